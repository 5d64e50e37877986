"""Run pytorchpractice.py, with its own arguments, on the sample in tests/data."""

import hashlib
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


def source():
    """Return the script's source, but hold out 120 images, since the sample has 600 in all."""
    source = (TESTS.parent / "pytorchpractice.py").read_text(encoding="utf-8")
    return source.replace("VALIDATION_IMAGES = 2000", "VALIDATION_IMAGES = 120")


if __name__ == "__main__":
    expect_sample()
    exec(source(), {"__name__": "__main__"})  # noqa: S102 - the script, with fewer images held out
