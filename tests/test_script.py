"""The script as a program: what it leaves, what it says, and how it ends."""

import errno
import itertools
import os
import pkgutil
import re
import runpy
import signal
import subprocess
import sys
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
ROW = re.compile(  # of the table of epochs
    r"^ +(?P<epoch>\d+) +[\d.]+ +[\d.]+% +[\d.]+ +[\d.]+% +[\d.]+ *(?P<mark>.*)$", re.MULTILINE
)
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
    environment = {"HOME": "/nonexistent", "DISPLAY": "", "MPLCONFIGDIR": ""}
    process = start_script(folder, "--epochs", 4, **environment)
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
    assert f"best batch of 50: {best:.2%}" in output
    labels = torch.tensor(sample[1].targets)
    for index, name in enumerate(sample[1].classes):
        assert re.search(rf"{name} +{hits[labels == index].mean():.1%}", output)


def test_evaluate_reports_the_same_and_redraws_the_grid_only(finished, run_here, monkeypatch):
    folder, output = finished
    before = {path: (folder / path).read_bytes() for path in files(folder)}
    monkeypatch.chdir(folder)
    code, second = run_here("--evaluate", "--images", 7, "--image-seed", 5)
    assert code == 0
    results = re.compile(r"test set.*?truck +\S+", re.DOTALL)
    assert results.search(second)[0] == results.search(output)[0]
    assert "scoring" in second
    assert "training" not in second
    assert [path for path in before if (folder / path).read_bytes() != before[path]] == [GRID]


def test_shows_a_live_line_on_a_terminal_which_the_row_covers(run_here, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _, output = run_here("--epochs", 1)
    *live, row = next(line for line in output.split("\n") if "\r" in line).split("\r")
    assert [text.split() for text in live if text] == [
        ["1", "batch", f"{batch}", "of", "10"] for batch in range(1, 11)
    ]
    assert ROW.match(row)["mark"] == "saved"
    assert len(row) >= max(map(len, live))


@pytest.mark.parametrize("options", [[], ["--show"]])
def test_show_shows_the_figures_in_windows(run_here, monkeypatch, options):
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.extend(plt.get_fignums()))
    code, output = run_here("--epochs", 1, *options)
    plt.close("all")
    assert code == 0, output
    assert len(shown) == (3 if options else 0)


def test_two_runs_in_one_folder_leave_the_whole_weights_of_one(tmp_path, sample):
    one_core = {"OMP_NUM_THREADS": "1"}  # more threads than cores wait for each other
    runs = [start_script(tmp_path, "--epochs", 1, "--seed", i, **one_core) for i in range(2)]
    outputs = [run.communicate(timeout=240)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert files(tmp_path) == [*CURVES, GRID, MODEL]
    assert_loads(tmp_path / MODEL)
    loss, _ = score_by_hand(tmp_path / MODEL, sample[1])
    stated = [float(SCORE.search(output)[1]) for output in outputs]
    assert abs(stated[0] - stated[1]) > 1e-3  # each reports its own weights
    assert min(abs(loss - other) for other in stated) < 2e-4


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--epochs", ["0", "-1", "1e3"]),
        ("--images", ["0", "251"]),
        ("--batch-size", ["0", "45001"]),
        ("--seed", ["x", "-1", str(2**63)]),
        ("--image-seed", ["x", "-1", str(2**63)]),
        ("--device", ["tpu"]),
        ("--no-such-option", ["1"]),
    ],
)
def test_wrong_arguments_are_one_line_before_any_work(option, values, in_folder, capsys):
    for value in values:
        with pytest.raises(SystemExit) as stop:
            script.main([option, value])
        assert stop.value.code == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.splitlines()[-1].startswith("pytorchpractice.py: error: ")
        assert files(in_folder) == []


def test_the_largest_values_are_accepted():
    script.parse_arguments(f"--batch-size 45000 --images 250 --seed {2**63 - 1}".split())


# Interruptions


@pytest.fixture
def earlier(in_folder):
    """Leave the checkpoint of an earlier run in the folder; return the file's content."""
    script.save(script.CIFARNet().state_dict(), in_folder / MODEL)
    return (in_folder / MODEL).read_bytes()


def at_calls(monkeypatch, name, numbers, action):
    """Let something else happen at these calls of a function, counted from 1."""
    function, count = pkgutil.resolve_name(name), itertools.count(1)

    def changed(*arguments):
        chosen = action if next(count) in numbers else function
        return chosen(*arguments)

    monkeypatch.setattr(name, changed)


def nothing(*_):
    """Do none of what the function would have done."""


def half(path, content, write=Path.write_bytes):
    """Write half of a file."""
    write(path, content[: len(content) // 2])


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"]
)
@pytest.mark.parametrize(
    ("name", "call", "done", "left"),
    [
        ("torch.Tensor.backward", 5, nothing, [MODEL]),  # of ten batches an epoch
        ("torch.Tensor.backward", 15, nothing, [*CURVES, MODEL]),
        ("pathlib.Path.write_bytes", 1, half, [*CURVES, MODEL]),
        ("os.replace", 1, nothing, [*CURVES, MODEL]),
        ("os.replace", 1, os.replace, [*CURVES, MODEL]),
    ],
    ids=["first epoch", "second epoch", "amid writing", "before replacing", "after replacing"],
)
def test_stopped_it_keeps_and_draws_the_best_epoch_if_one_has_ended(
    run_here, in_folder, earlier, monkeypatch, number, code, name, call, done, left
):
    def stop(*arguments):
        done(*arguments)
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

    at_calls(monkeypatch, "torch.Tensor.backward", [15], diverge)  # of ten batches an epoch
    output = assert_fails_in_one_line(run_here("--epochs", 3), "the loss is not finite in epoch 2")
    assert [row["mark"] for row in ROW.finditer(output)] == ["saved"]
    assert_loads(in_folder / MODEL)
    assert files(in_folder) == [*CURVES, MODEL]


def test_no_checkpoint_to_evaluate_and_an_old_torch_are_one_line(run_here, monkeypatch):
    assert_fails_in_one_line(run_here("--evaluate"), MODEL)
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.2.2"))
    assert_fails_in_one_line(run_here("--epochs", 1), "needs torch 2.9")


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


def test_in_a_notebook_it_works_and_changes_nothing_there(run_here, monkeypatch):
    """A notebook's sys.stdout can write, and little else."""
    handlers_before, written = handlers(), []
    notebook = SimpleNamespace(write=written.append, flush=nothing, isatty=lambda: False)
    monkeypatch.setattr(sys, "stdout", notebook)
    assert script.main(arguments_on_sample("--epochs", 1)) == 0
    assert SCORE.search("".join(written))
    code, output = run_here("--evaluate")  # as %run does
    assert code == 0, output
    assert handlers() == handlers_before
    assert matplotlib.get_backend() == "svg"  # as conftest.py chose
