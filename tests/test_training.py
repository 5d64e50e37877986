"""Optimizers and training: it learns, repeatably, saves the best, and its numbers are right."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

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


def test_every_trained_parameter_is_in_one_optimizer():
    model = random_model()
    optimizers, _ = script.make_optimizers(model, 50, 4, torch.float32)
    held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sorted(map(id, held)) == sorted(map(id, trained))


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*before.*optimizer.step")
def test_learning_rates_fall_linearly():
    optimizers, schedulers = script.make_optimizers(random_model(), 50, 2, torch.float32)
    rates = []
    for _ in range(3):
        rates.append([group["lr"] for o in optimizers for group in o.param_groups])
        for scheduler in schedulers:
            scheduler.step()
    first, middle, last = torch.tensor(rates)
    torch.testing.assert_close(middle, (first + last) / 2)
    assert (last < first / 2).all()


def test_training_learns(sample, in_folder):
    """Chance is 10 % and ln 10 = 2.30: 480 images are enough to leave both well behind."""
    history, _ = train(sample[0], epochs=20)
    assert history[-1][0] < history[0][0] - 0.4
    assert history[-1][2].mean() > 0.5
    images, labels = script.as_tensors(sample[1])
    _, loss, accuracy = script.evaluate(script.load_model(MODEL), images, labels, "cpu")
    assert accuracy > 0.3
    assert loss < 2.1


def test_same_seed_same_losses_and_weights(sample, in_folder):
    first, again, other = (train(sample[0], epochs=2, seed=seed) for seed in (0, 0, 1))
    assert [row[:2] for row in first[0]] == [row[:2] for row in again[0]]
    assert equal(first[1], again[1])
    assert not equal(first[1], other[1])


def test_the_saved_epoch_is_the_one_with_the_lowest_validation_loss(sample, in_folder, monkeypatch):
    evaluate, losses, states = script.evaluate, iter([1.5, 1.0, 1.2]), []

    def evaluate_as_planned(look, *rest):
        states.append({name: t.clone() for name, t in look.__self__.state_dict().items()})
        logits, _, accuracy = evaluate(look, *rest)
        return logits, next(losses), accuracy

    monkeypatch.setattr(script, "evaluate", evaluate_as_planned)
    history, best_state = train(sample[0], epochs=3)
    assert [loss for _, loss, _ in history] == [1.5, 1.0, 1.2]
    saved = torch.load(MODEL, weights_only=True)
    for state in states:
        state["temperature"] = saved["temperature"]  # fitted after they were recorded
    assert equal(states[1], saved)
    assert equal(states[1], best_state)
    assert not equal(states[2], saved)


@pytest.fixture
def states(monkeypatch):
    """Return a list to which every training step adds the state_dict that it leaves."""
    update, states = script.AveragedModel.update_parameters, []

    def record(averaged, model):
        states.append({name: t.clone() for name, t in model.state_dict().items()})
        update(averaged, model)

    monkeypatch.setattr(script.AveragedModel, "update_parameters", record)
    return states


def test_the_saved_weights_are_an_average_over_the_last_steps(sample, in_folder, states):
    history, best_state = train(sample[0], epochs=2)
    validation_losses = [loss for _, loss, _ in history]
    best_epoch = validation_losses.index(min(validation_losses))
    steps = len(states) // 2
    for name in ("blocks.1.conv2.weight", "blocks.0.norm1.running_var", "head.weight"):
        average = states[0][name]
        for state in states[1 : (best_epoch + 1) * steps]:
            average = average.lerp(state[name], 1 / (1 + script.AVERAGED_EPOCHS * steps))
        torch.testing.assert_close(best_state[name], average)


@pytest.mark.parametrize(
    ("epochs", "sizes"), [(1, [24]), (2, [24, 32]), (10, [16] * 2 + [24] * 4 + [32] * 4)]
)
def test_the_size_of_an_epochs_images_follows_its_middle(
    sample, in_folder, monkeypatch, epochs, sizes
):
    seen, epoch = [], script.TrainingBatches.epoch

    def recorded(self, size):
        seen.append(size)
        return itertools.islice(epoch(self, size), 1)

    monkeypatch.setattr(script.TrainingBatches, "epoch", recorded)
    train(sample[0], epochs=epochs)
    assert seen == sizes


def test_fit_temperature_finds_what_the_logits_were_multiplied_by():
    torch.manual_seed(0)
    true = 3 * torch.randn(20_000, 10)
    labels = true.softmax(1).multinomial(1).squeeze(1)
    for factor in (0.7, 1.0, 1.5):
        assert script.fit_temperature(factor * true, labels) == pytest.approx(factor, abs=0.05)


def test_the_saved_temperature_is_that_of_the_saved_epoch(sample, in_folder):
    """It is fitted on one look at the validation images."""
    model, batches, validation = script.set_up_training(sample[0], 0, 30, "cpu")
    options = {"epochs": 2, "device": "cpu", "dtype": torch.float32}
    script.train(model, batches, validation, [], **options)
    saved = script.load_model(script.MODEL_PATH)
    assert saved.temperature != 1
    logits, _, _ = script.evaluate(saved.look, *validation, "cpu")
    loss, *others = (
        F.cross_entropy(logits / (saved.temperature * factor), validation[1])
        for factor in (1, 0.9, 1.1)
    )
    assert loss < min(others)


def test_the_first_layer_learns_in_the_first_epochs_only(sample, in_folder, states, monkeypatch):
    monkeypatch.setattr(script, "FIRST_LAYER_PORTION", 0.5)
    train(sample[0], epochs=2)
    learnt, last = (states[i]["whiten.bias"] for i in (len(states) // 2 - 1, -1))
    assert learnt.any()  # it starts at 0
    assert torch.equal(last, learnt)


def test_the_training_recorded_is_plain_cross_entropy_and_accuracy(sample, in_folder, monkeypatch):
    epoch, labels = script.TrainingBatches.epoch, []
    forward, outputs = script.CIFARNet.forward, []

    def recorded_epoch(self, size):
        for batch in epoch(self, size):
            labels.append(batch[1])
            yield batch

    def recorded_forward(self, images):
        outputs.append(forward(self, images))
        return outputs[-1]

    monkeypatch.setattr(script.TrainingBatches, "epoch", recorded_epoch)
    monkeypatch.setattr(script.CIFARNet, "forward", recorded_forward)
    history, _ = train(sample[0], epochs=2, batch_size=180)
    assert len(outputs) == len(labels) == 2 * 2
    pairs = [(logits.detach(), answers) for logits, answers in zip(outputs, labels, strict=True)]
    losses = torch.tensor([F.cross_entropy(*pair) for pair in pairs]).view(2, 2)
    hits = torch.stack([logits.argmax(1) == answers for logits, answers in pairs])
    torch.testing.assert_close(torch.tensor([loss for loss, _, _ in history]), losses.mean(1))
    accuracies = torch.stack([accuracies for *_, accuracies in history])
    torch.testing.assert_close(accuracies, hits.float().mean(1).view(2, 2))


def test_evaluate_takes_the_mean_over_all_images_whatever_the_batches(sample):
    model = random_model().eval()
    images, labels = script.as_tensors(sample[0])  # 600, of which the last batch has fewer
    whole = model(images / 255).detach()
    logits, loss, accuracy = script.evaluate(model, images, labels, "cpu")
    torch.testing.assert_close(logits, whole, rtol=1e-3, atol=1e-4)
    assert loss == pytest.approx(F.cross_entropy(logits, labels).item())
    assert accuracy == pytest.approx((logits.argmax(1) == labels).float().mean().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_in_16_bits_agrees_with_float32(sample, in_folder, dtype):
    losses = [train(sample[0], epochs=1, dtype=d)[0][0][0] for d in (torch.float32, dtype)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert_loads(MODEL)  # in float32, whatever it was trained in


def save_and_be_killed():
    """Let 30 children save without pause, kill each at another moment, and look at the file."""
    models = [random_model(seed) for seed in range(2)]
    script.save(models[0], script.MODEL_PATH)
    interrupted, rng = 0, random.Random(0)
    for _ in range(30):
        child = os.fork()
        while child == 0:
            for model in models:
                script.save(model, script.MODEL_PATH)
        time.sleep(rng.uniform(0.02, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert_loads(MODEL)
        weight = torch.load(MODEL, weights_only=True)["head.weight"]
        assert any(torch.equal(weight, model.head.weight) for model in models)
        for path in Path().glob("*.tmp"):
            interrupted += 1
            path.unlink()
    assert interrupted > 0  # some were hit in the middle of a save


@pytest.mark.skipif(not hasattr(os, "fork"), reason="it needs fork")
def test_whenever_it_is_killed_the_file_is_the_old_one_or_the_new_one(tmp_path):
    """In a process of its own with one thread, since forks inherit no threads."""
    subprocess.run(
        [sys.executable, "-c", "import test_training as t; t.save_and_be_killed()"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=120,
    )
