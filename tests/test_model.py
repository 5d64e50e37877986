"""Model: what goes in and comes out, and how it looks at an image."""

import pytest
import torch
import torch.nn.functional as F
from conftest import random_model
from torch import nn

import pytorchpractice as script


def convolutions(model):
    return [module for module in model.blocks.modules() if isinstance(module, nn.Conv2d)]


def first(kind, block):
    return next(module for module in block.modules() if isinstance(module, kind))


def test_images_in_logits_out():
    logits = random_model()(torch.rand(7, 3, 32, 32))
    assert logits.shape == (7, 10)
    assert logits.dtype == torch.float32
    assert script.CIFARNet(n_classes=3)(torch.rand(2, 3, 32, 32)).shape == (2, 3)
    assert random_model()(torch.rand(2, 3, 20, 20)).shape == (2, 10)


@pytest.mark.parametrize("size", [(15, 15), (8, 8), (7, 10)])
def test_padding_leaves_out_only_what_pooling_drops(size):
    block = random_model().blocks[0].eval()
    conv, norm = first(nn.Conv2d, block), first(nn.BatchNorm2d, block)
    nn.init.normal_(conv.weight)
    images = torch.randn(2, conv.in_channels, *size)
    seen = []
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    block(images)
    whole = F.conv2d(images, conv.weight, padding=1)
    torch.testing.assert_close(seen[0], F.max_pool2d(whole, 2))


def test_convolutions_start_as_the_identity():
    for conv in convolutions(random_model()):
        x = torch.randn(2, conv.in_channels, 6, 6)
        y = F.conv2d(x, conv.weight, padding=conv.kernel_size[0] // 2)
        torch.testing.assert_close(y[:, : conv.in_channels], x)


@pytest.fixture
def looks(monkeypatch):
    """Return a model that is sure of dark images and unsure of bright ones, and its looks.

    A look is the images that it was given and the logits that it returned.
    """
    model, looks = random_model(), []

    def look(images):
        dark = images.mean((1, 2, 3)) < 0.5
        certain = F.one_hot(torch.arange(len(images)) % 10, 10) * 100.0
        logits = torch.where(dark[:, None], certain, torch.rand(len(images), 10))
        looks.append((images, logits.clone()))
        return logits

    monkeypatch.setattr(model, "look", look)
    return model, looks


BRIGHT = torch.tensor([True, False, False, True, True, False])


def images_of_two_kinds():
    return torch.rand(6, 3, 32, 32) * 0.4 + 0.6 * BRIGHT[:, None, None, None]


def test_eval_looks_again_at_the_images_it_is_unsure_about(looks):
    model, looks = looks
    logits = model.eval()(images_of_two_kinds())
    (_, once), *again = looks
    assert [len(images) for images, _ in again] == [3, 3, 3]
    assert torch.equal(logits[~BRIGHT], once[~BRIGHT])
    mean = torch.stack([once[BRIGHT], *(logits for _, logits in again)]).mean(0)
    torch.testing.assert_close(logits[BRIGHT], mean)


def test_other_looks_are_at_the_image_mirrored_and_shifted_by_a_pixel(looks):
    model, looks = looks
    images = images_of_two_kinds()
    model.eval()(images)
    padded = F.pad(images[BRIGHT], (1, 1, 1, 1), mode="reflect")
    shifted = [padded[:, :, y : y + 32, x : x + 32] for y in range(3) for x in range(3)]
    candidates = [*shifted, *(view.flip(3) for view in shifted)]
    seen = [
        [i for i, view in enumerate(candidates) if torch.equal(view, given)]
        for given, _ in looks[1:]
    ]
    assert all(len(which) == 1 for which in seen)
    assert len({which[0] for which in seen} - {4}) == 3  # 4 is the image itself


def test_training_takes_one_look(looks):
    model, looks = looks
    model.train()(images_of_two_kinds())
    assert [len(images) for images, _ in looks] == [6]


def test_first_layer_whitens_the_training_patches(sample):
    model = script.CIFARNet()
    images, _ = script.as_tensors(sample[0])
    model.init_whiten(images)
    pixels = images / 255
    with torch.no_grad():
        responses = model.whiten((pixels - model.mean) / model.std)
    responses = responses.transpose(0, 1).flatten(1)[:12]
    covariance = responses @ responses.T / responses.shape[1]
    assert covariance.diagonal().max() < 1.01
    assert covariance.diagonal().min() > 0.5
    off_diagonal = covariance - covariance.diagonal().diag()
    assert off_diagonal.abs().max() < 0.01
    torch.testing.assert_close(model.whiten.weight[:12], -model.whiten.weight[12:])
