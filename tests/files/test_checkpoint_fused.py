"""Files of fused networks."""

import copy
import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from drifa_attn import Fused, attention_parameters, disabled, fuse, load_attention, save_attention, wrap
from tests._compare import assert_same_bits
from tests._files import edited, metadata, other, without
from tests._fusion import TASKS, given, record
from tests._wrapping import refinements, registered, wrapped
from tests.cases import perturb_
from tests.networks import built

NAMES = ("resnet", "record")


def trained(wrapping="before", **options):
    """A fused network in which every added parameter is off its start; its backbones are those of `given`."""
    backbones, inputs = given(NAMES)
    torch.manual_seed(1)
    if wrapping == "before":
        wrap(backbones["resnet"], "block", reduction=4, example_input=inputs["resnet"])
    net = fuse(backbones, TASKS, example_inputs=inputs, **options).eval()
    if wrapping == "after":
        wrap(net.branches["resnet"], example_input=inputs["resnet"])
    for part in (net.refiners, net.heads, *(hook.attention for hook in refinements(net))):
        perturb_(part)
    return net, inputs


def fresh(net):
    """The same backbones without what was added, as a user has them: with their classifiers, in another order."""
    (resnet, _), one = built("resnet"), record().eval()
    one.load_state_dict(net.branches["record"].state_dict())
    return {"record": one, "resnet": resnet}


@pytest.fixture
def path(tmp_path):
    net, _ = trained()
    save_attention(net, tmp_path / "fused.safetensors")
    return tmp_path / "fused.safetensors"


WAYS = [
    {},
    {"at": "block", "fusion_options": {"reduction": None}, "wrapping": "after"},
    {"fusion_options": {"dim": 12, "init": "paper"}, "wrapping": None, "modality_dropout": 0.3, "dropout": 0.1},
    {"at": [{"record": "1", "resnet": "layer2"}, {"resnet": "layer3"}, {"record": "3"}], "fusion_options": {"reduction": 2}},
    {"classifiers": {"record": "2"}},
]


@pytest.mark.parametrize("options", WAYS, ids=str)
@torch.no_grad()
def test_a_fused_network_comes_back_on_fresh_backbones_to_the_last_bit(options, tmp_path):
    net, inputs = trained(**options)
    save_attention(net, tmp_path / "fused.safetensors")
    backbones = fresh_of(net, options)
    again = load_attention(backbones, tmp_path / "fused.safetensors", example_input=inputs)
    assert isinstance(again, Fused)
    assert all(again.branches[name] is backbone for name, backbone in backbones.items())
    assert list(again.state_dict()) == list(net.state_dict())
    assert (again.stages, again.recipe, again.modality_dropout) == (net.stages, net.recipe, net.modality_dropout)
    assert [hook.site for hook in refinements(again)] == [hook.site for hook in refinements(net)]
    assert (repr(again.refiners), again.dropout.p) == (repr(net.refiners), net.dropout.p)
    present = torch.tensor([[True, False], [True, True]])
    for task, logits in again.eval()(inputs, present).items():
        assert_same_bits(logits, net(inputs, present)[task])
    with disabled(again), disabled(net):
        assert_same_bits(again(inputs)["cell"], net(inputs)["cell"])


def fresh_of(net, options):
    backbones = fresh(net) if "classifiers" not in options else {"resnet": built("resnet")[0], "record": record().eval()}
    if "classifiers" in options:
        backbones["record"].load_state_dict(net.branches["record"].state_dict(), strict=False)
    return backbones


def test_a_file_holds_what_was_added_alone_and_more_on_request(tmp_path):
    net, _ = trained()
    file, names = tmp_path / "fused.safetensors", {id(p): name for name, p in net.named_parameters()}
    added = {names[id(p)] for p in attention_parameters(net)} | {n for n in names.values() if n.startswith("heads.")}
    added |= {name for name in net.state_dict() if name.endswith(("_center", "_spread"))}
    save_attention(net, file)
    assert load_file(file).keys() == added
    save_attention(net, file, classifier=True)
    assert load_file(file).keys() == added
    save_attention(net, file, classifier="branches.record", batch_norm=True)
    more = {name for name in net.state_dict() if name.startswith("branches.record.") or "running_" in name or "num_b" in name}
    assert load_file(file).keys() == added | more
    assert any("running_mean" in name for name in more)


@torch.no_grad()
def test_statistics_and_named_branches_are_loaded(tmp_path):
    net, inputs = trained()
    perturb_(net.branches["record"])
    for name, buffer in net.named_buffers():
        if "running_" in name:
            buffer.add_(0.5)
    save_attention(net, tmp_path / "fused.safetensors", classifier="branches.record", batch_norm=True)
    backbones = {"resnet": built("resnet")[0], "record": record().eval()}
    again = load_attention(backbones, tmp_path / "fused.safetensors", example_input=inputs).eval()
    assert_same_bits(again(inputs)["cell"], net(inputs)["cell"])


