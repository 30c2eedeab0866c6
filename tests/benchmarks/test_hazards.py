"""The hazards that can be judged without a GPU, on fake CUDA tensors."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from benchmarks import hazards
from drifa_attn.ops import choose


def test_chosen_finds_chunked_operators_on_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(choose, "triton_missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with FakeTensorMode():
        found = hazards.chosen(torch.device("cuda"))
        assert "64 float32: triton" in found
        assert "2048 float32: reference" in found
        monkeypatch.setattr(choose, "kernel_reason", lambda xs, width: None)
        with pytest.raises(ValueError, match="1024 channels in torch.float32: chunked"):
            hazards.chosen(torch.device("cuda"))


def test_a_hazard_that_fails_is_named_and_the_others_go_on(monkeypatch, capsys):
    def fails(device):
        raise ValueError("it does not hold")

    monkeypatch.setitem(hazards.HAZARDS, "few", fails)
    with pytest.raises(SystemExit) as exit:
        hazards.main(["--device", "cpu", "--only", "few", "chosen"])
    said = capsys.readouterr().out
    assert exit.value.code == 1
    assert "FAIL few ValueError: it does not hold" in said
    assert "ok   chosen" in said
