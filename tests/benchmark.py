"""Measure the script, on this machine; run by hand, not by pytest.

    python tests/benchmark.py --work            the FLOPs of the original, of the script and of two
                                                published recipes; a few seconds
    python tests/benchmark.py                   the original's speed and the script's: an epoch of
                                                each kind, in turn, three times
    python tests/benchmark.py --beside airbench    the same, with airbench94_muon in place of the
                                                original
    python tests/benchmark.py --seeds 5         full runs of the script, one a seed: test accuracy
    python tests/benchmark.py --without SiLU    what this part buys: runs without it, scored on the
                                                validation images, beside the default recipe's
    python tests/benchmark.py --without all --seeds 3    the same for each part, with three seeds
    --fp32                                      force float32, for the speed and --without
    --part 0.2                                  a part of the images, for the speed: sooner

Each is measured in a process of its own. The original's data loader (images decoded and normalised
one by one) is left out, which favours the original. Of airbench94_muon only the training steps are
timed, without any validation, which favours airbench94_muon. Peak memory isn't known on Windows.
"""

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

try:
    import resource
except ImportError:  # Windows has none
    resource = None

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytorchpractice as script

IMAGES = 50_000  # of CIFAR-10, to train and to validate
TRAINING_IMAGES = IMAGES - script.VALIDATION_IMAGES
# The parts of a plan are (epochs, size of the images, whether the bias of the first layer learns).
PLAN = [(1, *epoch) for epoch in script.plan(script.EPOCHS)]
ORIGINAL_BATCH = 128
# Two published recipes.
AIRBENCH_BATCH = 2_000  # airbench94_muon, in github.com/KellerJordan/cifar10-airbench
AIRBENCH_PLAN = [(3, 32, True), (5, 32, False)]
E1_BATCH = 1_536  # in github.com/fulcrumresearch/cifar-10-speedrun
E1_PLAN = [(0.2, 24, True), (2.8, 24, False), (3, 28, False), (2.875, 32, False)]
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes, of what the system reports


def original_net():
    """Return the original's net: five 3x3 convolutions and three linear layers."""

    def stage(channels_in, channels_out, *after):
        return nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.ReLU(), *after

    return nn.Sequential(
        *stage(3, 16),
        *stage(16, 32, nn.MaxPool2d(2)),
        *stage(32, 64, nn.BatchNorm2d(64)),
        *stage(64, 128, nn.MaxPool2d(2), nn.BatchNorm2d(128)),
        *stage(128, 256, nn.BatchNorm2d(256)),
        nn.AdaptiveAvgPool2d(6),
        nn.Flatten(),
        *(nn.Dropout(), nn.Linear(256 * 6 * 6, 1024), nn.ReLU()),
        *(nn.Dropout(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)),
    )


def train_original(train_set, device, dtype):
    """Train one epoch of the original's recipe, and validate; return the seconds.

    The original trains in float32, whatever the dtype, on images from -1 to 1.
    """
    images, labels = script.as_tensors(train_set)
    validation, training = torch.randperm(len(labels)).tensor_split([script.VALIDATION_IMAGES])
    start = time.perf_counter()
    model = original_net().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, weight_decay=1e-4)
    for batch in training.split(ORIGINAL_BATCH):
        optimizer.zero_grad()
        logits = model(images[batch].to(device).float() / 127.5 - 1)
        F.cross_entropy(logits, labels[batch].to(device)).backward()
        optimizer.step()
    held_out = images[validation], labels[validation]
    model.eval()
    _, _, accuracy = script.evaluate(lambda x: model(x * 2 - 1), *held_out, device)
    print(f"  original: validation {accuracy:.1%}", file=sys.stderr)
    return time.perf_counter() - start


