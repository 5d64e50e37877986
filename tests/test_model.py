"""Model: what goes in and comes out, and how it looks at an image."""

import pytest
import torch
import torch.nn.functional as F
from conftest import random_model
from torch import nn

import pytorchpractice as script


def test_images_in_logits_out():
    logits = random_model()(torch.rand(7, 3, 32, 32))
    assert logits.shape == (7, 10)
    assert logits.dtype == torch.float32
    assert script.CIFARNet(n_classes=3)(torch.rand(2, 3, 20, 20)).shape == (2, 3)


@pytest.mark.parametrize("size", [(15, 15), (8, 8), (7, 10)])
def test_padding_leaves_out_only_what_pooling_drops(size):
    block = random_model().blocks[0].eval()
    nn.init.normal_(block.conv1.weight)
    images = torch.randn(2, block.conv1.in_channels, *size)
    seen = []
    block.norm1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    block(images)
    whole = F.conv2d(images, block.conv1.weight, padding=block.conv1.kernel_size[0] // 2)
    torch.testing.assert_close(seen[0], F.max_pool2d(whole, 2))


def test_convolutions_start_as_the_identity():
    layers = random_model().blocks.modules()
    for conv in [layer for layer in layers if isinstance(layer, nn.Conv2d)]:
        x = torch.randn(2, conv.in_channels, 6, 6)
        y = F.conv2d(x, conv.weight, padding=conv.kernel_size[0] // 2)
        torch.testing.assert_close(y[:, : conv.in_channels], x)


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
def test_eval_takes_three_more_looks_where_it_is_unsure_and_training_takes_one(monkeypatch):
    model, images, looks = random_model().eval(), torch.rand(6, 3, 32, 32), []
    look, confidence = model.look, model.look(images).softmax(1).amax(1)
    monkeypatch.setattr(script, "SURE", confidence.mean().item())
    unsure = confidence < script.SURE

    def look_and_record(images):
        looks.append((images, look(images)))
        return looks[-1][1].clone()

    monkeypatch.setattr(model, "look", look_and_record)
    logits = model(images)
    (_, once), *again = looks
    assert torch.equal(logits[~unsure], once[~unsure] / script.TEMPERATURE)
    mean = torch.stack([once[unsure], *(logits for _, logits in again)]).mean(0)
    torch.testing.assert_close(logits[unsure], mean / script.TEMPERATURE)

    # The other looks are at the image mirrored or shifted by a pixel, each at another view.
    padded = F.pad(images[unsure], (1, 1, 1, 1), mode="reflect")
    views = [padded[:, :, y : y + 32, x : x + 32] for y in range(3) for x in range(3)]
    views += [view.flip(3) for view in views]
    seen = {i for given, _ in again for i, view in enumerate(views) if torch.equal(view, given)}
    assert len(seen - {4}) == len(again) == 3  # 4 is the image itself

    looks.clear()
    model.train()(images)
    assert len(looks) == 1
