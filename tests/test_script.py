"""The script as a program: what it leaves, what it says, and how it ends."""

import errno
import io
import itertools
import math
import os
import pkgutil
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pytest
import torch
import torch.nn.functional as F
from conftest import MODEL, ROOT, TESTS, arguments_on_sample, assert_loads, files
from matplotlib import pyplot as plt
from matplotlib.image import imread

import pytorchpractice as script

GRID = "figures/test_images_pred_actual.png"
CURVES = ["figures/nnmodel_accuracy.png", "figures/nnmodel_loss.png"]
NUMBERS = r" +[\d.]+ +[\d.]+%" * 2 + r" +[\d.]+ +\d+"
ROW = re.compile(rf"^ +(?P<epoch>\d+){NUMBERS} *(?P<mark>.*)$", re.MULTILINE)  # of an epoch
NOTEBOOK = "module://matplotlib_inline.backend_inline"  # its backend, which isn't installed here
WRONG = "epochs=0 epochs=-1 epochs=1e3 images=0 images=251 batch-size=0 batch-size=1 seed=x"
SCORE = re.compile(r"test set, 200 images: loss (\S+), accuracy (\S+)%")


def start_script(folder, *arguments, **environment):
    """Start the script on the sample in a folder; return the process, its output in a pipe."""
    return subprocess.Popen(
        [sys.executable, TESTS / "run_on_sample.py", *arguments_on_sample(*arguments)],
        cwd=folder,
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def score_by_hand(path, test_set):
    """Return (loss, right or wrong) of the weights in a file, as one would compute it."""
    model = script.CIFARNet()
    model.load_state_dict(torch.load(path, weights_only=True))
    images, labels = script.as_tensors(test_set)
    with torch.no_grad():
        logits = model.eval()(images / 255)
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run the script once from an empty folder, output to a pipe; return (folder, output)."""
    folder = tmp_path_factory.mktemp("finished")
    bare = {"HOME": "/nonexistent", "DISPLAY": "", "MPLCONFIGDIR": "", "MPLBACKEND": NOTEBOOK}
    process = start_script(folder, "--epochs", 4, **bare)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return folder, output


def test_leaves_the_model_and_three_figures_and_nothing_else(finished):
    folder, _ = finished
    assert files(folder) == [*CURVES, GRID, MODEL]
    assert_loads(folder / MODEL)
    for name in [*CURVES, GRID]:
        assert imread(folder / name).std() > 0.05  # something is drawn


def test_says_what_it_runs_on_and_prints_one_plain_row_an_epoch_in_80_columns(finished):
    head, _, rest = finished[1].partition("data:")
    for words in (f"torch {torch.__version__}", "torchvision", "Python", "threads"):
        assert words in head
    assert re.search(r"^device \w+, training in (bfloat16|float32): .+", head, re.MULTILINE)
    assert [row["epoch"] for row in ROW.finditer(rest)] == ["1", "2", "3", "4"]
    assert not {"\r", "\033"} & set(rest)
    assert max(map(len, rest[rest.index("epoch ") :].splitlines())) <= 80


def test_reports_what_the_saved_file_scores_by_hand(finished, sample):
    folder, output = finished
    loss, hits = score_by_hand(folder / MODEL, sample[1])
    stated = SCORE.search(output)
    assert float(stated[1]) == pytest.approx(loss, abs=2e-4)
    assert stated[2] == f"{hits.mean():.2%}"[:-1]
    best = max(batch.mean().item() for batch in hits.split(50))
    assert f"best single batch of 50: {best:.2%}" in output
    labels = torch.tensor(sample[1].targets)
    for index, name in enumerate(sample[1].classes):
        assert f"{hits[labels == index].mean():6.1%}  {name}\n" in output


def test_evaluate_reports_the_same_and_redraws_the_grid_only(finished, run_here, monkeypatch):
    folder, output = finished
    before = {path: (folder / path).read_bytes() for path in files(folder)}
    monkeypatch.chdir(folder)
    code, second = run_here("--evaluate", "--images", 7, "--image-seed", 5)
    assert code == 0
    results = re.compile(r"test set.*?truck", re.DOTALL)
    assert results.search(second)[0] == results.search(output)[0]
    assert "scoring" in second
    assert "training" not in second
    assert [path for path in before if (folder / path).read_bytes() != before[path]] == [GRID]


def test_a_terminal_shows_how_long_it_will_still_take(run_here, monkeypatch):
    """A clock that runs by the pixels of each batch makes the estimates exact."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    now, epoch = [0.0], script.TrainingBatches.epoch
    monkeypatch.setattr(script, "SIZES", ((0.5, 24), (1.0, 32)))
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def timed(self, size):
        for batch in epoch(self, size):
            now[0] += 60 * (size / 24) ** 2
            yield batch

    monkeypatch.setattr(script.TrainingBatches, "epoch", timed)
    script.main(arguments_on_sample("--epochs", 2, "--seed", 1))
    pace, text = (32 / 24) ** 2, []
    for number, minutes, each in ((1, 9 + 9 * pace, 1), (2, 9 * pace, pace)):
        for batch in range(1, 10):
            left = math.ceil(round(minutes - batch * each, 6))
            text.append(f"epoch {number} of 2, batch {batch} of 9, about {left} min left")
    rows = [line.split("\r") for line in run_here.read().split("\n") if "\r" in line]
    assert [live.rstrip() for *lives, _ in rows for live in lives] == text
    for *lives, row in rows:
        assert ROW.match(row)["mark"] == "saved"
        assert max(map(len, lives)) <= len(row.partition("saved")[0])


def test_a_console_that_ignores_carriage_returns_stays_readable(run_here, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(script, "WIDTHS", (4, 4, 4))
    script.main(arguments_on_sample("--epochs", 1, "--batch-size", 3))
    assert 10 <= run_here.read().count("\r") <= 20  # of 160 batches


@pytest.mark.parametrize("options", [[], ["--show"]])
def test_show_shows_the_figures_in_windows(run_here, monkeypatch, options):
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.extend(plt.get_fignums()))
    code, output = run_here("--epochs", 1, *options)
    plt.close("all")
    assert code == 0, output
    assert len(shown) == (3 if options else 0)


def test_two_runs_in_one_folder_leave_the_whole_weights_of_one(tmp_path, sample):
    options = tmp_path, "--epochs", 1, "--seed"  # one thread each: more would wait for each other
    runs = [start_script(*options, seed, OMP_NUM_THREADS="1") for seed in range(2)]
    outputs = [run.communicate(timeout=240)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert files(tmp_path) == [*CURVES, GRID, MODEL]
    assert_loads(tmp_path / MODEL)
    loss, _ = score_by_hand(tmp_path / MODEL, sample[1])
    stated = [float(SCORE.search(output)[1]) for output in outputs]
    assert abs(stated[0] - stated[1]) > 1e-3  # each reports its own weights
    assert min(abs(loss - other) for other in stated) < 2e-4


@pytest.mark.parametrize("argument", f"{WRONG} image-seed=x device=tpu no-such-option=1".split())
def test_wrong_arguments_are_one_line_before_any_work(argument, in_folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytorchpractice.py"])
    with pytest.raises(SystemExit) as stop:
        script.main([f"--{argument}"])
    assert (stop.value.code, files(in_folder)) == (2, [])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith("pytorchpractice.py: error: ")


def test_the_largest_values_are_accepted():
    script.parse_arguments(f"--batch-size 48000 --images 250 --seed {2**63 - 1}".split(), ["cpu"])


def test_too_few_images_for_a_batch_are_told_with_what_to_do(run_here, in_folder):
    output = assert_fails_in_one_line(
        run_here("--batch-size", 481), "--batch-size is at most 480, the images to train on"
    )
    assert "epoch " not in output
    assert files(in_folder) == []


# Interruptions


@pytest.fixture
def earlier(in_folder):
    """Leave the checkpoint of an earlier run in the folder; return the file's content."""
    script.save(script.CIFARNet().state_dict(), in_folder / MODEL)
    return (in_folder / MODEL).read_bytes()


def at_calls(monkeypatch, name, numbers, action):
    """Let something else happen at these calls of a function, counted from 1."""
    function, count = pkgutil.resolve_name(name), itertools.count(1)

    def changed(*arguments, **options):
        chosen = action if next(count) in numbers else function
        return chosen(*arguments, **options)

    monkeypatch.setattr(name, changed)


def nothing(*_, **__):
    """Do none of what the function would have done."""


def half(path, content, write=Path.write_bytes):
    """Write half of a file."""
    write(path, content[: len(content) // 2])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    ("name", "call", "done", "left"),
    [
        ("torch.Tensor.backward", 5, nothing, [MODEL]),  # of nine batches an epoch
        ("torch.Tensor.backward", 15, nothing, [*CURVES, MODEL]),
        ("torch.linspace", 2, nothing, [*CURVES, MODEL]),  # the temperatures, in epoch 2
        ("pathlib.Path.write_bytes", 1, half, [*CURVES, MODEL]),
        ("os.replace", 1, nothing, [*CURVES, MODEL]),
        ("os.replace", 1, os.replace, [*CURVES, MODEL]),
        ("torch.nn.functional.pad", 2, nothing, [*CURVES, MODEL]),  # in eval mode, after training
        ("matplotlib.figure.Figure.savefig", 2, nothing, [*CURVES, GRID, MODEL]),
    ],
)
def test_stopped_it_keeps_and_draws_the_best_epoch_if_one_has_ended(
    run_here, in_folder, earlier, monkeypatch, number, code, name, call, done, left
):
    def stop(*arguments, **options):
        done(*arguments, **options)
        signal.raise_signal(number)

    at_calls(monkeypatch, name, [call], stop)
    stopped, output = run_here("--epochs", 3)
    assert stopped == code, output
    assert files(in_folder) == left
    assert_loads(in_folder / MODEL)
    assert ((in_folder / MODEL).read_bytes() == earlier) == (left == [MODEL])


# Faults


def assert_fails_in_one_line(run, start):
    """Assert that a run failed and ended with the one line that says why; return the output."""
    code, output = run
    assert code == 1
    assert output.splitlines()[-1].startswith(f"pytorchpractice: {start}")
    assert output.count("pytorchpractice: ") == 1
    return output


def no_room(path, content):
    half(path, content)
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_that_has_room_later_costs_nothing(run_here, in_folder, monkeypatch, sample):
    at_calls(monkeypatch, "pathlib.Path.write_bytes", [1], no_room)
    code, output = run_here("--epochs", 1)
    assert code == 0, output
    assert "No space left on device" in ROW.search(output)["mark"]
    loss, _ = score_by_hand(in_folder / MODEL, sample[1])
    assert float(SCORE.search(output)[1]) == pytest.approx(loss, abs=2e-4)
    assert files(in_folder) == [*CURVES, GRID, MODEL]


@pytest.mark.parametrize("first", [1, 2])
def test_disk_full_to_the_end_keeps_the_file(run_here, in_folder, earlier, monkeypatch, first):
    at_calls(monkeypatch, "pathlib.Path.write_bytes", range(first, 99), no_room)
    output = assert_fails_in_one_line(run_here("--epochs", 2), "[Errno 28] No space left on device")
    assert SCORE.search(output)  # from memory
    assert files(in_folder) == [MODEL]
    assert_loads(in_folder / MODEL)
    assert ((in_folder / MODEL).read_bytes() == earlier) == (first == 1)


def test_loss_that_is_not_finite_keeps_the_best_epoch(run_here, in_folder, monkeypatch):
    def diverge(loss, backward=torch.Tensor.backward):
        backward(loss * torch.inf)

    at_calls(monkeypatch, "torch.Tensor.backward", [15], diverge)  # of nine batches an epoch
    output = assert_fails_in_one_line(run_here("--epochs", 3), "the loss is not finite in epoch 2")
    assert [row["mark"] for row in ROW.finditer(output)] == ["saved"]
    assert_loads(in_folder / MODEL)
    assert files(in_folder) == [*CURVES, MODEL]


def test_a_folder_that_cannot_be_written_to_is_told_before_the_download(
    run_here, in_folder, earlier, monkeypatch
):
    def fail(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    at_calls(monkeypatch, "tempfile.TemporaryFile", range(1, 99), fail)
    output = assert_fails_in_one_line(run_here("--epochs", 1), f"[Errno {errno.EACCES}]")
    assert "data: trying" not in output
    assert (in_folder / MODEL).read_bytes() == earlier
    assert files(in_folder) == [MODEL]


def test_a_bug_in_a_run_that_was_saved_is_not_hidden_by_a_full_disk(run_here, monkeypatch):
    """Its traceback is what helps; the curves can't be drawn either."""

    def bug(*_, **__):
        at_calls(monkeypatch, "pathlib.Path.write_bytes", range(1, 99), no_room)
        raise ZeroDivisionError

    at_calls(monkeypatch, "torch.Tensor.backward", [15], bug)
    with pytest.raises(ZeroDivisionError):
        run_here("--epochs", 2)


def test_evaluate_without_a_model_says_so_and_leaves_nothing(run_here, in_folder):
    assert_fails_in_one_line(run_here("--evaluate"), f"there is no {MODEL} in this folder")
    assert list(in_folder.iterdir()) == []


@pytest.mark.parametrize(
    ("version", "old"),
    [("2.2.2", True), ("2.10.0+cu128", True), ("2.11.0a0+5228986c39.nv26.01", False)],
)
def test_an_old_torch_is_refused_by_its_name(run_here, monkeypatch, version, old):
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)(version))
    reason = f"needs torch 2.11 or newer, and this is {version}" if old else "there is no"
    assert_fails_in_one_line(run_here("--evaluate"), reason)


def test_a_model_of_other_classes_is_told(run_here, in_folder):
    script.save(script.CIFARNet(n_classes=3).state_dict(), in_folder / MODEL)
    assert_fails_in_one_line(run_here("--evaluate"), f"{MODEL} was trained on other classes")


# The user's own settings


def test_the_figures_are_the_same_whatever_the_users_style(run_here, in_folder):
    style = {"text.usetex": True, "figure.facecolor": "black", "font.family": ["no such font"]}
    pictures = []
    for rc in ({}, style):
        with matplotlib.rc_context(rc):
            before = dict(matplotlib.rcParams)
            code, output = run_here("--epochs", 1)
            assert dict(matplotlib.rcParams) == before
        assert code == 0, output
        pictures.append([(in_folder / name).read_bytes() for name in (*CURVES, GRID)])
    assert pictures[0] == pictures[1]


def test_show_without_a_window_system_is_told_before_the_download(run_here, monkeypatch):
    monkeypatch.setattr(plt, "get_backend", lambda: "agg")
    output = assert_fails_in_one_line(run_here("--show"), "--show finds no window system")
    assert "data: trying" not in output


def test_without_an_output_it_trains_in_silence(tmp_path):
    command = ["sh", "-c", '"$0" "$@" >&-', sys.executable, TESTS / "run_on_sample.py"]
    command += arguments_on_sample("--epochs", 1)
    assert subprocess.check_output(command, cwd=tmp_path, stderr=subprocess.STDOUT) == b""
    assert files(tmp_path) == [*CURVES, GRID, MODEL]


def test_an_encoding_that_lacks_a_character_costs_nothing(monkeypatch, tmp_path):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    shutil.copytree(TESTS / "data", tmp_path / "数据")
    for folder in (tmp_path / "数据", "\udcff"):  # the latter is no file name in any encoding
        script.say(f"data: trying {folder}")
    assert output.buffer.getvalue().splitlines() == [
        f"data: trying {tmp_path}/\\u6570\\u636e".encode(),
        b"data: trying \\udcff",
    ]


def test_a_tilde_is_the_home_folder(run_here, tmp_path, monkeypatch):
    shutil.copytree(TESTS / "data", tmp_path / "datasets")
    monkeypatch.setenv("HOME", str(tmp_path))
    code, output = run_here("--epochs", 1, "--data=~/datasets")
    assert code == 0, output
    assert f"data: trying the files in {tmp_path}/datasets" in output


def test_stopped_with_the_reader_of_its_output_it_draws_the_curves(tmp_path):
    """As in `python pytorchpractice.py | tee log`: Ctrl-C stops tee first."""
    run = start_script(tmp_path, "--epochs", 500, OMP_NUM_THREADS="1")
    while not ROW.match(run.stdout.readline()):
        assert run.poll() is None
    run.stdout.close()
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=60) == 130
    assert files(tmp_path) == [*CURVES, MODEL]


# Imported, or run in a notebook


def handlers():
    return {number: signal.getsignal(number) for number in signal.valid_signals()}


def test_importing_the_script_does_nothing(in_folder, capsys):
    before = handlers()
    runpy.run_path(str(ROOT / "pytorchpractice.py"), run_name="pytorchpractice")
    assert handlers() == before
    assert matplotlib.get_backend() == "svg"  # as conftest.py chose
    assert "".join(capsys.readouterr()) == ""
    assert files(in_folder) == []


@pytest.mark.parametrize(
    ("first", "variable", "backend"),
    [
        ("", "svg", "svg"),
        ("import matplotlib; matplotlib.use('pdf')", "svg", "pdf"),
        ("", NOTEBOOK, "agg"),
    ],
)
def test_importing_the_script_leaves_matplotlibs_backend_to_the_user(first, variable, backend):
    code = f"{first}\nimport pytorchpractice\nimport matplotlib\nprint(matplotlib.get_backend())"
    env = {**os.environ, "MPLBACKEND": variable, "DISPLAY": ""}
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=env, text=True)
    assert printed.strip() == backend


def test_in_a_notebook_it_works_and_changes_nothing_there(run_here, in_folder, monkeypatch):
    """A notebook's sys.stdout can write, and little else; its sys.argv is the kernel's."""
    handlers_before, style, written = handlers(), dict(matplotlib.rcParams), []
    notebook = SimpleNamespace(write=written.append, flush=nothing, isatty=lambda: False)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    monkeypatch.setattr(script, "EPOCHS", 1)
    monkeypatch.setattr(script, "BATCH_SIZE", 50)
    shutil.copytree(TESTS / "data", in_folder / "data")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", notebook)
        script.main()
    assert SCORE.search("".join(written))
    code, output = run_here("--evaluate")  # as %run does
    assert code == 0, output
    assert handlers() == handlers_before
    assert dict(matplotlib.rcParams) == style
    assert matplotlib.get_backend() == "svg"  # as conftest.py chose
    assert socket.getdefaulttimeout() is None


# Changed, as the README says


class Brighter(script.TrainingBatches):
    def epoch(self, size):
        for images, labels in super().epoch(size):
            yield images * (0.8 + 0.4 * torch.rand(len(images), 1, 1, 1)), labels


def adam(model, batch_size, steps, dtype):
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)]


def hundred_classes(root, load_cifar10=script.load_cifar10):
    train_set, test_set = load_cifar10(root)
    for dataset in (train_set, test_set):
        dataset.classes = [f"class {i}" for i in range(100)]
        dataset.targets = [(10 * label + i) % 100 for i, label in enumerate(dataset.targets)]
    return train_set, test_set


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WIDTHS", (96, 256, 384)),
        ("TrainingBatches", Brighter),
        ("make_optimizers", adam),
        ("load_cifar10", hundred_classes),
    ],
)
def test_a_change_has_one_place(run_here, in_folder, monkeypatch, name, value):
    monkeypatch.setattr(script, name, value)
    script.main(arguments_on_sample("--epochs", 1))
    trained = run_here.read()
    assert files(in_folder) == [*CURVES, GRID, MODEL]
    script.main(arguments_on_sample("--evaluate"))
    evaluated = run_here.read()
    assert SCORE.search(evaluated)[0] == SCORE.search(trained)[0]
    rows = re.findall(r"^ +[\d.]+%  \w.*$", evaluated, re.MULTILINE)
    assert len(rows) == len(set(script.load_cifar10(TESTS / "data")[1].targets))
