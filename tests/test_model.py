"""Model: what goes in and comes out, and how it looks at an image."""

import pytest
import torch
import torch.nn.functional as F
from conftest import random_model
from torch import nn

import pytorchpractice as script


def test_images_in_logits_out():
    assert random_model()(torch.rand(7, 3, 32, 32)).shape == (7, 10)
    assert script.CIFARNet(n_classes=3)(torch.rand(2, 3, 24, 24)).shape == (2, 3)


@pytest.mark.parametrize("size", sorted({size for _, size in script.SIZES}))
def test_pooling_drops_nothing_at_any_size_of_the_training(size):
    model, maps = random_model(), []
    for block in model.blocks:
        block.conv1.register_forward_hook(lambda *hooked: maps.append(hooked[-1].shape[2:]))
    model(torch.rand(2, 3, size, size))
    assert len(maps) == 3
    assert all(side % 2 == 0 for shape in maps for side in shape)


def test_convolutions_start_as_the_identity():
    layers = random_model().blocks.modules()
    for conv in [layer for layer in layers if isinstance(layer, nn.Conv2d)]:
        x = torch.randn(2, conv.in_channels, 6, 6)
        aside = 1 if conv.kernel_size == (2, 2) else 0  # its lower right corner does the copying
        torch.testing.assert_close(conv(x)[:, : conv.in_channels], x[:, :, aside:, aside:])


def test_first_layer_whitens_the_training_patches(sample):
    model = script.CIFARNet()
    images, _ = script.as_tensors(sample[0])
    model.init_whiten(images)
    with torch.no_grad():
        responses = model.whiten((images / 255 - model.mean) / model.std)
    responses = responses.transpose(0, 1).flatten(1)[:12]
    covariance = responses @ responses.T / responses.shape[1]
    assert covariance.diagonal().max() < 1.01
    assert covariance.diagonal().min() > 0.5
    assert (covariance - covariance.diagonal().diag()).abs().max() < 0.01
    torch.testing.assert_close(model.whiten.weight[:12], -model.whiten.weight[12:])


@torch.no_grad()
def test_eval_takes_the_mean_of_four_looks_and_training_takes_one(monkeypatch):
    model, images, looks = random_model().eval(), torch.rand(6, 3, 32, 32), []
    model.temperature.fill_(0.5)
    look = model.look

    def look_and_record(images):
        looks.append((images, look(images)))
        return looks[-1][1]

    monkeypatch.setattr(model, "look", look_and_record)
    logits = model(images)
    torch.testing.assert_close(logits, torch.stack([given for _, given in looks]).mean(0) / 0.5)
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    views = [padded[:, :, y : y + 32, x : x + 32] for y in range(3) for x in range(3)]
    views += [view.flip(3) for view in views]
    seen = {i for given, _ in looks for i, view in enumerate(views) if torch.equal(view, given)}
    assert len(seen) == len(looks) == 4
    assert 4 in seen  # the image itself
    assert torch.equal(model.train()(images), looks[-1][1])  # one look, and no temperature
