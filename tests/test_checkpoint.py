"""Checkpoint: the file on disk is always a whole model, whatever happens."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import MODEL, TESTS, assert_loads, fill, no_debris, random_model

import pytorchpractice as script


def test_the_file_gives_the_same_predictions_by_hand(tmp_path):
    model = random_model()
    script.Checkpoint(tmp_path / MODEL).keep(model, epoch=1, loss=1.0)
    assert_loads(tmp_path / MODEL)
    assert (tmp_path / MODEL).stat().st_size < 20e6
    loaded = script.CIFARNet()
    loaded.load_state_dict(torch.load(tmp_path / MODEL, weights_only=True))
    images = torch.rand(5, 3, 32, 32)
    assert torch.equal(loaded.eval()(images), model.eval()(images))


def test_channels_last_weights_are_saved_contiguous(tmp_path):
    model = random_model().to(memory_format=torch.channels_last)
    assert not model.blocks[0].conv1.weight.is_contiguous()
    script.Checkpoint(tmp_path / MODEL).keep(model, epoch=1, loss=1.0)
    assert_loads(tmp_path / MODEL)


def test_what_is_kept_does_not_change_with_the_model(tmp_path):
    model = random_model()
    checkpoint = script.Checkpoint(tmp_path / MODEL)
    checkpoint.keep(model, epoch=1, loss=1.0)
    with torch.no_grad():
        model.head.weight.zero_()
    assert checkpoint.state["head.weight"].abs().sum() > 0


def save_and_be_killed():
    """Let 50 children save without pause, kill each at another moment, and look at the file."""
    models = [random_model(seed) for seed in range(2)]
    known = [model.head.weight.detach().clone() for model in models]
    script.Checkpoint(script.MODEL_PATH).keep(models[0], epoch=1, loss=1.0)
    interrupted, rng = 0, random.Random(0)
    for _ in range(50):
        child = os.fork()
        if child == 0:
            while True:
                for model in models:
                    script.Checkpoint(script.MODEL_PATH).keep(model, epoch=1, loss=1.0)
        time.sleep(rng.uniform(0.02, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert_loads(MODEL)
        weight = torch.load(MODEL, weights_only=True)["head.weight"]
        assert any(torch.equal(weight, other) for other in known)
        interrupted += not no_debris(".")
        script.clear_debris()
        assert no_debris(".")
    assert interrupted > 0  # some were hit in the middle of a save


def save_from_two_processes():
    """Save 40 times from two processes at once, and look at the file each time."""
    model = random_model()
    script.Checkpoint(script.MODEL_PATH).keep(model, epoch=1, loss=1.0)
    child = os.fork()
    for _ in range(40):
        script.Checkpoint(script.MODEL_PATH).keep(model, epoch=1, loss=1.0)
        assert_loads(MODEL)
    if child == 0:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert_loads(MODEL)
    assert no_debris(".")


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


def test_full_disk_keeps_the_old_file_and_the_best_weights(small_disk):
    old, new = random_model(0), random_model(1)
    script.Checkpoint(small_disk / MODEL).keep(old, epoch=1, loss=1.0)
    before = (small_disk / MODEL).read_bytes()
    filler = fill(small_disk)

    checkpoint = script.Checkpoint(small_disk / MODEL)
    checkpoint.keep(new, epoch=2, loss=0.5)
    assert "No space left" in checkpoint.fault
    assert (small_disk / MODEL).read_bytes() == before
    assert no_debris(small_disk)

    filler.unlink()  # it has no room for two checkpoints: make some as a user would
    (small_disk / MODEL).unlink()
    checkpoint.save()
    assert checkpoint.fault is None
    saved = torch.load(small_disk / MODEL, weights_only=True)
    assert torch.equal(saved["head.weight"], new.head.weight)


def test_interrupted_while_saving_it_knows_that_the_file_is_old(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    checkpoint = script.Checkpoint(tmp_path / MODEL)
    checkpoint.keep(random_model(0), epoch=1, loss=1.0)
    new = random_model(1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.keep(new, epoch=2, loss=0.5)
    assert checkpoint.fault
    assert torch.equal(checkpoint.model().head.weight, new.head.weight)
    checkpoint.save()
    assert checkpoint.fault is None
    saved = torch.load(tmp_path / MODEL, weights_only=True)
    assert torch.equal(saved["head.weight"], new.head.weight)
    assert no_debris(tmp_path)


def test_folder_turned_read_only_keeps_the_old_file(small_disk):
    script.Checkpoint(small_disk / MODEL).keep(random_model(0), epoch=1, loss=1.0)
    before = (small_disk / MODEL).read_bytes()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    checkpoint = script.Checkpoint(small_disk / MODEL)
    checkpoint.keep(random_model(1), epoch=2, loss=0.5)
    assert "Read-only" in checkpoint.fault
    assert (small_disk / MODEL).read_bytes() == before
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_file_that_is_no_checkpoint_is_one_line(tmp_path, content):
    if content is None:
        torch.save({"weight": torch.zeros(3)}, tmp_path / MODEL)
    else:
        (tmp_path / MODEL).write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        script.load_model(tmp_path / MODEL)
    assert "isn't a checkpoint of this model" in stop.value.code
    assert "\n" not in stop.value.code
