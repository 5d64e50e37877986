"""Run pytorchpractice.py as a program, with torchvision told to expect the sample in tests/data.

python run_on_sample.py [the script's own arguments]
"""

import hashlib
import runpy
import sys
from pathlib import Path

from torchvision.datasets import CIFAR10

HERE = Path(__file__).parent
SCRIPT = HERE.parent / "pytorchpractice.py"
SAMPLE = HERE / "data" / CIFAR10.base_folder


def expect_sample():
    """Replace the digests of the full data set in torchvision's CIFAR10 by the sample's."""

    def digest(name):
        return hashlib.md5((SAMPLE / name).read_bytes()).hexdigest()

    CIFAR10.train_list = [[name, digest(name)] for name, _ in CIFAR10.train_list]
    CIFAR10.test_list = [[name, digest(name)] for name, _ in CIFAR10.test_list]
    CIFAR10.meta = {**CIFAR10.meta, "md5": digest(CIFAR10.meta["filename"])}


if __name__ == "__main__":
    expect_sample()
    sys.argv[0] = str(SCRIPT)
    runpy.run_path(str(SCRIPT), run_name="__main__")
