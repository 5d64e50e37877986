"""Figures: what is drawn is what was recorded."""

import itertools

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import pytorchpractice as script


def draw(plot, *data):
    """Draw in a figure; return its axes."""
    fig = Figure(figsize=(7, 4), layout="constrained")
    plot(fig, *data)
    fig.canvas.draw()
    return fig.axes


@pytest.mark.parametrize("epochs", [1, 2, 10, 100])
def test_loss_figure_of_any_length_shows_both_losses_and_names_the_kept_epoch(epochs):
    kept, numbers = (epochs + 1) // 2, range(1, epochs + 1)
    losses = [(2 / epoch, 1 + abs(epoch - kept)) for epoch in numbers]
    [ax] = draw(script.plot_losses, [(*both, torch.zeros(3)) for both in losses])
    training, validation, mark = ax.lines
    assert list(training.get_xdata()) == list(validation.get_xdata()) == list(numbers)
    assert list(zip(training.get_ydata(), validation.get_ydata(), strict=True)) == losses
    assert set(mark.get_xdata()) == {kept}
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["training", "validation", f"saved: epoch {kept}"]
    assert all(tick == int(tick) for tick in ax.get_xticks())


@pytest.mark.parametrize("epochs", [1, 2, 10, 16, 60, 100, 500])
def test_accuracy_figure_of_any_length_shows_batches_and_means_and_labels_do_not_touch(epochs):
    accuracies = torch.rand(epochs, 3)
    [ax] = draw(script.plot_accuracies, [(0.0, 0.0, row) for row in accuracies])
    batches, *starts = ax.lines
    np.testing.assert_allclose(batches.get_ydata(), accuracies.ravel())
    [means] = ax.collections
    for epoch, (left, right) in enumerate(means.get_segments()):
        assert (left[0], right[0]) == (3 * epoch, 3 * epoch + 3)
        assert left[1] == right[1] == pytest.approx(accuracies[epoch].mean())
    assert len(means.get_segments()) == epochs
    boxes = [text.get_window_extent() for text in ax.texts]
    assert boxes
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))
    if epochs <= 10:
        assert [text.get_text() for text in ax.texts] == [f"E{n + 1}" for n in range(epochs)]
        assert [line.get_xdata()[0] for line in starts] == [3 * n for n in range(epochs)]


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
