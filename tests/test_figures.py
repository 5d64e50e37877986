"""Figures: what is drawn is what was recorded."""

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
    [ax] = draw(script.plot_loss, script.History([2.0, 1.5, 1.0], [1.9, 1.2, 1.4]))
    training, validation, mark = ax.lines
    assert list(training.get_xdata()) == list(validation.get_xdata()) == [1, 2, 3]
    assert list(training.get_ydata()) == [2.0, 1.5, 1.0]
    assert list(validation.get_ydata()) == [1.9, 1.2, 1.4]
    assert set(mark.get_xdata()) == {2}
    assert all(tick == int(tick) for tick in ax.get_xticks())


def test_accuracy_figure_shows_every_batch_that_was_run():
    """A run that was stopped leaves NaN for the batches that it hasn't run."""
    recorded = np.array([[0.1, 0.2], [0.3, np.nan], [np.nan, np.nan]])
    [ax] = draw(script.plot_accuracy, recorded)
    batches, *starts = ax.lines
    np.testing.assert_allclose(batches.get_ydata(), [0.1, 0.2, 0.3])
    assert [line.get_xdata()[0] for line in starts] == [0, 2]
    means = [collection.get_segments()[0][0][1] for collection in ax.collections]
    assert means == pytest.approx([0.15, 0.3])
    assert [text.get_text() for text in ax.texts] == ["E1", "E2"]


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
