"""The script as a program: what it leaves, what it says, and how it ends."""

import contextlib
import errno
import itertools
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
import torch
from conftest import (
    MODEL,
    ROOT,
    arguments_on_sample,
    assert_loads,
    half_written,
    random_model,
    run_script,
    start_script,
)
from matplotlib import pyplot as plt
from matplotlib.image import imread

import pytorchpractice as script

GRID = "test_images_pred_actual.png"
CURVES = ["nnmodel_accuracy.png", "nnmodel_loss.png"]
ROW = re.compile(
    r"^ +(?P<epoch>\d+) +\d+\.\d+ +[\d.]+% +(?P<validation>\d+\.\d+) +[\d.]+% +[\d.]+ *(?P<mark>.*)$",
    re.MULTILINE,
)
SCORE = re.compile(r"test set, 200 images: loss (\S+), accuracy (\S+)%")


def figures(folder):
    return sorted(path.name for path in (folder / "figures").iterdir())


def score_by_hand(path, test_set):
    """Return (loss, accuracy, right or wrong) of the weights in a file, as one would compute it."""
    model = script.CIFARNet()
    model.load_state_dict(torch.load(path, weights_only=True))
    images, labels = script.as_tensors(test_set)
    with torch.no_grad():
        logits = model.eval()(images / 255)
    hits = (logits.argmax(1) == labels).float()
    return torch.nn.functional.cross_entropy(logits, labels).item(), hits.mean().item(), hits