class AirbenchNet(script.CIFARNet):
    """The net of airbench94_muon: the script's first layer, then 3x3 convolutions, and no skips.

    That of E1 has other activations, and is the same for a count of FLOPs, which leaves them out.
    """

    def __init__(self):
        super().__init__()

        def block(channels_in, channels_out):
            conv1, norm1 = script.conv_norm(channels_in, channels_out, 3, 1)
            conv2, norm2 = script.conv_norm(channels_out, channels_out, 3, 1)
            return nn.Sequential(conv1, nn.MaxPool2d(2), norm1, nn.GELU(), conv2, norm2, nn.GELU())

        self.blocks = nn.Sequential(block(24, 64), block(64, 256), block(256, 256))
        self.head = nn.Linear(256, 10, bias=False)
        nn.init.normal_(self.head.weight)

    def look(self, images):
        x = F.gelu(self.whiten((images - self.mean) / self.std))
        x = self.blocks(x).amax((2, 3))  # of 3x3 pixels; of 2x2, if the images have 24
        return self.head(x) / x.shape[1]


def train_airbench(train_set, device, dtype):
    """Train one epoch by the steps of airbench94_muon; return the seconds for all the images.

    It validates nothing, and so trains on all of them. Batches and optimizers are the script's, at
    the script's rates, since these don't change the time. airbench94_muon itself is in float16.
    """
    images, labels = script.as_tensors(train_set)
    model = AirbenchNet()
    model.init_whiten(images)
    script.to_device(model, device)
    batches = script.TrainingBatches(images, labels, AIRBENCH_BATCH, 0, device)
    steps = batches.per_epoch
    autocast = torch.autocast(device, dtype, enabled=dtype != torch.float32)
    average = script.AveragedModel(model)  # once an epoch, in airbench94_muon; here it isn't timed
    average.update_parameters = lambda _: None

    def batches_of_an_epoch():
        for step, batch in enumerate(batches.epoch(32)):
            model.whiten.bias.requires_grad_(step < 3 / 8 * steps)  # as in 3 epochs of the run's 8
            yield batch

    script.LABEL_SMOOTHING = 0.2
    optimizers, schedulers = script.make_optimizers(model, AIRBENCH_BATCH, steps, dtype)
    run = model, average, batches_of_an_epoch(), optimizers, schedulers, autocast
    start = time.perf_counter()
    loss, _ = script.train_epoch(*run)  # a GPU has finished when the loss can be read
    seconds = time.perf_counter() - start
    print(f"  airbench94_muon: training loss {loss:.2f}", file=sys.stderr)
    return seconds * len(labels) / (steps * AIRBENCH_BATCH)  # some images may not fill a batch


BESIDE = {  # what the script's speed is measured beside: its name, one epoch of it, its epochs
    "original": ("the original", train_original, script.EPOCHS),
    "airbench": ("airbench94_muon", train_airbench, 8),
}


def name(_, size, first_layer_learns):
    """Return the name of a kind of epoch, from a part of the plan."""
    return f"script at {size} pixels" + ", first layer learns" * first_layer_learns


def train_script(train_set, device, dtype, kind):
    """Train one epoch of the script's recipe, of this kind; return the seconds."""
    _, size, first_layer_learns = next(epoch for epoch in PLAN if name(*epoch) == kind)
    script.SIZES = ((1.0, size),)
    script.FIRST_LAYER_PORTION = float(first_layer_learns)
    setup = script.set_up_training(train_set, 0, script.BATCH_SIZE, device)
    return train_aside(setup, epochs=1, device=device, dtype=dtype)[1]


def train_aside(setup, **options):
    """Train as the script does, but leave no file; return the best model and the seconds."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        start = time.perf_counter()
        model = script.train(*setup, [], **options)
        seconds = time.perf_counter() - start
        os.chdir(ROOT)
    return model, seconds


def learnt_first_layer(model, images, whiten=script.CIFARNet.init_whiten):
    """Normalise the images as the script does, and let the first layer start at random."""
    whiten(model, images)
    model.whiten.reset_parameters()
    model.whiten.weight.requires_grad_(True)


def learnt_scales(*arguments, conv_norm=script.conv_norm):
    """Let the scale of every BatchNorm learn."""
    conv, norm = conv_norm(*arguments)
    norm.weight.requires_grad_(True)
    return conv, norm


def square(kernels):
    """Return conv_norm with 3x3 convolutions in place of those of these kernels."""

    def changed(channels_in, channels_out, kernel, padding, conv_norm=script.conv_norm):
        if kernel in kernels:
            kernel, padding = 3, 1
        return conv_norm(channels_in, channels_out, kernel, padding)

    return changed


class BlockWithoutBranch(script.Block):
    """The convolution under the pooling alone."""

    def __init__(self, *channels):
        super().__init__(*channels)
        del self.conv2, self.norm2, self.conv3, self.norm3

    def forward(self, x):
        x = self.conv1(x)
        return F.silu(self.norm1(F.max_pool2d(x, 2, 2) + F.avg_pool2d(x, 2, 2)))


class BlockWithoutSkip(script.Block):
    """The branch's output alone, without what it is added to."""

    def forward(self, x):
        x = BlockWithoutBranch.forward(self, x)
        y = F.silu(self.norm2(self.conv2(x)))
        return F.silu(self.norm3(self.conv3(y)))


