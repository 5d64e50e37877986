"""What the tests share: the sample of real images, and ways to run the script on it."""

import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib import pyplot as plt
from torchvision.datasets import CIFAR10

TESTS = Path(__file__).parent
ROOT = TESTS.parent
sys.path[:0] = [str(ROOT), str(TESTS)]

import run_on_sample

import pytorchpractice as script

MODEL = "nnmodel_cifar10.pt"


@pytest.fixture(params=script.find_devices()[0])
def device(request):
    """Return each device of this machine in turn."""
    return request.param


# Data


@pytest.fixture
def expect_sample(monkeypatch):
    """Let torchvision take the sample in tests/data for the data set, within this test."""
    for name in ("train_list", "test_list", "meta"):
        monkeypatch.setattr(CIFAR10, name, getattr(CIFAR10, name))
    run_on_sample.expect_sample()


@pytest.fixture
def sample(expect_sample):
    """Return the sample's (train, test) datasets: 600 and 200 real images."""
    return CIFAR10(TESTS / "data", train=True), CIFAR10(TESTS / "data", train=False)


@pytest.fixture
def sample_copy(tmp_path, expect_sample):
    """Return a data folder of this test's own that holds the sample."""
    return Path(shutil.copytree(TESTS / "data", tmp_path / "data"))


@pytest.fixture(scope="session")
def full_data():
    """Return all of CIFAR-10, (train, test), by the script's own routes, or skip the test."""
    try:
        return script.load_cifar10(ROOT / "data")
    except OSError as error:
        pytest.skip(f"this test needs all 60,000 images: {error}")


# Folders and models


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """Work in an empty folder of this test's own; return it."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def random_model(seed=0):
    """Return an untrained CIFARNet, its weights drawn with the seed."""
    torch.manual_seed(seed)
    return script.CIFARNet()


def train(train_set, *, epochs, batch_size=30, seed=0, device="cpu", dtype=torch.float32):
    """Set up and train as the script does, into the current folder; return (model, history)."""
    model, batches, validation = script.set_up_training(train_set, seed, batch_size, device)
    history = script.History()
    script.train(model, batches, validation, history, epochs=epochs, device=device, dtype=dtype)
    return model, history


def assert_loads(path):
    """Assert that the file is a whole checkpoint of CIFARNet, of plain float32 CPU tensors."""
    state = torch.load(path, weights_only=True)
    script.CIFARNet().load_state_dict(state)
    for name, tensor in state.items():
        assert tensor.device.type == "cpu", name
        assert tensor.is_contiguous(), name
        assert tensor.dtype == (torch.int64 if "num_batches" in name else torch.float32), name
        assert tensor.isfinite().all(), name


def half_written(folder):
    """Return the half-written files in a folder."""
    return list(Path(folder).rglob("*.tmp"))


# Runs


def arguments_on_sample(*arguments):
    """Return the script's arguments for a run on the sample: ten batches of 50 images an epoch."""
    return ["--data", str(TESTS / "data"), "--batch-size", "50", *map(str, arguments)]


@pytest.fixture
def run_here(expect_sample, in_folder, monkeypatch, capsys):
    """Return a function that runs the script as a program, but in this process and folder.

    It returns (exit code, output), and is faster than `run_script`, which imports torch anew.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pytorchpractice.py", *arguments_on_sample(*arguments)])
        try:
            runpy.run_path(str(ROOT / "pytorchpractice.py"), run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        except KeyboardInterrupt:
            pytest.fail("KeyboardInterrupt got out of the script")
        output = "".join(capsys.readouterr())
        return (1, f"{output}{code}\n") if isinstance(code, str) else (code, output)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
    plt.close("all")


def start_script(folder, *arguments, **options):
    """Start the script on the sample in a folder; return the process, its output in a pipe."""
    return subprocess.Popen(
        [sys.executable, str(TESTS / "run_on_sample.py"), *arguments_on_sample(*arguments)],
        cwd=folder,
        text=True,
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=subprocess.STDOUT,
        env={**os.environ, **options.pop("env", {})},
        **options,
    )


def run_script(folder, *arguments, **options):
    """Run the script on the sample in a folder to its end; return (exit code, output)."""
    process = start_script(folder, *arguments, **options)
    output, _ = process.communicate(timeout=240)
    return process.returncode, output
