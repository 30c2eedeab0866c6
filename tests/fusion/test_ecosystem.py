"""What else is done to a fused network."""

import copy
import pickle

import pytest
import timm
import torch
import torch.distributed as dist
from torch.export import Dim
from torch.nn.parallel import DistributedDataParallel

from drifa_attn import (
    TaskLoss,
    attention_parameters,
    disabled,
    freeze_backbone,
    fuse,
    gates,
    plan,
    unwrap,
    wrap,
)
from drifa_attn.fusion.branches import without_classifier
from drifa_attn.layout import positions
from drifa_attn.wrapping.inject import STEPS
from tests import older
from tests._compare import assert_same_bits, assert_same_math
from tests._fusion import TASKS, fused, given
from tests._wrapping import refinements, registered
from tests.cases import perturb_
from tests.networks import built


@torch.no_grad()
def test_compiles_whole():
    net, inputs = fused(("resnet", "record"))
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager")  # a step with gradients goes through autograd's tracer below
    present = torch.tensor([[True, False], [True, True]])
    for arguments in ((inputs,), (inputs, present), ({"record": inputs["record"]},)):
        for task, logits in compiled(*arguments).items():
            assert_same_math(logits, net(*arguments)[task])
    with disabled(net):
        assert_same_math(compiled(inputs)["cell"], net(inputs)["cell"])


def test_a_compiled_training_step_is_that_of_the_network():
    net, inputs = fused(("resnet", "record"))
    net.train().branches.eval()  # batch norms of two samples at one position are no test of anything
    torch._dynamo.reset()
    compiled, results = torch.compile(net, fullgraph=True, backend="aot_eager"), []
    for forward in (net, compiled):
        logits = forward(inputs, torch.tensor([[True, False], [True, True]]))
        results.append(torch.autograd.grad(sum(v.sin().sum() for v in logits.values()), list(net.parameters())))
    for one, two in zip(*results, strict=True):
        assert_same_math(one, two)
    net.modality_dropout = 0.5
    assert compiled(inputs)["cell"].isfinite().all()


@torch.no_grad()
def test_exports_with_any_batch():
    net, inputs = fused(("resnet", "record"))
    batch = Dim("batch", min=2, max=64)
    shapes = ({name: {0: batch} for name in inputs}, {0: batch})
    arguments = (inputs, torch.tensor([[True, False], [True, True]]))
    program = torch.export.export(net, arguments, dynamic_shapes=shapes, strict=False).module()
    inputs = {name: torch.randn(5, *x.shape[1:]) for name, x in inputs.items()}
    present = torch.rand(5, 2) < 0.5
    for task, logits in program(inputs, present).items():
        assert_same_math(logits, net(inputs, present)[task])


@torch.no_grad()
def test_copies_and_pickles_come_back_working():
    net, inputs = fused()
    expected = net(inputs)["cell"]
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert_same_bits(twin(inputs)["cell"], expected)
        perturb_(twin.branches["resnet"])
        assert not torch.equal(twin(inputs)["cell"], expected)
        assert_same_bits(net(inputs)["cell"], expected)


@torch.no_grad()
def test_state_of_one_fits_another():
    net, inputs = fused()
    again = fuse(given(inputs)[0], TASKS, example_inputs=inputs).eval()
    assert list(again.state_dict()) == list(net.state_dict())
    again.load_state_dict(net.state_dict())
    assert_same_bits(again(inputs)["cell"], net(inputs)["cell"])
    plain = without_classifier(built("resnet")[0], "resnet", "")
    assert [k.removeprefix("branches.resnet.") for k in net.state_dict() if k.startswith("branches.resnet.")] == list(
        plain.state_dict()
    )


def test_fusing_again_gives_the_same_state():
    backbones, inputs = given(("resnet", "record"))
    nets = [fuse(backbones, TASKS, example_inputs=inputs) for _ in range(2)]
    assert list(nets[0].state_dict()) == list(nets[1].state_dict())
    assert [tuple(t.shape) for t in nets[0].state_dict().values()] == [tuple(t.shape) for t in nets[1].state_dict().values()]
    assert all(nets[0].branches[name] is nets[1].branches[name] is backbone for name, backbone in backbones.items())


def test_checkpointing_changes_no_gradient():
    net, inputs = fused()
    results = []
    for enable in (False, True):
        net.set_grad_checkpointing(enable)
        logits = net(inputs)
        results.append([*logits.values(), *torch.autograd.grad(sum(v.sin().sum() for v in logits.values()), net.parameters())])
    for one, two in zip(*results, strict=True):
        assert_same_math(one, two)