class DrawnMirror(script.TrainingBatches):
    """Each image is mirrored or not by chance, anew in each epoch."""

    def epoch(self, size):
        mirrored = torch.rand(len(self.labels), generator=self.generator) < 0.5
        self.mirrored = mirrored.to(self.device)
        yield from super().epoch(size)


def sgd(convolutions, _lr, momentum, _dtype):
    """Return SGD in place of Muon; of the rates 0.0005, 0.001, 0.002 and 0.004, its best."""
    rate, decay = 0.001, script.WEIGHT_DECAY * script.BATCH_SIZE
    options = {"momentum": momentum, "nesterov": True, "weight_decay": decay / rate}
    return torch.optim.SGD(convolutions, rate, **options)


class MuonAlone(script.Muon):
    """Muon that doesn't scale the weights to a norm: it takes that part of the step back."""

    @torch.no_grad()
    def step(self):
        weights = self.param_groups[0]["params"]
        before = [weight.clone() for weight in weights]
        super().step()
        for weight, old in zip(weights, before, strict=True):
            weight.add_(old, alpha=1 - (len(old) ** 0.5 / old.norm()).item())


def one_look(model, images):
    """Look once in eval mode, too."""
    return model.look(images) / (1 if model.training else model.temperature)


PARTS = {  # of the recipe: (object, attribute) and what stands there in a run without it
    "whitening": ((script.CIFARNet, "init_whiten"), learnt_first_layer),
    "first-layer bias": ((script, "FIRST_LAYER_PORTION"), 0),
    "identity start": ((nn.init, "dirac_"), lambda weight: weight),
    "frozen scale": ((script, "conv_norm"), learnt_scales),
    "SiLU": ((F, "silu"), F.relu),
    "residual branch": ((script, "Block"), BlockWithoutBranch),
    "skip connection": ((script, "Block"), BlockWithoutSkip),
    "maximum at the end": ((torch.Tensor, "amax"), lambda x, dims: 0),
    "mean in the blocks": ((F, "avg_pool2d"), lambda x, size, stride: 0),
    "2x2 convolution": ((script, "conv_norm"), square([2])),
    "column and row": ((script, "conv_norm"), square([(3, 1), (1, 3)])),
    "Muon": ((script, "Muon"), sgd),
    "weight norm": ((script, "Muon"), MuonAlone),
    "weight decay": ((script, "WEIGHT_DECAY"), 0),
    "alternating mirror": ((script, "TrainingBatches"), DrawnMirror),
    "shifts": ((script, "MAX_SHIFT"), 0),
    "small images": ((script, "SIZES"), ((1.0, 32),)),
    "label smoothing": ((script, "LABEL_SMOOTHING"), 0.0),
    "averaged weights": ((script, "AVERAGED_EPOCHS"), 0),
    "extra looks": ((script.CIFARNet, "forward"), one_look),
}


