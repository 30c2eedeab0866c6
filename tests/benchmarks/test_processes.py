"""What attention adds to data-parallel training: counted in real processes, held to the trained weights."""

import pytest

from benchmarks import processes
from benchmarks.processes import WAYS, averaged_bytes, buffer_bytes, efficiency, main, network, trained_bytes


def test_attention_adds_its_own_gradients_and_nothing_else():
    plain, wrapped, frozen = (network("test_resnet", way) for way in WAYS)
    added = sum(p.numel() for p in wrapped.parameters()) - sum(p.numel() for p in plain.parameters())
    head = sum(p.numel() for p in plain.get_classifier().parameters())
    assert trained_bytes(wrapped) == trained_bytes(plain) + 4 * added
    assert trained_bytes(frozen) == 4 * (added + head)


@pytest.mark.parametrize("number", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_average_the_trained_weights(number):
    name = "test_efficientnet"  # that every process knows, also with older versions of timm
    assert averaged_bytes(name, WAYS[2], number, 32) == trained_bytes(network(name, WAYS[2]))


def test_a_ring_sends_nearly_twice_the_gradients():
    assert efficiency(1.0, 10, 1, 1.0) == 1.0
    assert efficiency(1.0, 1, 2, 1.0) == pytest.approx(1 / 2)
    assert efficiency(1.0, 1, 10**6, 1.0) == pytest.approx(1 / 3, abs=1e-4)


def test_the_command_prints_what_was_counted(monkeypatch, capsys):
    monkeypatch.setattr(processes, "averaged_bytes", lambda name, way, *_: trained_bytes(network(name, way)))
    main(["test_resnet", "--processes", "2", "4", "--step", "0.1", "--link", "10"])
    printed, plain = capsys.readouterr().out, network("test_resnet", "plain")
    assert f"| plain | {trained_bytes(plain):,} | 100.00% | {buffer_bytes(plain):,} |" in printed
    assert "Counted in 2, 4 processes" in printed
    assert "| network | 2 processes | 4 processes |" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_net"], "timm has no network 'no_such_net'"),
        (["test_resnet", "--step", "1"], "--step and --link belong together"),
        (["test_resnet", "--processes", "0"], "expected an integer >= 1"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_more_bytes_than_weights_are_an_error(monkeypatch):
    monkeypatch.setattr(processes, "averaged_bytes", lambda *_: 1)
    with pytest.raises(ValueError, match="averaged 1 bytes, its trained weights have"):
        processes.counted("test_resnet", [2], 32)