@pytest.mark.parametrize("first", ["wrap", "fuse"])
@torch.no_grad()
def test_branches_are_wrapped_before_or_after(first):
    backbones, inputs = given(("resnet", "vit"))
    if first == "wrap":
        wrap(backbones["resnet"], "block", example_input=inputs["resnet"])
    net = fuse(backbones, TASKS, example_inputs=inputs).eval()
    if first == "fuse":
        wrap(net.branches["resnet"], "block", example_input=inputs["resnet"])
    perturb_(net)
    calls = []
    found = list(refinements(net))
    assert len(found) == 4
    for hook in found:
        hook.attention.register_forward_hook(lambda *_: calls.append(1))
    y = net(inputs)["cell"]
    assert len(calls) == len(found)
    unwrap(net.branches["resnet"])
    assert not torch.equal(net(inputs)["cell"], y)


@pytest.mark.parametrize("first", ["wrap", "fuse"])
@torch.no_grad()
def test_attention_around_stages_works(first):
    """A module with fused blocks inside is not called itself."""
    model = timm.create_model("convnext_atto", depths=(1, 1, 1, 2), dims=(8, 16, 16, 24), num_classes=0).eval()
    x = torch.randn(2, 3, 64, 64)
    if first == "wrap":
        wrap(model, example_input=x)
    net = fuse({"ct": model}, TASKS, at="block", example_inputs={"ct": x}).eval()
    if first == "fuse":
        wrap(model, example_input=x)
    assert [sites["ct"].module for sites in net.stages] == [
        *(f"stages.{i}.blocks.0" for i in range(4)),
        "stages.3.blocks.1",
    ]
    plain = net.features({"ct": x})["ct"]
    carriers = [name for name, module in model.named_modules() if STEPS in vars(module)]
    assert carriers == [f"stages.{i}" for i in range(4)]
    for hook in refinements(net):
        hook.attention.alpha.fill_(3.0)
    assert_same_bits(net.features({"ct": x})["ct"], model(x))
    assert not torch.equal(model(x), plain)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    program = torch.export.export(net, ({"ct": x},), strict=False).module()
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), compiled, program):
        assert_same_math(other({"ct": x})["cell"], net({"ct": x})["cell"])
    unwrap(model)
    assert_same_bits(net.features({"ct": x})["ct"], plain)


