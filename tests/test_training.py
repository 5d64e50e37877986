"""Optimizers and training: it learns, repeatably, saves the best, and its numbers are right."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import MODEL, TESTS, assert_loads, random_model, train

import pytorchpractice as script

pytestmark = pytest.mark.usefixtures("narrow")


def equal(state, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in state.items())


def test_orthogonalize_keeps_the_singular_vectors_and_evens_the_values():
    torch.manual_seed(0)
    matrix = torch.randn(20, 50, dtype=torch.float64)
    u, values, v = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
    expected = values
    for _ in range(3):  # the quintic polynomial of Newton and Schulz's iteration
        expected = 3.4445 * expected - 4.775 * expected**3 + 2.0315 * expected**5
    result = script.orthogonalize(5 * matrix, torch.float64)  # it normalises what it gets
    torch.testing.assert_close(result, u @ expected.diag() @ v)
    assert values.max() / values.min() > 3
    assert expected.max() / expected.min() < 2


def test_training_learns(sample, in_folder):
    """Chance is 10 % and ln 10 = 2.30: 480 images are enough to leave both well behind."""
    history, _ = train(sample[0], epochs=12)
    assert history[-1][0] < history[0][0] - 0.4
    assert history[-1][2].mean() > 0.5
    images, labels = script.as_tensors(sample[1])
    _, _, accuracy = script.evaluate(script.load_model(MODEL), images, labels, "cpu")
    assert accuracy > 0.3


def test_same_seed_same_losses_and_weights(sample, in_folder):
    first, again, other = (train(sample[0], epochs=2, seed=seed) for seed in (0, 0, 1))
    assert [row[:2] for row in first[0]] == [row[:2] for row in again[0]]
    assert equal(first[1], again[1])
    assert not equal(first[1], other[1])


def test_the_saved_epoch_is_the_one_with_the_lowest_validation_loss(sample, in_folder, monkeypatch):
    evaluate, losses, heads = script.evaluate, iter([1.5, 1.0, 1.2]), []

    def evaluate_as_planned(look, *rest):
        heads.append(look.__self__.head.weight.clone())
        logits, _, accuracy = evaluate(look, *rest)
        return logits, next(losses), accuracy

    monkeypatch.setattr(script, "evaluate", evaluate_as_planned)
    history, best_state = train(sample[0], epochs=3)
    assert [loss for _, loss, _ in history] == [1.5, 1.0, 1.2]
    assert equal(torch.load(MODEL, weights_only=True), best_state)
    assert [torch.equal(head, best_state["head.weight"]) for head in heads] == [False, True, False]


def test_the_average_follows_weights_and_buffers():
    model = random_model()
    average, followed = script.moving_average(model, 6), {}
    for _ in range(3):
        model.head.weight.data.normal_()
        model.blocks[0].norm1.running_var.normal_()
        average.update_parameters(model)
        for name in ("head.weight", "blocks.0.norm1.running_var"):
            new = model.state_dict()[name].clone()
            followed[name] = followed.get(name, new).lerp(new, 1 / (1 + 6 / 2))
            torch.testing.assert_close(average.module.state_dict()[name], followed[name])


def test_the_size_of_an_epochs_images_follows_its_middle():
    sizes = {n: [size for size, _ in script.plan(n)] for n in (1, 2, 10)}
    assert sizes == {1: [24], 2: [24, 32], 10: [16] * 2 + [24] * 4 + [32] * 4}


def test_fit_temperature_finds_what_the_logits_were_multiplied_by():
    torch.manual_seed(0)
    true = 3 * torch.randn(20_000, 10)
    labels = true.softmax(1).multinomial(1).squeeze(1)
    for factor in (0.7, 1.0, 1.5):
        assert script.fit_temperature(factor * true, labels) == pytest.approx(factor, abs=0.05)


def test_the_saved_temperature_is_that_of_the_saved_epoch(sample, in_folder):
    """It is fitted on one look at the validation images."""
    train(sample[0], epochs=2)
    saved = script.load_model(script.MODEL_PATH)
    _, _, (images, labels) = script.set_up_training(sample[0], 0, 30, "cpu")
    logits, _, _ = script.evaluate(saved.look, images, labels, "cpu")
    fitted = script.fit_temperature(logits, labels).item()
    assert saved.temperature.item() == pytest.approx(fitted, abs=0.011) != 1


@pytest.mark.parametrize("portion", [0.0, 0.6])
def test_the_first_layer_learns_in_the_first_epochs_only(sample, in_folder, monkeypatch, portion):
    monkeypatch.setattr(script, "FIRST_LAYER_PORTION", portion)
    _, state = train(sample[0], epochs=1)
    assert state["whiten.bias"].any() == (portion > 0.5)  # it starts at 0


def test_the_training_recorded_is_plain_cross_entropy_and_accuracy(sample):
    model, batches, _ = script.set_up_training(sample[0], 0, 180, "cpu")
    served = list(batches.epoch(24))
    average, no_autocast = script.moving_average(model, 2), contextlib.nullcontext()
    loss, accuracies = script.train_epoch(model, average, served, [], [], no_autocast)
    with torch.no_grad():  # without optimizers, the weights have not changed
        outputs = [(model(images), labels) for images, labels in served]
    losses = torch.stack([F.cross_entropy(*pair) for pair in outputs])
    assert loss == pytest.approx(losses.mean().item(), rel=1e-4)
    hits = torch.stack([logits.argmax(1) == labels for logits, labels in outputs])
    torch.testing.assert_close(accuracies, hits.float().mean(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_in_16_bits_agrees_with_float32(sample, in_folder, dtype):
    losses = [train(sample[0], epochs=1, dtype=d)[0][0][0] for d in (torch.float32, dtype)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert_loads(MODEL)  # in float32, whatever it was trained in


def test_killed_while_it_saves_it_leaves_the_old_file(tmp_path):
    code = """import os, pathlib, conftest, pytorchpractice as script
script.WIDTHS = (8, 32, 32)
script.save(conftest.random_model(), script.MODEL_PATH)
write = pathlib.Path.write_bytes
pathlib.Path.write_bytes = lambda path, content: write(path, content[:9999]) and os._exit(9)
script.save(conftest.random_model(), script.MODEL_PATH)"""
    env = {**os.environ, "PYTHONPATH": str(TESTS)}
    assert subprocess.call([sys.executable, "-c", code], cwd=tmp_path, env=env) == 9
    assert_loads(tmp_path / MODEL)
    assert len(list(tmp_path.glob("*.tmp"))) == 1
