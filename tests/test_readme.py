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
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
STATED = re.search(r"test set, 10,000 images: loss ([\d.]+), accuracy ([\d.]+)%", README)


@pytest.fixture
def shipped(monkeypatch):
    """Run the README's first block in the repository's folder; return the variables it makes."""
    monkeypatch.chdir(ROOT)
    variables = {}
    exec(BLOCKS[0], variables)  # noqa: S102 - the README, as it stands
    return variables


def test_shipped_model_is_whole_and_small_and_classifies_the_sample(shipped, sample):
    """On 200 test images, 0.06 is over three standard deviations of an accuracy of 0.93."""
    assert_loads(ROOT / MODEL)
    assert (ROOT / MODEL).stat().st_size < 20e6
    images, labels = script.as_tensors(sample[1])
    with torch.no_grad():
        predictions = shipped["model"](images / 255).argmax(1)
    accuracy = (predictions == labels).float().mean().item()
    assert accuracy == pytest.approx(float(STATED[2]) / 100, abs=0.06)


def test_shipped_model_scores_what_the_readme_states(shipped, full_data):
    images, labels = script.as_tensors(full_data[1])
    logits, loss, accuracy = script.evaluate(shipped["model"], images, labels, "cpu")
    assert accuracy == pytest.approx(float(STATED[2]) / 100, abs=3e-4)
    assert loss == pytest.approx(float(STATED[1]), abs=1e-3)
    assert accuracy >= 0.93

    # Its probabilities are true: the expected calibration error, over 15 bins (arXiv:1706.04599).
    confidence, predictions = logits.softmax(1).max(1)
    surplus = confidence - (predictions == labels).float()
    error = torch.zeros(15).index_add(0, (confidence * 15).long().clamp(max=14), surplus)
    assert error.abs().sum() / len(labels) <= 0.015


def classify(shipped, capsys):
    """Run the README's block on picture.jpg; return the class and the percentage it prints."""
    exec(BLOCKS[1], shipped)  # noqa: S102 - the README, as it stands
    name, percentage = re.fullmatch(r"(\w+) (\d+)%\n", capsys.readouterr().out).groups()
    return name, int(percentage)


@pytest.mark.parametrize("kind", ["RGB", "L", "RGBA", "P", "CMYK", "turned", "16 bits", "wide"])
def test_a_picture_of_ones_own_is_classified(shipped, kind, tmp_path, capsys, monkeypatch):
    """A photograph that isn't from CIFAR-10, in any mode: Stefan van der Walt's Chelsea (CC0)."""
    monkeypatch.chdir(tmp_path)
    cat = Image.open(TESTS / "cat.jpg")
    cat.save("picture.jpg")
    expected = classify(shipped, capsys)
    assert expected[0] == "cat"
    if kind == "turned":  # as a phone does: the pixels lie on their side, and a tag says so
        exif = Image.Exif()
        exif[0x0112] = 6
        cat.rotate(90, expand=True).save("picture.jpg", exif=exif)
    elif kind == "16 bits":
        grey = np.asarray(cat.convert("L")).astype(np.uint16) * 257
        Image.fromarray(grey).save("picture.jpg", "png")
    elif kind == "wide":  # with as much again beside it, which isn't the cat
        ImageOps.expand(cat, (cat.width // 2, 0), "grey").save("picture.jpg")
    else:
        cat.convert(kind).save("picture.jpg", "png" if kind in ("RGBA", "P") else "jpeg")
    name, percentage = classify(shipped, capsys)
    assert name == "cat"
    if kind in ("RGB", "RGBA", "turned"):
        assert percentage == pytest.approx(expected[1], abs=5)


@pytest.fixture
def exported(shipped, tmp_path, monkeypatch):
    """Run the README's block that exports the model, in an empty folder; return its variables."""
    monkeypatch.chdir(tmp_path)
    exec(BLOCKS[2], shipped)  # noqa: S102 - the README, as it stands
    return shipped


@torch.no_grad()
def test_the_exported_model_predicts_the_same(exported, sample):
    images = script.as_tensors(sample[1])[0][:7] / 255
    expected = exported["model"](images)
    torch.testing.assert_close(exported["exported"](images), expected)
    each = torch.func.vmap(lambda image: exported["model"](image[None])[0])(images)
    torch.testing.assert_close(each, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_onnx_file_predicts_the_same(exported, sample):
    """Where the packages are; they are not among the requirements."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    exec(BLOCKS[3], exported)  # noqa: S102 - the README, as it stands
    assert [path.name for path in Path().glob("*.onnx*")] == ["nnmodel_cifar10.onnx"]
    session = runtime.InferenceSession("nnmodel_cifar10.onnx", providers=["CPUExecutionProvider"])
    images = script.as_tensors(sample[1])[0][:7] / 255
    [logits] = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.tensor(logits), exported["model"](images), rtol=0, atol=1e-4)


def test_core_ml_converts_the_exported_model(exported):
    """Where the package is; its predictions need a Mac."""
    pytest.importorskip("coremltools")
    exec(BLOCKS[4], exported)  # noqa: S102 - the README, as it stands
    assert Path("nnmodel_cifar10.mlpackage").exists()


@pytest.mark.parametrize("classes", [2, 10])
def test_pictures_of_ones_own_are_trained_on(in_folder, sample, monkeypatch, capsys, classes):
    for part, dataset in zip(("train", "test"), sample, strict=True):
        for number, (picture, label) in enumerate(dataset):
            folder = Path("pictures", part, dataset.classes[label])
            if label < classes:
                folder.mkdir(parents=True, exist_ok=True)
                size = (20 + number % 90, 20 + number % 70)
                picture.resize(size).save(folder / f"{number}.{('jpg', 'png', 'webp')[number % 3]}")
    monkeypatch.setattr(script, "load_cifar10", script.load_cifar10)  # to be put back afterwards
    monkeypatch.setattr(script, "WIDTHS", (8, 32, 32))
    assert '"--epochs", "30"' in BLOCKS[5]
    exec(BLOCKS[5].replace('"30"', '"2"'), {})  # noqa: S102 - the README, but sooner
    assert len(re.findall(r"^ +[\d.]+%  \w+$", capsys.readouterr().out, re.MULTILINE)) == classes
    assert len(torch.load(MODEL, weights_only=True)["head.weight"]) == classes
    assert sum(map(bool, BLOCKS[5].splitlines())) <= 10


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
    assert names - {"data"} == set(expected.split())