def test_the_plan_is_in_the_metadata(path):
    plan = json.loads(metadata(path)["drifa_attn"])
    fused = plan["fused"]
    assert fused["tasks"] == TASKS
    assert [list(sites) for sites in fused["stages"]] == [list(NAMES)] * 2
    assert (fused["options"]["fusion"], fused["options"]["fusion_options"]) == ("mifa", {})
    assert fused["branches"]["record"] is None
    assert fused["branches"]["resnet"]["attention"]["options"]["reduction"] == 4


# Refusals ----------------------------------------------------------------------------------------------------------------


def fused_plan(path, change):
    fused = json.loads(metadata(path)["drifa_attn"])["fused"]
    change(fused)
    return edited(path, fused=fused)


def resized(path):
    tensors = load_file(path)
    return save_edited(path, tensors | {"heads.cell.bias": torch.zeros(3)})


def save_edited(path, tensors):
    save_file(tensors, path, metadata(path))
    return path


BAD_FILES = {
    "a tensor is missing": (
        lambda p: without(p, "refiners.1.global_scale"),
        "file lacks 'refiners.1.global_scale', which Fused has",
    ),
    "a tensor too many": (
        lambda p: save_edited(p, load_file(p) | {"x": torch.ones(1)}),
        "the file holds 'x', which Fused",
    ),
    "another shape": (resized, r"'heads.cell.bias' is \(3,\) in the file and \(5,\) in Fused"),
    "another stage": (
        lambda p: fused_plan(p, lambda f: f["stages"][1]["resnet"].update(module="layer9")),
        "at 'layer9', a module that ResNet of branch 'resnet' does not have",
    ),
    "other channels": (
        lambda p: fused_plan(p, lambda f: f["stages"][0]["record"].update(channels=5)),
        "has channels=5, Sequential of branch 'record' has channels=33 there",
    ),
    "attention elsewhere": (
        lambda p: fused_plan(p, lambda f: f["branches"]["resnet"]["sites"][0].update(module="layer7")),
        "at 'layer7', a module that ResNet of branch 'resnet' does not have",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_refused_and_change_nothing(spoil, message, path):
    spoilt, (net, inputs) = spoil(path), trained()
    backbones = fresh(net)
    check_refused(backbones, spoilt, ValueError, message, inputs)


def check_refused(backbones, path, error, message, inputs):
    before = {name: (registered(b), copy.deepcopy(b.state_dict())) for name, b in backbones.items()}
    with pytest.raises(error, match=message):
        load_attention(backbones, path, example_input=inputs)
    for name, (modules, state) in before.items():
        assert registered(backbones[name]) == modules
        assert all(torch.equal(tensor, state[key]) for key, tensor in backbones[name].state_dict().items())


OTHERS = {
    "fewer": (lambda b: {"resnet": b["resnet"]}, r"of the modalities \['resnet', 'record'\], got \['resnet'\]"),
    "another name": (lambda b: {"resnet": b["resnet"], "ct": b["record"]}, r"got \['resnet', 'ct'\]"),
    "wider": (lambda b: b | {"resnet": other(channels=(32, 64, 96, 192))}, "ResNet of branch 'resnet' has channels="),
    "another record": (lambda b: b | {"record": nn.Sequential(nn.Linear(9, 8), nn.ReLU())}, "of branch 'record'"),
    "wrapped": (lambda b: b | {"resnet": wrapped("resnet")[0]}, r"ResNet is wrapped already"),
}


@pytest.mark.parametrize(("change", "message"), OTHERS.values(), ids=OTHERS)
def test_other_networks_are_refused_with_the_first_difference(change, message, path):
    net, inputs = trained()
    backbones = change(fresh(net))
    check_refused(backbones, path, ValueError, message, {name: x for name, x in inputs.items() if name in backbones})


def test_a_failure_while_fusing_leaves_the_backbones(path, monkeypatch):
    """On the copies all went well; on the networks themselves the last check does not."""

    def fail(*_):
        raise RuntimeError("half-way")

    net, inputs = trained()
    monkeypatch.setattr(sys.modules["drifa_attn.fusion.branches"], "check_parts", fail)
    check_refused(fresh(net), path, RuntimeError, "half-way", inputs)


def test_files_of_one_network_and_of_several_are_told_apart(path, tmp_path):
    net, _ = trained()
    with pytest.raises(TypeError, match=r"holds attention for {modality: network} of \['resnet', 'record'\], got ResNet"):
        load_attention(built("resnet")[0], path)
    save_attention(net.branches["resnet"], tmp_path / "one.safetensors")
    with pytest.raises(TypeError, match="holds attention for one network, got dict"):
        load_attention(fresh(net), tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match="Sequential has a fused network inside: save the attention of that"):
        save_attention(nn.Sequential(net), path)
    with pytest.raises(ValueError, match="save_attention got a OptimizedModule"):
        save_attention(torch.compile(net), path)
