"""Compare the script with the original's recipe, on this machine; run by hand, not by pytest.

    python tests/benchmark.py               one epoch of each, in turn, three times: speed
    python tests/benchmark.py --seeds 5     full runs of the script, one a seed: accuracy
    --fp32                                  force float32, for either

Both train on the same 45,000 images, each run in a process of its own. The original's data loader
(images decoded and normalised one by one) is left out, which favours the original.
"""

import argparse
import json
import os
import re
import resource
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytorchpractice as script

ORIGINAL_BATCH = 128
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


def normalise(images):
    """Return uint8 images as the original feeds them: float32, mean and variance near 0 and 1."""
    return images.float() / 127.5 - 1


def train_original(images, labels, validation, device):
    """Train one epoch of the original's recipe; return its seconds, validation included."""
    model = original_net().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, weight_decay=1e-4)
    start = time.perf_counter()
    for batch in torch.randperm(len(labels)).to(device).split(ORIGINAL_BATCH):
        optimizer.zero_grad()
        F.cross_entropy(model(normalise(images[batch])), labels[batch]).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(normalise(b)) for b in validation[0].split(ORIGINAL_BATCH)])
    _, accuracy = script.score(logits, validation[1])
    seconds = time.perf_counter() - start
    print(f"  original: {seconds:.1f} s, validation {accuracy:.1%}", file=sys.stderr)
    return seconds


def train_script(train_set, device, dtype, kind):
    """Train one epoch of the script's recipe, of this kind; return its seconds."""
    arguments = script.parse_arguments(["--device", device])
    model, batches, validation = script.set_up_training(train_set, arguments)
    epoch = next(epoch for epoch in script.schedule(script.EPOCHS) if name(*epoch) == kind)
    script.schedule = lambda _: [epoch]
    run = {"epochs": 1, "device": device, "dtype": dtype}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = script.Checkpoint(Path(folder, "model.pt"))
        start = time.perf_counter()
        script.train(model, batches, validation, checkpoint, script.History(), **run)
        return time.perf_counter() - start


def name(size, first_layer_learns):
    """Return the name of a kind of epoch."""
    return f"script at {size} pixels" + ", first layer learns" * first_layer_learns


def matmul_rate(device, dtype, size=2048):
    """Return the TFLOP/s of a matrix product of this size at this moment."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        (a @ a).sum().item()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds) / 1e12


def flops(epochs):
    """Return the FLOPs of a full run of the script, (training, validation).

    Counted by torch on the meta device, which computes nothing.
    """
    n = script.BATCH_SIZE
    model = script.CIFARNet().to("meta")
    optimizers, _ = script.make_optimizers(model, n, 1)
    labels = torch.zeros(n, dtype=torch.int64, device="meta")
    training = 0
    for size, first_layer_learns in script.schedule(epochs):
        model.whiten.bias.requires_grad_(first_layer_learns)
        images = torch.zeros(n, 3, size, size, device="meta")
        with FlopCounterMode(display=False) as counter:
            script.train_step(model, optimizers, images, labels)
        training += counter.get_total_flops() * (script.TRAINING_IMAGES // n)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.classify(torch.zeros(n, 3, 32, 32, device="meta"))
    return training, epochs * counter.get_total_flops() * (5_000 // n)


def measure(what, device, dtype):
    """Measure one thing in this process, and print it as JSON on the last line."""
    script.keep_memory()  # for the original, too, which favours it
    train_set, _ = script.load_cifar10(ROOT / "data")
    if what == "original":
        images, labels = script.as_tensors(train_set, device)
        parts = script.split_indices(len(labels), seed=0)
        training, validation = ((images[part], labels[part]) for part in parts)
        seconds = train_original(*training, validation, device)
    else:
        seconds = train_script(train_set, device, dtype, what)
    result = {"seconds": seconds, "matmul": matmul_rate(device, dtype)}
    print(json.dumps({**result, "peak_gib": peak_memory()}))


def peak_memory():
    """Return this process's peak resident memory in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / 2**30


