"""README and shipped model: what they say is what one gets."""

import re

import pytest
import torch
from conftest import ROOT, TESTS, assert_loads
from PIL import Image

import pytorchpractice as script

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
STATED = re.search(r"test set, 10,000 images: loss ([\d.]+), accuracy ([\d.]+)%", README)


@pytest.fixture
def shipped(monkeypatch):
    """Run the README's first block in the repository's folder; return the variables it makes."""
    monkeypatch.chdir(ROOT)
    variables = {}
    exec(BLOCKS[0], variables)  # noqa: S102 - the README, as it stands
    return variables


def test_shipped_model_is_whole_and_small():
    assert_loads(ROOT / "nnmodel_cifar10.pt")
    assert (ROOT / "nnmodel_cifar10.pt").stat().st_size < 20e6


def test_shipped_model_loaded_by_hand_classifies_the_sample(shipped, sample):
    """On 200 test images, 0.06 is over three standard deviations of an accuracy of 0.93."""
    images, labels = script.as_tensors(sample[1], "cpu")
    with torch.no_grad():
        _, accuracy = script.score(shipped["model"](images / 255), labels)
    assert accuracy == pytest.approx(float(STATED[2]) / 100, abs=0.06)


def test_shipped_model_scores_what_the_readme_states(shipped, full_data):
    images, labels = script.as_tensors(full_data[1], "cpu")
    loss, accuracy = script.score(script.predict(shipped["model"], images), labels)
    assert accuracy == pytest.approx(float(STATED[2]) / 100, abs=3e-4)
    assert loss == pytest.approx(float(STATED[1]), abs=1e-3)
    assert accuracy >= 0.93


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
def test_a_picture_of_ones_own_is_classified(shipped, mode, tmp_path, capsys, monkeypatch):
    """A photograph that isn't from CIFAR-10, in any mode: Stefan van der Walt's Chelsea (CC0)."""
    monkeypatch.chdir(tmp_path)
    picture = Image.open(TESTS / "cat.jpg").convert(mode)
    picture.save("picture.jpg", "png" if mode in ("RGBA", "P") else "jpeg")
    exec(BLOCKS[1], shipped)  # noqa: S102 - the README, as it stands
    assert re.fullmatch(r"cat \d\d%\n", capsys.readouterr().out)


def test_readme_names_the_first_two_commands_and_the_settings():
    for line in ("    pip install -r requirements.txt\n", "    python pytorchpractice.py\n"):
        assert line in README
    assert f"crops of {script.CROP_SIZE}×{script.CROP_SIZE} pixels" in README
    assert f"images in a batch ({script.BATCH_SIZE})" in README
    assert f"probability under {script.SURE}, it" in README
    assert f"smoothing](https://arxiv.org/abs/1512.00567) of {script.LABEL_SMOOTHING}" in README


def test_top_level_holds_what_it_should():
    names = {path.name for path in ROOT.iterdir() if not path.name.startswith((".", "__"))}
    ignored = {"data"}
    assert names - ignored == {
        "pytorchpractice.py",
        "figures",
        "nnmodel_cifar10.pt",
        "README.md",
        "requirements.txt",
        "tests",
    }
