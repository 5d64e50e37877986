"""README and shipped model: what they say is what one gets."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MODEL, ROOT, TESTS, assert_loads
from PIL import Image

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
        cat.convert("L").save("grey.png")
    elif kind == "wide":  # with as much again beside it, which isn't the cat
        wide = Image.new("RGB", (2 * cat.width, cat.height), "grey")
        wide.paste(cat, (cat.width // 2, 0))
        wide.save("picture.jpg")
    else:
        cat.convert(kind).save("picture.jpg", "png" if kind in ("RGBA", "P") else "jpeg")
    name, percentage = classify(shipped, capsys)
    assert name == "cat"
    if kind in ("RGB", "RGBA", "turned"):
        assert percentage == pytest.approx(expected[1], abs=5)


def test_the_exported_model_predicts_the_same(shipped, sample, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(BLOCKS[2], shipped)  # noqa: S102 - the README, as it stands
    exported = torch.export.load(*Path().glob("*.pt2")).module()
    images = script.as_tensors(sample[1])[0][:7] / 255
    with torch.no_grad():
        torch.testing.assert_close(exported(images), shipped["model"](images))
        each = torch.func.vmap(lambda image: shipped["model"](image[None])[0])(images)
        torch.testing.assert_close(each, shipped["model"](images), rtol=1e-3, atol=1e-3)


def test_requirements_are_those_of_the_script():
    source = (ROOT / "pytorchpractice.py").read_text(encoding="utf-8")
    metadata = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", source, re.MULTILINE)[1]
    dependencies = re.search(r"dependencies = \[(.*?)\]", metadata, re.DOTALL)[1]
    stated = set(re.findall(r'"(.*?)"', dependencies))
    assert stated == set((ROOT / "requirements.txt").read_text().split())


def test_top_level_holds_what_it_should():
    names = {path.name for path in ROOT.iterdir() if not path.name.startswith((".", "__"))}
    documents = {"README.md", "requirements.txt"}
    made_by_a_run = {"nnmodel_cifar10.pt", "figures"}
    assert names - {"data"} == {"pytorchpractice.py", "tests", *documents, *made_by_a_run}
