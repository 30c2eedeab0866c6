"""What is trained: `parameter_groups`. `freeze_backbone` is tested with the networks that it freezes."""

import pytest
import timm
import torch
from torch import nn

import drifa_attn
from drifa_attn import MFA, fuse, parameter_groups, wrap
from tests._fusion import TASKS, given
from tests.networks import Net


def network(name="test_resnet", **options):
    torch.manual_seed(0)
    return wrap(timm.create_model(name, num_classes=4), **options)


def named(model, groups):
    """The names of the parameters of every group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}


def test_every_parameter_is_in_one_group_with_the_rate_of_its_part():
    model = network()
    groups = parameter_groups(model, lr=1e-4, attention_lr=2e-3, weight_decay=0.3)
    found = named(model, groups)
    assert sorted(name for names in found.values() for name in names) == sorted(name for name, _ in model.named_parameters())
    for group in groups:
        part, _, spared = group["name"].partition(" ")
        assert group["lr"] == (2e-3 if part == "attention" else 1e-4)
        assert group["weight_decay"] == (0.0 if spared else 0.3)
        for name in found[group["name"]]:
            assert ("drifa_attn" in name) == (part == "attention"), name
            assert name.startswith("fc.") == (part == "head"), name
            assert spared == ("without decay" if model.get_parameter(name).ndim < 2 else ""), name
    scales = {name for name in found["attention without decay"] if name.endswith(("scale", "alpha", "bias"))}
    assert scales == found["attention without decay"]
    assert len(scales) == 5 * (3 + 9)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_any_optimizer_takes_them(optimizer):
    model = network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    steps = optimizer(parameter_groups(model))
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    steps.step()
    assert torch.optim.lr_scheduler.OneCycleLR(steps, [group["lr"] for group in steps.param_groups], total_steps=3)
    assert not torch.equal(model.fc.weight, before["fc.weight"])


def test_what_is_frozen_is_left_out():
    model = drifa_attn.freeze_backbone(network())
    groups = parameter_groups(model)
    assert {group["name"].partition(" ")[0] for group in groups} == {"attention", "head"}
    assert {group["lr"] for group in groups} == {1e-2, 1e-3}
    drifa_attn.freeze_backbone(model, classifier=False)
    assert all(name.startswith("attention") for name in named(model, parameter_groups(model)))
    with pytest.raises(ValueError, match="has no parameter that takes gradients"):
        parameter_groups(model.requires_grad_(False))


def test_the_strength_of_another_attention_has_ten_times_the_rate():
    model = network(attention="se")
    rates = {group["name"]: group["lr"] for group in parameter_groups(model, attention_lr=3e-3)}
    assert rates["strength without decay"] == pytest.approx(3e-2)
    assert rates["attention"] == rates["attention without decay"] == 3e-3
    found = named(model, parameter_groups(model))
    assert found["strength without decay"] == {name for name, _ in model.named_parameters() if name.endswith(".strength")}


def test_what_a_network_wants_undecayed_is_not_decayed():
    model = network("test_vit")
    assert {"cls_token", "pos_embed"} <= named(model, parameter_groups(model))["rest without decay"]


def test_heads_of_fused_and_of_other_networks():
    backbones, inputs = given(("resnet", "record"))
    net = fuse(backbones, TASKS, example_inputs=inputs)
    assert named(net, parameter_groups(net))["head"] == {"heads.lesion.weight", "heads.cell.weight"}
    own = Net(lambda net, x: net.out(net.mfa(x)), mfa=MFA(8), out=nn.Linear(8, 2))
    assert named(own, parameter_groups(own)).keys() == {"attention", "attention without decay", "rest", "rest without decay"}
    assert named(own, parameter_groups(own, classifier="out"))["head"] == {"out.weight"}
    shared = Net(lambda net, x: x, a=own.mfa, b=own.mfa)
    assert len(parameter_groups(shared)[0]["params"]) + len(parameter_groups(shared)[1]["params"]) == 17


def test_mistakes_are_named():
    model = network()
    for name in ("lr", "attention_lr", "weight_decay"):
        with pytest.raises(ValueError, match=f"parameter_groups expected {name} >= 0, got -1"):
            parameter_groups(model, **{name: -1})
    with pytest.raises(ValueError, match="has no module 'top'"):
        parameter_groups(model, classifier="top")
    with pytest.raises(ValueError, match="holds no attention"):
        parameter_groups(nn.Linear(2, 2))
