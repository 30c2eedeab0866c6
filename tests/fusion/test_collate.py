"""`collate`: what samples hold comes through, what they lack is zeros and not present, and a network sees no difference."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from drifa_attn import collate, fuse
from tests._compare import assert_same_bits

PRESENT = st.integers(1, 4).flatmap(lambda m: st.lists(st.tuples(*[st.booleans()] * m), min_size=1, max_size=6))


def values(present, shape=(3,)):
    """One sample for each row of `present`, a modality a column, with None where it is False."""
    draw = torch.Generator().manual_seed(len(present))
    return [{f"m{j}": torch.randn(shape, generator=draw) if has else None for j, has in enumerate(row)} for row in present]


@settings(deadline=None)
@given(PRESENT, st.sampled_from([(), (3,), (2, 4, 5)]))
def test_what_is_there_comes_through_and_what_is_not_is_zeros(rows, shape):
    samples = values(rows, shape)
    inputs, present = collate(samples)
    assert present.dtype == torch.bool
    assert present.tolist() == [list(row) for row in rows]
    assert list(inputs) == list(samples[0])
    for j, (name, x) in enumerate(inputs.items()):
        if not present[:, j].any():
            assert x is None
            continue
        for i, sample in enumerate(samples):
            assert_same_bits(x[i], torch.zeros(shape) if sample[name] is None else sample[name])


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.booleans(), st.booleans()).filter(any), min_size=1, max_size=4))
def test_a_fused_network_says_of_a_batch_what_it_says_of_each_sample(rows):
    torch.manual_seed(0)
    backbones = {name: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU()) for name in ("m0", "m1")}
    examples = {name: torch.zeros(2, 3) for name in backbones}
    net = fuse(backbones, {"t": 2}, fusion="gated", example_inputs=examples).double().eval()
    samples = [{name: None if x is None else x.double() for name, x in sample.items()} for sample in values(rows)]
    together = net(*collate(samples))["t"]
    alone = torch.cat([net(*collate([sample]))["t"] for sample in samples])
    torch.testing.assert_close(together, alone)


def test_a_loader_hands_on_what_follows():
    dataset = [({"a": torch.ones(2), "b": None}, 0, "x"), ({"a": None, "b": torch.ones(1)}, 1, "y")]
    ((inputs, present, labels, names),) = DataLoader(dataset, 2, collate_fn=collate)
    assert present.tolist() == [[True, False], [False, True]]
    assert inputs["a"].tolist() == [[1, 1], [0, 0]]
    assert (labels.tolist(), list(names)) == ([0, 1], ["x", "y"])


def test_modalities_order_the_columns_and_may_be_left_out_of_a_sample():
    samples = [{"a": torch.ones(1)}, {"b": torch.ones(1)}]
    inputs, present = partial(collate, modalities=["b", "c", "a"])(samples)
    assert list(inputs) == ["b", "c", "a"]
    assert present.tolist() == [[False, False, True], [True, False, False]]
    assert inputs["c"] is None


def test_values_may_be_nested_arrays_and_numbers():
    samples = [
        {"text": {"ids": torch.tensor([1, 2]), "mask": np.array([True, False])}, "pair": (torch.ones(1), 2.0), "age": [51.0]},
        {"text": None, "pair": None, "age": np.float32([40])},
    ]
    inputs, present = collate(samples)
    assert inputs["text"]["ids"].tolist() == [[1, 2], [0, 0]]
    assert inputs["text"]["mask"].tolist() == [[True, False], [False, False]]
    assert [x.tolist() for x in inputs["pair"]] == [[[1.0], [0.0]], [2.0, 0.0]]
    assert inputs["age"].tolist() == [[51.0], [40.0]]
    assert present.tolist() == [[True] * 3, [False, False, True]]


@pytest.mark.parametrize(
    ("samples", "error", "message"),
    [
        ([], ValueError, "at least one sample, got none"),
        ([torch.ones(2)], TypeError, "{modality: value or None}, or as a tuple that begins with that, got tensor"),
        ([()], TypeError, "a tuple that begins with that, got ()"),
        ([{"a": None}, {"b": None}], ValueError, "of the modalities ['a'], got ['b'] besides"),
        ([{"a": torch.ones(2)}, {"a": torch.ones(3)}], ValueError, "'a' of one shape in all samples, got (2,) and (3,)"),
        ([{"a": (torch.ones(2),)}, {"a": {}}], ValueError, "'a' of all samples to have the same parts"),
        ([{"a": "x"}], TypeError, "'a' as tensors or numbers, got 'x'"),
    ],
)
def test_what_is_no_sample_is_named(samples, error, message):
    with pytest.raises(error, match=re.escape(message)):
        collate(samples)
