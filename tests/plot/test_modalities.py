"""Gates while modalities are missing."""

import pytest
import timm
import torch

import drifa_attn
from drifa_attn import plot

pytest.importorskip("matplotlib")

from tests._plot import cells, words  # noqa: E402 - they need matplotlib


def test_modalities_are_compared_with_the_first_case():
    first = {"refiners.0.a": torch.tensor([[0.2, 0.4]]), "refiners.0.b": torch.tensor([[0.5, 0.5]])}
    left, right = plot.modalities({"all": first, "no b": {"refiners.0.a": torch.tensor([[0.3, 0.2]])}}).axes
    assert cells(left) == ["0.300", "0.250", "0.500", "absent"]
    assert cells(right) == ["0.150", "absent"]
    assert left.get_title(loc="left") == "mean gate"
    assert [label.get_text() for label in left.get_yticklabels()] == ["refiners.0.a", "refiners.0.b"]


@pytest.mark.parametrize("axis", [-1, -2])
def test_attention_matrices_are_told_by_the_positions_that_are_looked_at(axis):
    even, one = torch.full((2, 3, 4, 4), 0.25), torch.zeros(2, 3, 4, 4)
    one.select(axis, 1).fill_(1)
    left, right = plot.modalities({"all": {"refiners.0.a": even}, "no b": {"refiners.0.a": one}}).axes
    assert cells(left) == ["4.000", "1.000"]
    assert cells(right) == ["0.750"]
    assert left.get_title(loc="left") == "positions looked at"


@pytest.mark.parametrize("fusion", ["mifa", "mmtm", "cross_attention", "gated", "mutual_attention"])
def test_gates_of_fused_networks_are_drawn(fusion):
    net = drifa_attn.fuse({name: timm.create_model("test_resnet") for name in "ab"}, {"task": 3}, fusion=fusion)
    inputs = {name: torch.randn(2, 3, 64, 64) for name in "ab"}
    cases = {"all": drifa_attn.gates(net, inputs)}
    cases |= {f"no {name}": drifa_attn.gates(net, {**inputs, name: None}) for name in inputs}
    figure = plot.modalities(cases)
    assert cells(figure.axes[0]).count("absent") >= 2
    assert {"all", "no a", "no b"} <= set(words(figure))


def test_cases_that_do_not_fit_are_refused():
    gates = {"refiners.0.a": torch.rand(4, 3)}
    for cases, message in (
        ([gates], "expected a dict of gates by case, got list"),
        ({"all": gates}, "at least 2 cases"),
        ({"all": gates, "no b": {"refiners.0.a": torch.rand(5, 3)}}, r"has 4 in 'all' and 5 in 'no b'"),
        ({"all": gates, "no b": torch.rand(4, 3)}, "expected the dict that drifa_attn.gates"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            plot.modalities(cases)
