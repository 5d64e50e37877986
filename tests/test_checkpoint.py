"""Checkpoint: the file on disk is always a whole model, and one that isn't is refused."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import MODEL, TESTS, assert_loads, random_model

import pytorchpractice as script


def save_and_be_killed():
    """Let 30 children save without pause, kill each at another moment, and look at the file."""
    states = [random_model(seed).state_dict() for seed in range(2)]
    script.save(states[0], script.MODEL_PATH)
    interrupted, rng = 0, random.Random(0)
    for _ in range(30):
        child = os.fork()
        while child == 0:
            for state in states:
                script.save(state, script.MODEL_PATH)
        time.sleep(rng.uniform(0.02, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert_loads(MODEL)
        weight = torch.load(MODEL, weights_only=True)["head.weight"]
        assert any(torch.equal(weight, state["head.weight"]) for state in states)
        for path in Path().glob(".*.tmp"):
            interrupted += 1
            path.unlink()
    assert interrupted > 0  # some were hit in the middle of a save


def test_killed_at_any_moment_the_file_is_the_old_one_or_the_new_one(tmp_path):
    """In a process of its own with one thread, since forks inherit no threads."""
    subprocess.run(
        [sys.executable, "-c", "import test_checkpoint as t; t.save_and_be_killed()"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=120,
    )


def test_file_that_is_no_checkpoint_is_refused_in_one_line(tmp_path):
    path = tmp_path / MODEL
    torch.save({"weight": torch.zeros(3)}, path)
    another_model = path.read_bytes()
    script.save(random_model().state_dict(), path)
    cut_short = path.read_bytes()[:100_000]
    for content in (another_model, cut_short, b"not a checkpoint", b""):
        path.write_bytes(content)
        with pytest.raises(OSError, match=MODEL) as failure:
            script.load_model(path)
        assert len(str(failure.value).splitlines()) == 1
