"""README and shipped model: what they say is what one gets."""

import re
from pathlib import Path

import benchmark
import numpy as np
import pytest
import torch
from conftest import MODEL, ROOT, TESTS, assert_loads
from PIL import Image, ImageOps

import pytorchpractice as script

README = (ROOT / "README.md").read_text(encoding="utf-8")
CLASSIFY, LOAD, ONNX, CORE_ML = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
STATED = re.search(r"test set, 10,000 images: loss ([\d.]+), accuracy ([\d.]+)%", README)


def run(block, monkeypatch, folder=ROOT, **variables):
    """Run a block of the README, as it stands, in a folder; return the variables it makes."""
    monkeypatch.chdir(folder)
    exec(block, variables)  # noqa: S102 - the README, as it stands
    return variables


def test_shipped_model_is_whole_and_classifies_the_sample(monkeypatch, sample):
    """On 200 test images, 0.06 is over three standard deviations of an accuracy of 0.93."""
    assert_loads(ROOT / MODEL)
    images, labels = script.as_tensors(sample[1])
    model = run(LOAD, monkeypatch)["model"]
    with torch.no_grad():
        predictions = model(images / 255).argmax(1)
    accuracy = (predictions == labels).float().mean().item()
    assert accuracy == pytest.approx(float(STATED[2]) / 100, abs=0.06)


def test_shipped_model_scores_what_the_readme_states(full_data):
    """On the first 2,500 test images: 0.015 is over three standard deviations of an accuracy."""
    images, labels = (part[:2500] for part in script.as_tensors(full_data[1]))
    model = script.to_device(script.load_model(ROOT / MODEL), "cpu")
    logits, loss, accuracy = script.evaluate(model, images, labels, "cpu")
    assert accuracy == pytest.approx(float(STATED[2]) / 100, abs=0.015)
    assert loss == pytest.approx(float(STATED[1]), abs=0.03)

    # Its probabilities are true: the expected calibration error, over 15 bins (arXiv:1706.04599).
    confidence, predictions = logits.softmax(1).max(1)
    surplus = confidence - (predictions == labels).float()
    error = torch.zeros(15).index_add(0, (confidence * 15).long().clamp(max=14), surplus)
    assert error.abs().sum() / len(labels) <= 0.025


@pytest.fixture
def classified(monkeypatch, capsys):
    """Run the README's program; return its variables and the (class, percentage) it prints."""
    variables = run(CLASSIFY, monkeypatch)
    name, percentage = re.fullmatch(r"(\w+) (\d+)%\n", capsys.readouterr().out).groups()
    return variables, name, int(percentage)


@torch.no_grad()
def test_a_picture_of_any_kind_is_read_and_classified(classified, tmp_path):
    """A photograph that isn't from CIFAR-10: Stefan van der Walt's Chelsea (CC0)."""
    variables, name, percentage = classified
    assert name == "cat"
    cat, exif = Image.open(TESTS / "cat.jpg"), Image.Exif()
    exif[0x0112] = 6  # as a phone does: the pixels lie on their side, and this tag says so
    cat.rotate(90, expand=True).save(tmp_path / "turned.jpg", exif=exif)
    grey = np.asarray(cat.convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(tmp_path / "16 bits.png")
    cat.convert("P").save(tmp_path / "palette.png")
    ImageOps.expand(cat, (cat.width // 2, 0), "grey").save(tmp_path / "wide.jpg")
    for path in tmp_path.iterdir():
        probabilities = variables["model"](variables["read_picture"](path)).softmax(1)[0]
        assert variables["classes"][probabilities.argmax()] == "cat", path
        if path.name == "turned.jpg":
            assert 100 * probabilities.max() == pytest.approx(percentage, abs=5)
    Image.new("RGBA", (50, 50)).save(tmp_path / "transparent.png")  # black, but can't be seen
    assert variables["read_picture"](tmp_path / "transparent.png").min() == 1  # white


@torch.no_grad()
def test_the_onnx_file_predicts_the_same(monkeypatch, tmp_path, sample):
    """Where the packages are; they are not among the requirements."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = script.load_model(ROOT / MODEL)
    run(ONNX, monkeypatch, tmp_path, torch=torch, model=model)
    assert [path.name for path in Path().glob("*.onnx*")] == ["nnmodel_cifar10.onnx"]
    session = runtime.InferenceSession("nnmodel_cifar10.onnx", providers=["CPUExecutionProvider"])
    images = script.as_tensors(sample[1])[0][:7] / 255
    [logits] = session.run(["logits"], {"images": images.numpy()})
    torch.testing.assert_close(torch.tensor(logits), model(images), rtol=0, atol=1e-4)


def test_core_ml_converts_the_exported_model(monkeypatch, tmp_path):
    """Where the package is; its predictions need a Mac."""
    pytest.importorskip("coremltools")
    pytest.importorskip("onnxscript")
    model = script.load_model(ROOT / MODEL)
    run(ONNX + CORE_ML, monkeypatch, tmp_path, torch=torch, model=model)
    assert Path("nnmodel_cifar10.mlpackage").exists()


def test_the_table_of_parts_has_the_names_that_the_benchmark_takes():
    rows = re.findall(r"^\|([^|]+)\|[^|]+\|[+-][\d.]+\|", README, re.MULTILINE)
    assert sorted(rows) == sorted(benchmark.PARTS)


def test_requirements_are_those_of_the_script():
    source = (ROOT / "pytorchpractice.py").read_text(encoding="utf-8")
    metadata = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", source, re.MULTILINE)[1]
    stated = set(re.findall(r'"(.*?)"', metadata.partition("dependencies = ")[2]))
    assert stated == set((ROOT / "requirements.txt").read_text().split())


def test_top_level_holds_what_it_should():
    names = {path.name for path in ROOT.iterdir() if not path.name.startswith((".", "__"))}
    expected = "pytorchpractice.py tests README.md requirements.txt nnmodel_cifar10.pt figures"
    made = {"data", "classify.py", "nnmodel_cifar10.onnx", "nnmodel_cifar10.mlpackage"}
    assert names - made == set(expected.split())
