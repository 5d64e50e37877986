"""Training: it learns, it is repeatable, it saves the best epoch, its numbers are right."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import MODEL, TESTS, assert_loads, random_model

import pytorchpractice as script


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """Work in an empty folder of this test's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train_on_sample(sample, path, epochs, seed=0, dtype=torch.float32):
    """Train on 540 images of the sample as the script does; return (model, checkpoint, history)."""
    images, labels = script.as_tensors(sample[0], "cpu")
    training, validation = script.split_indices(len(labels), seed)
    torch.manual_seed(seed)
    model = script.CIFARNet()
    model.fit_input(images[training])
    batches = script.TrainingBatches(images[training], labels[training], 30, seed)
    checkpoint, history = script.Checkpoint(path), script.History()
    held_out = images[validation], labels[validation]
    script.train(
        model, batches, held_out, checkpoint, history, epochs=epochs, device="cpu", dtype=dtype
    )
    return model, checkpoint, history


def test_training_learns(sample, in_folder):
    """Chance is 10 % and ln 10 = 2.30: 540 images are enough to leave both well behind."""
    _, checkpoint, history = train_on_sample(sample, in_folder / MODEL, epochs=6)
    assert history.train_loss[-1] < history.train_loss[0] - 0.4
    assert history.train_accuracy[-1] > 0.5
    model = script.load_model(checkpoint.path)
    images, labels = script.as_tensors(sample[1], "cpu")
    loss, accuracy = script.score(script.predict(model, images), labels)
    assert accuracy > 0.3
    assert loss < 2.1


def test_same_seed_same_losses_and_predictions(sample, in_folder):
    runs = [train_on_sample(sample, in_folder / f"{i}.pt", epochs=2) for i in range(2)]
    assert runs[0][2].train_loss == runs[1][2].train_loss
    assert runs[0][2].validation_loss == runs[1][2].validation_loss
    images, _ = script.as_tensors(sample[1], "cpu")
    logits = [script.predict(model, images) for model, _, _ in runs]
    assert torch.equal(*logits)
    other = train_on_sample(sample, in_folder / "2.pt", epochs=2, seed=1)
    assert other[2].train_loss != runs[0][2].train_loss


def test_the_saved_epoch_is_the_one_with_the_lowest_validation_loss(sample, in_folder, monkeypatch):
    """The weights of the third of four epochs are the best, since the fourth spoils them."""
    predict, calls, states = script.predict, [], []

    def predict_and_spoil(classify, images):
        model = classify.__self__
        calls.append(1)
        if len(calls) == 4:
            with torch.no_grad():
                model.head.weight.copy_(model.head.weight.flip(0))
        states.append({name: t.clone() for name, t in model.state_dict().items()})
        return predict(classify, images)

    monkeypatch.setattr(script, "predict", predict_and_spoil)
    _, checkpoint, history = train_on_sample(sample, in_folder / MODEL, epochs=4)
    best = int(np.argmin(history.validation_loss))
    assert best < 3
    assert checkpoint.epoch == best + 1
    saved = torch.load(in_folder / MODEL, weights_only=True)
    assert all(torch.equal(saved[name], states[best][name]) for name in saved)
    assert not torch.equal(saved["head.weight"], states[-1]["head.weight"])


@pytest.fixture
def states(monkeypatch):
    """Return a list to which every training step adds the state_dict that it leaves."""
    step, states = script.train_step, []

    def recorded_step(model, *rest):
        result = step(model, *rest)
        states.append({name: t.clone() for name, t in model.state_dict().items()})
        return result

    monkeypatch.setattr(script, "train_step", recorded_step)
    return states


def test_the_saved_weights_are_an_average_over_the_last_steps(sample, in_folder, states):
    _, checkpoint, _ = train_on_sample(sample, in_folder / MODEL, epochs=2)
    window = 1 + script.AVERAGED_EPOCHS * 18  # steps
    for name in ("blocks.1.conv2.weight", "blocks.0.norm1.running_var", "head.weight"):
        expected = states[0][name]
        for state in states[1 : 18 * checkpoint.epoch]:
            expected = expected + (state[name] - expected) / window
        torch.testing.assert_close(checkpoint.state[name], expected)
        assert not torch.allclose(states[-1][name], expected)


def test_the_first_layer_learns_in_the_first_epochs_only(sample, in_folder, states):
    train_on_sample(sample, in_folder / MODEL, epochs=4)
    start, first, *others = [torch.zeros(24), *(s["whiten.bias"] for s in states[17::18])]
    assert [learns for _, learns in script.schedule(4)] == [True, False, False, False]
    assert not torch.equal(first, start)
    assert len(others) == 3
    assert all(torch.equal(bias, first) for bias in others)


