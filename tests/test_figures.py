"""Figures: what is drawn is what was recorded."""

import pytest
import torch
from matplotlib import colors
from matplotlib import pyplot as plt

import pytorchpractice as script


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def history():
    """Return the history of three epochs of two batches."""
    history = script.History(train_loss=[2.0, 1.5, 1.0], validation_loss=[1.9, 1.2, 1.4])
    history.start(epochs=3, batches_per_epoch=2, device="cpu")
    for accuracy in (0.1, 0.2, 0.3, 0.5, 0.6, 0.8):
        history.add_batch(torch.tensor([1.0, accuracy]))
    return history


def test_loss_figure_shows_both_losses_and_marks_the_saved_epoch(history):
    ax = script.plot_loss(history, saved_epoch=2).axes[0]
    training, validation, mark = ax.lines
    assert list(training.get_xdata()) == list(validation.get_xdata()) == [1, 2, 3]
    assert list(training.get_ydata()) == history.train_loss
    assert list(validation.get_ydata()) == history.validation_loss
    assert set(mark.get_xdata()) == {2}
    assert [text.get_text() for text in ax.texts] == ["saved: epoch 2"]
    assert all(tick == int(tick) for tick in ax.get_xticks())


def test_accuracy_figure_shows_every_batch_and_a_black_line_an_epoch(history):
    ax = script.plot_accuracy(history).axes[0]
    batches, *epochs = ax.lines
    assert list(batches.get_ydata()) == pytest.approx([0.1, 0.2, 0.3, 0.5, 0.6, 0.8])
    assert [line.get_xdata()[0] for line in epochs] == [0, 2, 4]
    assert all(colors.same_color(line.get_color(), "black") for line in epochs)
    assert [text.get_text() for text in ax.texts] == ["E1", "E2", "E3"]
    means = [collection.get_segments()[0][0][1] for collection in ax.collections]
    assert means == pytest.approx([0.15, 0.4, 0.7])


def test_grid_tells_right_from_wrong_in_true_colours():
    images = torch.randint(256, (12, 3, 32, 32), dtype=torch.uint8)
    logits = torch.full((12, 3), -100.0)
    labels = torch.zeros(12, dtype=torch.int64)
    predictions = torch.tensor([0, 1] * 6)
    logits[range(12), predictions] = 0.0
    fig = script.plot_predictions(images, logits, labels, ["cat", "dog", "ship"])
    assert len(fig.axes) == 20  # two rows of ten
    shown = [ax for ax in fig.axes if ax.images]
    assert len(shown) == 12
    for image, prediction, ax in zip(images, predictions, shown, strict=True):
        assert torch.equal(torch.as_tensor(ax.images[0].get_array()), image.permute(1, 2, 0))
        wrong = prediction == 1
        assert ax.get_title() == ("✗ dog\n100%" if wrong else "cat\n100%")
        assert ax.get_xlabel() == "cat"
        assert (ax.xaxis.label.get_weight() == "bold") == wrong
        assert (ax.spines["left"].get_linewidth() > 2) == wrong
