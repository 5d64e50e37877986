"""The script as a program: what it leaves, what it says, and how it ends."""

import errno
import itertools
import math
import os
import pkgutil
import re
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
from conftest import MODEL, ROOT, TESTS, arguments_on_sample, assert_loads, files, random_model
from matplotlib import pyplot as plt
from matplotlib.image import imread

import pytorchpractice as script

GRID = "figures/test_images_pred_actual.png"
CURVES = ["figures/nnmodel_accuracy.png", "figures/nnmodel_loss.png"]
NUMBERS = r" +[\d.]+ +[\d.]+%" * 2 + r" +[\d.]+ +\d+"
ROW = re.compile(rf"^ +(?P<epoch>\d+){NUMBERS} *(?P<mark>.*)$", re.MULTILINE)  # of an epoch
SCORE = re.compile(r"test set, 200 images: loss (\S+), accuracy (\S+)%")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run the script once from an empty folder, output to a pipe; return (folder, output)."""
    folder = tmp_path_factory.mktemp("finished")
    command = [sys.executable, TESTS / "run_on_sample.py", *arguments_on_sample("--epochs", 2)]
    env = {**os.environ, "HOME": "/nonexistent", "DISPLAY": "", "MPLBACKEND": ""}
    return folder, subprocess.check_output(command, cwd=folder, env=env, text=True)


def test_leaves_the_model_and_three_figures_and_nothing_else(finished):
    folder, _ = finished
    assert files(folder) == [*CURVES, GRID, MODEL]
    assert_loads(folder / MODEL)
    assert all(imread(folder / name).std() > 0.05 for name in [*CURVES, GRID])  # drawn on


def test_says_what_it_runs_on_and_prints_one_plain_row_an_epoch_in_80_columns(finished):
    head, _, rest = finished[1].partition("data:")
    for words in (f"torch {torch.__version__}", "torchvision", "Python", "threads", "GPU"):
        assert words in head
    assert re.search(r"^device \w+, training in (bfloat16|float16|float32): .+", head, re.MULTILINE)
    assert [row["epoch"] for row in ROW.finditer(rest)] == ["1", "2"]
    assert not {"\r", "\033"} & set(rest)
    assert max(map(len, rest[rest.index("epoch ") :].splitlines())) <= 80


def test_reports_what_the_saved_file_scores_by_hand(finished, sample):
    folder, output = finished
    model = script.CIFARNet()
    model.load_state_dict(torch.load(folder / MODEL, weights_only=True))
    images, labels = script.as_tensors(sample[1])
    with torch.no_grad():
        logits = model.eval()(images / 255)
    hits = (logits.argmax(1) == labels).float()
    stated = SCORE.search(output)
    assert float(stated[1]) == pytest.approx(F.cross_entropy(logits, labels).item(), abs=2e-4)
    assert stated[2] == f"{hits.mean():.2%}"[:-1]
    best = max(batch.mean().item() for batch in hits.split(50))
    assert f"best single batch of 50: {best:.2%}" in output
    for i, name in enumerate(sample[1].classes):
        assert f"{hits[labels == i].mean():6.1%}  {name}\n" in output


def test_evaluate_reports_the_same_and_redraws_the_grid_only(
    finished, expect_sample, monkeypatch, capsys
):
    folder, output = finished
    before = {path: (folder / path).read_bytes() for path in files(folder)}
    monkeypatch.chdir(folder)
    script.main(arguments_on_sample("--evaluate", "--images", 7, "--image-seed", 5))
    second = capsys.readouterr().out
    results = re.compile(r"test set.*?truck", re.DOTALL)
    assert results.search(second)[0] == results.search(output)[0]
    assert [path for path in before if (folder / path).read_bytes() != before[path]] == [GRID]


def test_a_terminal_shows_how_long_it_will_still_take(run_main, monkeypatch):
    """A clock that runs by the pixels of each batch makes the estimate exact."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    now, epoch = [0.0], script.TrainingBatches.epoch
    monkeypatch.setattr(script, "SIZES", ((0.5, 24), (1.0, 32)))
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def timed(self, size):
        for batch in epoch(self, size):
            now[0] += 61 * (size / 24) ** 2
            yield batch

    monkeypatch.setattr(script.TrainingBatches, "epoch", timed)
    stated = re.findall(r"about (\d+) min left +\r", run_main("--epochs", 4))
    small, large = 9 * 61 / 60, 9 * 61 / 60 * (32 / 24) ** 2  # minutes for nine batches
    left = [small + 2 * large, 2 * large, large]
    assert [int(minutes) for minutes in stated] == [math.ceil(minutes) for minutes in left]


