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
    assert notes == [note]
    assert args.device == "cpu"


@pytest.mark.parametrize(
    ("features", "dtype", "words"),
    [
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16, "hardware multiplies it"),
        ({"avx512_bf16": True}, torch.bfloat16, "hardware multiplies it"),
        ({"bf16": True}, torch.bfloat16, "hardware multiplies it"),
        ({"avx2": True, "avx512_bf16": False}, torch.float32, "hardware has no bfloat16"),
    ],
)
def test_cpu_trains_in_bfloat16_only_where_the_hardware_has_it(monkeypatch, features, dtype, words):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    chosen, reason = script.choose_precision("cpu")
    assert chosen == dtype
    assert words in reason


def test_cpu_trains_in_float32_where_torch_lacks_onednn(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": True}, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    dtype, reason = script.choose_precision("cpu")
    assert dtype == torch.float32
    assert "oneDNN" in reason


def test_cpu_trains_in_float32_where_torch_cannot_tell(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    dtype, reason = script.choose_precision("cpu")
    assert dtype == torch.float32
    assert "can't tell" in reason


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_cuda_trains_in_bfloat16_only_where_it_is_not_emulated(monkeypatch, has_bfloat16):
    def is_supported(including_emulation=True):
        return including_emulation or has_bfloat16

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    dtype, _ = script.choose_precision("cuda")
    assert dtype == (torch.bfloat16 if has_bfloat16 else torch.float32)


def test_mps_trains_in_float32():
    dtype, reason = script.choose_precision("mps")
    assert dtype == torch.float32
    assert "Apple" in reason


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


def test_a_model_left_on_another_device_is_noticed(sample, in_folder, without_values):
    _, batches, validation = script.set_up_training(sample[0], 0, 30, "meta")
    run = {"epochs": 1, "device": "meta", "dtype": torch.float32}
    with pytest.raises((RuntimeError, NotImplementedError)):
        script.train(random_model(), batches, validation, script.History(), **run)


# Training on the devices of this machine


@pytest.fixture
def gradients(monkeypatch):
    """Let training leave the weights as they are; return a list of the gradients of its steps."""
    steps = []

    class Recorder:
        def __init__(self, model):
            self.model = model

        def step(self):
            named = self.model.named_parameters()
            steps.append({name: p.grad.cpu() for name, p in named if p.grad is not None})

        def zero_grad(self):
            self.model.zero_grad()

    class Constant:
        def step(self):
            pass

    monkeypatch.setattr(
        script, "make_optimizers", lambda model, *_: ([Recorder(model)], [Constant()])
    )
    return steps


def test_a_step_on_the_device_is_the_step_in_float32_on_the_cpu(
    device, sample, in_folder, gradients
):
    """The tolerances are those of TF32, in which NVIDIA's GPUs convolve."""
    losses = []
    for where in (device, "cpu"):
        model, batches, validation = script.set_up_training(sample[0], 0, 540, where)
        if where == "cpu":
            model.to(memory_format=torch.contiguous_format)  # as on no device but MPS
        history, run = script.History(), {"epochs": 1, "device": where, "dtype": torch.float32}
        script.train(model, batches, validation, history, **run)
        losses.append([*history.train_loss, *history.validation_loss])
    assert losses[0] == pytest.approx(losses[1], rel=3e-3)
    on_device, on_cpu = gradients
    assert on_device.keys() == on_cpu.keys()
    for name, expected in on_cpu.items():
        assert (on_device[name] - expected).norm() < 0.05 * expected.norm(), name


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
