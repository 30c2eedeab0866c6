"""What every fusion promises, whichever it is; one small network of an image, a text and a record for each."""

import copy
import pickle
from functools import cache

import pytest
import torch
from torch import nn
from torch.export import Dim

from drifa_attn import (
    TaskLoss,
    attention_parameters,
    disabled,
    freeze_backbone,
    fuse,
    gains,
    gates,
    load_attention,
    parameter_groups,
    save_attention,
)
from drifa_attn.fusion import FUSIONS
from drifa_attn.fusion.protocol import Untouched
from tests._compare import assert_same_bits, assert_same_math
from tests._wrapping import awaken_
from tests.cases import perturb_
from tests.networks import Net

TASKS = {"lesion": 3, "cell": 2}
AT = [{"image": "one", "text": "one", "record": "1"}, {"image": "two", "text": "two", "record": "3"}]
WITHOUT_GATES = {"concat": "Concatenated", "sum": "Summed", "lmf": "LowRank"}
EVERY = pytest.mark.parametrize("name", FUSIONS)
TRACED = pytest.mark.parametrize(  # the others take as long together as all other tests of this file
    "name", [name if name in ("gated", "mmtm", "gloria") else pytest.param(name, marks=pytest.mark.slow) for name in FUSIONS]
)


def image(net, x):
    return net.two(net.one(x)).mean((2, 3))


def text(net, x):
    return net.norm(net.two(net.one(x))).mean(1)


def backbones():
    torch.manual_seed(0)
    conv = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())  # noqa: E731
    dense = lambda a, b: nn.Sequential(nn.Linear(a, b), nn.GELU())  # noqa: E731
    return {
        "image": Net(image, one=conv(3, 8), two=conv(8, 12)),
        "text": Net(text, one=dense(6, 8), two=dense(8, 8), norm=nn.LayerNorm(8)),
        "record": nn.Sequential(nn.Linear(9, 10), nn.ReLU(), nn.Linear(10, 6), nn.ReLU()),
    }


