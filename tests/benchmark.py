"""Measure the script, on this machine; run by hand, not by pytest.

    python tests/benchmark.py --work            the FLOPs of the original, of the script and of two
                                                published recipes; a few seconds
    python tests/benchmark.py                   the original's speed and the script's: an epoch of
                                                each kind, in turn, three times
    python tests/benchmark.py --beside airbench    the same, with airbench94_muon in place of the
                                                original
    python tests/benchmark.py --seeds 5         full runs of the script, one a seed: test accuracy
    python tests/benchmark.py --without         names the parts of the recipe
    python tests/benchmark.py --without SiLU    what this part buys: runs without it, scored on the
                                                validation images, beside the default recipe's
    python tests/benchmark.py --without all --seeds 3    the same for each part, with three seeds
    --fp32                                      force float32
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
VALIDATION_IMAGES = round(IMAGES * script.VALIDATION_PORTION)
TRAINING_IMAGES = IMAGES - VALIDATION_IMAGES
MIDDLES = [(epoch + 0.5) / script.EPOCHS for epoch in range(script.EPOCHS)]  # as in script.train
# The parts of a plan are (epochs, size of the images, whether the bias of the first layer learns).
SIZES = [next(size for end, size in script.SIZES if middle < end) for middle in MIDDLES]
PLAN = [(1, s, m < script.FIRST_LAYER_PORTION) for s, m in zip(SIZES, MIDDLES, strict=True)]
ORIGINAL_BATCH = 128
# Two published recipes.
AIRBENCH_BATCH = 2_000  # airbench94_muon, in github.com/KellerJordan/cifar10-airbench
AIRBENCH_PLAN = [(3, 32, True), (5, 32, False)]
E1_BATCH = 1_536  # in github.com/fulcrumresearch/cifar-10-speedrun
E1_PLAN = [(0.2, 24, True), (2.8, 24, False), (3, 28, False), (2.875, 32, False)]
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes, of what the system reports
EPOCH = re.compile(r" +\d+ +[\d.]+ +[\d.]+% +([\d.]+) +[\d.]+% +([\d.]+) ")  # of its table


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


def normalise(images):
    """Return uint8 images as the original feeds them: float32, from -1 to 1."""
    return images.float() / 127.5 - 1


def train_original(train_set, device, dtype):
    """Train one epoch of the original's recipe, and validate; return the seconds.

    The original trains in float32, whatever the dtype.
    """
    images, labels = script.as_tensors(train_set)
    cut = round(len(labels) * script.VALIDATION_PORTION)
    order = torch.randperm(len(labels))
    validation, training = order[:cut], order[cut:]
    start = time.perf_counter()
    model = original_net().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, weight_decay=1e-4)
    for batch in training.split(ORIGINAL_BATCH):
        optimizer.zero_grad()
        logits = model(normalise(images[batch].to(device)))
        F.cross_entropy(logits, labels[batch].to(device)).backward()
        optimizer.step()
    with torch.no_grad():
        model.eval()
        held_out = images[validation], labels[validation]
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
    model.to(device)
    batches = script.TrainingBatches(images, labels, AIRBENCH_BATCH, 0, device)
    steps = batches.per_epoch
    autocast = torch.autocast(device, dtype, enabled=dtype != torch.float32)
    if device != "mps":  # as the script does
        model.to(memory_format=torch.channels_last)
    optimizers, _ = script.make_optimizers(model, AIRBENCH_BATCH, steps, dtype)
    start = time.perf_counter()
    for step, (inputs, targets) in enumerate(batches.epoch(32)):
        model.whiten.bias.requires_grad_(step < 3 / 8 * steps)  # as in 3 epochs of the run's 8
        with autocast:
            logits = model(inputs).float()
        loss = F.cross_entropy(logits, targets, label_smoothing=0.2, reduction="sum")
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    last_loss = loss.item() / AIRBENCH_BATCH  # a GPU has finished when this can be read
    seconds = time.perf_counter() - start
    print(f"  airbench94_muon: training loss {last_loss:.2f} in the end", file=sys.stderr)
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
    return train_aside(setup, script.History(), epochs=1, device=device, dtype=dtype)


def train_aside(setup, history, **options):
    """Train as the script does, but leave no model; return the seconds."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        start = time.perf_counter()
        script.train(*setup, history, **options)
        seconds = time.perf_counter() - start
        os.chdir(ROOT)
    return seconds


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
        self.mirrored = torch.rand(len(self.labels), generator=self.generator) < 0.5
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
    script.VALIDATION_PORTION = 0.1
    setup = script.set_up_training(train_set, seed, script.BATCH_SIZE, device)
    model, _, validation = setup
    history = script.History()
    seconds = train_aside(setup, history, epochs=script.EPOCHS, device=device, dtype=dtype)
    model.load_state_dict(history.best_state)
    _, loss, accuracy = script.evaluate(model.eval(), *validation, device)
    return {"accuracy": accuracy, "loss": loss, "seconds": seconds}


