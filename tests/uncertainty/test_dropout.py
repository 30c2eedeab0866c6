"""Dropout for networks that have none, where `wrap` would put attention."""

import copy
import pickle

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from drifa_attn import add_dropout, fuse, mc_dropout, plan, remove_dropout, unwrap, wrap
from drifa_attn.trees import tensors_in
from drifa_attn.uncertainty.dropout import DropoutStep, drop_channels, dropouts
from drifa_attn.wrapping.inject import STEPS, Refinement
from tests._compare import assert_same_bits, assert_same_math
from tests._wrapping import assert_same, awaken_, refinements, registered, training_step
from tests.cases import backward, perturb_
from tests.networks import NETWORKS, Net, built, conv, planned
from tests.strategies import features

RATES = st.floats(0.05, 0.95)


def outputs(model, x):
    """Every tensor a network gives, in eval mode."""
    with torch.no_grad():
        return [t for _, t in tensors_in(model.eval()(x))]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def uncertainty(model, inputs, passes=4):
    return mc_dropout(model, inputs, passes, generator=seeded()).epistemic


def dropped_at(model, x, at="stage"):
    """The sites of a plan of the network whose carriers drop, in calling order."""
    carriers = {name for name, module in model.named_modules() if any(module is found for found, _ in dropouts(model))}
    bare = remove_dropout(copy.deepcopy(model))
    sites = [site for site in plan(bare, at, example_input=x).sites if site.carrier in carriers]
    assert len(sites) == len(list(dropouts(model)))
    return [site.name for site in sites]


# Channels ----------------------------------------------------------------------------------------------------------------


@given(feature=features(), p=RATES)
def test_whole_channels_are_dropped_at_all_positions(feature, p):
    """Prefix tokens among them; what is kept is scaled, and strides stay."""
    x = feature.x + 10 * feature.x.sign()  # none is zero by itself
    y = drop_channels(x, p=p, layout=feature.layout, training=True)
    axis = 1 if feature.layout == "b c ..." else -1
    flat = y.movedim(axis, 1).flatten(2) if y.ndim > 2 else y[..., None]
    kept = (flat != 0).any(2)
    assert torch.equal((flat != 0).all(2), kept)
    mask = kept.reshape(len(x), -1, *[1] * (x.ndim - 2)) if axis == 1 else kept.reshape(len(x), *[1] * (x.ndim - 2), -1)
    assert_same_math(y + 1, mask * x / (1 - p) + 1)
    assert_same_bits(drop_channels(x, p=p, layout=feature.layout, training=False), x)


@pytest.mark.parametrize("layout", ["b c ...", "b ... c"])
def test_the_rate_is_the_share_of_channels_and_each_sample_has_its_own(layout):
    x = torch.ones(100, 100, 2) if layout == "b c ..." else torch.ones(100, 2, 100)
    y = drop_channels(x, p=0.3, layout=layout, training=True)
    dropped = (y == 0).double().mean(2 if layout == "b c ..." else 1)
    assert abs(dropped.mean().item() - 0.3) < 0.02  # four deviations: 4 · sqrt(0.3 · 0.7 / 10⁴)
    assert len({tuple(row.tolist()) for row in dropped}) == 100


@pytest.mark.parametrize("layout", ["b c ...", "b ... c"])
def test_memory_format_stays(layout):
    x = torch.randn(2, 8, 4, 6).to(memory_format=torch.channels_last)
    x = x if layout == "b c ..." else x.permute(0, 2, 3, 1)
    assert drop_channels(x, p=0.5, layout=layout, training=True).stride() == x.stride()


# In networks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_dropout_goes_where_attention_would_and_changes_no_bit_in_eval_mode(name):
    model, x = built(name)
    awaken_(model)
    expected, keys, before, step = outputs(model, x), list(model.state_dict()), registered(model), training_step(model, x)
    kind = type(model)
    assert add_dropout(model, 0.5, example_input=x) is model
    assert type(model) is kind
    sites = [site.name for site in planned(name, "stage").sites]
    assert dropped_at(model, x) == sites
    assert list(model.state_dict()) == keys
    assert_same(outputs(model, x), expected)
    assert not torch.equal(training_step(model, x)[0], step[0])
    assert uncertainty(model, x, 3).min() > 0
    assert remove_dropout(model) is model
    assert registered(model) == before
    assert_same(outputs(model, x), expected)
    assert_same(training_step(model, x), step)


def test_every_site_drops_its_channels():
    """Each stage's features have whole channels of zeros, about as many as asked, in training mode alone."""
    model, x = built("vit")
    add_dropout(model, 0.5, at="block")
    seen = {}
    for module, _ in dropouts(model):
        module.register_forward_hook(lambda module, args, output: seen.update({module: output}))
    model.train()(x)
    assert len(seen) == 5
    for output in seen.values():  # b n c
        zeros = (output == 0).all(1)
        assert torch.equal(zeros, (output == 0).any(1))
        assert 0.3 < zeros.double().mean() < 0.7
    model.eval()(x)
    assert not any((output == 0).all(1).any() for output in seen.values())


@pytest.mark.parametrize(
    ("at", "names"),
    [
        ("block", {f"layer{i}.0" for i in range(1, 5)}),
        (r"layer[34]", {"layer3", "layer4"}),
        (["layer2"], {"layer2"}),
        (lambda name, module: name == "layer1", {"layer1"}),
    ],
)
def test_at_is_that_of_wrap(at, names):
    model, x = built("resnet")
    assert set(dropped_at(add_dropout(model, 0.2, at=at), x, at)) == names


def test_layouts_and_inputs_are_those_of_wrap():
    model = Net(lambda net, x: net.f(x), f=nn.Linear(6, 6))
    add_dropout(model, 0.2, ["f"], example_input=torch.randn(2, 5, 6), layouts={"f": "b ... c"})
    assert [step.layout for _, step in dropouts(model)] == ["b ... c"]


