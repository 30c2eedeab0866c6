"""Networks cut at their stages."""

import copy
import pickle
import random

import pytest
import torch
from torch import nn

from drifa_attn.network.lockstep import NotCuttableError, check_parts, cut
from drifa_attn.network.survey import Survey
from drifa_attn.network.trace import meta_clone
from drifa_attn.trees import map_tensors, tensors_in
from tests._compare import assert_same_bits
from tests.network.test_survey import NETWORKS, built
from tests.network.test_trace import Net, conv

X = torch.randn(2, 8, 6, 6)


def stages_of(model, x):
    survey = Survey(model, x)
    return sorted([n for n, c in survey.stages().items() if survey.sites(n, c)[0]], key=lambda n: survey.first.calls[n].order)


def parts_of(model, stages, x):
    clone = meta_clone(model)
    with torch.no_grad():
        return {training: cut(clone.train(training), stages, x.to("meta")) for training in (False, True)}


def run(model, parts, x, change=lambda output: output):
    output, handed = parts[0].run(model, x)
    for part in parts[1:-1]:
        output, handed = part.run(model, change(output), *handed)
    return parts[-1].run(model, change(output), *handed)


def louder(output):
    return map_tensors(output, lambda t: 1.5 * t if t.is_floating_point() else t)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_parts_do_what_the_network_does(name, training):
    """Stages changed, so that what is not handed on, or handed on unchanged, shows; outputs, gradients and state."""
    (one, x), (two, _) = built(name), built(name)
    stages = stages_of(one, x)
    parts = parts_of(one, stages, x)[training]
    assert len(parts) == len(stages) + 1
    for stage in stages:
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
            assert_same_bits(actual[1], expected[1])


def test_parts_pickle_and_hold_no_weight():
    model, x = built("vit")
    stages = stages_of(model, x)
    parts = parts_of(model, stages, x)[False]
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


WRONG = {"state": assigned, "python's random": drawn}


@pytest.mark.parametrize("forward", WRONG.values(), ids=WRONG)
def test_what_is_followed_wrongly_is_found_by_trying(forward):
    net = Net(forward, a=conv(), b=conv())
    net.register_buffer("count", torch.zeros(()))
    with pytest.raises(NotCuttableError, match="another result in eval mode"):
        check_parts(net, parts_of(net, ["a", "b"], X), ["a", "b"], X)


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
    check_parts(net, parts, ["a", "b"], X)
    other = torch.randn(5, 8, 3, 9)
    assert_same_bits(run(net, parts[False], other), net(other))


def test_a_branch_on_the_size_holds_for_that_size():
    net = Net(by_size, a=conv(), b=conv())
    parts = parts_of(net, ["a", "b"], X)
    check_parts(net, parts, ["a", "b"], X)
    assert_same_bits(run(net, parts[False], X[:, :, :5, :5]), net(X[:, :, :5, :5]))
    with pytest.raises(ValueError, match="cut where True held, got False: fuse it with example_inputs of this size"):
        run(net, parts[False], X[:, :, :4, :4])


def test_tracing_leaves_torch_and_the_network_as_they_were():
    net = Net(lambda net, x: net.b(net.a(x)).missing, a=conv(), b=conv())
    before = {name: getattr(torch, name) for name in ("arange", "zeros")}, nn.Module.__call__, torch.get_rng_state()
    with pytest.raises(AttributeError, match="missing"):
        parts_of(net, ["a", "b"], X)
    assert ({name: getattr(torch, name) for name in ("arange", "zeros")}, nn.Module.__call__) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert not any(m._forward_hooks for m in net.modules())
