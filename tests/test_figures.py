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


def draw_loss(train_loss, validation_loss):
    state = {"best": "state"}
    history = script.History(train_loss, validation_loss, best_state=state)
    return draw(script.plot_loss, history)[0]


def test_loss_figure_shows_both_losses_and_marks_the_kept_epoch():
    ax = draw_loss([2.0, 1.5, 1.0], [1.9, 1.2, 1.4])
    training, validation, mark = ax.lines
    assert list(training.get_xdata()) == list(validation.get_xdata()) == [1, 2, 3]
    assert list(training.get_ydata()) == [2.0, 1.5, 1.0]
    assert list(validation.get_ydata()) == [1.9, 1.2, 1.4]
    assert set(mark.get_xdata()) == {2}
    assert all(tick == int(tick) for tick in ax.get_xticks())


@pytest.mark.parametrize("finished", [True, False])
def test_accuracy_figure_shows_every_batch_that_was_run(finished):
    """A run that was stopped leaves NaN for the batches that it hasn't run."""
    nan = np.nan
    recorded = [[0.1, 0.2], [0.3, 0.5], [0.6, 0.8]]
    if not finished:
        recorded = [[0.1, 0.2], [0.3, nan], [nan, nan]]
    ax = draw(script.plot_accuracy, np.array(recorded))[0]
    batches, *starts = ax.lines
    np.testing.assert_allclose(
        batches.get_ydata(), [0.1, 0.2, 0.3, 0.5, 0.6, 0.8][: 6 if finished else 3]
    )
    epochs = 3 if finished else 2
    assert [line.get_xdata()[0] for line in starts] == [0, 2, 4][:epochs]
    means = [collection.get_segments()[0][0][1] for collection in ax.collections]
    assert means == pytest.approx([0.15, 0.4, 0.7] if finished else [0.15, 0.3])
    assert len(ax.texts) == epochs


def test_grid_tells_right_from_wrong_in_true_colours():
    images = torch.randint(256, (12, 3, 32, 32), dtype=torch.uint8)
    logits = torch.full((12, 3), -100.0)
    labels = torch.zeros(12, dtype=torch.int64)
    predictions = torch.tensor([0, 1] * 6)
    logits[range(12), predictions] = 0.0
    classes = ["cat", "dog", "ship"]
    axes = draw(script.plot_predictions, images, logits, labels, classes)
    for image, prediction, ax in zip(images, predictions, axes, strict=True):
        assert torch.equal(torch.as_tensor(ax.images[0].get_array()), image.permute(1, 2, 0))
        wrong = prediction == 1
        assert ax.get_title() == ("✗ dog\n100%" if wrong else "cat\n100%")
        assert ax.get_xlabel() == "cat"
        assert (ax.xaxis.label.get_weight() == "bold") == wrong
        assert (ax.spines["left"].get_linewidth() > 2) == wrong
