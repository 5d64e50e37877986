"""Device and model: what runs where, and what goes in and out of the net."""

import platform
import subprocess
import sys

import pytest
import torch
import torch.fx.experimental._config
import torch.nn.functional as F
from conftest import ROOT, random_model

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


@pytest.fixture
def every_image_is_unsure(monkeypatch):
    """Let the meta device, which holds no values, index by a mask: it takes all as chosen."""
    monkeypatch.setattr(torch.fx.experimental._config, "meta_nonzero_assume_all_nonzero", True)


def test_no_tensor_stays_behind_on_the_cpu(every_image_is_unsure):
    """On torch's meta device any operation that mixes in a CPU tensor fails."""
    images = torch.zeros(20, 3, 32, 32, dtype=torch.uint8, device="meta")
    labels = torch.zeros(20, dtype=torch.int64, device="meta")
    model = random_model().to("meta")
    batches = script.TrainingBatches(images, labels, batch_size=10, seed=0)
    optimizers, schedulers = script.make_optimizers(model, 10, steps=2)
    average = script.get_ema_multi_avg_fn(0.9)
    averaged = script.AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    history = script.History()
    history.start(epochs=1, batches_per_epoch=2, device="meta")
    assert history.batches.device.type == "meta"
    for batch_images, batch_labels in batches.epoch(script.schedule(10)[0][0]):
        model.train()
        loss_and_accuracy = script.train_step(model, optimizers, batch_images, batch_labels)
        assert loss_and_accuracy.device.type == "meta"
        history.add_batch(loss_and_accuracy)
        averaged.update_parameters(model)
        for scheduler in schedulers:
            scheduler.step()
    assert script.predict(averaged.module.eval(), images).device.type == "meta"


def test_a_model_left_on_the_cpu_is_noticed():
    images = torch.zeros(20, 3, 32, 32, dtype=torch.uint8, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        script.predict(random_model().eval(), images)


def test_images_in_logits_out():
    images = torch.rand(7, 3, 32, 32)
    assert random_model()(images).shape == (7, 10)
    assert script.CIFARNet(n_classes=3)(images).shape == (7, 3)
    assert script.CIFARNet(n_classes=3)(images).dtype == torch.float32


def test_parameter_count():
    trained = [p for p in random_model().parameters() if p.requires_grad]
    into_blocks = 24 * 64 + 64 * 256 + 256 * 256
    convolutions = into_blocks + 2 * (64 * 64 + 256 * 256 + 256 * 256)
    biases = 24 + 3 * (64 + 256 + 256)
    assert sum(p.numel() for p in trained) == 9 * convolutions + biases + 256 * 10


@pytest.mark.parametrize("size", [(15, 15), (8, 8), (7, 10)])
def test_block_leaves_out_only_what_pooling_drops(size):
    block = script.Block(4, 6).eval()
    torch.nn.init.normal_(block.conv1.weight)
    images = torch.randn(2, 4, *size)
    seen = []
    block.norm1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    block(images)
    whole = F.conv2d(images, block.conv1.weight, padding=1)
    torch.testing.assert_close(seen[0], F.max_pool2d(whole, 2))


def test_memory_is_kept_where_the_c_library_is_glibc(monkeypatch):
    code = """
import resource, torch, pytorchpractice as script
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
given_back = faults()
script.keep_memory()
faults()
print(given_back, faults())
"""
    if platform.libc_ver()[0] == "glibc":
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        given_back, kept = map(int, done.stdout.split())
        assert kept < given_back / 10
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(script, "ctypes", None)  # elsewhere it isn't touched
    script.keep_memory()


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize(
    "size", [(3, 4), (3, 3), (6, 6), (7, 7), (8, 8), (11, 9), (16, 16), (20, 33)]
)
def test_winograd_is_the_convolution(size, padding):
    """Output and both gradients, for one tile and for several that fill the image or stand over."""
    x = torch.randn(4, 3, *size, requires_grad=True)
    weight = torch.randn(5, 3, 3, 3, requires_grad=True)
    expected = F.conv2d(x.double(), weight.double(), padding=padding)
    actual = script.winograd(x, weight, padding)
    assert actual.shape == expected.shape and actual.dtype == torch.float32
    above = torch.randn_like(actual)
    pairs = zip(
        (actual, *torch.autograd.grad(actual, (x, weight), above)),
        (expected, *torch.autograd.grad(expected, (x, weight), above.double())),
        strict=True,
    )
    for a, b in pairs:
        assert (a - b).norm() < 3e-5 * b.norm()


def test_many_images_in_float32_are_convolved_by_winograd(monkeypatch):
    winograd, shapes = script.winograd, []
    monkeypatch.setattr(
        script, "winograd", lambda x, *rest: shapes.append(tuple(x.shape)) or winograd(x, *rest)
    )
    model = random_model().eval()
    images = torch.rand(100, 3, 32, 32)
    with torch.no_grad():
        many = model.classify(images)
        second = [(100, 64, 16, 16), *[(100, 256, 7, 7)] * 2]
        third = [(100, 256, 8, 8), *[(100, 256, 3, 3)] * 2]
        assert shapes == second + third
        few = torch.cat([model.classify(part) for part in images.split(50)])
        with torch.autocast("cpu", torch.bfloat16):
            model.classify(images)
        model.to("meta").classify(images.to("meta"))
    assert len(shapes) == 6
    torch.testing.assert_close(many, few, rtol=1e-3, atol=1e-4)


def test_eval_looks_again_at_the_images_it_is_unsure_about(monkeypatch):
    model = random_model().eval()
    images = torch.rand(8, 3, 32, 32)
    looked_at = []
    classify = model.classify
    monkeypatch.setattr(model, "classify", lambda x: looked_at.append(len(x)) or classify(x))
    with torch.no_grad():
        one_look = classify(images)
        probabilities = one_look.softmax(1).amax(1)
        monkeypatch.setattr(script, "SURE", probabilities.median().item())
        logits = model(images)
        unsure = probabilities < script.SURE
        again = torch.stack([classify(view) for view in model.other_views(images[unsure])])
    assert looked_at == [8, 3, 3, 3]
    torch.testing.assert_close(logits[~unsure], one_look[~unsure])
    torch.testing.assert_close(logits[unsure], (one_look[unsure] + again.sum(0)) / 4)


def test_other_views_are_the_mirror_image_and_two_shifts():
    images = torch.rand(2, 3, 32, 32)
    mirrored, shifted, shifted_and_mirrored = script.CIFARNet.other_views(images)
    assert torch.equal(mirrored, images.flip(3))
    assert torch.equal(shifted[:, :, 1:, 1:], images[:, :, :-1, :-1])
    assert torch.equal(shifted_and_mirrored.flip(3)[:, :, :-1, :-1], images[:, :, 1:, 1:])


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
