import copy

import pytest
import torch
from torch import nn

from drifa_attn import attention_parameters, disabled, freeze_backbone, gates, plan, unwrap, wrap
from drifa_attn.trees import replace_tensor
from tests._compare import assert_same_bits, assert_same_math
from tests._wrapping import (
    EVERY,
    WAYS,
    assert_same,
    awaken_,
    check_round_trip,
    counted,
    features,
    refinements,
    refused,
    registered,
    wrapped,
)
from tests.networks import Net, built, conv, planned

# The start, and back -----------------------------------------------------------------------------------------------------


@WAYS
@EVERY
def test_wrap_changes_no_bit_and_unwrap_leaves_no_trace(name, at):
    check_round_trip(*built(name), at=at)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet", {"reduction": None}),
        ("resnet", {"at": "block", "reduction": 3}),
        ("vit", {"at": "block", "reduction": None}),
        ("swin", {"reduction": None}),
        ("tnt", {"reduction": 10**6}),
        ("densenet", {"at": "conv"}),
    ],
)
def test_wrap_changes_no_bit_at_any_width(name, arguments):
    check_round_trip(*built(name), **arguments)


@pytest.mark.parametrize("arguments", [{"variant": "paper"}, {"init": "paper"}])
def test_unwrap_takes_the_paper_start_out_and_wrap_works_again(arguments):
    model, x = built("resnet")
    expected, keys = model(x), list(model.state_dict())
    for _ in range(2):
        wrap(model, example_input=x, **arguments)
        assert (model(x) - expected).abs().max() > 1e-4 * expected.abs().max()
        unwrap(model)
        assert list(model.state_dict()) == keys
        assert_same_bits(model(x), expected)


# What attention does -----------------------------------------------------------------------------------------------------


@WAYS
@EVERY
@torch.no_grad()
def test_every_site_fires_exactly_once(name, at):
    model, x = wrapped(name, at)
    counts = counted(model)
    assert len(counts) == len(planned(name, at).sites)
    model(x)
    assert set(counts.values()) == {1}, counts
    model.train()(x)
    assert set(counts.values()) == {2}, counts
    with disabled(model):
        model(x)
    assert set(counts.values()) == {2}, counts


def place(site):
    """What a site says, whatever else its class says."""
    return site.module, site.path, site.channels, site.layout, site.num_prefix_tokens, site.shape


def gained(t, site, attention):
    """The equation of a site's attention, its layout by hand."""
    maps = t if site.layout == "b c ..." else t[:, site.num_prefix_tokens :].movedim(-1, 1)
    plain = copy.copy(attention)
    plain.layout, plain.num_prefix_tokens = "b c ...", 0
    factor = plain.gates(maps) * attention.alpha
    maps = maps * factor[(..., *[None] * (maps.ndim - 2))]
    return maps if site.layout == "b c ..." else torch.cat([t[:, : site.num_prefix_tokens], maps.movedim(1, -1)], 1)


@WAYS
@EVERY
@torch.no_grad()
def test_attention_changes_its_sites_and_nothing_else(name, at):
    (model, x), (original, _), (other, _) = wrapped(name, at), built(name), built(name)
    ours = list(refinements(model))
    assert {place(hook.site) for hook in ours} == {place(site) for site in planned(name, at).sites}
    for hook in ours:
        other.get_submodule(hook.site.module).register_forward_hook(
            lambda _, args, output, h=hook: replace_tensor(output, h.site.path, lambda t: gained(t, h.site, h.attention))
        )
    for actual, expected, before in zip(features(model, x), features(other, x), features(original, x), strict=True):
        assert_same_math(actual, expected)
        assert (actual - before).abs().max() > 1e-3 * before.abs().max()


@WAYS
@EVERY
def test_every_attention_parameter_learns(name, at):
    model, x = wrapped(name, at)
    awaken_(model)
    logits = model(x)
    (logits * torch.randn(logits.shape)).sum().backward()
    for hook in refinements(model):
        for key, parameter in hook.attention.named_parameters():
            assert parameter.grad is not None, f"{hook.site.name} {key} is not reached"
            assert parameter.grad.isfinite().all(), f"{hook.site.name} {key}"
            assert parameter.grad.any(), f"{hook.site.name} {key} has a zero gradient"