def train(rank, folder):
    """Two steps in one of two processes; one of them lacks a modality."""
    older.register()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    net, inputs = fused(("resnet", "record"), modality_dropout=0.3)
    parallel = DistributedDataParallel(net.train(), find_unused_parameters=False)
    sgd, loss = torch.optim.SGD(parallel.parameters(), lr=0.01), TaskLoss(list(TASKS))
    labels = {"lesion": torch.tensor([1, 6]), "cell": torch.tensor([4, -100])}
    for step in range(2):
        sgd.zero_grad()
        given = {k: v + step + rank for k, v in inputs.items() if rank != step or k == "resnet"}
        loss(parallel(given), labels).backward()
        sgd.step()
    torch.save([p.detach() for p in net.parameters()], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch is built without gloo")
def test_two_processes_stay_in_step_when_one_lacks_a_modality(tmp_path):
    torch.multiprocessing.spawn(train, (str(tmp_path),), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for a, b in zip(one, two, strict=True):
        assert_same_math(a, b)


@pytest.mark.parametrize("mask", [None, torch.tensor([[True, False], [True, True]])], ids=["all", "some"])
def test_autocast_is_near_full_precision_and_trains(mask):
    net, inputs = fused(("resnet", "record"))
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(inputs, mask)
        loss = TaskLoss(list(TASKS))(logits, {"lesion": torch.tensor([1, 6]), "cell": torch.tensor([4, -100])})
    exact = net(inputs, mask)["cell"]
    assert (logits["cell"] - exact).abs().max() < 0.1 * exact.abs().max()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in net.parameters())


# Gates, and the backbones without them -----------------------------------------------------------------------------------


def test_maps_hold_the_gate_of_every_stage_and_modality():
    net, inputs = fused(fusion_options={"init": "paper"})
    seen, present = {}, torch.tensor([[True, False, True], [True, True, True]])
    for k, fusion in enumerate(net.refiners):
        fusion.register_forward_hook(lambda fusion, args, ys, k=k: seen.update({k: (args[0], ys, fusion)}))
    maps = gates(net.train(), inputs, present)
    assert net.training
    assert list(maps) == [f"refiners.{k}.{name}" for k, sites in enumerate(net.stages) for name in sites]
    for k, (xs, ys, fusion) in seen.items():
        for i, (name, site) in enumerate(net.stages[k].items()):
            gate = maps[f"refiners.{k}.{name}"] * fusion.alphas[i]
            here = present[:, list(inputs).index(name)]
            x, y = (positions(t[i], site.layout, site.num_prefix_tokens)[here] for t in (xs, ys))
            assert_same_math(y, x * gate[here, :, None])
    assert all(0 < gate.min() and gate.max() <= 1 for gate in maps.values())  # in float32 σ reaches one


def test_maps_hold_the_branches_own_attention_and_no_absent_modality():
    net, inputs = fused(("resnet", "record"))
    wrap(net.branches["resnet"], ["layer3"], example_input=inputs["resnet"])
    maps = gates(net, inputs)
    assert maps["branches.resnet.layer3"].shape == (2, refinements(net)[0].site.channels)
    assert list(gates(net, {"record": inputs["record"]})) == ["refiners.0.record", "refiners.1.record"]


@torch.no_grad()
def test_disabled_branches_are_their_own_backbones():
    backbones, inputs = given(("resnet", "vit", "record"))
    net = fuse(backbones, TASKS, example_inputs=inputs).eval()
    expected = {name: branch(inputs[name]) for name, branch in net.branches.items()}
    wrap(net.branches["resnet"], example_input=inputs["resnet"])
    perturb_(net.refiners)
    for hook in refinements(net):
        hook.attention.alpha.fill_(3.0)
    gated = net.features(inputs)
    with disabled(net):
        for name, feature in net.features(inputs).items():
            assert_same_bits(feature, expected[name])
            assert not torch.equal(gated[name], expected[name])
        assert gates(net, inputs).keys() >= {"refiners.0.vit", "branches.resnet.layer4"}
        assert_same_bits(net.features(inputs)["vit"], expected["vit"])
    with pytest.raises(ValueError, match="expected inputs"), disabled(net):
        net({})
    for name, feature in net.features(inputs).items():
        assert_same_bits(feature, gated[name])


def test_fusions_and_heads_are_what_is_trained():
    net, inputs = fused(("resnet", "record"))
    wrap(net.branches["resnet"], ["layer4"], example_input=inputs["resnet"])
    names = {id(p): name for name, p in net.named_parameters()}
    found = [names[id(p)] for p in attention_parameters(net)]
    assert set(found) == {name for name in names.values() if name.startswith("refiners.") or "drifa_attn" in name}
    assert len(set(found)) == len(found)
    assert freeze_backbone(net) is net
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {*found, *(name for name in names.values() if name.startswith("heads."))}
    sum(logits.sum() for logits in net({"resnet": inputs["resnet"]}).values()).backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    freeze_backbone(net, classifier=["heads.cell", "branches.record"])
    kept = [name for name, p in net.named_parameters() if p.requires_grad and name not in found]
    assert {name.rpartition(".")[0] for name in kept} == {"heads.cell", "branches.record.0", "branches.record.2"}


@pytest.mark.parametrize(
    ("function", "message"),
    [(wrap, r"wrap its branches, net.branches\[name\]"), (plan, "got a fused network")],
)
def test_what_is_meant_for_a_branch_says_so(function, message):
    net, inputs = fused(("resnet", "record"))
    wrap(net.branches["resnet"], example_input=inputs["resnet"])
    before = registered(net)
    with pytest.raises(ValueError, match=message):
        function(net)
    assert registered(net) == before


@torch.no_grad()
def test_unwrap_takes_attention_out_of_all_branches():
    net, inputs = fused(("resnet", "record"))
    expected = net(inputs)["cell"]
    with pytest.raises(ValueError, match="holds no attention that wrap put there"):
        unwrap(net)
    wrap(net.branches["resnet"], example_input=inputs["resnet"])
    perturb_(net.branches["resnet"].layer1)
    assert unwrap(net) is net
    assert not refinements(net)
    assert list(gates(net, inputs)) == [f"refiners.{k}.{name}" for k in range(2) for name in ("resnet", "record")]
    assert expected.shape == net(inputs)["cell"].shape