def child(arguments, what):
    """Measure in a process of its own; return what it printed."""
    command = [sys.executable, __file__, "--measure", what, "--device", arguments.device]
    command += ["--fp32"] * arguments.fp32
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare_speed(arguments):
    """Print the seconds an epoch of both recipes, alternating, and their ratio over ten epochs."""
    epochs = [name(*epoch) for epoch in script.schedule(script.EPOCHS)]
    kinds = ["original", *dict.fromkeys(epochs)]
    results = {kind: [] for kind in kinds}
    for turn in range(arguments.turns):
        for kind in kinds:
            result = child(arguments, kind)
            results[kind].append(result)
            print(
                f"turn {turn + 1}: {kind:38} {result['seconds']:6.1f} s an epoch, matmul "
                f"{result['matmul']:.2f} TFLOP/s, peak {result['peak_gib']:.2f} GiB",
                flush=True,
            )
    ratios = []
    for turn in range(arguments.turns):
        ours = sum(results[epoch][turn]["seconds"] for epoch in epochs)
        ratios.append(ours / (len(epochs) * results["original"][turn]["seconds"]))
    training, validation = flops(script.EPOCHS)
    seconds = sum(
        statistics.median(result["seconds"] for result in results[epoch]) for epoch in epochs
    )
    rate = statistics.median(r["matmul"] for kind in kinds[1:] for r in results[kind])
    print(f"\n{len(epochs)} epochs of the script: {seconds:.0f} s")
    work = training + validation
    print(f"{training / 1e15:.3f} PFLOP to train and {validation / 1e15:.3f} to validate")
    print(f"that is {work / seconds / 1e12:.2f} TFLOP/s, a matmul's {rate:.2f}")
    print(
        f"ratio to the original's {len(epochs)} epochs: median {statistics.median(ratios):.2f}, "
        f"from {min(ratios):.2f} to {max(ratios):.2f}"
    )


def full_run(arguments, seed):
    """Run the script as a user does, in an empty folder; return what it printed and took."""
    command = [sys.executable, "-c", FORCED] if arguments.fp32 else [sys.executable]
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
            elif line.startswith("test set"):
                accuracy = float(line.split("accuracy")[1].strip(" %\n"))
        _, _, usage = os.wait4(run.pid, 0)
    if accuracy is None:
        sys.exit(f"seed {seed} failed")
    return {
        "loss": min(losses),
        "accuracy": accuracy,
        "seconds": sum(seconds),
        "start": last_epoch - start - sum(seconds),
        "end": time.perf_counter() - last_epoch,
        "peak": usage.ru_maxrss * RSS_UNIT / 2**30,
    }


def compare_seeds(arguments):
    """Print the results of full default runs of the script, one a seed."""
    accuracies = []
    for seed in range(arguments.seeds):
        run = full_run(arguments, seed)
        accuracies.append(run["accuracy"])
        print(
            f"seed {seed}: validation loss {run['loss']:.4f}, test accuracy {run['accuracy']:.2f} "
            f"%, {run['seconds']:.0f} s of epochs, {run['start']:.0f} s before, {run['end']:.0f} s "
            f"after, peak {run['peak']:.2f} GiB",
            flush=True,
        )
    spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    print(f"\n{len(accuracies)} seeds: {statistics.mean(accuracies):.2f} % ± {spread:.2f}")


EPOCH = re.compile(r" +\d+ +[\d.]+ +[\d.]+% +([\d.]+) +[\d.]+% +([\d.]+) ")  # a row of its table

# Runs the script as a program with bfloat16 switched off.
FORCED = """
import runpy, sys, torch
torch.cpu.get_capabilities = dict
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def main():
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, help="make full runs with this many seeds")
    parser.add_argument("--turns", type=int, default=3, help="epochs of each kind, alternating")
    parser.add_argument("--fp32", action="store_true", help="force float32")
    parser.add_argument("--device", default=script.available_devices()[0])
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    precision = script.choose_precision(arguments.device)
    dtype, reason = (torch.float32, "forced") if arguments.fp32 else precision
    if arguments.measure:
        measure(arguments.measure, arguments.device, dtype)
        return
    script.describe(arguments.device, dtype, reason)
    if arguments.seeds:
        compare_seeds(arguments)
    else:
        compare_speed(arguments)


if __name__ == "__main__":
    main()
