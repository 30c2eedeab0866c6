"""What opens for which class, and how far each site attends."""

import pytest
import torch

from drifa_attn import plot

pytest.importorskip("matplotlib")

from tests._plot import gates_of, words  # noqa: E402 - they need matplotlib


def test_gates_show_what_opens_for_each_class():
    gates, labels = gates_of()
    figure = plot.gates(gates, labels, names=["cat", "dog", "owl"], channels=3, per_class=2)
    left, right = (axes.images[0].get_array() for axes in figure.axes[:2])
    assert left.shape == (6, 3)
    expected = torch.full((3, 3), -0.4 / 3) + 0.4 * torch.eye(3)
    assert torch.allclose(torch.tensor(right.tolist()), expected, atol=1e-6)
    assert torch.allclose(torch.tensor(left.tolist()), expected.repeat_interleave(2, 0), atol=1e-6)
    said = words(figure)
    assert {"cat", "dog", "owl", "channel (3 of 6)", "gate, less the channel's mean"} <= set(said)
    mean = gates["open"].std(0).mean()
    assert f"Gates at open: they deviate by {mean:.3f} over 12 samples" in said


def test_gates_of_the_site_that_is_named_and_without_labels():
    gates, _ = gates_of()
    figure = plot.gates({**gates, "open": gates["open"]}, site="flat", what="gain")
    assert "Gains at flat: they deviate by 0.000 over 12 samples" in words(figure)
    assert len([axes for axes in figure.axes if axes.images]) == 1


def test_spread_is_the_deviation_over_the_batch():
    gates, _ = gates_of()
    figure = plot.spread({**gates, "twice": [gates["open"], gates["flat"]]})
    axes = figure.axes[0]
    expected = [0, gates["open"].std(0).mean().item(), gates["open"].std(0).mean().item(), 0]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(expected)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["flat", "open", "twice, call 1", "twice, call 2"]
    assert axes.get_xlabel().startswith("standard deviation of a gate over 12 samples")


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([1], {}, "plot.gates expected the dict that drifa_attn.gates or drifa_attn.gains returns, got list"),
        ({}, {}, "the dict is empty"),
        ({"a": 3}, {}, "expected a tensor as the gate of 'a', got int"),
        ({"a": torch.rand(3)}, {}, r"expected the gate of 'a' as \(b, c\), got \(3,\)"),
        ({"a": torch.full((2, 2), torch.nan)}, {}, "a gate of 'a' that is not finite"),
        ({"a": torch.rand(1, 2)}, {}, "at least 2 samples, got {'a': 1}"),
        ({"a": torch.rand(2, 2)}, {"site": "b"}, "got site='b', but there are gates of a"),
        ({"a": torch.rand(2, 2, 2)}, {}, "plot.modalities draws attention among positions"),
        ({"a": torch.rand(2, 2)}, {"labels": [0, 1, 1]}, r"labels of shape \(2,\), one class a sample, got \(3,\)"),
        ({"a": torch.rand(2, 2)}, {"labels": [0.5, 1]}, "labels as integers, one class a sample, got torch.float32"),
        ({"a": torch.rand(2, 2)}, {"labels": [-100, 1]}, "labels of at least 0, got -100"),
        ({"a": torch.rand(2, 2)}, {"labels": [0, 1], "names": ["x"]}, "got 1 names and a class 1"),
        ({"a": torch.rand(2, 2)}, {"channels": 0}, "channels to be an integer >= 1, got 0"),
        ({"a": torch.rand(2, 2)}, {"what": "weight"}, 'what to be "gate" or "gain", got \'weight\''),
    ],
)
def test_gates_that_cannot_be_drawn_are_refused(given, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        plot.gates(given, **options)
