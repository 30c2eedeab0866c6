"""Backbones in lockstep (Fig. 1A)."""

import copy
import itertools

import pytest
import timm
import torch
from torch import nn

import drifa_attn
from drifa_attn import (
    MIFA,
    fuse,
)
from drifa_attn.fusion.branches import without_classifier
from drifa_attn.fusion.presence import presence
from drifa_attn.layout import positions
from drifa_attn.trees import at_path
from tests._compare import assert_same_bits, assert_same_math
from tests._fusion import TASKS, fused, given, in_threads
from tests._wrapping import registered
from tests.cases import perturb_
from tests.networks import Net, built, conv

SETS = [
    ("resnet",),
    ("resnet", "vit"),
    ("swin", "densenet", "resnet"),
    ("coat", "regnet"),
    ("mvitv2", "pit"),
    ("tnt", "crossvit"),
]


# Lockstep ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["stage", "block"])
@pytest.mark.parametrize("names", SETS, ids="-".join)
@torch.no_grad()
def test_branches_advance_together(names, at):
    net, inputs = fused(names, at=at)
    features, expected = net.features(inputs), in_threads(net, inputs)
    assert net.stages
    for name in names:
        y = at_path(expected[name], net.outputs[name].path)
        y = y if y.ndim == 2 else positions(y, net.outputs[name].layout, net.outputs[name].num_prefix_tokens).mean(-1)
        assert_same_bits(features[name], y)


@pytest.mark.parametrize("names", [*SETS, ("resnet", "vit", "record")], ids="-".join)
@torch.no_grad()
def test_an_identity_start_changes_no_bit_of_any_branch(names):
    backbones, inputs = given(names)
    expected = {name: without_classifier(copy.deepcopy(b), name, "")(inputs[name]) for name, b in backbones.items()}
    net = fuse(backbones, TASKS, example_inputs=inputs).eval()
    assert all(net.branches[name] is backbone for name, backbone in backbones.items())
    for name, feature in net.features(inputs).items():
        if isinstance(expected[name], torch.Tensor) and expected[name].ndim == 2:
            assert_same_bits(feature, expected[name])
    perturb_(net.refiners)
    assert not any(torch.equal(f, expected[n]) for n, f in net.features(inputs).items() if torch.is_tensor(expected[n]))


@torch.no_grad()
def test_logits_are_the_equation():
    net, inputs = fused()
    features = net.features(inputs)
    for task, classes in TASKS.items():
        head = net.heads[task]
        assert head.weight.shape == (classes, sum(f.shape[1] for f in features.values()))
        assert_same_math(net(inputs)[task], torch.cat(list(features.values()), 1) @ head.weight.T + head.bias)


def test_every_fusion_reads_every_branch():
    net, inputs = fused()
    for name, other in itertools.permutations(inputs, 2):
        x = inputs[name].clone().requires_grad_()
        feature = net.features(inputs | {name: x})[other]
        (grad,) = torch.autograd.grad((feature * torch.randn_like(feature)).sum(), x)
        assert grad.any(), (name, other)


# Missing modalities ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_an_absent_sample_holds_reaches_nothing():
    net, inputs = fused()
    present = torch.tensor([[True, False, True], [True, True, False]])
    expected = net(inputs, present)
    for name, row in (("vit", 0), ("record", 1)):
        for value in (0.0, 1e4, torch.nan):
            changed = {key: x.clone() for key, x in inputs.items()}
            changed[name][row] = value
            for task, logits in net(changed, present).items():
                assert_same_bits(logits, expected[task])


@torch.no_grad()
def test_samples_are_on_their_own():
    net, inputs = fused()
    masks = torch.tensor(list(itertools.product([True, False], repeat=3)))
    many = {name: x[:1].expand(len(masks), *x.shape[1:]) for name, x in inputs.items()}
    together = net(many, masks)
    for i, mask in enumerate(masks):
        alone = net({name: x[:1] for name, x in inputs.items()}, mask[None])
        for task in TASKS:
            assert_same_math(together[task][i : i + 1], alone[task])
    none = net.heads["cell"].bias
    assert_same_math(together["cell"][-1], none)


