"""Device and model: what runs where, and what goes in and out of the net."""

import pytest
import torch
from conftest import random_model

import pytorchpractice as script


def test_auto_prefers_mps_then_cuda_then_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert script.available_devices() == ["mps", "cuda", "cpu"]
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert script.parse_arguments([]).device == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.parse_arguments([]).device == "cpu"


@pytest.mark.parametrize(
    ("features", "dtype", "word"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, torch.bfloat16, "AMX"),
        ({"avx512_bf16": True}, torch.bfloat16, "AVX-512"),
        ({"bf16": True}, torch.bfloat16, "Arm"),
        ({"avx2": True}, torch.float32, "no bfloat16"),
    ],
)
def test_cpu_trains_in_bfloat16_only_where_the_hardware_has_it(monkeypatch, features, dtype, word):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    chosen, reason = script.choose_precision("cpu")
    assert chosen == dtype
    assert word in reason


def test_cpu_trains_in_float32_where_torch_cannot_tell(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert script.choose_precision("cpu")[0] == torch.float32


def test_mps_trains_in_float32_without_channels_last():
    assert script.choose_precision("mps")[0] == torch.float32
    assert script.memory_format("mps") == torch.contiguous_format


def test_no_tensor_stays_behind_on_the_cpu():
    """On torch's meta device any operation that mixes in a CPU tensor fails."""
    images = torch.zeros(20, 3, 32, 32, dtype=torch.uint8, device="meta")
    labels = torch.zeros(20, dtype=torch.int64, device="meta")
    model = random_model().to("meta")
    batches = script.TrainingBatches(images, labels, batch_size=10, seed=0)
    optimizers, schedulers = script.make_optimizers(model, 10, steps=2)
    for batch_images, batch_labels in batches.epoch(script.image_sizes(10)[0]):
        model.train()
        loss, accuracy = script.train_step(model, optimizers, batch_images, batch_labels)
        for scheduler in schedulers:
            scheduler.step()
        assert loss.device.type == accuracy.device.type == "meta"
    assert script.predict(model, images).device.type == "meta"


def test_a_model_left_on_the_cpu_is_noticed():
    images = torch.zeros(20, 3, 32, 32, dtype=torch.uint8, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        script.predict(random_model(), images)


def test_images_in_logits_out():
    images = torch.rand(7, 3, 32, 32)
    assert random_model()(images).shape == (7, 10)
    assert script.CIFARNet(n_classes=3)(images).shape == (7, 3)
    assert script.CIFARNet(n_classes=3)(images).dtype == torch.float32


def test_parameter_count():
    trained = [p for p in random_model().parameters() if p.requires_grad]
    convolutions = 24 * 64 + 64 * 64 + 64 * 256 + 3 * 256 * 256
    biases = 2 * (64 + 256 + 256)
    assert sum(p.numel() for p in trained) == 9 * convolutions + biases + 256 * 10


def test_eval_gives_an_image_and_its_mirror_image_the_same_logits():
    model = random_model().eval()
    images = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(model(images), model(images.flip(3)), rtol=1e-4, atol=1e-5)
    expected = (model.classify(images) + model.classify(images.flip(3))) / 2
    torch.testing.assert_close(model(images), expected)


def test_first_layer_whitens_the_training_patches(sample):
    model = script.CIFARNet()
    images, _ = script.as_tensors(sample[0], "cpu")
    model.fit_input(images)
    pixels = script.to_unit_interval(images)
    torch.testing.assert_close(model.mean.flatten(), pixels.mean((0, 2, 3)))
    torch.testing.assert_close(model.std.flatten(), pixels.std((0, 2, 3)))
    with torch.no_grad():
        responses = model.whiten((pixels - model.mean) / model.std)
    responses = responses.transpose(0, 1).flatten(1)[:12]
    covariance = responses @ responses.T / responses.shape[1]
    assert covariance.diagonal().max() < 1.01
    assert covariance.diagonal().min() > 0.5
    off_diagonal = covariance - covariance.diagonal().diag()
    assert off_diagonal.abs().max() < 0.01
    torch.testing.assert_close(model.whiten.weight[:12], -model.whiten.weight[12:])
    assert not model.whiten.weight.requires_grad
