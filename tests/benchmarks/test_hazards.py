"""The hazards that can be judged without a GPU, on fake CUDA tensors."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks import hazards
from drifa_attn import functional
from drifa_attn.ops import choose
from tests._gpu import fake_gpu
from tests._triton import skip_without_triton


def test_chosen_finds_chunked_operators_on_a_gpu(monkeypatch):
    with fake_gpu(monkeypatch):
        found = hazards.chosen(torch.device("cuda"))
        assert "64 float32: triton" in found
        assert "2048 float32: reference" in found
        monkeypatch.setattr(choose, "kernel_reason", lambda xs, width: None)
        with pytest.raises(ValueError, match="1024 channels in torch.float32: chunked"):
            hazards.chosen(torch.device("cuda"))


def test_start_finds_a_gain_that_is_not_one(monkeypatch):
    assert hazards.start(torch.device("cpu")) == "the same bits"
    monkeypatch.setattr(functional, "gain", lambda a, alpha: a * alpha * 1.01)
    with pytest.raises(ValueError, match="64 channels, reduction 16, torch.bfloat16: the output is not x"):
        hazards.start(torch.device("cpu"))


def test_launched_finds_one_more(monkeypatch):
    skip_without_triton()
    from benchmarks import launches

    assert hazards.launched(torch.device("cpu")) == "3"
    monkeypatch.setattr(launches, "launches", lambda label, mode: ((1, 3), (0, 0)))
    with pytest.raises(ValueError, match="the launches are"):
        hazards.launched(torch.device("cpu"))


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


def test_every_line_of_the_table_names_tests_and_hazards_that_exist():
    root = Path(hazards.__file__).parent.parent
    lines = [line.split(" | ") for line in (root / "benchmarks" / "hazards.md").read_text().splitlines() if "::" in line]
    assert len(lines) > 15
    tried = set()
    for line in lines:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", line[2])
        assert named, line[0]
        for path, test in named:
            assert f"def {test}(" in (root / path).read_text(), test
        tried |= set(re.findall(r"`(\w+)`", line[3]))
    assert tried == set(hazards.HAZARDS)