# The whole job


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run the script once from an empty folder, output to a pipe; return (folder, output)."""
    folder = tmp_path_factory.mktemp("finished")
    environment = {"HOME": "/nonexistent", "DISPLAY": "", "MPLCONFIGDIR": ""}
    code, output = run_script(folder, "--epochs", 4, env=environment)
    assert code == 0, output
    return folder, output


def test_leaves_the_model_and_three_figures_and_nothing_else(finished):
    folder, _ = finished
    left = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert left == sorted([MODEL, *(f"figures/{name}" for name in [*CURVES, GRID])])
    assert_loads(folder / MODEL)
    for name in [*CURVES, GRID]:
        picture = imread(folder / "figures" / name)
        assert picture.shape[1] >= 1000
        assert picture.std() > 0.05  # something is drawn


def test_says_first_what_it_runs_on(finished):
    head = finished[1].partition("data:")[0]
    for words in (f"torch {torch.__version__}", "torchvision", "Python", "threads"):
        assert words in head
    assert re.search(r"^device \w+, training in (bfloat16|float32): .+", head, re.MULTILINE)


def test_prints_one_plain_row_an_epoch_and_fits_80_columns(finished):
    _, output = finished
    assert [row["epoch"] for row in ROW.finditer(output)] == ["1", "2", "3", "4"]
    assert "\r" not in output
    assert "\033" not in output
    assert max(map(len, output[output.index("epoch ") :].splitlines())) <= 80


def test_reports_what_the_saved_file_scores_by_hand(finished, sample):
    folder, output = finished
    loss, accuracy, hits = score_by_hand(folder / MODEL, sample[1])
    stated = SCORE.search(output)
    assert float(stated[1]) == pytest.approx(loss, abs=2e-4)
    assert stated[2] == f"{accuracy:.2%}"[:-1]
    best = max(batch.mean().item() for batch in hits.split(50))
    assert f"best batch of 50: {best:.2%}" in output
    labels = torch.tensor(sample[1].targets)
    for index, name in enumerate(sample[1].classes):
        assert re.search(rf"{name} +{hits[labels == index].mean():.1%}", output)


def test_evaluate_reports_the_same_and_redraws_the_grid_only(finished, run_here, monkeypatch):
    folder, output = finished
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.chdir(folder)
    code, second = run_here("--evaluate", "--images", 7, "--image-seed", 5)
    assert code == 0
    results = re.compile(r"test set.*?truck +\S+", re.DOTALL)
    assert results.search(second)[0] == results.search(output)[0]
    assert "scoring" in second
    assert "training" not in second
    changed = [path.name for path in before if path.read_bytes() != before[path]]
    assert changed == [GRID]


def test_shows_a_live_line_on_a_terminal(tmp_path):
    terminal, end = pty.openpty()
    process = start_script(tmp_path, "--epochs", 1, stdout=end)
    os.close(end)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal says that its other end is closed
        while chunk := os.read(terminal, 4096):
            shown += chunk
    os.close(terminal)
    assert process.wait(timeout=60) == 0
    written = shown.decode().replace("\r\n", "\n")
    for batch in (1, 10):
        assert re.search(rf"\r +1 +batch {batch} of 10", written)
    lines = []
    for line in written.split("\n"):  # what a terminal leaves of each line to be seen
        seen = ""
        for part in line.split("\r"):
            seen = part + seen[len(part) :]
        lines.append(seen)
    assert [row["mark"].strip() for row in ROW.finditer("\n".join(lines))] == ["saved"]


@pytest.mark.parametrize("options", [[], ["--show"]])
def test_show_shows_the_figures_in_windows(run_here, monkeypatch, options):
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.extend(plt.get_fignums()))
    code, output = run_here("--epochs", 1, *options)
    assert code == 0, output
    assert len(shown) == (3 if options else 0)


def test_two_runs_in_one_folder_leave_the_whole_weights_of_one(tmp_path, sample):
    one_core = {"OMP_NUM_THREADS": "1"}  # more threads than cores wait for each other
    runs = [start_script(tmp_path, "--epochs", 1, "--seed", i, env=one_core) for i in range(2)]
    outputs = [run.communicate(timeout=240)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert_loads(tmp_path / MODEL)
    loss, _, _ = score_by_hand(tmp_path / MODEL, sample[1])
    stated = [float(SCORE.search(output)[1]) for output in outputs]
    assert abs(stated[0] - stated[1]) > 1e-3
    assert min(abs(loss - other) for other in stated) < 2e-4
    assert not half_written(tmp_path)


# The command line


@pytest.mark.parametrize(
    "arguments",
    [
        "--epochs 0",
        "--epochs -1",
        "--epochs 1e3",
        "--images 0",
        "--images 251",
        "--batch-size 0",
        "--batch-size 45001",
        "--seed x",
        "--seed -1",
        f"--seed {2**64}",
        "--image-seed -1",
        f"--image-seed {2**64}",
        "--device tpu",
        "--no-such-option",
    ],
)
def test_wrong_arguments_are_one_line_before_any_work(arguments, in_folder, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(arguments.split())
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith("pytorchpractice.py: error: ")
    assert list(in_folder.iterdir()) == []


@pytest.mark.parametrize("arguments", ["--batch-size 16", "--images 250", f"--seed {2**63 - 1}"])
def test_right_arguments_are_accepted(arguments):
    script.parse_arguments(arguments.split())


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        script.parse_arguments(["--help"])
    assert stop.value.code == 0
    message = capsys.readouterr().out
    for option in vars(script.parse_arguments([])[0]):
        line = rf"--{option.replace('_', '-')} .*\w"
        assert re.search(line, message)


# Interruptions


def interrupt(monkeypatch, number, owner, name, *, call=1, when="before"):
    """Send this process a signal around a call of a function; `call` counts them from 1."""
    function, calls = getattr(owner, name), itertools.count(1)

    def interrupted(*arguments, **options):
        if next(calls) != call:
            return function(*arguments, **options)
        if when == "amid":  # in the middle of a file
            path, content = arguments
            function(path, content[: len(content) // 2])
        if when == "after":
            function(*arguments, **options)
        os.kill(os.getpid(), number)
        raise AssertionError("the signal did nothing")

    monkeypatch.setattr(owner, name, interrupted)


STOPS = pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"]
)


@STOPS
def test_stopped_in_the_first_epoch_it_leaves_an_earlier_file_alone(
    run_here, in_folder, monkeypatch, number, code
):
    script.save(random_model().state_dict(), in_folder / MODEL)
    before = (in_folder / MODEL).read_bytes()
    interrupt(monkeypatch, number, torch.Tensor, "backward", call=5)
    stopped, output = run_here("--epochs", 3)
    assert stopped == code, output
    assert (in_folder / MODEL).read_bytes() == before
    assert figures(in_folder) == []


@STOPS
@pytest.mark.parametrize(
    "moment",
    [
        (torch.Tensor, "backward", 15, "before"),  # of ten batches an epoch
        (Path, "write_bytes", 1, "before"),
        (Path, "write_bytes", 1, "amid"),
        (os, "replace", 1, "before"),
        (os, "replace", 1, "after"),
    ],
    ids=lambda moment: f"{moment[3]} {moment[1]}",
)
def test_stopped_after_an_epoch_or_while_saving_it_keeps_and_draws_the_best(
    run_here, in_folder, monkeypatch, number, code, moment
):
    script.save(random_model().state_dict(), in_folder / MODEL)
    before = (in_folder / MODEL).read_bytes()
    owner, name, call, when = moment
    interrupt(monkeypatch, number, owner, name, call=call, when=when)
    stopped, output = run_here("--epochs", 3)
    assert stopped == code, output
    assert (in_folder / MODEL).read_bytes() != before  # the first epoch's weights
    assert_loads(in_folder / MODEL)
    assert figures(in_folder) == CURVES
    assert not half_written(in_folder)


@STOPS
def test_stopped_from_outside_it_ends_without_a_traceback(tmp_path, number, code):
    process = start_script(tmp_path, "--epochs", 200)
    for line in process.stdout:
        if ROW.match(line):
            break
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert "Traceback" not in output
    assert_loads(tmp_path / MODEL)
    assert figures(tmp_path) == CURVES


# Faults


def assert_one_line(output, start):
    """Assert that the output ends with the one line that says what went wrong."""
    assert output.splitlines()[-1].startswith(f"pytorchpractice: {start}")
    assert output.count("pytorchpractice: ") == 1
    assert "Traceback" not in output


@pytest.fixture
def fill_disk(monkeypatch):
    """Return a function that lets there be no room for the saves with these numbers, from 1."""
    write, calls = Path.write_bytes, itertools.count(1)

    def fill(numbers, watch=lambda: None):
        def write_half(path, content):
            if next(calls) not in numbers:
                return write(path, content)
            watch()
            write(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", write_half)

    return fill


def test_full_disk_costs_no_training_if_there_is_room_at_the_end(
    run_here, in_folder, fill_disk, sample
):
    fill_disk([1])
    code, output = run_here("--epochs", 1)
    assert code == 0, output
    assert "No space left on device" in ROW.search(output)["mark"]
    loss, _, _ = score_by_hand(in_folder / MODEL, sample[1])
    assert float(SCORE.search(output)[1]) == pytest.approx(loss, abs=2e-4)
    assert not half_written(in_folder)


@pytest.mark.parametrize("first", [1, 2])
def test_disk_full_to_the_end_leaves_the_file_as_it_was(run_here, in_folder, fill_disk, first):
    script.save(random_model().state_dict(), in_folder / MODEL)
    contents = []
    fill_disk(range(first, 99), lambda: contents.append((in_folder / MODEL).read_bytes()))
    code, output = run_here("--epochs", 2)
    assert code == 1
    assert_one_line(output, "[Errno 28] No space left on device")
    assert SCORE.search(output)  # from memory
    assert len(contents) >= 2
    assert set(contents) == {(in_folder / MODEL).read_bytes()}
    assert not half_written(in_folder)


def test_loss_that_is_not_finite_ends_in_one_line_with_the_best_epoch_kept(
    run_here, in_folder, monkeypatch
):
    backward, calls = torch.Tensor.backward, itertools.count(1)

    def diverge(loss):
        backward(loss * torch.inf if next(calls) == 15 else loss)  # of ten batches an epoch

    monkeypatch.setattr(torch.Tensor, "backward", diverge)
    code, output = run_here("--epochs", 3)
    assert code == 1
    assert_one_line(output, "the loss is not finite in epoch 2")
    assert [row["mark"] for row in ROW.finditer(output)] == ["saved"]
    assert_loads(in_folder / MODEL)
    assert figures(in_folder) == CURVES


def test_no_checkpoint_to_evaluate_is_one_line(run_here):
    code, output = run_here("--evaluate")
    assert code == 1
    assert_one_line(output, MODEL)


def test_torch_that_is_too_old_is_one_line(run_here, monkeypatch):
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.2.2"))
    code, output = run_here("--epochs", 1)
    assert code == 1
    assert_one_line(output, "needs torch 2.9")


# Imported, or run in a notebook


def test_importing_the_script_does_nothing(tmp_path):
    code = """