def inputs(batch=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shapes = {"image": (3, 16, 16), "text": (5, 6), "record": (9,)}
    return {name: torch.randn(batch, *shape, generator=generator).to(dtype) for name, shape in shapes.items()}


PRESENT = torch.tensor([[True, True, True], [True, False, True], [False, True, False], [True, True, False]])


@cache
def at_start(name):
    return fuse(backbones(), TASKS, at=AT, fusion=name, example_inputs=inputs(2)).eval()


def fused(name, dtype=torch.float32):
    """A copy of a fused network in eval mode in which every parameter of the fusion does something."""
    net = copy.deepcopy(at_start(name)).to(dtype)
    torch.manual_seed(2)
    for part in (net.refiners, net.readout):
        perturb_(part, 0.1)
    awaken_(net.refiners)
    return net


def acting(net):
    return [refiner for refiner in net.refiners if not isinstance(refiner, Untouched)]


def spoilt(given, present=PRESENT):
    """NaN where a sample lacks a modality."""
    return {
        name: torch.where(present[:, i].view(-1, *[1] * (x.ndim - 1)), x, torch.nan)
        for i, (name, x) in enumerate(given.items())
    }


def total(logits):
    return sum((v * torch.arange(1.0, v.numel() + 1).view_as(v).sin()).sum() for v in logits.values())


def without_gradient(net):
    return [name for name, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


# The start, and the switch -----------------------------------------------------------------------------------------------


@EVERY
@torch.no_grad()
def test_at_the_start_and_disabled_every_branch_is_its_own_backbone(name):
    given = inputs()
    expected = {one: backbone.eval()(given[one]) for one, backbone in backbones().items()}
    start, net = at_start(name), fused(name)
    for one, feature in start.features(given).items():
        assert_same_bits(feature, expected[one])
    assert all(refiner.is_start() for refiner in acting(start))
    changed, logits = net.features(given), net(given)
    assert not any(refiner.is_start() for refiner in acting(net))
    assert all(torch.equal(changed[one], expected[one]) != bool(acting(net)) for one in expected)
    with disabled(net):
        for one, feature in net.features(given).items():
            assert_same_bits(feature, expected[one])
    for task, value in net(given).items():
        assert_same_bits(value, logits[task])


@EVERY
def test_gates_are_those_of_its_equation_or_an_error_that_names_it(name):
    net, given = fused(name), spoilt(inputs())
    if name in WITHOUT_GATES:
        with pytest.raises(ValueError, match=f"holds no attention that has gates, only {WITHOUT_GATES[name]}"):
            gates(net, given, PRESENT)
        return
    found = gates(net, given, PRESENT)
    assert found
    assert all(isinstance(gate, torch.Tensor) and gate.isfinite().all() and (gate >= 0).all() for gate in found.values())
    assert all((gate <= 1).all() for gate in found.values())
    first = "refiners" if acting(net) else "readout"
    assert next(iter(found)).startswith(first)
    whole = gates(net, inputs())
    if name in ("mifa", "mmtm"):
        assert {key: gate.shape for key, gate in gains(net, given, PRESENT).items()} == {k: g.shape for k, g in found.items()}
    elif name in ("cross_attention", "mutual_attention", "mttu"):
        assert all(torch.allclose(gate.sum(-1), torch.ones(())) for gate in whole.values())
    elif name == "gloria":
        assert all(torch.allclose(gate.sum(-2), torch.ones(())) for gate in whole.values())
    elif name in ("aff", "iaff"):
        assert list(whole) == [f"readout.{one}" for one in given]
        assert torch.allclose(sum(whole.values()), torch.ones(()))
    elif name == "caf":
        assert {key.split(".")[0] for key in whole} == {"refiners", "readout"}
        axes = {"refiners": -1, "readout": 1}
        assert all(torch.allclose(gate.sum(axes[key.split(".")[0]]), torch.ones(())) for key, gate in whole.items())
    if name not in ("mifa", "mmtm"):
        with pytest.raises(ValueError, match="has gains|no gains"):
            gains(net, given, PRESENT)


# Files and training ------------------------------------------------------------------------------------------------------


@EVERY
@torch.no_grad()
def test_a_file_brings_it_back_to_the_last_bit(name, tmp_path):
    net, given = fused(name), inputs()
    save_attention(net, tmp_path / "it.safetensors")
    again = load_attention(backbones(), tmp_path / "it.safetensors", example_input=inputs(2)).eval()
    assert (again.stages, repr(again.refiners), repr(again.readout)) == (net.stages, repr(net.refiners), repr(net.readout))
    for task, logits in again(given, PRESENT).items():
        assert_same_bits(logits, net(given, PRESENT)[task])


@EVERY
@torch.no_grad()
def test_copies_and_pickles_come_back_working(name):
    net, given = fused(name).train(), inputs()
    net(given)  # in training some keep what their losses need
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        for task, logits in twin.eval()(given, PRESENT).items():
            assert_same_bits(logits, net.eval()(given, PRESENT)[task])
        assert list(twin.state_dict()) == list(net.state_dict())
        assert twin.losses() == {}


@EVERY
def test_the_fusion_and_the_heads_are_what_is_trained(name):
    net = fused(name)
    names = {id(p): key for key, p in net.named_parameters()}
    own = {key for key in names.values() if key.startswith(("refiners.", "readout."))}
    assert {names[id(p)] for p in attention_parameters(net)} == own
    freeze_backbone(net)
    assert {key for key, p in net.named_parameters() if p.requires_grad} == own | {k for k in names.values() if "heads." in k}
    groups = parameter_groups(net, 1e-3, 1e-2)
    for group in groups:
        first = {names[id(p)].split(".")[0] for p in group["params"]}
        part = group["name"].removesuffix(" without decay")
        assert first <= ({"refiners"} if part == "attention" else {"readout", "heads"})
        assert group["lr"] == {"attention": 1e-2, "head": 1e-3}[part]
    assert sum(len(group["params"]) for group in groups) == len(own) + 4


# Absent modalities -------------------------------------------------------------------------------------------------------


@EVERY
@torch.no_grad()
def test_samples_are_on_their_own_and_what_is_absent_is_left_out(name):
    net, given = fused(name, torch.float64), inputs(dtype=torch.float64)
    together = net(spoilt(given), PRESENT)
    for b, has in enumerate(PRESENT):
        mine = {one: x[b : b + 1] for (one, x), here in zip(given.items(), has, strict=True) if here}
        for task, logits in net(mine).items():
            assert_same_math(together[task][b : b + 1], logits)


@pytest.mark.parametrize("kind", ["mask", "left out", "none"])
@EVERY
def test_every_parameter_gets_a_finite_gradient_in_training(name, kind):
    """DDP waits for it, also for what an absent modality does not use."""
    net, given = fused(name).train(), inputs()
    batch = {"mask": (spoilt(given), PRESENT), "left out": ({"text": given["text"]},), "none": (given, PRESENT & False)}[kind]
    (total(net(*batch)) + sum(net.losses().values())).backward()
    assert not without_gradient(net)


@EVERY
def test_modality_dropout_trains(name):
    net, given = fused(name).train(), inputs(16)
    net.modality_dropout = 0.5
    torch.manual_seed(0)
    (total(net(given)) + sum(net.losses().values())).backward()
    assert not without_gradient(net)
    trained = [p for part in (net.refiners, net.readout, net.heads) for p in part.parameters()]
    assert sum(bool(p.grad.any()) for p in trained) > 0.8 * len(trained)  # a softmax over one position has no gradient


# Ways to run -------------------------------------------------------------------------------------------------------------


@EVERY
def test_checkpointing_changes_no_gradient(name):
    net, given, results = fused(name, torch.float64).train(), inputs(dtype=torch.float64), []
    for enable in (False, True):
        one = copy.deepcopy(net)
        one.set_grad_checkpointing(enable)
        loss = total(one(given, PRESENT)) + sum(one.losses().values())
        results.append([*torch.autograd.grad(loss, one.parameters()), *one.buffers()])
    for plain, twice in zip(*results, strict=True):
        assert_same_math(plain.double(), twice.double())


@cache
def smaller(name):
    """Two modalities, and as few stages as the fusion needs: what is quick to trace."""
    some = {one: backbone for one, backbone in backbones().items() if one != "record"}
    stages = [{one: sites[one] for one in some} for sites in AT][0 if name == "caf" else 1 :]
    net = fuse(some, TASKS, at=stages, fusion=name, example_inputs={one: inputs(2)[one] for one in some})
    perturb_(net.refiners, 0.1), perturb_(net.readout, 0.1)
    return net.double().eval()


def two(batch=4):
    given = inputs(batch, torch.float64)
    return {"image": given["image"], "text": given["text"]}


@TRACED
def test_it_compiles_whole(name):
    """In training mode, but for batch norms: in graphs these see all samples, as the class says."""
    net, given, present = copy.deepcopy(smaller(name)).train(), two(), PRESENT[:, :2]
    for norm in net.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.eval()
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager", dynamic=False)
    for task, logits in compiled(given, present).items():
        assert_same_math(logits, net(given, present)[task])
    found = net.losses()
    compiled(given, present)
    for key, value in net.losses().items():
        assert_same_math(found[key], value)
    assert bool(found) == (name == "gloria")


@TRACED
@torch.no_grad()
def test_it_exports_with_any_batch(name):
    net, given, batch = smaller(name), two(), Dim("batch", min=2, max=64)
    shapes = ({one: {0: batch} for one in given}, {0: batch})
    program = torch.export.export(net, (given, PRESENT[:, :2]), dynamic_shapes=shapes, strict=False).module()
    given, present = two(7), torch.rand(7, 2) < 0.6
    for task, logits in program(given, present).items():
        assert_same_math(logits, net(given, present)[task])


@EVERY
def test_autocast_is_near_full_precision_and_trains(name):
    net, given = fused(name).train(), inputs()
    net.branches.eval()
    net.readout.eval()
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(given, PRESENT)
        loss = TaskLoss(TASKS)(logits, {"lesion": torch.tensor([0, 1, 2, 0]), "cell": torch.tensor([1, 0, -100, 1])})
    exact = net(given, PRESENT)
    for task, value in exact.items():
        assert (logits[task] - value).abs().max() < 0.1 * value.abs().max()
    loss.backward()
    assert not without_gradient(net)
    with torch.autocast("cpu", torch.bfloat16):
        total(net.train()(given, PRESENT)).backward()
    assert not without_gradient(net)


# The plan ----------------------------------------------------------------------------------------------------------------


@EVERY
def test_the_plan_says_what_meets_and_what_it_costs(name):
    net = at_start(name)
    plan, shown = net.plan, str(net.plan)
    assert (plan.fusion, plan.width, plan.tasks) == (name, net.readout.width, TASKS)
    added = sum(p.numel() for p in attention_parameters(net))
    assert sum(stage.params for stage in plan.stages) + plan.readout_params == added
    assert plan.params == sum(p.numel() for p in net.branches.parameters())
    assert [list(stage.sites) for stage in plan.stages] == [list(AT[0])] * len(net.stages)
    assert shown.startswith(f'fusion="{name}"() of image, text, record\n')
    assert f"heads read {net.readout.width} numbers per sample: lesion (3), cell (2)" in shown
    assert ("8×8×8" in shown) == any(stage.refiner or stage.note or 0 in net.readout.keeps for stage in plan.stages)
    assert (plan.readout_flops > 0) == (name not in ("concat", "mifa", "mmtm", "cross_attention", "mutual_attention"))
    assert all(stage.flops > 0 for stage in plan.stages if stage.refiner)
    assert plan.flops > 0


def test_the_plan_counts_two_flops_per_multiply_add():
    plan = at_start("sum").plan
    assert plan.readout_flops == 2 * 12 * (12 + 8 + 6)
    plan = at_start("mmtm").plan
    assert plan.stages[1].flops == 2 * 8 * (12 + 8 + 6) * 2
    assert "stage 0 is left alone: it acts at the last stage" in str(at_start("mutual_attention").plan)
    assert "reads the maps of stage 1;" in str(at_start("mttu").plan)
    assert "no stages meet: every branch runs to its end" in str(at_start("concat").plan)


# Options and limits ------------------------------------------------------------------------------------------------------

BAD = [
    ("mmtm", {"reductions": 2}, TypeError, "fusion 'mmtm' takes the options reduction, scale, init, got 'reductions'"),
    ("concat", {"dim": 2}, TypeError, "fusion 'concat' takes the options none, got 'dim'"),
    ("mmtm", {"scale": 0}, ValueError, "MMTM expected scale > 0, got 0"),
    ("mmtm", {"init": "zero"}, ValueError, 'MMTM expected init "paper" or "identity"'),
    ("lmf", {"rank": 0}, ValueError, "LowRank expected rank to be an integer >= 1, got 0"),
    ("sum", {"dim": 1.5}, ValueError, "Summed expected dim to be an integer >= 1, got 1.5"),
    ("cross_attention", {"dim": 10}, ValueError, "expected a width that 4 heads divide, got 10: change dim or heads"),
    ("mutual_attention", {"dims": [8]}, ValueError, r"expected dims, one per modality \(3\), got \[8\]"),
    ("cross_attention", {"max_positions": 5}, ValueError, "CrossAttention acts at none of the 2 stages: 70 positions are more"),
    ("caf", {"max_positions": 15}, ValueError, 'acts at none of the 2 stages.*take fusion="concat"'),
    ("mttu", {"max_positions": 5}, ValueError, "MTTU got 22 positions, more than max_positions=5: its matrices grow"),
    ("gloria", {"max_positions": 5}, ValueError, "GLoRIA got 22 positions, more than max_positions=5"),
    ("gloria", {"temperatures": [1, 2]}, ValueError, "GLoRIA expected three temperatures"),
    ("gloria", {"gloria_weight": -1}, ValueError, "GLoRIA expected gloria_weight >= 0, got -1"),
    ("aff", {"reduction": 0}, ValueError, "AFF expected reduction to be an integer >= 1, got 0"),
]


@pytest.mark.parametrize(("name", "options", "error", "message"), BAD)
def test_bad_options_are_refused(name, options, error, message):
    with pytest.raises(error, match=message):
        fuse(backbones(), TASKS, at=AT, fusion=name, fusion_options=options, example_inputs=inputs(2))


def test_a_quadratic_block_chooses_its_stages_and_says_so():
    net = fuse(
        backbones(), TASKS, at=AT, fusion="cross_attention", fusion_options={"max_positions": 22}, example_inputs=inputs(2)
    ).eval()
    assert [type(refiner).__name__ for refiner in net.refiners] == ["Untouched", "CrossAttention"]
    assert "stage 0 is left alone: 70 positions are more than max_positions=22" in str(net.plan)
    larger = inputs() | {"image": torch.randn(4, 3, 24, 24)}
    with pytest.raises(ValueError, match="CrossAttention got 42 positions, more than max_positions=22: its matrices grow"):
        net(larger)


@pytest.mark.parametrize("name", ["mttu", "gloria", "aff", "iaff", "caf"])
def test_what_reads_maps_wants_a_stage_where_all_meet(name):
    apart = [{"image": "one", "text": "one"}, {"record": "1"}]
    with pytest.raises(ValueError, match="modalities meet"):
        fuse(backbones(), TASKS, at=apart, fusion=name, example_inputs=inputs(2))


def test_mttu_has_learned_its_positions():
    with pytest.raises(ValueError, match="MTTU has learned 16 positions, got features of 36: give it inputs of the size"):
        at_start("mttu")(inputs() | {"image": torch.randn(4, 3, 24, 24)})


def test_a_batch_too_large_for_all_pairs_is_refused(monkeypatch):
    monkeypatch.setattr("drifa_attn.fusion.contrast.LARGEST", 1000)
    with pytest.raises(ValueError, match="compares all positions of all pairs of samples, here 4 x 4 x 16 x 5: take smaller"):
        fused("gloria").train()(inputs())
    fused("gloria")(inputs())  # not in eval mode, which has no losses


def test_one_modality_is_no_fusion():
    alone = {"image": backbones()["image"]}
    with pytest.raises(ValueError, match="MMTM acts at none of the 2 stages: one modality is alone there"):
        fuse(alone, TASKS, at=[{"image": "one"}, {"image": "two"}], fusion="mmtm", example_inputs={"image": inputs(2)["image"]})
    for name in ("concat", "sum", "gated", "lmf", "mttu", "gloria", "aff", "iaff"):
        net = fuse(
            {"image": backbones()["image"]}, TASKS, at=AT_IMAGE, fusion=name, example_inputs={"image": inputs(2)["image"]}
        )
        total(net({"image": inputs()["image"]})).backward()
        assert net.losses() == {}


AT_IMAGE = [{"image": "one"}, {"image": "two"}]


class Mean(FUSIONS["concat"][1]):
    """A readout of one's own."""


class Doubled(FUSIONS["mmtm"][0]):
    """A refiner of one's own."""


@torch.no_grad()
def test_a_fusion_may_be_a_class_of_ones_own():
    for kind in (Mean, Doubled):
        net = fuse(backbones(), TASKS, at=AT, fusion=kind, example_inputs=inputs(2)).eval()
        assert net.plan.fusion == kind.__name__
        assert net(inputs(), PRESENT)["cell"].shape == (4, 2)
