"""Networks cut at their stages."""

import copy
import pickle
import random
import threading

import pytest
import torch
from torch import fx, nn

from drifa_attn.network.copies import meta_clone
from drifa_attn.network.glue import NotCuttableError, enter, leave
from drifa_attn.network.lockstep import check_parts, cut
from drifa_attn.network.stages import stages
from drifa_attn.network.survey import survey
from drifa_attn.trees import map_tensors, tensors_in
from tests._compare import assert_same_bits, assert_same_math
from tests.networks import NETWORKS, Net, built, conv
from tests.older import needs_later_torch

X = torch.randn(2, 8, 6, 6)


def stages_of(model, x):
    found = survey(model, x)
    names = [name for name in stages(found) if name in found.found and found.found[name].sites]
    return sorted(names, key=lambda name: found.first.calls[name].order)


def parts_of(model, stages, x):
    clone = meta_clone(model)
    with torch.no_grad():
        return {training: cut(clone.train(training), stages, ((x.to("meta"),), {})) for training in (False, True)}


def run(model, parts, x, change=lambda output: output):
    output, handed = parts[0].run(model, enter(model, (x,), {}))
    for part in parts[1:-1]:
        output, handed = part.run(model, change(output), *handed)
    return leave(model, parts[-1].run(model, change(output), *handed))


def louder(output):
    return map_tensors(output, lambda t: 1.5 * t if t.is_floating_point() else t)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_parts_do_what_the_network_does(name, training):
    """Stages changed, so that what is not handed on, or handed on unchanged, shows; outputs, gradients and state."""
    (one, x), (two, _) = built(name), built(name)
    ends = stages_of(one, x)
    parts = parts_of(one, ends, x)[training]
    assert len(parts) == len(ends) + 1
    for stage in ends:
        one.get_submodule(stage).register_forward_hook(lambda _, args, output: louder(output))
    results = []
    for model, forward in ((one.train(training), one), (two.train(training), lambda x: run(two, parts, x, louder))):
        for p in model.parameters():
            if not p.any():
                nn.init.constant_(p, 0.1)
        torch.manual_seed(1)
        y = [t for _, t in tensors_in(forward(x))]
        sum(t.sin().sum() for t in y).backward()
        results.append([*y, *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()])
    for actual, expected in zip(*results, strict=True):
        assert_same_bits(actual, expected)
    other = torch.cat([x, x, x])[:5]
    for actual, expected in zip(tensors_in(run(two.eval(), parts, other, louder)), tensors_in(one.eval()(other)), strict=True):
        if not training:
            assert_same_math(actual[1], expected[1])


def test_parts_pickle_and_hold_no_weight():
    model, x = built("vit")
    ends = stages_of(model, x)
    parts = parts_of(model, ends, x)[False]
    again = pickle.loads(pickle.dumps(parts))
    assert len(pickle.dumps(parts)) < 20_000
    assert_same_bits(run(model, again, x), model(x))
    assert copy.deepcopy(parts)[0] is parts[0]


GLUE = {
    "values of a tensor": (lambda net, x: net.b(net.a(x) if x.sum() > 0 else x), "values of a tensor"),
    "a number from a tensor": (lambda net, x: net.b(net.a(x) * float(x.mean())), "values of a tensor"),
    "no gradients": (lambda net, x: net.b(no_gradient(net.a, x)), "switches gradients or autocast"),
    "autocast": (lambda net, x: net.b(low_precision(net.a, x)), "switches gradients or autocast"),
    "a foreign tensor": (lambda net, x: net.b(net.a(x) + X[0]), "does not hold as an attribute"),
    "order": (lambda net, x: net.a(net.b(x)), "end in the order"),
    "never": (lambda net, x: net.b(x), "end in the order"),
    "twice": (lambda net, x: net.b(net.a(net.a(x))), "end in the order"),
}


def no_gradient(module, x):
    with torch.enable_grad():
        return module(x) * 2