def train_without(part, seed, train_set, device, dtype):
    """Train the default recipe without one of its parts, or whole ("nothing"); score it.

    Return the validation accuracy and loss of the saved epoch, as `model.eval()` gives them, and
    the seconds of training.
    """
    if part != "nothing":
        (place, attribute), replacement = PARTS[part]
        setattr(place, attribute, replacement)
    # Recipes are compared on 5,000 images, more than a user's run has, so that the points mean
    # something: by chance alone, an accuracy on 2,000 images is off by half a point.
    script.VALIDATION_IMAGES = 5000
    setup = script.set_up_training(train_set, seed, script.BATCH_SIZE, device)
    model, seconds = train_aside(setup, epochs=script.EPOCHS, device=device, dtype=dtype)
    _, loss, accuracy = script.evaluate(model, *setup[2], device)
    return {"accuracy": accuracy, "loss": loss, "seconds": seconds}


def count(model, shape, optimizers):
    """Return the FLOPs of a training step for one image of a batch of this shape.

    Counted by torch on the meta device, which computes nothing.
    """
    images = torch.zeros(shape, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return counter.get_total_flops() / len(images)


def count_plan(model, batch, images, plan):
    """Return the FLOPs to train this model, one with the script's first layer.

    Images that don't fill a batch are left out of an epoch, as all these recipes do.
    """
    model = model.to("meta")
    optimizers, _ = script.make_optimizers(model, batch, 1, torch.float32)
    flops = 0
    for epochs, size, bias_learns in plan:
        model.whiten.bias.requires_grad_(bias_learns)
        an_image = count(model, (batch, 3, size, size), optimizers)
        flops += epochs * (images // batch * batch) * an_image
    return flops


def print_work():
    """Count and print the FLOPs of the original, the script and the two published recipes."""
    net = original_net().to("meta")
    an_image = count(net, (ORIGINAL_BATCH, 3, 32, 32), [torch.optim.Adam(net.parameters())])
    ours = count_plan(script.CIFARNet(), script.BATCH_SIZE, TRAINING_IMAGES, PLAN)
    airbench = count_plan(AirbenchNet(), AIRBENCH_BATCH, IMAGES, AIRBENCH_PLAN)
    e1 = count_plan(AirbenchNet(), E1_BATCH, IMAGES, E1_PLAN)
    print(f"the original, 10 epochs: {10 * TRAINING_IMAGES * an_image / 1e15:.3f} PFLOP to train")
    print(f"the script, {script.EPOCHS} epochs: {ours / 1e15:.3f} PFLOP to train")
    print(f"airbench94_muon, 8 epochs: {airbench / 1e15:.3f} PFLOP to train")
    print(f"E1 of cifar-10-speedrun, 8.875 epochs: {e1 / 1e15:.3f} PFLOP to train")


def measure(what, device, dtype, part, seed):
    """Measure one thing in this process, and print it as JSON on the last line."""
    train_set, _ = script.load_cifar10(ROOT / "data")
    images = round(part * len(train_set.data))
    train_set.data, train_set.targets = train_set.data[:images], train_set.targets[:images]
    script.VALIDATION_IMAGES = round(part * script.VALIDATION_IMAGES)
    if what.startswith("without "):
        without = what.removeprefix("without ")
        print(json.dumps(train_without(without, seed, train_set, device, dtype)))
        return
    if what in BESIDE:
        _, train_epoch, _ = BESIDE[what]
        seconds = train_epoch(train_set, device, dtype)
    else:
        seconds = train_script(train_set, device, dtype, what)
    print(json.dumps({"seconds": seconds / part}))


def child(arguments, what, seed=0):
    """Measure in a process of its own; return what it printed."""
    command = [sys.executable, __file__, "--measure", what, "--device", arguments.device]
    command += ["--seed", str(seed)]
    command += ["--part", str(arguments.part), *["--fp32"] * arguments.fp32]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare_speed(arguments):
    """Print the seconds an epoch of the script and another recipe, in turns, and of whole runs."""
    other, _, other_epochs = BESIDE[arguments.beside]
    epochs = [name(*epoch) for epoch in PLAN]
    results = {kind: [] for kind in [arguments.beside, *epochs]}
    for turn in range(arguments.turns):
        for kind, measured in results.items():
            result = child(arguments, kind)
            measured.append(result["seconds"])
            print(f"turn {turn + 1}: {kind:40} {result['seconds']:6.1f} s an epoch", flush=True)
    ours = [sum(results[epoch][turn] for epoch in epochs) for turn in range(arguments.turns)]
    theirs = [other_epochs * seconds for seconds in results[arguments.beside]]
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    print(f"\n{other}, {other_epochs} epochs: {statistics.median(theirs):.0f} s")
    print(f"the script, {script.EPOCHS} epochs: {statistics.median(ours):.0f} s")
    print(f"ratio: median {statistics.median(ratios):.2f}, ", end="")
    print(f"from {min(ratios):.2f} to {max(ratios):.2f}")
    print_work()


def compare_parts(arguments):
    """Print what a run without a part, or without each in turn, comes to, as rows of a table.

    Accuracies are means over the seeds, with the standard error of their difference from the whole
    recipe's, seed by seed; times are relative to the whole recipe's.
    """
    parts = PARTS if arguments.without == "all" else [arguments.without]
    seeds = range(arguments.seeds or 2)
    whole = [child(arguments, "without nothing", seed) for seed in seeds]
    print("| without | validation accuracy | difference | loss | time |")
    print("| --- | --- | --- | --- | --- |")
    print(row_of("nothing", whole, whole), flush=True)
    for part in parts:
        runs = [child(arguments, f"without {part}", seed) for seed in seeds]
        print(row_of(part, runs, whole), flush=True)


def row_of(part, runs, whole):
    """Return a table's row on runs without a part, beside those of the whole recipe."""
    mean = {key: statistics.mean(run[key] for run in runs) for key in whole[0]}
    differences = [100 * (a["accuracy"] - b["accuracy"]) for a, b in zip(runs, whole, strict=True)]
    error = statistics.stdev(differences) / len(runs) ** 0.5 if len(runs) > 1 else math.nan
    time_ratio = mean["seconds"] / statistics.mean(run["seconds"] for run in whole)
    difference = f"{statistics.mean(differences):+.2f} ± {error:.2f}"
    accuracy, loss = f"{100 * mean['accuracy']:.2f}", f"{mean['loss']:.4f}"
    return f"| {part} | {accuracy} | {difference} | {loss} | {time_ratio:.2f} |"


def compare_seeds(arguments):
    """Run the script as a user does, in an empty folder, once a seed; print what it reports."""
    accuracies = []
    for seed in range(arguments.seeds):
        command = [sys.executable, ROOT / "pytorchpractice.py", "--device", arguments.device]
        command += ["--seed", str(seed), "--data", ROOT / "data"]
        with tempfile.TemporaryDirectory() as folder:
            run = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
        print(run.stdout, file=sys.stderr)
        accuracies.append(float(re.search(r"test set.* accuracy ([\d.]+)%", run.stdout)[1]))
        seconds = re.search(r"total time (\d+) s", run.stdout)[1]
        print(f"seed {seed}: test accuracy {accuracies[-1]:.2f} %, {seconds} s in all", flush=True)
    spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    print(f"\n{len(accuracies)} seeds: {statistics.mean(accuracies):.2f} % ± {spread:.2f}")
    if resource:
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * RSS_UNIT / 2**30
        print(f"peak memory: {peak:.2f} GiB")


def main():
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", action="store_true", help="count FLOPs, run nothing")
    parser.add_argument("--beside", choices=BESIDE, default="original", help="for the speed")
    parser.add_argument("--seeds", type=int, help="make full runs with this many seeds")
    parser.add_argument("--without", choices=["all", *PARTS], help="a part of the recipe")
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--turns", type=int, default=3, help="epochs of each kind, alternating")
    parser.add_argument("--part", type=float, default=1.0, help="of the images; airbench: >= 0.04")
    parser.add_argument("--fp32", action="store_true", help="force float32")
    parser.add_argument("--device", default=script.find_devices()[0][0])
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    dtype = torch.float32 if arguments.fp32 else script.choose_precision(arguments.device)[0]
    if arguments.measure:
        measure(arguments.measure, arguments.device, dtype, arguments.part, arguments.seed)
    elif arguments.work:
        print_work()
    elif arguments.without:
        compare_parts(arguments)
    elif arguments.seeds:
        compare_seeds(arguments)
    else:
        compare_speed(arguments)


if __name__ == "__main__":
    main()
