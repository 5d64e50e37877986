"""The script as a program: what it leaves, what it says, and how it ends."""

import contextlib
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    MODEL,
    ROOT,
    TESTS,
    assert_loads,
    command,
    fill,
    no_debris,
    random_model,
    read_until,
    run_script,
    start_script,
)
from matplotlib import pyplot as plt
from matplotlib.image import imread

import pytorchpractice as script

FIGURES = ("nnmodel_loss.png", "nnmodel_accuracy.png", "test_images_pred_actual.png")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run the script once from an empty folder, output to a pipe; return (folder, output)."""
    folder = tmp_path_factory.mktemp("finished")
    code, output = run_script(folder, "--epochs", 4)
    assert code == 0, output
    return folder, output


@pytest.fixture
def run_here(expect_sample, tmp_path, monkeypatch, capsys):
    """Return a function that runs the script's main on the sample, in an empty folder.

    It returns (exit code, output). Faster than `run_script`, which starts Python and torch anew.
    """
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        _python, _runner, *options = command(*arguments)
        code = script.main(options)
        return code, "".join(capsys.readouterr())

    yield run
    plt.close("all")


# The whole job


def test_leaves_the_model_and_three_figures_and_nothing_else(finished):
    folder, _ = finished
    left = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert left == sorted([MODEL, *(f"figures/{name}" for name in FIGURES)])
    assert_loads(folder / MODEL)
    for name in FIGURES:
        picture = imread(folder / "figures" / name)
        assert picture.shape[1] >= 1000
        assert picture.std() > 0.05  # something is drawn


def test_says_first_what_it_runs_on(finished):
    head = finished[1].splitlines()[:3]
    assert f"torch {torch.__version__}" in head[0]
    assert "torchvision" in head[0]
    assert re.match(r"device \w+, training in (bfloat16|float32): .+", head[2])


def test_prints_one_plain_line_an_epoch_and_fits_80_columns(finished):
    lines = finished[1].splitlines()
    assert sum(bool(re.match(r" +\d+ +\d\.\d+ +[\d.]+% ", line)) for line in lines) == 4
    assert "\r" not in finished[1]
    assert "\033" not in finished[1]
    assert max(map(len, lines[3:])) <= 80


def test_reports_what_the_saved_file_scores_by_hand(finished, sample):
    folder, output = finished
    images, labels = script.as_tensors(sample[1], "cpu")
    model = script.CIFARNet()
    model.load_state_dict(torch.load(folder / MODEL, weights_only=True))
    with torch.no_grad():
        logits = model.eval()(images / 255)
    loss, accuracy = script.score(logits, labels)
    hits = (logits.argmax(1) == labels).float()
    best = max(batch.mean().item() for batch in hits.split(50))
    assert f"accuracy {accuracy:.2%}" in output
    assert float(re.search(r"loss (\S+), accuracy", output)[1]) == pytest.approx(loss, abs=1e-4)
    assert f"best batch of 50: {best:.2%}" in output
    for index, name in enumerate(sample[1].classes):
        assert re.search(rf"{name} +{hits[labels == index].mean():.1%}", output)


def test_names_the_epoch_whose_weights_were_saved(finished):
    rows = re.findall(r"^ +(\d+) +\S+ +\S+ +(\d\.\d+) .*?(saved)?$", finished[1], re.MULTILINE)
    best = min(rows, key=lambda row: float(row[1]))[0]
    assert f"the weights of epoch {best}, in {MODEL}" in finished[1]


def test_evaluate_scores_the_file_and_redraws_the_grid_only(finished):
    folder, output = finished
    grid = folder / "figures" / FIGURES[2]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, second = run_script(folder, "--evaluate", "--images", 7, "--image-seed", 5)
    assert code == 0
    results = re.compile(r"test set.*?truck +\S+", re.DOTALL)
    assert results.search(second)[0] == results.search(output)[0]
    assert "epoch" not in second
    changed = [path for path in before if path.read_bytes() != before[path]]
    assert changed == [grid]


def test_works_without_display_or_home(tmp_path):
    environment = {"HOME": "/nonexistent", "DISPLAY": "", "MPLCONFIGDIR": ""}
    code, output = run_script(tmp_path, "--epochs", 1, env=environment)
    assert code == 0
    assert "matplotlib" not in output.lower()
    assert (tmp_path / "figures" / FIGURES[0]).exists()


def test_ends_quietly_when_its_reader_is_gone(tmp_path):
    shell = f"{' '.join(command('--epochs', 1))} | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""


def test_takes_its_data_from_a_folder_that_is_read_only(small_disk, run_here):
    shutil.copytree(TESTS / "data", small_disk / "data")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    code, output = run_here("--epochs", 1, "--data", small_disk / "data")
    assert code == 0, output


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
    assert b"\r    1   batch 1 of 10" in shown
    assert b"\r    1   batch 10 of 10" in shown


def test_show_ends_where_there_is_no_display(finished):
    code, output = run_script(finished[0], "--evaluate", "--show", env={"DISPLAY": ""})
    assert code == 0, output
    assert "Traceback" not in output


# Arguments


@pytest.mark.parametrize(
    "arguments",
    [
        "--epochs 0",
        "--epochs -1",
        "--epochs 1e3",
        "--images 0",
        "--images 51",
        "--batch-size 45001",
        "--batch-size 0",
        "--seed x",
        "--device tpu",
        "--data pytorchpractice.py",
        "--no-such-option",
    ],
)
def test_bad_arguments_are_argparse_errors(arguments, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        script.main(["--batch-size", "50", *arguments.split()])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith("pytorchpractice.py: error: ")


def test_unknown_device_names_those_that_are_there(capsys):
    with pytest.raises(SystemExit):
        script.parse_arguments(["--device", "tpu"])
    assert capsys.readouterr().err.rstrip().endswith(", ".join(script.available_devices()))


def test_evaluate_without_a_checkpoint_is_one_line(tmp_path):
    code, output = run_script(tmp_path, "--evaluate")
    assert code == 1
    assert output.splitlines()[-1].startswith(f"pytorchpractice: there is no {MODEL}")
    assert "Traceback" not in output


def test_checkpoint_of_another_shape_is_replaced_without_complaint(tmp_path, run_here):
    torch.save({"weight": torch.zeros(3)}, tmp_path / MODEL)
    code, output = run_here("--epochs", 1)
    assert code == 0, output
    assert_loads(tmp_path / MODEL)


# Interruptions and faults


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_within_an_epoch_it_keeps_the_best_and_draws(tmp_path, number, code):
    process = start_script(tmp_path, "--epochs", 200)
    read_until(process, "    1  ")
    process.send_signal(number)
    sent = time.perf_counter()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert time.perf_counter() - sent < 30
    assert re.search(rf"the weights of epoch \d+, in {MODEL}", output)
    assert "Traceback" not in output
    assert_loads(tmp_path / MODEL)
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == sorted(FIGURES)
    assert no_debris(tmp_path)


def test_stopped_before_the_first_epoch_ends_an_earlier_file_is_untouched(tmp_path):
    script.Checkpoint(tmp_path / MODEL).keep(random_model(), epoch=1, loss=1.0)
    before = (tmp_path / MODEL).read_bytes()
    process = start_script(tmp_path, "--epochs", 200)
    read_until(process, "training loss")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "no epoch was finished" in output
    assert "Traceback" not in output
    assert (tmp_path / MODEL).read_bytes() == before


def test_stopped_while_torch_is_imported_it_ends_quietly(tmp_path):
    script_path = ROOT / "pytorchpractice.py"
    process = subprocess.Popen(
        [sys.executable, "-v", str(script_path)], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )  # -v: it says on stderr what it imports
    for line in process.stderr:
        assert not line.startswith("Traceback")
        if line.startswith("import 'torch.version'"):
            process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == -signal.SIGINT


def test_full_disk_ends_with_1_and_the_old_file(small_disk):
    script.Checkpoint(small_disk / MODEL).keep(random_model(), epoch=1, loss=1.0)
    before = (small_disk / MODEL).read_bytes()
    process = start_script(small_disk, "--epochs", 2)
    read_until(process, "training loss")
    fill(small_disk)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert "Traceback" not in output
    assert f"{MODEL} could not be written" in output
    assert "nnmodel_loss.png could not be written: No space left" in output
    assert "test set, 200 images" in output  # scored from memory
    assert (small_disk / MODEL).read_bytes() == before
    assert no_debris(small_disk)


def test_one_figure_that_cannot_be_written_costs_only_itself(tmp_path, run_here):
    blocked = tmp_path / "figures" / FIGURES[0]
    blocked.mkdir(parents=True)  # a folder where the file should go
    code, output = run_here("--epochs", 1)
    assert code == 1
    assert f"{FIGURES[0]} could not be written" in output
    assert "Traceback" not in output
    for name in FIGURES[1:]:
        assert imread(tmp_path / "figures" / name).size
    assert_loads(tmp_path / MODEL)


def test_loss_that_is_not_finite_ends_with_1_and_the_best_epoch(tmp_path, run_here, monkeypatch):
    step, calls = script.train_step, []

    def poisoned_step(model, optimizers, images, labels):
        calls.append(1)
        return step(model, optimizers, images * (torch.nan if len(calls) == 14 else 1), labels)

    monkeypatch.setattr(script, "train_step", poisoned_step)
    code, output = run_here("--epochs", 3)
    assert code == 1
    assert "stopped: the loss is not finite in epoch 2, batch 4" in output
    assert "the weights of epoch 1" in output
    assert_loads(tmp_path / MODEL)


def test_folder_that_cannot_be_written_to_is_said_first(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    code, output = run_script(small_disk, "--epochs", 1)
    assert code == 1
    assert "can't write to" in output.splitlines()[-1]
    assert "data:" not in output
    assert "Traceback" not in output


def test_two_runs_in_one_folder_leave_a_whole_file(tmp_path):
    one_core = {"OMP_NUM_THREADS": "1"}  # more threads than cores wait for each other
    runs = [start_script(tmp_path, "--epochs", 2, "--seed", i, env=one_core) for i in range(2)]
    for run in runs:
        output, _ = run.communicate(timeout=240)
        assert run.returncode == 0, output
    assert_loads(tmp_path / MODEL)
    assert no_debris(tmp_path)


def test_a_later_run_clears_what_a_killed_one_left(tmp_path, run_here):
    (tmp_path / f".{MODEL}.123.tmp").write_bytes(b"half")
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / f".{FIGURES[0]}.123.tmp").write_bytes(b"half")
    with pytest.raises(SystemExit):  # there is no model to evaluate
        run_here("--evaluate")
    assert no_debris(tmp_path)


def test_help_names_every_option():
    done = subprocess.run(
        [sys.executable, str(ROOT / "pytorchpractice.py"), "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    for option in ("epochs", "batch-size", "seed", "device", "data", "evaluate", "images"):
        assert f"--{option}" in done.stdout
