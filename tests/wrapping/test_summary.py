"""The summary says what is there now."""

import pytest
import timm
import torch
from torch import nn

import drifa_attn


def network():
    torch.manual_seed(0)
    return drifa_attn.wrap(timm.create_model("test_resnet", num_classes=4).eval())


def test_a_wrapped_network_is_at_its_start_until_it_is_moved():
    net = network()
    found = drifa_attn.summary(net)
    plan = drifa_attn.plan(timm.create_model("test_resnet", num_classes=4))
    assert [layer.params for layer in found.layers] == [site.params for site in plan.sites]
    assert {(layer.kind, layer.calibrated, layer.start, layer.enabled) for layer in found.layers} == {
        ("MFA", False, True, True)
    }
    assert found.params == found.trained == plan.params + sum(site.params for site in plan.sites)
    drifa_attn.calibrate(net, torch.randn(16, 3, 64, 64))
    assert {(layer.calibrated, layer.start) for layer in drifa_attn.summary(net).layers} == {(True, True)}
    nn.init.constant_(next(p for name, p in net.named_parameters() if name.endswith("alpha")), 3.0)
    assert sum(layer.start is False for layer in drifa_attn.summary(net).layers) == 1


def test_what_is_frozen_or_disabled_is_said():
    net = network()
    drifa_attn.freeze_backbone(net, classifier=False)
    found = drifa_attn.summary(net)
    assert found.trained == sum(layer.trained for layer in found.layers) == sum(layer.params for layer in found.layers)
    with drifa_attn.disabled(net):
        assert not any(layer.enabled for layer in drifa_attn.summary(net).layers)


def test_the_table_has_a_line_a_layer():
    text = str(drifa_attn.summary(network()))
    lines = text.splitlines()
    assert lines[0].startswith("ResNet: 5 attention layers of ")
    assert len(lines) == 2 + 5
    assert "at it" in lines[2]


def test_layers_of_other_kinds_have_no_statistics_or_start():
    net = drifa_attn.wrap(timm.create_model("test_resnet"), attention="se")
    assert {layer.calibrated for layer in drifa_attn.summary(net).layers} == {None}
    paper = drifa_attn.summary(nn.Sequential(drifa_attn.MFA(4)))
    assert [(layer.calibrated, layer.start) for layer in paper.layers] == [(None, None)]


def test_fused_networks_have_one_too():
    net = drifa_attn.fuse({"a": timm.create_model("test_resnet"), "b": timm.create_model("test_resnet")}, {"y": 3})
    assert {layer.kind for layer in drifa_attn.summary(net).layers} == {"MIFARefiner"}


def test_a_network_without_attention_is_told():
    with pytest.raises(ValueError, match="holds no attention"):
        drifa_attn.summary(nn.Linear(2, 2))
