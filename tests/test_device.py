"""Device: what is chosen, and that training on it is the training on the CPU."""

import contextlib
import sys

import pytest
import torch
from conftest import MODEL, assert_loads, random_model, train

import pytorchpractice as script

# Choice


@pytest.fixture
def machine(monkeypatch):
    """Return a function that lets this machine look like another."""

    def pretend(*, cuda=False, mps=False, mps_built=False, platform="linux", kernels=True):
        zeros = torch.zeros

        def zeros_on_card(*shape, device="cpu"):
            if device == "cuda" and not kernels:
                raise RuntimeError("no kernel image is available for execution on the device")
            return zeros(*shape)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.backends.mps, "is_built", lambda: mps or mps_built)
        monkeypatch.setattr(torch, "zeros", zeros_on_card)
        monkeypatch.setattr(sys, "platform", platform)

    return pretend


def test_auto_prefers_mps_then_cuda_then_cpu(machine):
    machine(cuda=True, mps=True)
    assert script.find_devices() == (["mps", "cuda", "cpu"], [])
    assert script.parse_arguments([])[0].device == "mps"
    machine(cuda=True)
    assert script.parse_arguments([])[0].device == "cuda"
    machine()
    assert script.parse_arguments([])[0].device == "cpu"


@pytest.mark.parametrize(
    ("what", "note"),
    [
        ({"mps_built": True}, "MPS: built, but this macOS doesn't offer it"),
        ({"platform": "darwin"}, "MPS: this torch was built without it"),
        ({"cuda": True, "kernels": False}, "CUDA: this card has no kernels in this torch"),
    ],
)
def test_a_device_that_does_not_work_is_explained_and_passed_over(machine, what, note):
    machine(**what)
    args, notes = script.parse_arguments([])
    assert note in notes
    assert args.device == "cpu"


@pytest.mark.parametrize(
    ("features", "dtype", "words"),
    [
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16, "hardware computes in it"),
        ({"avx512_bf16": True}, torch.bfloat16, "hardware computes in it"),
        ({"bf16": True}, torch.bfloat16, "hardware computes in it"),
        ({"avx2": True, "avx512_bf16": False}, torch.float32, "hardware has no bfloat16"),
    ],
)
def test_cpu_trains_in_bfloat16_only_where_the_hardware_has_it(monkeypatch, features, dtype, words):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    chosen, reason = script.choose_precision("cpu")
    assert chosen == dtype
    assert words in reason


@pytest.mark.parametrize(
    ("device", "lacking", "word"),
    [
        ("mps", None, "Apple"),
        ("cpu", (torch.backends.mkldnn, "is_available"), "oneDNN"),
        ("cpu", (torch.cpu, "get_capabilities"), "can't tell"),
    ],
)
def test_float32_is_explained(monkeypatch, device, lacking, word):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": True}, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    if lacking == (torch.cpu, "get_capabilities"):
        monkeypatch.delattr(*lacking)
    elif lacking:
        monkeypatch.setattr(*lacking, lambda: False)
    dtype, reason = script.choose_precision(device)
    assert dtype == torch.float32
    assert word in reason


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_cuda_trains_in_bfloat16_only_where_it_is_not_emulated(monkeypatch, has_bfloat16):
    def is_supported(including_emulation=True):
        return including_emulation or has_bfloat16

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    dtype, _ = script.choose_precision("cuda")
    assert dtype == (torch.bfloat16 if has_bfloat16 else torch.float32)


# Training on torch's meta device, where any operation that mixes in a CPU tensor fails


@pytest.fixture
def without_values(monkeypatch):
    """Let `train` run on the meta device, which has no values: what it reads there is nan."""
    to_cpu = torch.Tensor.cpu

    def read(tensor):
        return torch.full(tensor.shape, torch.nan) if tensor.is_meta else to_cpu(tensor)

    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "cpu", read)
    monkeypatch.setattr(torch.Tensor, "item", lambda _: torch.nan)


def test_no_tensor_stays_behind_on_another_device(sample, in_folder, without_values):
    with pytest.raises(SystemExit, match="not finite in epoch 1"):  # after the validation
        train(sample[0], epochs=2, device="meta")


# Training on the devices of this machine


def test_a_step_on_the_device_agrees_with_float32_on_the_cpu(device, sample):
    """The tolerances are those of TF32, in which NVIDIA's GPUs convolve."""
    images, labels = script.as_tensors(sample[0])
    images, labels = images[:50] / 255, labels[:50]
    losses, gradients = [], []
    for where in (device, "cpu"):
        model = random_model().to(where)
        loss = torch.nn.functional.cross_entropy(model(images.to(where)), labels.to(where))
        loss.backward()
        losses.append(loss.item())
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients.append([p.grad.cpu() for p in trained])
    assert losses[0] == pytest.approx(losses[1], rel=3e-3)
    for on_device, on_cpu in zip(*gradients, strict=True):
        assert (on_device - on_cpu).norm() < 0.05 * on_cpu.norm()


def test_what_is_trained_on_the_device_predicts_the_same_on_the_cpu(device, sample, in_folder):
    _, history = train(sample[0], epochs=2, device=device, dtype=script.choose_precision(device)[0])
    assert_loads(MODEL)
    images, labels = script.as_tensors(sample[1])
    on_device = script.CIFARNet().eval()
    on_device.load_state_dict(history.best_state)
    there, loss, _ = script.evaluate(on_device.to(device).look, images, labels, device)
    here, loss_here, _ = script.evaluate(script.load_model(MODEL).look, images, labels, "cpu")
    difference = here.softmax(1) - there.softmax(1)
    assert difference.abs().max() < 0.02
    assert loss_here == pytest.approx(loss, rel=3e-3)
