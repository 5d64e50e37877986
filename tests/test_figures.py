"""Figures: what is drawn is what was recorded."""

import itertools

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import pytorchpractice as script


def draw(plot, *data):
    """Draw in a figure; return its axes."""
    fig = Figure()
    plot(fig, *data)
    fig.canvas.draw()
    return fig.axes


def test_loss_figure_shows_both_losses_and_marks_the_kept_epoch():
    [ax] = draw(script.plot_loss, [(2.0, 1.9), (1.5, 1.2), (1.0, 1.4)])
    training, validation, mark = ax.lines
    assert list(training.get_xdata()) == list(validation.get_xdata()) == [1, 2, 3]
    assert list(training.get_ydata()) == [2.0, 1.5, 1.0]
    assert list(validation.get_ydata()) == [1.9, 1.2, 1.4]
    assert set(mark.get_xdata()) == {2}
    assert all(tick == int(tick) for tick in ax.get_xticks())


@pytest.mark.parametrize("epochs", [1, 2, 10, 100])
def test_loss_figure_of_any_length_has_whole_epochs_and_a_label_inside(epochs):
    [ax] = draw(script.plot_loss, [(2 / epoch, 2 / epoch) for epoch in range(1, epochs + 1)])
    left, right = ax.get_xlim()
    ticks = [tick for tick in ax.get_xticks() if left <= tick <= right]
    assert ticks
    assert all(tick == int(tick) for tick in ticks)
    [label] = ax.texts
    box, frame = label.get_window_extent(), ax.get_window_extent()
    assert frame.x0 < box.x0 < box.x1 < frame.x1
    assert label.get_text() == f"saved: epoch {epochs}"


def test_accuracy_figure_shows_every_batch_that_was_run():
    [ax] = draw(script.plot_accuracy, [torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.5])])
    batches, *starts = ax.lines
    np.testing.assert_allclose(batches.get_ydata(), [0.1, 0.2, 0.3, 0.5])
    assert [line.get_xdata()[0] for line in starts] == [0, 2]
    means = [collection.get_segments()[0][0][1] for collection in ax.collections]
    assert means == pytest.approx([0.15, 0.4])
    assert [text.get_text() for text in ax.texts] == ["E1", "E2"]


@pytest.mark.parametrize("epochs", [1, 10, 16, 60, 100, 2000])
def test_accuracy_figure_of_any_length_has_labels_that_do_not_touch(epochs):
    [ax] = draw(script.plot_accuracy, list(torch.rand(epochs, 3)))
    boxes = [text.get_window_extent() for text in ax.texts]
    assert 1 <= len(boxes) <= 20
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))
    assert len(ax.collections) == epochs  # a mean each


def test_grid_tells_right_from_wrong_in_true_colours():
    images = torch.randint(256, (12, 3, 32, 32), dtype=torch.uint8)
    predictions, labels = torch.tensor([0, 1] * 6), torch.zeros(12, dtype=torch.int64)
    logits = torch.nn.functional.one_hot(predictions, 3) * 100.0
    axes = draw(script.plot_predictions, images, logits, labels, ["cat", "dog", "ship"])
    for image, prediction, ax in zip(images, predictions, axes, strict=True):
        assert torch.equal(torch.as_tensor(ax.images[0].get_array()), image.permute(1, 2, 0))
        wrong = prediction == 1
        assert ax.get_title() == ("✗ dog\n100%" if wrong else "cat\n100%")
        assert ax.get_xlabel() == "cat"
        assert (ax.xaxis.label.get_weight() == "bold") == wrong
        assert (ax.spines["left"].get_linewidth() > 2) == wrong
