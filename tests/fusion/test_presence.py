"""Absent samples in training: a branch runs on those that have its modality, and on no others."""

import copy

import timm
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from drifa_attn import fuse
from tests._compare import assert_same_bits, assert_same_math
from tests.cases import loss

TASKS = {"t": 3}


def table():
    """A branch of vectors with a norm over the batch."""
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU())


def network():
    torch.manual_seed(0)
    backbones = {"image": timm.create_model("test_resnet", num_classes=0), "table": table()}
    return fuse(backbones, TASKS, example_inputs={"table": torch.zeros(2, 6)}).double().train()


def inputs(n=8):
    generator = torch.Generator().manual_seed(1)
    return {
        "image": 2 * torch.randn(n, 3, 64, 64, generator=generator, dtype=torch.float64) + 1,
        "table": 3 * torch.randn(n, 6, generator=generator, dtype=torch.float64) - 2,
    }


def alone(given, present):
    """Each branch trained without the others on the samples that have it: its features, and the branch after the step."""
    branches = {name: copy.deepcopy(branch) for name, branch in network().branches.items()}
    features = {}
    for i, (name, branch) in enumerate(branches.items()):
        has = present[:, i]
        features[name] = branch(given[name][has]) if has.any() else given[name].new_zeros(0, 1)
    loss(list(features.values())).backward() if any(len(y) for y in features.values()) else None
    return features, branches


def absent(given, present):
    """The same inputs with NaN where a sample lacks a modality."""
    return {
        name: torch.where(present[:, i].view(-1, *[1] * (x.ndim - 1)), x, torch.nan)
        for i, (name, x) in enumerate(given.items())
    }


def check_step(net, given, present):
    """A training step of the fused network leaves every branch as a step on the present samples alone."""
    expected, branches = alone(given, present)
    features = net.features(absent(given, present), present)
    loss([feature[present[:, i]] for i, feature in enumerate(features.values())]).backward()
    for i, (name, branch) in enumerate(branches.items()):
        has, own = present[:, i], net.branches[name]
        assert not features[name][~has].any()
        if has.any():
            assert_same_math(features[name][has], expected[name])
        for (key, a), b in zip(own.named_parameters(), branch.parameters(), strict=True):
            assert a.grad is not None, f"{key}: DDP waits for it"
            assert_same_math(a.grad, torch.zeros_like(a) if b.grad is None else b.grad, 1e-6, name=key)
        for a, b in zip(own.buffers(), branch.buffers(), strict=True):
            assert_same_math(a.double(), b.double())


@settings(max_examples=10)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=8, max_size=8))
def test_a_step_with_absent_samples_is_a_step_on_the_present_ones(rows):
    present = torch.tensor(rows)
    assume(present[:, 1].sum() != 1)  # one vector is no batch for its norm, in a fused network or alone
    check_step(network(), inputs(), present)


def test_one_present_sample_is_a_batch_of_one():
    present = torch.ones(8, 2).bool()
    present[1:, 0] = False
    check_step(network(), inputs(), present)


def test_none_present_leaves_the_branch_alone():
    present = torch.tensor([[True, False]]).expand(8, 2)
    net = network()
    before = [buffer.clone() for buffer in net.branches["table"].buffers()]
    check_step(net, inputs(), present)
    for buffer, value in zip(net.branches["table"].buffers(), before, strict=True):
        assert_same_bits(buffer, value)


def test_modality_dropout_does_not_touch_the_norms_of_what_it_drops():
    net, given = network(), inputs()
    net.modality_dropout = 0.5
    seen = []
    handle = net.branches["table"][1].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    torch.manual_seed(1)
    net(given)
    handle.remove()
    (rows,) = seen
    assert 2 <= len(rows) < 8
    every = torch.cat([net.branches["table"][0](given["table"])])
    assert all(any(torch.allclose(row, one) for one in every) for row in rows)


def test_in_eval_mode_present_samples_do_not_depend_on_the_others():
    net, given, present = network().eval(), inputs(), torch.rand(8, 2) < 0.6
    present[0] = True
    with torch.no_grad():
        features = net.features(absent(given, present), present)
        for i, (name, branch) in enumerate(net.branches.items()):
            assert_same_math(features[name][present[:, i]], branch(given[name])[present[:, i]])


def test_compiled_training_runs_the_absent_as_zeros():
    """As the class says: a graph's shapes may not depend on values."""
    torch._dynamo.reset()
    net, given, present = network(), inputs(), torch.ones(8, 2).bool()
    present[4:, 1] = False
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend="aot_eager")
    compiled(given, present)
    twin = copy.deepcopy(net.branches["table"])
    twin(torch.where(present[:, 1:], given["table"], 0))
    assert_same_math(compiled.branches["table"][1].running_mean, twin[1].running_mean)
