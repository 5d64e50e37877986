"""What the tests share: the sample of real images, and ways to run the script on it."""

import signal
import sys
from pathlib import Path

import matplotlib
import pytest
import torch
from torchvision.datasets import CIFAR10

TESTS = Path(__file__).parent
ROOT = TESTS.parent
sys.path[:0] = [str(ROOT), str(TESTS)]

import run_on_sample

import pytorchpractice as script

MODEL = "nnmodel_cifar10.pt"
matplotlib.use("svg")  # it opens no windows, and isn't what the script would choose
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it


@pytest.fixture
def expect_sample(monkeypatch):
    """Let torchvision take the sample in tests/data for the data set, within this test."""
    run_on_sample.expect_sample(monkeypatch.setattr)
    monkeypatch.setattr(script, "VALIDATION_IMAGES", 120)


@pytest.fixture
def sample(expect_sample):
    """Return the sample's (train, test) datasets: 600 and 200 real images."""
    return CIFAR10(TESTS / "data", train=True), CIFAR10(TESTS / "data", train=False)


@pytest.fixture(scope="session")
def full_data():
    """Return all of CIFAR-10, (train, test), by the script's own routes, or skip the test."""
    try:
        return script.load_cifar10(ROOT / "data")
    except OSError as error:
        pytest.skip(f"this test needs all 60,000 images: {error}")


@pytest.fixture
def narrow(monkeypatch):
    """Let the net be narrow, which is faster, above all in bfloat16 without the hardware."""
    monkeypatch.setattr(script, "WIDTHS", (8, 32, 32))


def random_model(seed=0):
    """Return an untrained CIFARNet, its weights drawn with the seed."""
    torch.manual_seed(seed)
    return script.CIFARNet()


def train(train_set, *, epochs, batch_size=30, seed=0, device="cpu", dtype=torch.float32):
    """Set up and train as the script does, into this folder; return history and best state."""
    setup, history = script.set_up_training(train_set, seed, batch_size, device), []
    return history, script.train(*setup, history, epochs, device, dtype).state_dict()


def assert_loads(path):
    """Assert that the file is a whole checkpoint of CIFARNet, of plain float32 CPU tensors."""
    state = torch.load(path, weights_only=True)
    script.CIFARNet().load_state_dict(state)
    for name, tensor in state.items():
        assert tensor.device.type == "cpu", name
        assert tensor.is_contiguous(), name
        assert tensor.dtype == (torch.int64 if "num_batches" in name else torch.float32), name
        assert tensor.isfinite().all(), name


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """Work in an empty folder of this test's own; return it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder):
    """Return the names of all files in a folder and below it, half-written ones too, sorted."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def arguments_on_sample(*arguments):
    """Return the script's arguments for a run on the sample: nine batches of 50 images an epoch."""
    return ["--data", str(TESTS / "data"), "--batch-size", "50", *map(str, arguments)]


@pytest.fixture
def run_main(expect_sample, narrow, in_folder, capsys):
    """Return a function that calls main, with a narrow net; it returns what main printed."""

    def run(*arguments):
        script.main(arguments_on_sample(*arguments))
        return capsys.readouterr().out

    return run


@pytest.fixture
def run_program(expect_sample, narrow, in_folder, monkeypatch, capsys):
    """Return a function that runs the script as a program, with a narrow net: (code, output)."""
    source = run_on_sample.source().replace("WIDTHS = (64, 224, 448)", f"WIDTHS = {script.WIDTHS}")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pytorchpractice.py", *arguments_on_sample(*arguments)])
        code = 0
        try:
            exec(source, {"__name__": "__main__"})  # noqa: S102 - the script, as it stands
        except SystemExit as stop:
            code = stop.code
        output = "".join(capsys.readouterr())
        return (1, f"{output}{code}\n") if isinstance(code, str) else (code, output)

    return run