@pytest.mark.parametrize("missing", [("vit",), ("resnet", "record")])
def test_a_modality_left_out_is_absent_and_leaves_no_parameter_without_gradient(missing):
    net, inputs = fused(modality_dropout=0.0)
    present = torch.tensor([[name not in missing for name in inputs]] * 2)
    expected = net(inputs, present)
    some = {name: x for name, x in inputs.items() if name not in missing}
    for mask in (None, present):
        for task, logits in net(some, mask).items():
            assert_same_math(logits, expected[task])
    for train in (net.train(), net.eval()):
        train.zero_grad(set_to_none=True)
        sum(logits.sum() for logits in train(some).values()).backward()
        without = [name for name, p in train.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert not without


@torch.no_grad()
def test_features_are_renormalised_at_the_head():
    net, inputs = fused()
    present = torch.tensor([[True, False, True], [True, True, True]])
    features = [f * present[:, i, None] for i, f in enumerate(net.features(inputs, present).values())]
    expected = torch.cat(features, 1) * torch.tensor([[1.5], [1.0]])
    assert_same_math(net(inputs, present)["cell"], net.heads["cell"](expected))


def test_modality_dropout_takes_its_share_and_leaves_one():
    names = ["a", "b", "c"]
    inputs = {name: torch.zeros(4000, 1) for name in names}
    mask = presence(inputs, names, None, 0.4)
    assert mask.any(1).all()
    assert (~mask).float().mean() == pytest.approx(0.4 - 0.4**3, abs=0.02)
    present = torch.rand(4000, 3) < 0.5
    kept = presence(inputs, names, present, 0.4)
    assert not (kept & ~present).any()
    assert torch.equal(kept.any(1), present.any(1))
    assert (kept.sum() / present.sum()).item() < 0.9
    assert presence(inputs, names, None, 0) is None
    assert presence(inputs, names, present, 0) is present


def test_modality_dropout_is_for_training():
    net, inputs = fused(("resnet", "record"), modality_dropout=0.5)
    many = {name: x[:1].expand(40, *x.shape[1:]) for name, x in inputs.items()}
    assert not (net.features(many)["record"] == 0).all(1).any()
    _, _, present = net.train().advance(many, None)
    assert 0.5 < present.float().mean() < 0.9


# Refusals ----------------------------------------------------------------------------------------------------------------

INPUTS = [
    (lambda i: ([*i.values()],), TypeError, "expected a dict of inputs by modality, got list"),
    (lambda i: ({},), ValueError, r"expected inputs of some of the modalities \['resnet', 'record'\], got \[\]"),
    (lambda i: (i | {"record": [1.0]},), TypeError, "a tensor of modality 'record', .* got list: leave a modality"),
    (lambda i: (i | {"ct": 0},), ValueError, r"got \['resnet', 'record', 'ct'\]"),
    (lambda i: (i | {"record": i["record"][:1]},), ValueError, r"one batch size .*'resnet': 2, 'record': 1"),
    (lambda i: (i, [True, False]), TypeError, "got list: convert it with .bool"),
    (lambda i: (i, torch.ones(2, 2)), TypeError, "got torch.float32"),
    (lambda i: (i, torch.ones(2, 3).bool()), ValueError, r"\(b, m\) = \(2, 2\), got \(2, 3\)"),
]


@pytest.mark.parametrize(("spoil", "error", "message"), INPUTS)
def test_bad_inputs_are_refused(spoil, error, message):
    net, inputs = fused(("resnet", "record"))
    with pytest.raises(error, match=message):
        net(*spoil(inputs))


def data_dependent():
    return Net(lambda net, x: net.b(net.a(x) if x.sum() > 0 else x), a=conv(), b=conv())


BAD = [
    ({"backbones": [1]}, TypeError, "expected backbones as a dict"),
    ({"tasks": {}}, TypeError, "expected tasks as a dict with at least one entry"),
    ({"tasks": {"a.b": 2}}, ValueError, "names of tasks to be strings without dots, got 'a.b'"),
    ({"tasks": {"a": 0}}, ValueError, r"tasks\['a'\] to be an integer >= 1, got 0"),
    ({"fusion_options": {"reduction": 0}}, ValueError, "reduction to be an integer >= 1"),
    ({"fusion_options": {"init": "zero"}}, ValueError, 'init "paper" or "identity"'),
    ({"fusion": "mmtn"}, ValueError, "expected fusion to be one of mifa, concat, .*, iaff or a class, got 'mmtn'"),
    ({"fusion": 3}, TypeError, "a Refiner or a Readout class, got 3"),
    ({"tasks": {"keys": 2}}, ValueError, "got 'keys' among the names of tasks, which torch.nn.ModuleDict uses itself"),
    ({"modality_dropout": 1.0}, ValueError, r"modality_dropout in \[0, 1\), got 1.0"),
    ({"dropout": -0.1}, ValueError, r"dropout in \[0, 1\), got -0.1"),
    ({"classifiers": {"ct": "fc"}}, ValueError, r"classifiers for \['ct'\], but its modalities are"),
    ({"classifiers": {"resnet": "head"}}, ValueError, "no module 'head' in backbone 'resnet'"),
    ({"at": "conv"}, ValueError, 'expected at "stage", "block" or a list'),
    ({"at": [{"ct": "layer1"}]}, ValueError, "expected entries {modality: module name}"),
    ({"at": [{"resnet": "layer9"}]}, ValueError, "backbone 'resnet' has no module 'layer9'"),
    ({"at": [{"resnet": ""}]}, ValueError, "backbone 'resnet' has no module ''"),
    ({"at": [{"resnet": "layer1"}]}, ValueError, r"no stage of \['record'\] in at="),
    ({"at": [{"resnet": "layer2", "record": "0"}, {"resnet": "layer1"}]}, ValueError, "advance .* end in the order"),
    ({"at": [{"resnet": "layer2", "record": "0"}, {"resnet": "layer2.0"}]}, ValueError, "cannot advance backbone 'resnet'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_arguments_are_refused_and_leave_the_backbones(arguments, error, message):
    backbones, inputs = given(("resnet", "record"))
    before = {name: registered(backbone) for name, backbone in backbones.items()}
    with pytest.raises(error, match=message):
        fuse(**{"backbones": backbones, "tasks": TASKS, "example_inputs": inputs} | arguments)
    assert {name: registered(backbone) for name, backbone in backbones.items()} == before
    assert backbones["resnet"].fc.out_features == 10


OTHERS = {
    "data-dependent": (data_dependent, "cannot advance|could not be traced"),
    "compiled": (lambda: torch.compile(conv()), "parallel or compiled backbone 'x'"),
    "parallel": (lambda: nn.DataParallel(conv()), "parallel or compiled backbone 'x'"),
    "no network": (lambda: "resnet18", "expected a network as backbone 'x', got str"),
    "one layer": (lambda: conv(), "found no stage in backbone 'x'"),
    "dead": (lambda: Net(lambda net, x: (net.a(x), net.b(x))[1], a=conv(), b=conv()), "found no stage|cannot advance"),
}


@pytest.mark.parametrize(("build", "message"), OTHERS.values(), ids=OTHERS)
def test_backbones_that_cannot_be_advanced_are_refused(build, message):
    with pytest.raises((ValueError, TypeError), match=message):
        fuse({"x": build()}, {"a": 2}, example_inputs={"x": torch.randn(2, 8, 6, 6)})


def test_one_network_twice_is_refused():
    model, x = built("resnet")
    with pytest.raises(ValueError, match="one network under several names"):
        fuse({"a": model, "b": model}, TASKS, example_inputs={"a": x, "b": x})


@torch.no_grad()
def test_classifiers_are_taken_off_by_name():
    model, x = built("torchvision resnet")
    net = fuse({"ct": model}, {"a": 3}, classifiers={"ct": "fc"}, example_inputs={"ct": x}).eval()
    assert net.features({"ct": x})["ct"].shape == (2, 512)
    assert net({"ct": x})["a"].shape == (2, 3)


# The whole of it ---------------------------------------------------------------------------------------------------------


def test_default_networks_of_timm_are_fused_in_one_line():
    net = drifa_attn.fuse(
        {"dermoscopy": timm.create_model("resnet18"), "smear": timm.create_model("mobilenetv3_small_050")}, TASKS
    )
    assert len(net.refiners) >= 4
    assert all(isinstance(refiner, MIFA) for refiner in net.refiners)
    added = sum(p.numel() for p in net.refiners.parameters()) / sum(p.numel() for p in net.parameters())
    assert added < 0.05
