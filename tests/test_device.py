"""Device: what is chosen, and that it trains as the CPU does. Checkpoint: what is refused."""

import contextlib
import io

import pytest
import torch
import torch.nn.functional as F
from conftest import MODEL, assert_loads, random_model, train

import pytorchpractice as script


@pytest.mark.parametrize(
    ("offered", "error", "devices", "note"),
    [
        ("mps", None, ["mps", "cpu"], "GPU found"),
        ("cuda", None, ["cuda", "cpu"], "GPU found"),
        ("cuda", "No kernel\nSee", ["cpu"], "GPU not used: No kernel"),
        ("xpu", None, ["cpu"], "GPU not used: this torch is made for xpu"),
        (None, None, ["cpu"], "GPU not used: this torch is made for the CPU alone"),
    ],
)
def test_the_gpu_is_taken_if_it_works_and_else_explained(
    monkeypatch, offered, error, devices, note
):
    def read(tensor):
        """Fail as a GPU does, only when a result is read."""
        if error:
            raise RuntimeError(error)
        return 1.0

    def zeros(*shape, device):
        assert device == offered
        return torch.ones(*shape)

    accelerator = torch.device(offered) if offered else None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: accelerator)
    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(torch.Tensor, "item", read)
    assert script.find_devices() == (devices, note)
    assert script.parse_arguments([], devices, note).device == devices[0]


def test_a_device_that_is_asked_for_and_does_not_work_is_told_with_the_reason(capsys):
    with pytest.raises(SystemExit):
        script.parse_arguments(["--device", "cuda"], ["cpu"], "GPU not used: No driver")
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith("error: no cuda here, only cpu. GPU not used: No driver")


@pytest.mark.parametrize("name", ["amx_bf16", "avx512_bf16", "bf16"])
def test_bfloat16_is_chosen_only_where_a_cpu_is_known_to_have_it(monkeypatch, name):
    def precision(one_dnn, **features):
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: one_dnn)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
        return script.choose_precision("cpu")

    no_bfloat16 = torch.float32, "bfloat16 would be many times slower here"
    assert precision(True, avx2=True, **{name: True})[0] == torch.bfloat16
    assert precision(False, avx2=True, **{name: True}) == no_bfloat16
    assert precision(True, avx2=True, **{name: False}) == no_bfloat16
    assert script.choose_precision("mps")[0] == torch.float32


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_cuda_trains_in_float16_where_bfloat16_would_be_emulated(monkeypatch, has_bfloat16):
    def is_supported(including_emulation=True):
        return including_emulation or has_bfloat16

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    dtype, _ = script.choose_precision("cuda")
    assert dtype == (torch.bfloat16 if has_bfloat16 else torch.float16)


def test_float16_needs_no_loss_scaling(sample, monkeypatch):
    """Its gradients are finite and nearer to float32's than bfloat16's."""
    monkeypatch.setattr(script, "WIDTHS", (8, 16, 16))  # float16 is slow on a CPU
    images, labels = script.as_tensors(sample[0])
    images, labels = images[:50] / 255, labels[:50]

    def gradients(dtype):
        model = random_model()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(images).float()
        F.cross_entropy(logits, labels, reduction="sum").backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    exact = gradients(torch.float32)
    half, brain = (gradients(dtype) for dtype in (torch.float16, torch.bfloat16))
    assert half.isfinite().all()
    assert (half - exact).norm() < min(0.1 * exact.norm(), (brain - exact).norm())


def test_no_tensor_stays_behind_on_another_device(sample, narrow, in_folder, monkeypatch):
    """On the meta device, an operation that mixes in a CPU tensor fails; what is read is nan."""
    to_cpu = torch.Tensor.cpu

    def read(tensor):
        return torch.full(tensor.shape, torch.nan) if tensor.is_meta else to_cpu(tensor)

    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "cpu", read)
    monkeypatch.setattr(torch.Tensor, "item", lambda _: torch.nan)
    with pytest.raises(FloatingPointError, match="not finite in epoch 1"):  # after the validation
        train(sample[0], epochs=2, device="meta")


@pytest.fixture(params=script.find_devices()[0])
def device(request):
    """Return each device of this machine in turn."""
    return request.param


def test_a_training_step_on_the_device_is_that_of_the_cpu(device, sample):
    """In float32: loss, gradients, and how far each weight has moved; TF32 is switched off."""
    images, labels = script.as_tensors(sample[0])
    images, labels = images[:50] / 255, labels[:50]
    losses, gradients, moves = [], [], []
    for where in (device, "cpu"):
        model = random_model().to(where)
        trained = [p for p in model.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in trained]
        optimizers, _ = script.make_optimizers(model, 50, 10, torch.float32)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            logits = model(images.to(where))
            loss = F.cross_entropy(logits, labels.to(where), reduction="sum")
            loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        gradients.append([p.grad.cpu() for p in trained])
        moves.append([(p.detach() - old).cpu() for p, old in zip(trained, before, strict=True)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    for on_device, on_cpu in zip(gradients[0] + moves[0], gradients[1] + moves[1], strict=True):
        assert (on_device - on_cpu).norm() < 0.02 * on_cpu.norm()


def test_what_is_trained_on_the_device_predicts_the_same_on_the_cpu(
    device, sample, narrow, in_folder
):
    train(sample[0], epochs=2, device=device, dtype=script.choose_precision(device)[0])
    assert_loads(MODEL)
    data = script.as_tensors(sample[1])
    there, loss, _ = script.evaluate(script.load_model(MODEL).to(device).look, *data, device)
    here, loss_here, _ = script.evaluate(script.load_model(MODEL).look, *data, "cpu")
    assert (here.softmax(1) - there.softmax(1)).abs().max() < 0.02
    assert loss_here == pytest.approx(loss, rel=3e-3)


STATE = random_model().state_dict()
WHOLE = io.BytesIO()
torch.save(STATE, WHOLE)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "FileNotFoundError"),
        (b"<!DOCTYPE html><html><body>Not found</body></html>", "UnpicklingError"),
        (b"", "EOFError"),
        (WHOLE.getvalue()[:100_000], "RuntimeError"),
        (random_model(), "UnpicklingError"),  # a whole model may run code when it is loaded
        ({"epoch": 3, "state_dict": {}}, "KeyError"),
        ({**STATE, "head.weight": torch.zeros(10, 32)}, "size mismatch for head.weight"),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_one_short_line(tmp_path, content, reason):
    path = tmp_path / MODEL
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(OSError, match=f"no model in {path}, so train.*{reason}") as failure:
        script.load_model(path)
    assert len(str(failure.value).splitlines()) == 1
    assert len(str(failure.value)) < 200 + len(str(path))