import signal
handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
from pytorchpractice import CIFARNet
assert handlers == {number: signal.getsignal(number) for number in signal.valid_signals()}
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


class NotebookOutput:
    """What a notebook has for sys.stdout: it can write, and little else."""

    def __init__(self):
        self.written = ""

    def write(self, text):
        self.written += text

    def flush(self):
        pass

    def isatty(self):
        return False


@pytest.fixture
def unchanged(monkeypatch):
    """Assert after the test that signal handlers and matplotlib's backend are as they were."""
    backend = matplotlib.get_backend()
    plt.switch_backend("svg")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    changed = matplotlib.get_backend()
    plt.switch_backend(backend)
    assert after == handlers
    assert changed == "svg"


def test_main_called_in_a_notebook_works_and_changes_nothing_there(
    expect_sample, in_folder, unchanged, monkeypatch
):
    output = NotebookOutput()
    monkeypatch.setattr(sys, "stdout", output)
    assert script.main(arguments_on_sample("--epochs", 1)) == 0
    assert SCORE.search(output.written)


def test_run_by_a_notebook_as_a_program_it_changes_nothing_there(run_here, in_folder, unchanged):
    script.save(random_model().state_dict(), in_folder / MODEL)
    code, output = run_here("--evaluate")
    assert code == 0, output