def test_copies_and_pickles_carry_it():
    model, x = built("resnet")
    expected = uncertainty(add_dropout(model, 0.2), x)
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (copied, pickled):
        assert_same_bits(uncertainty(other, x), expected)
        other.layer1.register_forward_hook(lambda *_: None)  # takes no hook's place
        assert_same_bits(uncertainty(other, x), expected)
        remove_dropout(other)
    assert_same_bits(uncertainty(model, x), expected)


def test_gradient_checkpointing_draws_the_same_again():
    model, x = built("resnet")
    add_dropout(model, 0.3).train()
    x.requires_grad_()  # or timm 1.0.9 runs no checkpoint backward
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        grads.append(backward(model(x).square().sum(), [*model.parameters()]))
    assert any(grad.any() for grad in grads[0])
    for one, other in zip(*grads, strict=True):
        assert_same_math(other + 1, one + 1, 1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_it_compiles_without_a_break(training):
    model, x = built("resnet")
    add_dropout(model, 0.2)
    expected = training_step(model, x)[0] if training else outputs(model, x)[0]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    actual = training_step(compiled, x)[0] if training else outputs(compiled, x)[0]
    assert_same_math(actual, expected)


def test_it_exports():
    model, x = built("vit")
    expected = outputs(add_dropout(model, 0.2), x)
    assert_same_math(torch.export.export(model, (x,)).module()(x).detach(), expected[0])


# Beside attention --------------------------------------------------------------------------------------------------------


def test_wrap_and_add_dropout_come_in_either_order():
    """At one site dropout precedes attention, as in the paper's network."""
    results = []
    for first, second in ((wrap, lambda m: add_dropout(m, 0.2)), (lambda m: add_dropout(m, 0.2), wrap)):
        model, x = built("resnet")
        second(first(model))
        for module in model.modules():
            assert [type(step) for step in vars(module).get(STEPS, ())] in ([DropoutStep, Refinement], [])
        assert len(list(dropouts(model))) == 5
        torch.manual_seed(0)
        perturb_(model)
        results.append((list(model.state_dict()), uncertainty(model, x)))
        remove_dropout(model)
        assert len(list(refinements(model))) == 5
    assert results[0][0] == results[1][0]
    assert_same_bits(results[0][1], results[1][1])


def test_unwrap_leaves_dropout():
    model, x = built("resnet")
    expected = uncertainty(add_dropout(model, 0.2), x)
    assert_same_bits(uncertainty(unwrap(wrap(model)), x), expected)


@pytest.mark.parametrize("before", [True, False])
def test_backbones_keep_it_in_a_fused_network(before):
    (r, x), (v, y) = built("resnet"), built("vit")
    if before:
        add_dropout(r, 0.2)
    model = fuse({"skin": r, "cells": v}, {"lesion": 3})
    if not before:
        add_dropout(model.branches["skin"], 0.2)
    assert mc_dropout(model, {"skin": x, "cells": y}, 4)["lesion"].epistemic.min() > 0
    with pytest.raises(ValueError, match="no active dropout"):
        mc_dropout(model, {"cells": y}, 4)
    remove_dropout(model)
    with pytest.raises(ValueError, match="no active dropout"):
        mc_dropout(model, {"skin": x, "cells": y}, 4)


def test_a_fused_network_drops_around_its_stages_too():
    """What is carried by a module that the network is cut within."""
    body = Net(lambda net, x: net.two(net.one(x)), one=conv(3), two=conv())
    backbone = Net(lambda net, x: net.body(x).mean((2, 3)), body=body)
    x = torch.randn(2, 3, 8, 8)
    add_dropout(backbone, 0.4, ["body"], example_input=x)
    stages = [{"skin": "body.one"}, {"skin": "body.two"}]
    model = fuse({"skin": backbone}, {"lesion": 3}, at=stages, example_inputs={"skin": x})
    assert mc_dropout(model, {"skin": x}, 8)["lesion"].epistemic.min() > 0


# Refusals ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0, 1, -0.1, 1.5, float("nan"), "0.1", None])
def test_rates_out_of_range_are_refused(p):
    with pytest.raises(ValueError, match=rf"add_dropout expected a probability p in \(0, 1\), got {p!r}"):
        add_dropout(built("resnet")[0], p)


def test_a_second_time_is_refused_until_it_is_removed():
    model, _ = built("resnet")
    add_dropout(model, 0.1)
    with pytest.raises(ValueError, match=r"ResNet has been given dropout already: drifa_attn\.remove_dropout\(model\) first"):
        add_dropout(model, 0.2)
    assert [step.p for _, step in dropouts(model)] == [0.1] * 5
    add_dropout(remove_dropout(model), 0.2)
    assert [step.p for _, step in dropouts(model)] == [0.2] * 5


def test_removing_none_is_refused():
    with pytest.raises(ValueError, match="ResNet holds no dropout that add_dropout put there"):
        remove_dropout(timm.create_model("test_resnet", drop_rate=0.5))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda model: torch.compile(model), ValueError, "compiled network: add dropout to it first, then compile it"),
        (nn.DataParallel, ValueError, "got a DataParallel: add dropout to the network first, then make it parallel"),
        (lambda model: "resnet", TypeError, r"expected an nn\.Module, got str"),
    ],
)
def test_networks_of_other_kinds_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        add_dropout(change(built("resnet")[0]), 0.1)


def test_a_network_is_untouched_by_a_refusal():
    model, _ = built("resnet")
    before = registered(wrap(model))
    with pytest.raises(ValueError, match="matched 0 of"):
        add_dropout(model, 0.1, at="layer9")
    assert registered(model) == before
