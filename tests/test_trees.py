"""Tensors in nestings of every kind."""

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass, field, is_dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from drifa_attn.trees import at_path, holds, map_tensors, parts, replace_tensor, tensors_in
from tests.older import needs_later_torch

Pair = namedtuple("Pair", "map size")


@dataclass(frozen=True)
class Frozen:
    logits: object
    extra: object = None


@dataclass
class Derived:
    """A field that the constructor does not take."""

    logits: object
    seen: list = field(init=False, default_factory=list)


KINDS = [
    lambda x: (x, 1),
    lambda x: [x, "a"],
    lambda x: {"f": x},
    lambda x: OrderedDict(f=x),
    lambda x: UserDict(f=x),
    lambda x: Pair(x, 3),
    lambda x: Frozen(x),
    lambda x: Derived(x),
]
TREES = st.recursive(st.just("tensor"), lambda inner: st.tuples(st.sampled_from(KINDS), inner), max_leaves=4)


def built(tree):
    """The nesting, the path to its tensor, and the tensor."""
    if tree == "tensor":
        x = torch.arange(6.0).view(2, 3)
        return x, (), x
    kind, inner = tree
    inside, path, x = built(inner)
    whole = kind(inside)
    return whole, (next(iter(parts(whole))), *path), x


@given(TREES)
def test_a_tensor_is_found_changed_and_put_back(tree):
    whole, path, x = built(tree)
    assert [(found, tensor is x) for found, tensor in tensors_in(whole)] == [(path, True)]
    assert holds(whole, path)
    changed = replace_tensor(whole, path, lambda tensor: tensor + 1)
    assert type(changed) is type(whole)
    assert torch.equal(at_path(changed, path), x + 1)
    assert at_path(whole, path) is x  # the first nesting is as it was
    assert torch.equal(at_path(map_tensors(whole, lambda tensor: tensor * 2), path), x * 2)


def test_what_is_no_nesting_is_left_alone():
    assert parts(3) == parts("abc") == parts(nn.Linear(2, 2)) == parts(Frozen) == {}
    assert not holds({"f": 1}, ("f",))
    assert not holds([torch.ones(1)], (1,))


def test_a_nesting_within_itself_ends():
    tree = {"f": torch.ones(1)}
    tree["self"] = tree
    assert [path for path, _ in tensors_in(tree)] == [("f",)]


def compiled(kind):
    return pytest.param(kind, marks=needs_later_torch("compiles no copy of a dataclass") if is_dataclass(kind(0)) else ())


@pytest.mark.parametrize("kind", [compiled(k) for k in KINDS if type(k(0)) not in (UserDict, OrderedDict)])
def test_changing_a_nesting_compiles(kind):
    def function(x):
        whole = kind(x * 2)
        return replace_tensor(whole, (next(iter(parts(whole))),), lambda tensor: tensor + 1)

    x = torch.ones(2)
    changed = torch.compile(function, fullgraph=True, backend="eager")(x)
    assert torch.equal(tensors_in(changed)[0][1], x * 2 + 1)
