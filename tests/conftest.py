"""What the tests share: the sample of real images, and ways to run the script on it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.datasets import CIFAR10

TESTS = Path(__file__).parent
ROOT = TESTS.parent
sys.path[:0] = [str(ROOT), str(TESTS)]

import run_on_sample

import pytorchpractice as script

MODEL = "nnmodel_cifar10.pt"


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
    except RuntimeError as error:
        pytest.skip(f"this test needs all 60,000 images: {error}")


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system with room for one checkpoint and a half; return its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    size = (ROOT / MODEL).stat().st_size * 3 // 2
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this test needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder):
    """Fill the file system of a folder to the last byte; return the file that does."""
    filler = folder / "filler"
    with open(filler, "wb", buffering=0) as file:
        for size in (1 << 16, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                pass
    return filler


def command(*arguments):
    """Return the command that runs the script on the sample, with batches of 50 images."""
    runner = [sys.executable, str(TESTS / "run_on_sample.py"), "--data", str(TESTS / "data")]
    return [*runner, "--batch-size", "50", *map(str, arguments)]


def start_script(folder, *arguments, **options):
    """Start the script on the sample in a folder; return the process, its output in a pipe."""
    return subprocess.Popen(
        command(*arguments),
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


def read_until(process, text):
    """Read a running script's output up to the line that holds the text; return what was read."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"no {text!r} in:\n{''.join(lines)}")


def random_model(seed=0):
    """Return an untrained CIFARNet, its weights drawn with the seed."""
    torch.manual_seed(seed)
    return script.CIFARNet()


def assert_loads(path):
    """Assert that the file is a whole checkpoint of CIFARNet, of plain float32 CPU tensors."""
    state = torch.load(path, weights_only=True)
    script.CIFARNet().load_state_dict(state)
    for name, tensor in state.items():
        assert tensor.device.type == "cpu", name
        assert tensor.is_contiguous(), name
        assert tensor.dtype == (torch.int64 if "num_batches" in name else torch.float32), name


def no_debris(folder):
    """Return whether the folder holds no half-written files."""
    return not list(Path(folder).rglob("*.tmp"))
