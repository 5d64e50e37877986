"""Batches and split: each image once, with its label, shifted, mirrored in turn, small at first."""

import pytest
import torch
import torch.nn.functional as F

import pytorchpractice as script


def serve(images, *, batch_size=50):
    """Return TrainingBatches of these images, labelled with their numbers."""
    return script.TrainingBatches(images, torch.arange(len(images)), batch_size, 0, "cpu")


def test_an_epoch_serves_each_image_once_with_its_label_shifted_or_mirrored(sample):
    images, _ = script.as_tensors(sample[0])
    served = list(serve(images, batch_size=70).epoch(32))
    numbers = torch.cat([labels for _, labels in served])
    assert len(numbers.unique()) == len(numbers) == 600 // 70 * 70
    for batch, labels in served:
        padded = F.pad(images[labels] / 255, (script.MAX_SHIFT,) * 4, mode="reflect")
        shifted = padded.unfold(2, 32, 1).unfold(3, 32, 1).flatten(2, 3)  # (70, 3, places, 32, 32)
        sides = batch[:, :, None], batch[:, :, None].flip(4)
        found = torch.cat([(shifted == side).all(4).all(3).all(1) for side in sides], dim=1)
        assert found.any(1).all()
        assert found.any(0).sum() > 5  # in many ways


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


@pytest.mark.parametrize("size", [16, 24, 32])
def test_small_images_are_whole_images_made_smaller(size):
    images = F.pad(torch.full((50, 3, 16, 16), 255, dtype=torch.uint8), (8,) * 4)  # a white quarter
    [(batch, _)] = serve(images).epoch(size)
    assert batch.shape == (50, 3, size, size)
    torch.testing.assert_close(batch.mean((1, 2, 3)), torch.full((50,), 0.25), atol=0.04, rtol=0)


def test_split_is_disjoint_whole_and_of_the_seed(sample):
    images, _ = script.as_tensors(sample[0])
    sample[0].targets = list(range(len(images)))  # as labels, their numbers
    splits = [script.set_up_training(sample[0], seed, 50, "cpu")[1:] for seed in (3, 3, 4)]
    training, again, other = (batches.labels.tolist() for batches, _ in splits)
    held_out, numbers = splits[0][1]
    assert len(numbers) == script.VALIDATION_IMAGES
    assert sorted([*training, *numbers.tolist()]) == list(range(len(images)))
    assert torch.equal(held_out, images[numbers])
    assert training == again
    assert set(training) != set(other)
