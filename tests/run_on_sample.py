"""Run pytorchpractice.py, with its own arguments, on the sample in tests/data."""

import hashlib
import runpy
from pathlib import Path

from torchvision.datasets import CIFAR10

TESTS = Path(__file__).parent


def expect_sample(set_attribute=setattr):
    """Replace the digests of the full data set in torchvision's CIFAR10 by the sample's."""
    folder = TESTS / "data" / CIFAR10.base_folder
    md5 = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    for part in ("train_list", "test_list"):
        set_attribute(CIFAR10, part, [[name, md5[name]] for name, _ in getattr(CIFAR10, part)])
    set_attribute(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5[CIFAR10.meta["filename"]]})


if __name__ == "__main__":
    expect_sample()
    runpy.run_path(str(TESTS.parent / "pytorchpractice.py"), run_name="__main__")