@pytest.mark.parametrize("options", [[], ["--show"]])
def test_show_shows_the_figures_in_windows(run_main, monkeypatch, options):
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.extend(plt.get_fignums()))
    run_main("--epochs", 1, *options)
    assert len(plt.get_fignums()) == len(shown) == (3 if options else 0)
    plt.close("all")


def test_a_run_reports_its_own_weights_whoever_saves_in_the_folder_meanwhile(run_main, monkeypatch):
    alone = SCORE.search(run_main("--epochs", 1))[0]
    save = script.save

    def save_and_be_overtaken(model, path):
        save(model, path)
        save(random_model(), path)

    monkeypatch.setattr(script, "save", save_and_be_overtaken)
    assert SCORE.search(run_main("--epochs", 1))[0] == alone


WRONG = f"""images=251 batch-size=48001 seed={2**64} image-seed={2**64} epochs=0 epochs=1e3 images=0
batch-size=1 seed=-1 seed=x device=tpu no-such-option=1""".split()


@pytest.mark.parametrize("argument", WRONG)
def test_wrong_arguments_are_one_line_before_any_work(argument, in_folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytorchpractice.py"])
    with pytest.raises(SystemExit) as stop:
        script.main([f"--{argument}"])
    assert (stop.value.code, files(in_folder)) == (2, [])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith("pytorchpractice.py: error: ")


def test_the_largest_values_are_accepted_and_a_tilde_is_the_home_folder():
    arguments = f"--batch-size 48000 --images 250 --seed {2**64 - 1} --data=~/data".split()
    args = script.parse_arguments(arguments, ["cpu"], "")
    torch.manual_seed(args.seed)
    assert args.data == str(Path.home() / "data")


@pytest.fixture
def earlier(in_folder):
    """Leave the checkpoint of an earlier run in the folder; return the file's content."""
    script.save(random_model(), in_folder / MODEL)
    return (in_folder / MODEL).read_bytes()


def at_call(monkeypatch, name, number, action):
    """Let something else happen at this call of a function, counted from 1."""
    function, count = pkgutil.resolve_name(name), itertools.count(1)

    def changed(*arguments, **options):
        chosen = action if next(count) == number else function
        return chosen(*arguments, **options)

    monkeypatch.setattr(name, changed)


def half(path, content, write=Path.write_bytes):
    """Write half of a file."""
    write(path, content[: len(content) // 2])


@pytest.mark.parametrize(
    ("name", "call", "left"),
    [
        ("torch.Tensor.backward", 5, [MODEL]),  # of nine batches an epoch
        ("torch.Tensor.backward", 15, [*CURVES, MODEL]),
        ("pathlib.Path.write_bytes", 2, [*CURVES, MODEL]),  # the model of epoch 2
        ("matplotlib.figure.Figure.savefig", 3, [*CURVES, MODEL]),  # the grid, after training
    ],
)
def test_ctrl_c_keeps_the_best_epoch_and_draws_those_that_have_ended(
    run_program, in_folder, earlier, monkeypatch, name, call, left
):
    def stop(*arguments, **_):
        if name.endswith("write_bytes"):
            half(*arguments)
        signal.raise_signal(signal.SIGINT)

    at_call(monkeypatch, name, call, stop)
    code, output = run_program("--epochs", 2)
    assert code == 130, output
    assert "Traceback" not in output
    assert files(in_folder) == left
    assert_loads(in_folder / MODEL)
    assert ((in_folder / MODEL).read_bytes() == earlier) == (left == [MODEL])


def assert_fails_in_one_line(run, start):
    """Assert that a run failed and ended with the one line that says why; return the output."""
    code, output = run
    assert code == 1
    assert output.splitlines()[-1].startswith(f"pytorchpractice: {start}")
    assert output.count("pytorchpractice: ") == 1
    return output


def test_a_full_disk_ends_it_in_one_line_and_leaves_the_old_model(
    run_program, in_folder, earlier, monkeypatch
):
    def no_room(path, content):
        half(path, content)
        raise OSError(errno.ENOSPC, "No space left on device")

    at_call(monkeypatch, "pathlib.Path.write_bytes", 1, no_room)
    assert_fails_in_one_line(run_program("--epochs", 1), "[Errno 28] No space left on device")
    assert (in_folder / MODEL).read_bytes() == earlier
    assert files(in_folder) == [MODEL]


def test_a_loss_that_is_not_finite_ends_it_in_one_line(run_program, in_folder, monkeypatch):
    def diverge(loss, backward=torch.Tensor.backward):
        backward(loss * torch.inf)

    at_call(monkeypatch, "torch.Tensor.backward", 15, diverge)  # of nine batches an epoch
    out = assert_fails_in_one_line(run_program("--epochs", 3), "the loss is not finite in epoch 2")
    assert [row["mark"] for row in ROW.finditer(out)] == ["saved"]
    assert_loads(in_folder / MODEL)
    assert files(in_folder) == [*CURVES, MODEL]


def test_evaluate_without_a_model_says_so_and_leaves_nothing(run_program, in_folder):
    assert_fails_in_one_line(run_program("--evaluate"), f"no model in {MODEL}, so train one first")
    assert list(in_folder.iterdir()) == []


def test_an_old_torch_is_refused_by_its_name(run_program, monkeypatch):
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.9.1+cu128"))
    reason = "needs torch 2.11 or newer, and this is 2.9.1+cu128"
    assert_fails_in_one_line(run_program("--evaluate"), reason)


def test_importing_the_script_only_defines(tmp_path):
    code = "import matplotlib; matplotlib.use('pdf'); import pytorchpractice, socket;"
    code += "print(matplotlib.get_backend(), socket.getdefaulttimeout())"
    env = {**os.environ, "MPLBACKEND": "svg", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, cwd=tmp_path, env=env, text=True) == "pdf None\n"
    assert files(tmp_path) == []


def test_in_a_notebook_it_works_and_changes_nothing_there(run_program, in_folder, monkeypatch):
    """A notebook's sys.stdout can write, and little else; its sys.argv is the kernel's."""
    style, written = dict(matplotlib.rcParams), []
    notebook = SimpleNamespace(write=written.append, flush=lambda: None, isatty=lambda: False)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    monkeypatch.setattr(script, "EPOCHS", 1)
    monkeypatch.setattr(script, "BATCH_SIZE", 50)
    shutil.copytree(TESTS / "data", in_folder / "data")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", notebook)
        script.main()
    assert SCORE.search("".join(written))
    assert run_program("--evaluate")[0] == 0  # as %run does
    assert dict(matplotlib.rcParams) == style
    assert matplotlib.get_backend() == "svg"  # as conftest.py chose
    assert socket.getdefaulttimeout() is None


def hundred_classes(root, load_cifar10=script.load_cifar10):
    train_set, test_set = load_cifar10(root)
    for dataset in (train_set, test_set):
        dataset.classes = [f"class {i}" for i in range(100)]
        dataset.targets = [(10 * label + i) % 100 for i, label in enumerate(dataset.targets)]
    return train_set, test_set


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WIDTHS", (16, 48, 24)),
        ("load_cifar10", hundred_classes),
    ],
)
def test_a_change_has_one_place(run_main, in_folder, monkeypatch, name, value):
    monkeypatch.setattr(script, name, value)
    trained = run_main("--epochs", 1)
    assert files(in_folder) == [*CURVES, GRID, MODEL]
    evaluated = run_main("--evaluate")
    assert SCORE.search(evaluated)[0] == SCORE.search(trained)[0]
    rows = re.findall(r"^ +[\d.]+%  \w.*$", evaluated, re.MULTILINE)
    assert len(rows) == len(set(script.load_cifar10(TESTS / "data")[1].targets))