# Off, looked at, frozen --------------------------------------------------------------------------------------------------


class StopError(Exception):
    pass


@WAYS
@EVERY
@torch.no_grad()
def test_disabled_gives_the_original_network_and_comes_back(name, at):
    model, x = wrapped(name, at)
    expected, ours = features(built(name)[0], x), features(model, x)
    with disabled(model):
        assert_same(features(model, x), expected)
        with disabled(model):
            assert_same(features(model, x), expected)
        assert_same(features(model, x), expected)
    assert_same(features(model, x), ours)
    with pytest.raises(StopError), disabled(model):
        raise StopError
    assert_same(features(model, x), ours)
    assert not torch.equal(ours[0], expected[0])


@WAYS
@EVERY
def test_gates_are_the_gates_of_the_sites(name, at):
    model, x = wrapped(name, at)
    model.train()
    next(model.children()).eval()
    before, buffers = registered(model), [b.clone() for b in model.buffers()]
    maps = gates(model, x)
    assert list(maps) == sorted((site.name for site in planned(name, at).sites), key=list(maps).index)
    for site in planned(name, at).sites:
        gate = maps[site.name]
        assert (gate.shape, gate.dtype) == ((len(x), site.channels), torch.float32)
        assert ((gate > 0) & (gate < 1)).all()
        assert gate.std(1).min() > 0
        assert not gate.requires_grad
    assert registered(model) == before
    assert_same(model.buffers(), buffers)


def test_gates_take_what_the_network_takes():
    model = Net(lambda net, *, image: net.f(image), f=conv())
    seen = []
    wrap(model, ["f"], example_input={"image": torch.randn(2, 8, 4, 4)}).train()
    (hook,) = refinements(model)
    hook.attention.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    before = registered(model)
    gate = gates(model, image=torch.randn(3, 8, 5, 5))["f"]
    assert_same_bits(gate, hook.attention.gates(seen[0]).detach())
    with pytest.raises(TypeError, match="positional argument"):
        gates(model, torch.randn(3, 8, 5, 5))
    assert registered(model) == before


def test_gates_of_a_disabled_network_are_still_its_gates():
    model, x = wrapped("resnet")
    expected = gates(model, x)
    with disabled(model):
        found = gates(model, x)
        assert not any(attention.enabled for _, attention in refinements(model))
    assert list(found) == list(expected)
    assert_same(found.values(), expected.values())
    assert all(attention.enabled for _, attention in refinements(model))


@pytest.mark.parametrize("classifier", [True, False, "fc", ["fc", "layer4"], ("layer4.0",)], ids=str)
def test_freeze_backbone_leaves_attention_and_classifier(classifier):
    model, x = wrapped("resnet")
    awaken_(model)
    model.conv1.requires_grad_(False)
    names = {True: ["fc"], False: [], "fc": ["fc"]}.get(classifier) if isinstance(classifier, bool | str) else classifier
    assert freeze_backbone(model, classifier=classifier) is model
    expected = {n for n, _ in model.named_parameters() if "drifa_attn" in n or any(n.startswith(f"{c}.") for c in names)}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected
    assert [id(p) for n, p in model.named_parameters() if "drifa_attn" in n] == [id(p) for p in attention_parameters(model)]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(x).sin().sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=100.0).step()
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == expected


@pytest.mark.parametrize(
    ("name", "classifier", "message"),
    [
        ("torchvision resnet", True, "ResNet does not state its classifier: name it, e.g. classifier='fc'"),
        ("resnet", "head", "ResNet has no module 'head' to take as its classifier"),
        ("resnet", ["fc", "headd"], "no module 'headd'"),
    ],
)
def test_freeze_backbone_refuses_unknown_classifiers_and_freezes_nothing(name, classifier, message):
    model, _ = wrapped(name)
    with pytest.raises(ValueError, match=message):
        freeze_backbone(model, classifier=classifier)
    assert all(p.requires_grad for p in model.parameters())


NEED_ATTENTION = {
    "unwrap": unwrap,
    "disabled": lambda model: disabled(model).__enter__(),
    "attention_parameters": attention_parameters,
    "gates": lambda model: gates(model, torch.randn(1, 3, 64, 64)),
    "freeze_backbone": freeze_backbone,
}


