"""Device: what is chosen, and that it trains as the CPU does. Checkpoint: what is refused."""

import contextlib
import io

import pytest
import torch
from conftest import MODEL, random_model, train

import pytorchpractice as script


@pytest.mark.parametrize(
    ("offered", "error", "devices", "note"),
    [
        ("mps", None, ["mps", "cpu"], "GPU found"),
        ("cuda", "No kernel\nSee", ["cpu"], "GPU not used: No kernel"),
        ("xpu", None, ["cpu"], "GPU not used: this torch is made for xpu"),
        (None, None, ["cpu"], "GPU not used: this torch is made for the CPU alone"),
    ],
)
def test_a_gpu_is_taken_if_it_works_and_else_explained(monkeypatch, offered, error, devices, note):
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
    assert "error: no cuda here, only cpu. GPU not used: No driver" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["amx_bf16", "avx512_bf16", "bf16"])
def test_bfloat16_is_chosen_only_where_a_cpu_is_known_to_have_it(monkeypatch, name):
    def precision(one_dnn, **features):
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: one_dnn)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
        return script.choose_precision("cpu")

    assert precision(True, avx2=True, **{name: True})[0] == torch.bfloat16
    assert precision(False, avx2=True, **{name: True})[0] == torch.float32
    assert precision(True, avx2=True, **{name: False})[0] == torch.float32
    assert script.choose_precision("mps")[0] == torch.float32


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_cuda_trains_in_float16_where_bfloat16_would_be_emulated(monkeypatch, has_bfloat16):
    supported = {True: True, False: has_bfloat16}  # with emulation, and without
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **how: supported[any(how.values())])
    expected = torch.bfloat16 if has_bfloat16 else torch.float16
    assert script.choose_precision("cuda")[0] == expected


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


@pytest.mark.parametrize("device", script.find_devices()[0])
def test_training_on_each_device_is_that_of_the_cpu(device, sample, narrow, in_folder):
    there, here = (train(sample[0], epochs=1, device=where)[0][0] for where in (device, "cpu"))
    assert there[:2] == pytest.approx(here[:2], rel=0.02)


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
