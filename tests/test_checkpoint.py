"""Checkpoint: the file on disk is always a whole model, and one that isn't is refused."""

import io
import os
import random
import re
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


ADVICE = re.compile("weights_only|trust|Errno")  # what a user can't act on here, or shouldn't
STATE = random_model().state_dict()
WHOLE = io.BytesIO()
torch.save(STATE, WHOLE)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"<!DOCTYPE html><html><body>Not found</body></html>", "not a whole file of torch's"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0a", "not a whole file"),
        (b"", "not a whole file"),
        (WHOLE.getvalue()[:100_000], "not a whole file"),
        ({"weight": torch.zeros(3)}, "its weights aren't there, but weight"),
        ([torch.zeros(3)], "its weights aren't there, but list"),
        (torch.zeros(3), "its weights aren't there, but Tensor"),
        ({"epoch": 3, "state_dict": {}}, "its weights aren't there, but epoch, state_dict"),
        (
            torch.nn.DataParallel(random_model()).state_dict(),
            r"there, but module\.mean, module\.std",
        ),
        (random_model(), "it holds more than weights"),
        (
            {**STATE, "head.weight": torch.zeros(10, 32)},
            r"size mismatch for head\.weight.* torch\.",
        ),
        ({n: t for n, t in STATE.items() if n != "whiten.bias"}, r'Missing key.* "whiten\.bias"'),
    ],
)
def test_file_that_is_no_checkpoint_is_refused_in_one_line_that_says_why(tmp_path, content, reason):
    path = tmp_path / MODEL
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(OSError, match=f"{MODEL} isn't a checkpoint.*{reason}") as failure:
        script.load_model(path)
    assert len(str(failure.value).splitlines()) == 1
    assert not ADVICE.search(str(failure.value))


def test_a_link_stays_a_link_and_what_it_points_to_is_replaced(tmp_path):
    target, link = tmp_path / "disk" / "model.pt", tmp_path / MODEL
    target.parent.mkdir()
    target.write_bytes(b"old")
    link.symlink_to(target)
    script.save(random_model().state_dict(), link)
    assert link.is_symlink()
    assert_loads(target)