def low_precision(module, x):
    with torch.autocast("cpu", torch.bfloat16):
        return module(x) * 2


@pytest.mark.parametrize(("forward", "reason"), GLUE.values(), ids=GLUE)
def test_glue_that_cannot_be_followed_is_refused(forward, reason):
    with pytest.raises(NotCuttableError, match=reason):
        parts_of(Net(forward, a=conv(), b=conv()), ["a", "b"], X)


def assigned(net, x):
    net.count = net.count + 1
    return net.b(net.a(x))


def drawn(net, x):
    return net.b(net.a(x)) * random.random()


WRONG = {
    "state": pytest.param(assigned, marks=needs_later_torch("lets nothing but tensors be assigned to a buffer")),
    "python's random": drawn,
}


@pytest.mark.parametrize("forward", WRONG.values(), ids=WRONG)
def test_what_is_followed_wrongly_is_found_by_trying(forward):
    net = Net(forward, a=conv(), b=conv())
    net.register_buffer("count", torch.zeros(()))
    with pytest.raises(NotCuttableError, match="another result in eval mode"):
        check_parts(net, parts_of(net, ["a", "b"], X), ["a", "b"], ((X,), {}))


def by_size(net, x):
    y = net.a(x)
    return net.b(y * 2 if y.shape[-1] > 4 else y)


def sizes(net, x):
    b, c, h, w = net.a(x).shape
    grid = torch.arange(h * w, device=x.device, dtype=x.dtype).reshape(1, 1, h, w)
    y = net.b(x).reshape(b, c, h * w).reshape(b, c, h, w) + grid
    y[:, :1] = torch.zeros(b, 1, h, w, device=x.device, dtype=x.dtype)
    return y.mean((2, 3)) * net.scale + len(x.shape)


def test_sizes_and_attributes_are_followed_for_any_input():
    net = Net(sizes, a=conv(), b=conv())
    net.scale = torch.tensor(3.0)
    parts = parts_of(net, ["a", "b"], X)
    check_parts(net, parts, ["a", "b"], ((X,), {}))
    other = torch.randn(5, 8, 3, 9)
    assert_same_bits(run(net, parts[False], other), net(other))


def test_a_branch_on_the_size_holds_for_that_size():
    net = Net(by_size, a=conv(), b=conv())
    parts = parts_of(net, ["a", "b"], X)
    check_parts(net, parts, ["a", "b"], ((X,), {}))
    assert_same_bits(run(net, parts[False], X[:, :, :5, :5]), net(X[:, :, :5, :5]))
    with pytest.raises(ValueError, match="traced with True and now sees False: pass example_inputs of the size that you use"):
        run(net, parts[False], X[:, :, :4, :4])


def test_tracing_leaves_torch_and_the_network_as_they_were():
    net = Net(lambda net, x: net.b(net.a(x)).missing, a=conv(), b=conv())
    before = {name: getattr(torch, name) for name in ("arange", "zeros")}, nn.Module.__call__, torch.get_rng_state()
    with pytest.raises(NotCuttableError, match="cannot be traced .AttributeError: .*missing"):
        parts_of(net, ["a", "b"], X)
    assert ({name: getattr(torch, name) for name in ("arange", "zeros")}, nn.Module.__call__) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert not any(m._forward_hooks for m in net.modules())


# Other threads -----------------------------------------------------------------------------------------------------------


def test_a_trace_holds_for_its_own_thread_alone():
    """Other threads call torch's functions, modules and compiled parameters meanwhile, and get what they are."""
    model, x = built("vit")
    ends = stages_of(model, x)
    other, stop, seen, errors = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), threading.Event(), [], []

    def work():
        try:
            while not stop.is_set():
                with torch.no_grad():
                    made = [torch.zeros(2, 3), torch.arange(4), torch.tensor([1.0]), torch.empty(2, 2), torch.ones(1)]
                    made += [other(torch.full((2, 4), 1.0)), other[0].weight.detach()]
                seen.append({type(one) for one in made})
        except BaseException as error:  # noqa: BLE001 - whatever it is, the trace caused it
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            parts_of(model, ends, x)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors
    assert len(seen) > 10
    assert set().union(*seen) == {torch.Tensor}