def test_history_has_every_epoch_and_every_batch(sample, in_folder):
    _, checkpoint, history = train_on_sample(sample, in_folder / MODEL, epochs=2)
    assert len(history.train_loss) == len(history.validation_loss) == 2
    accuracies = history.batch_accuracies()
    assert len(accuracies) == 2 * 18
    assert np.mean(accuracies[:18]) == pytest.approx(history.train_accuracy[0])
    assert history.validation_loss[checkpoint.epoch - 1] == checkpoint.loss
    images, labels = script.as_tensors(sample[0], "cpu")
    _, validation = script.split_indices(len(labels), seed=0)
    one_look = script.predict(checkpoint.model().classify, images[validation])
    assert checkpoint.epoch == 2
    assert history.validation_loss[-1] == script.score(one_look, labels[validation])[0]


def test_loss_that_is_not_finite_stops_the_training(sample, in_folder, monkeypatch):
    step, calls = script.train_step, []

    def poisoned_step(model, optimizers, images, labels):
        calls.append(1)
        if len(calls) == 18 + 5:
            images = images * float("nan")
        return step(model, optimizers, images, labels)

    monkeypatch.setattr(script, "train_step", poisoned_step)
    with pytest.raises(FloatingPointError, match="epoch 2, batch 5"):
        train_on_sample(sample, in_folder / MODEL, epochs=3)
    assert_loads(in_folder / MODEL)
    assert all(t.isfinite().all() for t in torch.load(in_folder / MODEL).values())


def test_score_is_the_mean_over_all_images_whatever_the_batches(sample):
    model = random_model().eval()
    images, labels = script.as_tensors(sample[1], "cpu")
    with torch.no_grad():
        whole = model(images / 255)
    loss, accuracy = script.score(script.predict(model, images, batch_size=77), labels)
    assert loss == pytest.approx(F.cross_entropy(whole, labels).item(), rel=1e-4)
    assert accuracy == (whole.argmax(1) == labels).float().mean().item()


def test_train_step_reports_the_same_criterion_as_validation(sample):
    model = random_model().train()
    images, labels = script.as_tensors(sample[1], "cpu")
    images = images[:50] / 255
    with torch.no_grad():
        logits = model(images)
    optimizers, _ = script.make_optimizers(model, 50, 1)
    loss, accuracy = script.train_step(model, optimizers, images, labels[:50])
    expected = script.score(logits, labels[:50])
    assert (loss.item(), accuracy.item()) == pytest.approx(expected)


def test_muon_steps_are_nearly_orthogonal():
    torch.manual_seed(0)
    for shape in ((64, 216), (64, 64), (300, 90)):
        update = script.orthogonalize(torch.randn(shape), steps=5)
        assert update.shape == shape
        singular = torch.linalg.svdvals(update)
        assert singular.max() < 1.3
        assert singular.median() > 0.6


def test_orthogonalize_is_newton_schulz_on_the_matrix_itself():
    torch.manual_seed(0)
    matrix = torch.randn(20, 50, dtype=torch.float64)
    expected = matrix / matrix.norm()
    for _ in range(3):
        gram = expected @ expected.T
        expected = 3.4445 * expected + (-4.775 * gram + 2.0315 * gram @ gram) @ expected
    torch.testing.assert_close(script.orthogonalize(matrix), expected, rtol=1e-6, atol=1e-6)


def test_muon_holds_the_weights_norm():
    weight = torch.nn.Parameter(torch.randn(16, 8, 3, 3))
    weight.grad = torch.randn_like(weight)
    script.Muon([weight], lr=0.0, momentum=0.6).step()
    assert weight.norm().item() == pytest.approx(16**0.5, rel=1e-4)


def test_learning_rates_fall_linearly():
    optimizers, schedulers = script.make_optimizers(random_model(), 50, steps=4)
    rates = []
    for _ in range(4):
        rates.append([group["lr"] for o in optimizers for group in o.param_groups])
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.ones_like(p)
            optimizer.step()
            scheduler.step()
    assert rates[0] == [script.MUON_LR, script.BIAS_LR, script.HEAD_LR]
    last = [group["lr"] for o in optimizers for group in o.param_groups]
    assert last == pytest.approx([rate * script.FINAL_RATE for rate in rates[0]])
    assert rates[2] == pytest.approx([(a + b) / 2 for a, b in zip(rates[0], last, strict=True)])


def test_training_in_bfloat16_agrees_with_float32(sample, in_folder):
    loss = {
        dtype: train_on_sample(sample, in_folder / MODEL, epochs=1, dtype=dtype)[2].train_loss[0]
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert loss[torch.bfloat16] == pytest.approx(loss[torch.float32], rel=0.03)
    assert_loads(in_folder / MODEL)  # in float32, whatever it was trained in


def test_import_does_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "from pytorchpractice import CIFARNet; CIFARNet()"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(TESTS.parent), "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []
