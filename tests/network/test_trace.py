from collections import OrderedDict, defaultdict, namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from drifa_attn.network import features
from drifa_attn.network.copies import meta_clone
from drifa_attn.network.trace import trace
from drifa_attn.trees import map_tensors, replace_tensor, tensors_in
from tests.networks import Net, conv

Pair = namedtuple("Pair", "map size")
T = torch.arange(6.0).view(2, 3)


def traced(forward, *shapes, **children):
    net = meta_clone(Net(forward, **children))
    return trace(net, tuple(torch.empty(2, *shape, device="meta") for shape in shapes or [(8, 4, 4)]))


def is_live(record, name, path=(), prefix=0):
    return features.is_live(record, record.calls[name].outputs[path], prefix)


# Nested outputs ----------------------------------------------------------------------------------------------------------

TREES = {
    "tensor": (T, ()),
    "tuple": ((T, 4), (0,)),
    "list": ([None, T], (1,)),
    "dict": ({"a": 1, "b": T}, ("b",)),
    "ordered dict": (OrderedDict(a=T, b=T), ("b",)),
    "dict with a default": (defaultdict(list, a=T, b=T), ("b",)),
    "namedtuple": (Pair(T, (2, 3)), (0,)),
    "nested": ([(T, {"x": [T]}), T], (0, 1, "x", 0)),
    "torch's named result": (torch.max(T, dim=1), (0,)),
}


@pytest.mark.parametrize(("tree", "path"), TREES.values(), ids=TREES)
def test_replace_tensor_changes_one_leaf_and_no_type(tree, path):
    before = list(tensors_in(tree))
    assert path in dict(before)
    changed = replace_tensor(tree, path, lambda t: t + 1)
    assert type(changed) is type(tree)
    for (key, old), (same_key, new) in zip(before, tensors_in(changed), strict=True):
        assert same_key == key
        assert torch.equal(new, old + 1) if key == path else new is old
    assert all(a is b for (_, a), (_, b) in zip(before, tensors_in(tree), strict=True)), "the given tree was changed"


def test_map_tensors_reaches_every_tensor_and_keeps_the_rest():
    assert map_tensors({"a": [T, 3], "b": (T, "x")}, lambda t: t.shape) == {"a": [(2, 3), 3], "b": ((2, 3), "x")}


# The copy ----------------------------------------------------------------------------------------------------------------


def test_meta_clone_holds_no_memory_and_leaves_the_network_alone():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)).train()
    net[2].weight = net[0].weight
    net[0].weight.requires_grad_(False)
    before = {name: (t, t.clone()) for name, t in net.state_dict(keep_vars=True).items()}
    clone = meta_clone(net)
    assert all(t.is_meta for t in (*clone.parameters(), *clone.buffers()))
    assert clone[2].weight is clone[0].weight
    assert not clone[0].weight.requires_grad
    assert clone[1].weight.requires_grad
    assert not any(module.training for module in clone.modules())
    assert all(module.training for module in net.modules())
    for name, t in net.state_dict(keep_vars=True).items():
        assert t is before[name][0]
        assert torch.equal(t, before[name][1])


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_meta_clone_takes_tensors_that_nobody_registered():
    net = Net(lambda net, x: net.f((x - net.mean) / net.kept["std"][0]), f=nn.utils.weight_norm(conv()))
    net.mean, net.kept = torch.ones(1, 8, 1, 1), {"std": [torch.ones(8, 1, 1)]}
    net(torch.ones(2, 8, 4, 4))  # leaves a computed weight that is no parameter
    record = trace(meta_clone(net), (torch.empty(2, 8, 4, 4, device="meta"),))
    assert record.calls["f"].outputs[()].shape == (2, 8, 4, 4)
    assert not net.mean.is_meta


def test_meta_clone_never_calls_the_hooks_of_the_network():
    seen = []
    net = nn.Sequential(nn.Linear(4, 4))
    net[0].register_forward_hook(lambda module, args, output: seen.append(output))
    net[0].register_forward_pre_hook(lambda module, args: seen.append(args))
    trace(meta_clone(net), (torch.empty(2, 4, device="meta"),))
    assert not seen
    net(torch.ones(2, 4))
    assert len(seen) == 2


# Calls -------------------------------------------------------------------------------------------------------------------


def test_trace_counts_calls_in_order_with_the_shapes_of_their_outputs():
    record = traced(
        lambda net, x: (net.b(net.a(net.a(x))), {"z": net.c(x)["z"]}),
        a=conv(),
        b=conv(8, 5),
        c=nn.Sequential(conv(), Net(lambda net, x: {"z": x})),
        never=conv(),
    )
    assert {name: call.count for name, call in record.calls.items()} == {"": 1, "a": 2, "b": 1, "c": 1, "c.0": 1, "c.1": 1}
    assert sorted(record.calls, key=lambda name: record.calls[name].order) == ["a", "b", "c.0", "c.1", "c", ""]
    assert record.calls["b"].outputs[()].shape == (2, 5, 4, 4)
    assert record.calls[""].outputs.keys() == {(0,), (1, "z")}
    assert [name for name, call in record.calls.items() if call.is_dict] == ["c", "c.1"]
    assert record.batch == 2
    assert record.output_producers == {"", "b", "c", "c.0", "c.1"}


def test_trace_leaves_no_hook_on_the_copy_even_when_it_fails():
    net = meta_clone(Net(lambda net, x: net.a(x).missing, a=conv()))
    with pytest.raises(AttributeError, match="missing"):
        trace(net, (torch.empty(2, 8, 4, 4, device="meta"),))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_trace_takes_keyword_arguments():
    net = meta_clone(Net(lambda net, *, image: net.a(image), a=conv()))
    record = trace(net, (), {"image": torch.empty(5, 8, 4, 4, device="meta")})
    assert (record.batch, record.calls["a"].outputs[()].shape) == (5, (5, 8, 4, 4))


def test_trace_counts_flops_as_torch_does():
    net = nn.Sequential(conv(8, 16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
    with FlopCounterMode(display=False) as counter:
        net(torch.ones(2, 8, 4, 4))
    assert trace(meta_clone(net), (torch.empty(2, 8, 4, 4, device="meta"),)).flops == counter.get_total_flops()
    assert counter.get_total_flops() == 2 * 2 * (16 * 8 * 9 * 16 + 256 * 10)


# Sums, concatenations and norms ------------------------------------------------------------------------------------------


def add_into(x, y):
    y += x
    return y


RESIDUALS = {
    "x + f(x)": lambda net, x: x + net.f(x),
    "f(x) + x": lambda net, x: net.f(x) + x,
    "torch.add": lambda net, x: torch.add(x, net.f(x)),
    "in place": lambda net, x: add_into(x, net.f(x)),
    "two branches": lambda net, x: net.f(x) + net.g(x),
    "dropped": lambda net, x: x + F.dropout(net.f(x), 0.5, net.training),
}
NOT_RESIDUALS = {
    "a constant": lambda net, x: net.f(x) + 1,
    "a parameter": lambda net, x: net.f(x) + net.g.weight[:, :1, :1, :1].view(1, 8, 1, 1).expand(2, 8, 4, 4),
    "a bias of another shape": lambda net, x: net.f(x) + x.mean((2, 3), keepdim=True),
    "a product": lambda net, x: net.f(x) * x,
}


@pytest.mark.parametrize("forward", RESIDUALS.values(), ids=RESIDUALS)
def test_trace_notes_residual_sums_in_the_frame_they_stand_in(forward):
    record = traced(lambda net, x: net.block(x), block=Net(forward, f=conv(), g=conv()))
    assert {frame for frame, *_ in record.additions} == {"block"}


@pytest.mark.parametrize("forward", NOT_RESIDUALS.values(), ids=NOT_RESIDUALS)
def test_trace_notes_no_other_sum(forward):
    record = traced(lambda net, x: net.block(x), block=Net(forward, f=conv(), g=conv()))
    assert not record.additions


def test_trace_notes_concatenations_of_what_a_module_reads():
    grow = Net(lambda net, x: torch.cat([x, net.f(x)], 1), f=conv())
    token = Net(lambda net, x: torch.cat([net.cls.weight.view(1, 8, 1, 1).expand(2, 8, 1, 4), x], 2), cls=nn.Linear(8, 1))
    record = traced(lambda net, x: net.grow(net.token(x)), grow=grow, token=token)
    assert record.concatenations == {"grow"}


def test_trace_knows_which_outputs_a_norm_reads():
    record = traced(lambda net, x: net.c(net.norm(net.a(x)) + net.b(x)), a=conv(), b=conv(), c=conv(), norm=nn.BatchNorm2d(8))
    assert record.normed & {"a", "b", "c"} == {"a"}


# What the result depends on ----------------------------------------------------------------------------------------------


def fill(x, y):
    out = torch.zeros_like(x)
    out[:, :4] = x[:, :4]
    out[:, 4:] = y[:, 4:]
    return out


LIVE = {
    "returned": lambda x, y: y,
    "added": lambda x, y: x + y,
    "added in place": add_into,
    "written into a slice": fill,
    "through a view": lambda x, y: torch.cat([t.flatten(1) for t in y.chunk(2, 1)], 1).view(2, -1),
    "as a weight": lambda x, y: x * y.sigmoid().mean((2, 3), keepdim=True),
    "in a dict": lambda x, y: {"one": [x, (y,)]},
    "by an out argument": lambda x, y: torch.add(x, y, out=torch.empty_like(x)),
    "an item of a list": lambda x, y: torch.stack([x, y])[1],
}
DEAD = {
    "never read": lambda x, y: x,
    "only its shape": lambda x, y: x.view(y.shape),
    "read, then dropped": lambda x, y: (y.relu(), x)[1],
    "overwritten": lambda x, y: [y, x][-1],
}


@pytest.mark.parametrize("use", LIVE.values(), ids=LIVE)
def test_trace_sees_what_the_result_depends_on(use):
    record = traced(lambda net, x: use(x, net.f(x)), f=conv())
    assert is_live(record, "f")


@pytest.mark.parametrize("use", DEAD.values(), ids=DEAD)
def test_trace_sees_what_is_discarded(use):
    record = traced(lambda net, x: use(x, net.f(x)), f=conv())
    assert not is_live(record, "f")


def test_trace_tells_the_leaves_of_one_output_apart():
    two = Net(lambda net, x: (net.f(x), net.g(x)), f=conv(), g=conv())
    record = traced(lambda net, x: net.two(x)[1], two=two)
    assert (is_live(record, "two", (0,)), is_live(record, "two", (1,))) == (False, True)


def test_trace_tells_two_leaves_of_one_tensor_apart():
    twice = Net(lambda net, x: [net.f(x)] * 2, f=conv())
    record = traced(lambda net, x: net.twice(x)[1], twice=twice)
    assert (is_live(record, "twice", (0,)), is_live(record, "twice", (1,))) == (False, True)


def test_trace_tells_an_input_handed_on_from_the_input():
    tap = Net(lambda net, x: (x, net.f(x)), f=conv())
    record = traced(lambda net, x: x + net.tap(x)[1], tap=tap)
    assert (is_live(record, "tap", (0,)), is_live(record, "tap", (1,))) == (False, True)
    record = traced(lambda net, x: net.norm(net.skip(net.f(x))), f=conv(), skip=nn.Identity(), norm=nn.BatchNorm2d(8))
    assert is_live(record, "f")
    assert is_live(record, "skip")
    assert record.normed >= {"f", "skip"}


# Only the prefix of the tokens `b n c` that `f` gives is used, or all of it: what attention behind the prefix would change.
PREFIX_ONLY = {
    "x[:, 0]": lambda net, t: t[:, 0],
    "x[:, 0, :]": lambda net, t: t[:, 0, :],
    "x[:, :1]": lambda net, t: t[:, :1],
    "x[:, 0:2]": lambda net, t: t[:, 0:2],
    "after a norm": lambda net, t: net.norm(t)[:, 0],
    "after an mlp": lambda net, t: (t + net.mlp(t))[:, 0],
}
BEHIND = {
    "all": lambda net, t: t,
    "mean": lambda net, t: t.mean(1),
    "x[:, 1:]": lambda net, t: t[:, 1:].mean(1),
    "both": lambda net, t: t[:, 0] + t[:, 1:].mean(1),
    "mixed before": lambda net, t: (t + t.mean(1, keepdim=True))[:, 0],
    "attention before": lambda net, t: F.scaled_dot_product_attention(t, t, t)[:, 0],
    "another axis": lambda net, t: t[:, :, 0],
    "most of them": lambda net, t: t[:, :20],
}


@pytest.mark.parametrize("tokens", [26, 5])
@pytest.mark.parametrize("head", PREFIX_ONLY | BEHIND)
def test_trace_tells_class_token_heads_from_others(head, tokens):
    use = (PREFIX_ONLY | BEHIND)[head]
    parts = {"f": nn.Linear(8, 8), "norm": nn.LayerNorm(8), "mlp": nn.Linear(8, 8)}
    record = traced(lambda net, x: use(net, net.f(x)), (tokens, 8), **parts)
    assert is_live(record, "f")
    assert is_live(record, "f", prefix=1) is (head in BEHIND)


def relu_twice(x):
    return torch.relu(torch.relu(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is:FutureWarning")
def test_trace_sees_through_scripted_functions():
    scripted = torch.jit.script(relu_twice)
    record = traced(lambda net, x: net.block(net.f(x)), f=conv(), block=Net(lambda net, x: scripted(x)))
    assert is_live(record, "f")
