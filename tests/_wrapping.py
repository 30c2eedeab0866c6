"""Helpers of several tests about attention in one network."""

import copy
from collections import namedtuple
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from torch import nn

from drifa_attn import MFA, unwrap, wrap
from drifa_attn.wrapping.inject import STEPS, placed
from tests._compare import assert_same_bits
from tests.cases import perturb_
from tests.networks import NETWORKS, built

Refined = namedtuple("Refined", "site attention")


def refinements(model):
    """The sites that `wrap` made in a network, each with its attention."""
    return [Refined(*found) for found in placed(model)]


EVERY = pytest.mark.parametrize("name", NETWORKS)


WAYS = pytest.mark.parametrize("at", ["stage", "block"])


@cache
def wrapped_once(name, at):
    model, x = built(name)
    return wrap(model, at, example_input=x)


def wrapped(name, at="stage"):
    """A network of the list in eval mode with attention that does something, and an input for it."""
    model, x = copy.deepcopy(wrapped_once(name, at)), built(name)[1]
    for attention in (m for m in model.modules() if isinstance(m, MFA)):
        perturb_(attention)
    return model, x


def awaken_(model):
    """Give weight to what starts at zero: a zero head or norm hides whatever is behind it."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)


def features(model, x):
    """What the network makes before its head, or its output where it does not say."""
    found = model.forward_features(x) if hasattr(model, "forward_features") else model(x)
    return [found] if isinstance(found, torch.Tensor) else list(found)


def training_step(model, x):
    """The output of a copy in training mode under one seed, and the buffers that it left, without those of attention."""
    model = copy.deepcopy(model).train()
    torch.manual_seed(2)
    added = {id(buffer) for module in model.modules() if isinstance(module, MFA) for buffer in module.buffers()}
    return [model(x), *(buffer for buffer in model.buffers() if id(buffer) not in added)]


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other)


def registered(model):
    """Every module of a network with its mode and what is registered on it."""
    return {
        name: (
            *(id(m), m.training, [key for key in ("forward", STEPS, "_replicate_for_data_parallel") if key in vars(m)]),
            *(list(known) for known in (m._forward_hooks, m._forward_pre_hooks, m._modules, m._buffers)),
        )
        for name, m in model.named_modules()
    }


@torch.no_grad()
def check_round_trip(model, x, **arguments):
    """Wrap and unwrap; nothing may change but what is added, and that is gone in the end."""
    original, kind, keys, before = copy.deepcopy(model), type(model), list(model.state_dict()), registered(model)
    expected_step = training_step(original, x)
    assert wrap(model, example_input=x, **arguments) is model
    assert type(model) is kind
    after = registered(model)
    assert all(after[name][:2] == before[name][:2] for name in before)
    attentions = {name for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, MFA)}
    added = {f"{name}.{key}" for name in attentions for key in model.get_submodule(name).state_dict()}
    assert [key for key in model.state_dict() if key not in added] == keys
    missing, unexpected = model.load_state_dict(original.state_dict(), strict=False)
    assert (set(missing), unexpected) == (added, [])
    assert_same(training_step(model, x), expected_step)
    model.eval(), original.eval()
    expected = [original(x), *features(original, x)]
    assert_same([model(x), *features(model, x)], expected)
    modes = {name: m.training for name, m in original.named_modules()}
    assert unwrap(model) is model
    assert list(model.state_dict()) == keys
    assert registered(model) == {name: (i, modes[name], *rest) for name, (i, _, *rest) in before.items()}
    assert_same([model(x), *features(model, x)], expected)


def counted(model):
    """How often each attention refines, whoever calls it, counted from now on."""
    counts = {}
    for name, module in model.named_modules():
        if isinstance(module, MFA):
            counts[name] = 0
            module.register_forward_hook(lambda m, *_, name=name: counts.__setitem__(name, counts[name] + m.enabled))
    return counts


@contextmanager
def refused(model, x, error, message):
    """The body raises, and the network is untouched."""
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(x)
    before, state = registered(model), {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(error, match=message):
        yield
    assert registered(model) == before
    assert list(model.state_dict()) == list(state)
    assert_same(model.state_dict().values(), state.values())
    with torch.no_grad():
        assert_same_bits(copy.deepcopy(model).eval()(x), expected)


def strengthen_(model):
    for attention in [m for m in model.modules() if isinstance(m, MFA)]:
        perturb_(attention)
    return model