def matmul_rate(device, dtype, size=2048):
    """Return the TFLOP/s of a matrix product of this size at this moment."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        (a @ a).sum().item()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds) / 1e12


def count(model, shape, optimizers=()):
    """Return the FLOPs for one image: forward, and with optimizers a whole training step.

    Counted by torch on the meta device, which computes nothing.
    """
    model, images = model.to("meta"), torch.zeros(shape, device="meta")
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(bool(optimizers)):
        logits = model(images)
        if optimizers:
            F.cross_entropy(logits, torch.zeros(len(images), dtype=int, device="meta")).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return counter.get_total_flops() / len(images)


def count_plan(model, batch, images, plan):
    """Return the FLOPs to train this model, one with the script's first layer.

    Images that don't fill a batch are left out of an epoch, as all these recipes do.
    """
    model = model.to("meta").train()
    optimizers, _ = script.make_optimizers(model, batch, 1, torch.float32)
    flops = 0
    for epochs, size, bias_learns in plan:
        model.whiten.bias.requires_grad_(bias_learns)
        an_image = count(model, (batch, 3, size, size), optimizers)
        flops += epochs * (images // batch * batch) * an_image
    return flops


def print_work():
    """Count and print the FLOPs of the original, the script and the two published recipes."""
    shape = ORIGINAL_BATCH, 3, 32, 32
    training, validation = script.EPOCHS * TRAINING_IMAGES, script.EPOCHS * VALIDATION_IMAGES
    net = original_net().to("meta")
    flops = training * count(net.train(), shape, [torch.optim.Adam(net.parameters())])
    print_flops("the original", script.EPOCHS, flops, validation * count(net.eval(), shape))

    model = script.CIFARNet()
    flops = count_plan(model, script.BATCH_SIZE, TRAINING_IMAGES, PLAN)
    model.forward = model.look  # validation takes one look at each image
    print_flops("the script", script.EPOCHS, flops, validation * count(model.eval(), shape))

    flops = count_plan(AirbenchNet(), AIRBENCH_BATCH, IMAGES, AIRBENCH_PLAN)
    print_flops("airbench94_muon", 8, flops)
    flops = count_plan(AirbenchNet(), E1_BATCH, IMAGES, E1_PLAN)
    print_flops("E1 of cifar-10-speedrun", 8.875, flops)


def print_flops(recipe, epochs, training, validation=0):
    """Print a row: a recipe and its FLOPs."""
    row = f"{recipe:24} {epochs:6g} epochs: {training / 1e15:.3f} PFLOP to train"
    print(row + (f", {validation / 1e15:.3f} to validate" if validation else ""))


def peak_memory(children=False):
    """Return the peak of this process, or the largest of its children that ended, in GiB."""
    if resource is None:
        return math.nan
    who = resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF
    return resource.getrusage(who).ru_maxrss * RSS_UNIT / 2**30


def measure(what, device, dtype, part, seed):
    """Measure one thing in this process, and print it as JSON on the last line."""
    train_set, _ = script.load_cifar10(ROOT / "data")
    images = round(part * len(train_set.data))
    train_set.data, train_set.targets = train_set.data[:images], train_set.targets[:images]
    if what.startswith("without "):
        without = what.removeprefix("without ")
        print(json.dumps(train_without(without, seed, train_set, device, dtype)))
        return
    if what in BESIDE:
        _, train_epoch, _ = BESIDE[what]
        seconds = train_epoch(train_set, device, dtype)
    else:
        seconds = train_script(train_set, device, dtype, what)
    peak, rate = peak_memory(), matmul_rate(device, dtype)
    print(json.dumps({"seconds": seconds / part, "matmul": rate, "peak": peak}))


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
            print(
                f"turn {turn + 1}: {other if kind == arguments.beside else kind:38} "
                f"{result['seconds']:6.1f} s an epoch, matmul {result['matmul']:.2f} TFLOP/s, "
                f"peak {result['peak']:.2f} GiB",
                flush=True,
            )
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


def full_run(arguments, seed):
    """Run the script as a user does, in an empty folder; return what it printed and took."""
    forced = f"import torch; torch.cpu.get_capabilities = dict; {RUN_AS_PROGRAM}"
    command = [sys.executable, "-c", forced] if arguments.fp32 else [sys.executable]
    command += [str(ROOT / "pytorchpractice.py"), "--device", arguments.device]
    command += ["--seed", str(seed), "--data", str(ROOT / "data")]
    start = last_epoch = time.perf_counter()
    losses, seconds, accuracy = [], [], None
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as run,
    ):
        for line in run.stdout:
            print(f"  seed {seed}: {line}", end="", file=sys.stderr, flush=True)
            if row := EPOCH.match(line):
                losses.append(float(row[1]))
                seconds.append(float(row[2]))
                last_epoch = time.perf_counter()
            elif found := re.search(r"test set.* accuracy ([\d.]+)%", line):
                accuracy = float(found[1])
    if accuracy is None:
        sys.exit(f"seed {seed} failed")
    return {
        "loss": min(losses),
        "accuracy": accuracy,
        "seconds": sum(seconds),
        "start": last_epoch - start - sum(seconds),
        "end": time.perf_counter() - last_epoch,
    }


RUN_AS_PROGRAM = (
    "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def compare_seeds(arguments):
    """Print the results of full default runs of the script, one a seed."""
    accuracies = []
    for seed in range(arguments.seeds):
        run = full_run(arguments, seed)
        accuracies.append(run["accuracy"])
        print(
            f"seed {seed}: validation loss {run['loss']:.4f}, test accuracy {run['accuracy']:.2f} "
            f"%, {run['seconds']:.0f} s of epochs, {run['start']:.0f} s before, {run['end']:.0f} s "
            "after",
            flush=True,
        )
    mean, peak = statistics.mean(accuracies), peak_memory(children=True)
    spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    print(f"\n{len(accuracies)} seeds: {mean:.2f} % ± {spread:.2f}, peak {peak:.2f} GiB")


def main():
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", action="store_true", help="count FLOPs, run nothing")
    parser.add_argument("--beside", choices=BESIDE, default="original", help="for the speed")
    parser.add_argument("--seeds", type=int, help="make full runs with this many seeds")
    choices = ["", "all", *PARTS]
    parser.add_argument("--without", nargs="?", const="", choices=choices, help="a part's name")
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
    elif arguments.without == "":
        print("\n".join(PARTS))
    elif arguments.without:
        compare_parts(arguments)
    elif arguments.seeds:
        compare_seeds(arguments)
    else:
        compare_speed(arguments)


if __name__ == "__main__":
    main()