@pytest.mark.parametrize("function", NEED_ATTENTION.values(), ids=NEED_ATTENTION)
def test_networks_without_attention_are_refused(function):
    model, x = built("resnet")
    model.train()
    before = registered(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"ResNet holds no attention.*drifa_attn\.wrap\(model\)"):
            function(model)
        assert registered(model) == before
        assert all(p.requires_grad for p in model.parameters())
        unwrap(wrap(model, ["layer1"], example_input=x))


# Refusals ----------------------------------------------------------------------------------------------------------------


BLIND = {
    "twice": (["twice"], r"no attention can go at 'twice': it is called 2 times in one forward"),
    "one of several": (["fine", "twice"], r"at 'twice': it is called 2 times"),
    "never": (["never"], r"at 'never': it is not called"),
    "dead": (["dead"], r"at 'dead': the network's result does not depend on this output"),
    "shared": (["alias"], r"at= names no module of Net: \['alias'\]"),
    "scalar": (["scalar"], r"at 'scalar': its output is no floating-point feature: \(\)"),
    "regex": ("twice|dead", r"Looked at:\n  twice: it is called 2 times in one forward: .*\n  dead: the network's result"),
    "block": ("block", r"Net has no place .* at='block'. Looked at:\n  twice .*Conv2d"),
    "conv": ("conv", r"has no place for attention with at='conv'"),
}


def chain(net, x):
    net.dead(x)
    return net.fine(net.twice(net.twice(x))) * net.scalar(x)


@pytest.mark.parametrize(("at", "message"), BLIND.values(), ids=BLIND)
def test_modules_that_can_be_no_site_are_refused_by_name(at, message):
    model, x = Net(chain, **{name: conv() for name in ("twice", "never", "dead", "fine")}), torch.randn(2, 8, 4, 4)
    model.alias, model.scalar = model.twice, Net(lambda net, x: x.mean())
    with refused(model, x, ValueError, message):
        wrap(model, at, example_input=x)


def script(model, _):
    return torch.jit.script(nn.Sequential(model.conv1))


NOT_NETWORKS = {
    "wrapped": (lambda model, x: wrap(model, ["layer1"], example_input=x), "ResNet is wrapped already: drifa_attn.unwrap"),
    "holds a wrapped one": (
        lambda model, x: nn.Sequential(wrap(model, ["layer1"], example_input=x)),
        "Sequential is wrapped already",
    ),
    "DataParallel": (lambda model, _: nn.DataParallel(model), "got a DataParallel: wrap the network first, then make it para"),
    "torch.compile": (lambda model, _: torch.compile(model), "got a compiled network: wrap it first, then compile it"),
    "compile": (lambda model, _: model.compile() or model, "got a compiled network: wrap it first"),
    "a compiled part": (lambda model, _: model.layer1.compile() or model, "got a compiled network at 'layer1'"),
    "scripted": (script, "got a RecursiveScriptModule: wrap the network first, then trace or script it"),
    "traced": (lambda model, x: torch.jit.trace(model, x), "got a TopLevelTracedModule: wrap the network first"),
    "a name": (lambda *_: "resnet50", "expected an nn.Module, got str"),
    "a class": (lambda *_: nn.Identity, "expected an nn.Module, got type"),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.:FutureWarning")
@pytest.mark.parametrize(("prepare", "message"), NOT_NETWORKS.values(), ids=NOT_NETWORKS)
def test_wrapped_parallel_compiled_and_other_things_are_refused(prepare, message):
    model, x = built("resnet")
    thing = prepare(model, x)
    before, keys = registered(model), list(model.state_dict())
    for function in (plan, wrap):
        with pytest.raises((TypeError, ValueError), match=message):
            function(thing, example_input=x)
    assert registered(model) == before
    assert list(model.state_dict()) == keys


def test_networks_with_nothing_to_wrap_are_refused_with_what_was_looked_at():
    with pytest.raises(ValueError, match=r"Flatten has no place .* Looked at:\n  the network has no submodules"):
        wrap(nn.Flatten())
    model, x = built("vit")
    with refused(
        model, x, ValueError, r"VisionTransformer has no place .* at='conv'. Looked at:\n  patch_embed \(PatchEmbed\)"
    ):
        wrap(model, "conv", example_input=x)
