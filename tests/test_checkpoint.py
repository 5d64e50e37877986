"""Checkpoint: the file on disk is always a whole model, and one that isn't is refused."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import MODEL, TESTS, assert_loads, half_written, random_model

import pytorchpractice as script


def test_the_file_gives_the_same_predictions_by_hand(tmp_path):
    model = random_model().eval()
    script.save(model.state_dict(), tmp_path / MODEL)
    loaded = script.CIFARNet()
    loaded.load_state_dict(torch.load(tmp_path / MODEL, weights_only=True))
    images = torch.rand(5, 3, 32, 32)
    assert torch.equal(loaded.eval()(images), model(images))
    assert not half_written(tmp_path)


def save_and_be_killed():
    """Let 30 children save without pause, kill each at another moment, and look at the file."""
    states = [random_model(seed).state_dict() for seed in range(2)]
    script.save(states[0], script.MODEL_PATH)
    interrupted, rng = 0, random.Random(0)
    for _ in range(30):
        child = os.fork()
        if child == 0:
            while True:
                for state in states:
                    script.save(state, script.MODEL_PATH)
        time.sleep(rng.uniform(0.02, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert_loads(MODEL)
        weight = torch.load(MODEL, weights_only=True)["head.weight"]
        assert any(torch.equal(weight, state["head.weight"]) for state in states)
        interrupted += bool(half_written("."))
        for path in half_written("."):
            path.unlink()
    assert interrupted > 0  # some were hit in the middle of a save


def save_from_two_processes():
    """Save 20 times from two processes at once, and look at the file each time."""
    state = random_model().state_dict()
    script.save(state, script.MODEL_PATH)
    child = os.fork()
    for _ in range(20):
        script.save(state, script.MODEL_PATH)
        assert_loads(MODEL)
    if child == 0:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert_loads(MODEL)
    assert not half_written(".")


def run_alone(function, folder):
    """Run a function of this file in a process with one thread, since forks inherit no threads."""
    subprocess.run(
        [sys.executable, "-c", f"import conftest, test_checkpoint as t; t.{function.__name__}()"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=120,
    )


def test_killed_at_any_moment_the_file_is_the_old_one_or_the_new_one(tmp_path):
    run_alone(save_and_be_killed, tmp_path)


def test_two_writers_at_once_leave_a_whole_file(tmp_path):
    run_alone(save_from_two_processes, tmp_path)


@pytest.mark.parametrize(("owner", "name"), [(Path, "write_bytes"), (os, "replace")])
def test_a_save_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch, owner, name):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    script.save(random_model(0).state_dict(), tmp_path / MODEL)
    before = (tmp_path / MODEL).read_bytes()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(owner, name, fail)
        script.save(random_model(1).state_dict(), tmp_path / MODEL)
    assert [path.name for path in tmp_path.iterdir()] == [MODEL]
    assert (tmp_path / MODEL).read_bytes() == before


@pytest.mark.parametrize("content", ["empty", "text", "another model", "cut short", "missing"])
def test_file_that_is_no_checkpoint_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / MODEL
    if content == "another model":
        torch.save({"weight": torch.zeros(3)}, path)
    elif content == "cut short":
        script.save(random_model().state_dict(), path)
        path.write_bytes(path.read_bytes()[:100_000])
    elif content != "missing":
        path.write_bytes(b"" if content == "empty" else b"not a checkpoint")
    with pytest.raises(OSError, match=MODEL) as failure:
        script.load_model(path)
    assert len(str(failure.value).splitlines()) == 1
