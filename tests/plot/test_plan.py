"""Plans as bars."""

import pytest
import timm

import drifa_attn
from drifa_attn import plot

pytest.importorskip("matplotlib")


def test_a_plan_is_drawn_with_its_numbers():
    plan = drifa_attn.plan(timm.create_model("test_resnet"))
    params, flops = plot.plan(plan).axes
    assert [bar.get_width() for bar in params.patches] == [site.params for site in plan.sites]
    assert [bar.get_width() for bar in flops.patches] == [site.flops for site in plan.sites]
    assert [label.get_text() for label in params.get_yticklabels()] == [site.name for site in plan.sites]
    assert params.get_xlabel() == "parameters added"
    assert flops.get_xlabel() == "FLOPs per sample added"


def test_a_plan_of_a_fusion_is_drawn_by_stages_and_readout():
    networks = {name: timm.create_model("test_resnet") for name in "ab"}
    plan = drifa_attn.fuse(networks, {"task": 3}, fusion="gated").plan
    figure = plot.plan(plan)
    assert [bar.get_width() for bar in figure.axes[0].patches] == [plan.readout_params]
    plan = drifa_attn.fuse(networks, {"task": 3}).plan
    assert [bar.get_width() for bar in plot.plan(plan).axes[0].patches] == [stage.params for stage in plan.stages]


def test_what_is_no_plan_or_costs_nothing_is_refused():
    with pytest.raises(TypeError, match=r"plot.plan expected what drifa_attn.plan returns, or net.plan, got ResNet"):
        plot.plan(timm.create_model("test_resnet"))
    nothing = drifa_attn.fuse({name: timm.create_model("test_resnet") for name in "ab"}, {"task": 3}, fusion="concat").plan
    with pytest.raises(ValueError, match="the fusion 'concat' adds no parameters and no FLOPs"):
        plot.plan(nothing)
