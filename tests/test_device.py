"""Device: what is chosen, and that training on it is the training on the CPU."""

import contextlib
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import MODEL, assert_loads, random_model, train

import pytorchpractice as script


@pytest.mark.parametrize(
    ("platform", "error", "devices", "notes"),
    [
        ("darwin", None, ["mps", "cpu"], []),
        ("linux", None, ["cuda", "cpu"], []),
        ("win32", AssertionError("Not compiled"), ["cpu"], ["GPU not used: Not compiled"]),
        ("linux", RuntimeError("No driver. See"), ["cpu"], ["GPU not used: No driver"]),
        ("linux", RuntimeError("No kernel\nSee"), ["cpu"], ["GPU not used: No kernel"]),
    ],
)
def test_the_gpu_is_taken_if_it_works_and_else_explained(
    monkeypatch, platform, error, devices, notes
):
    def zeros(*shape, device):
        if error:
            raise error
        assert device == devices[0]
        return torch.ones(*shape)

    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(sys, "platform", platform)
    assert script.find_devices() == (devices, notes)
    assert script.parse_arguments([])[0].device == devices[0]


@pytest.mark.parametrize("name", ["amx_bf16", "avx512_bf16", "bf16"])
def test_bfloat16_is_chosen_only_where_a_cpu_is_known_to_have_it(monkeypatch, name):
    def precision(one_dnn, **features):
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: one_dnn)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
        return script.choose_precision("cpu")

    no_bfloat16 = torch.float32, "no bfloat16 that this torch can use"
    assert precision(True, avx2=True, **{name: True})[0] == torch.bfloat16
    assert precision(False, avx2=True, **{name: True}) == no_bfloat16
    assert precision(True, avx2=True, **{name: False}) == no_bfloat16
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert script.choose_precision("cpu") == no_bfloat16


def test_bfloat16_is_not_chosen_on_apples_gpus():
    dtype, reason = script.choose_precision("mps")
    assert dtype == torch.float32
    assert "Apple" in reason


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_cuda_trains_in_bfloat16_only_where_it_is_not_emulated(monkeypatch, has_bfloat16):
    def is_supported(including_emulation=True):
        return including_emulation or has_bfloat16

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    dtype, _ = script.choose_precision("cuda")
    assert dtype == (torch.bfloat16 if has_bfloat16 else torch.float32)


def test_no_tensor_stays_behind_on_another_device(sample, in_folder, monkeypatch):
    """On torch's meta device, any operation that mixes in a CPU tensor fails.

    It has no values: what is read there is nan.
    """
    to_cpu = torch.Tensor.cpu

    def read(tensor):
        return torch.full(tensor.shape, torch.nan) if tensor.is_meta else to_cpu(tensor)

    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "cpu", read)
    monkeypatch.setattr(torch.Tensor, "item", lambda _: torch.nan)
    with pytest.raises(SystemExit, match="not finite in epoch 1"):  # after the validation
        train(sample[0], epochs=2, device="meta")


@pytest.fixture(params=script.find_devices()[0])
def device(request):
    """Return each device of this machine in turn."""
    return request.param


def test_a_step_on_the_device_agrees_with_float32_on_the_cpu(device, sample):
    """The tolerances are those of TF32, in which NVIDIA's GPUs convolve."""
    images, labels = script.as_tensors(sample[0])
    images, labels = images[:50] / 255, labels[:50]
    losses, gradients = [], []
    for where in (device, "cpu"):
        model = random_model().to(where)
        loss = F.cross_entropy(model(images.to(where)), labels.to(where))
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.cpu() for p in model.parameters() if p.requires_grad])
    assert losses[0] == pytest.approx(losses[1], rel=3e-3)
    for on_device, on_cpu in zip(*gradients, strict=True):
        assert (on_device - on_cpu).norm() < 0.05 * on_cpu.norm()


def test_what_is_trained_on_the_device_predicts_the_same_on_the_cpu(device, sample, in_folder):
    train(sample[0], epochs=2, device=device, dtype=script.choose_precision(device)[0])
    assert_loads(MODEL)
    data = script.as_tensors(sample[1])
    there, loss, _ = script.evaluate(script.load_model(MODEL).to(device).look, *data, device)
    here, loss_here, _ = script.evaluate(script.load_model(MODEL).look, *data, "cpu")
    assert (here.softmax(1) - there.softmax(1)).abs().max() < 0.02
    assert loss_here == pytest.approx(loss, rel=3e-3)