def test_two_threads_can_trace_at_once():
    before = torch.zeros, nn.Module.__call__, nn.Module.__getattr__
    results, errors = [], []

    def work(name):
        try:
            model, x = built(name)
            parts = parts_of(model, stages_of(model, x), x)
            with torch.no_grad():
                results.append((run(model, parts[False], x), model(x)))
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("vit", "resnet", "swin", "vit")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(results) == 4
    assert all(torch.equal(*pair) for pair in results)
    assert (torch.zeros, nn.Module.__call__, nn.Module.__getattr__) == before
    assert not any(isinstance(torch.zeros(2), fx.Proxy) for _ in range(3))


# What modules carry ------------------------------------------------------------------------------------------------------


class Behind:
    """A forward on the instance that goes on after the module's own."""

    def __init__(self, module, factor):
        self.module, self.own, self.factor = module, None, factor

    def __call__(self, *args, **kwargs):
        return self.finish(type(self.module).forward(self.module, *args, **kwargs))

    def finish(self, output):
        return output * self.factor


def with_stages_inside():
    torch.manual_seed(0)
    inner = Net(lambda net, x: net.b(net.a(x)), a=conv(), b=conv())
    return Net(lambda net, x: net.c(net.inner(x, 2) if False else net.inner(x)), inner=inner, c=conv())


CARRIED = {
    "pre-hook": lambda net: net.inner.register_forward_pre_hook(lambda module, args: (args[0] * 3,)),
    "pre-hook that gives no tuple": lambda net: net.inner.register_forward_pre_hook(lambda module, args: args[0] * 3),
    "pre-hook with kwargs": lambda net: net.inner.register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0] * 3,), kwargs), with_kwargs=True
    ),
    "hook": lambda net: net.inner.register_forward_hook(lambda module, args, output: output * 3),
    "hook with kwargs": lambda net: net.inner.register_forward_hook(
        lambda module, args, kwargs, output: output * 3, with_kwargs=True
    ),
    "hook that looks": lambda net: net.inner.register_forward_hook(lambda module, args, output: None),
    "forward on the instance": lambda net: setattr(net.inner, "forward", Behind(net.inner, 3.0)),
    "hook of the network": lambda net: net.register_forward_hook(lambda module, args, output: output * 3),
    "pre-hook of the network": lambda net: net.register_forward_pre_hook(lambda module, args: (args[0] * 3,)),
    "hook of a stage": lambda net: net.inner.a.register_forward_hook(lambda module, args, output: output * 3),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("carry", CARRIED.values(), ids=CARRIED)
@torch.no_grad()
def test_what_a_module_carries_runs_once_whenever_it_was_put_there(carry, when):
    net = with_stages_inside()
    plain = net(X)
    if when == "before":
        carry(net)
    parts = parts_of(net, ["inner.a", "inner.b"], X)
    if when == "after":
        assert_same_bits(run(net, parts[False], X), plain)
        carry(net)
    assert_same_bits(run(net, parts[False], X), net(X))


def test_a_stand_in_that_somebody_kept_is_the_function_after_the_trace():
    kept = []

    def keeping(net, x):
        kept.append(torch.zeros)
        return net.b(net.a(x))

    parts_of(Net(keeping, a=conv(), b=conv()), ["a", "b"], X)
    assert kept
    assert all(type(function(2)) is torch.Tensor for function in kept)


def test_running_out_of_memory_is_no_fault_of_the_network():
    def large(net, x):
        return net.b(net.a(x)) + torch.empty(1 << 50, device="cpu")

    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        parts_of(Net(large, a=conv(), b=conv()), ["a", "b"], X)
