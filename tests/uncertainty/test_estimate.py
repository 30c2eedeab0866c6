"""Uncertainty from several passes (Fig. 1B), against a transcription in NumPy float64 that takes the other way round."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from drifa_attn import Uncertainty, add_dropout, ensemble, fuse, mc_dropout
from tests._compare import assert_close_rel, assert_same_bits, assert_same_math, exact
from tests._uncertainty import FIELDS, Heads, Says, X, assert_same_result, members, modes, net, seeded
from tests.networks import built
from tests.strategies import SEEDS


def reference(logits):
    """The same for logits `s b k`: each pass's softmax, entropies, and the mutual information as their difference."""
    z = np.asarray(exact(logits))
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    mean = p.mean(0)
    total, aleatoric = entropy(mean), entropy(p).mean(0)
    return Uncertainty(mean, total, aleatoric, total - aleatoric, ((p - mean) ** 2).mean(0))


def entropy(p):
    return -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)


def assert_is(result, expected, rel=1e-10):
    """Assert every field, those near zero up to the rounding of the entropies they are made of."""
    for name in FIELDS:
        assert_close_rel(getattr(result, name), getattr(expected, name), rel, floor=rel, name=name)


VALUES = st.sampled_from([1e4, -1e4, -math.inf, 0.0, 30.0])


@st.composite
def passes(draw, dtype=torch.float64):
    """Logits `s b k`, some of them extreme, no class ruled out by all of a pass."""
    shape = s, b, k = draw(st.integers(2, 6)), draw(st.integers(1, 4)), draw(st.integers(2, 7))
    logits = 5 * torch.randn(shape, generator=seeded(draw(SEEDS)), dtype=torch.float64)
    places = st.tuples(st.integers(0, s - 1), st.integers(0, b - 1), st.integers(0, k - 1))
    for place, value in draw(st.lists(st.tuples(places, VALUES), max_size=8)):
        logits[place] = value
    logits[..., 0].nan_to_num_(neginf=0.0)
    return logits.to(dtype)


# The equations -----------------------------------------------------------------------------------------------------------


@given(logits=passes())
@example(torch.tensor([[[0.0, -math.inf]], [[-math.inf, 0.0]]], dtype=torch.float64))  # as far apart as can be
@example(torch.tensor([[[1e4, -1e4]], [[1e4, -1e4]]], dtype=torch.float64))
def test_the_result_is_the_equations(logits):
    assert_is(ensemble(members(logits), X), reference(logits))


@given(logits=passes(dtype=torch.float32))
def test_total_is_aleatoric_plus_epistemic_and_all_are_in_their_ranges(logits):
    result = ensemble(members(logits), X)
    assert_is(result, reference(logits), 1e-5)
    assert_close_rel(result.aleatoric + result.epistemic, result.total, 1e-5, floor=2e-6)
    most = math.log(logits.shape[2]) + 1e-5
    assert all(((-1e-6 <= value) & (value <= most)).all() for value in (result.total, result.aleatoric, result.epistemic))
    assert ((result.variance >= 0) & (result.variance <= 0.25 + 1e-6)).all()
    assert_same_math(result.probs.sum(1), torch.ones(logits.shape[1]))


@given(logits=passes(dtype=torch.float32))
def test_equal_passes_have_no_epistemic_part(logits):
    result = ensemble(members(logits[:1].expand_as(logits)), X)
    assert result.epistemic.abs().max() < 2e-6
    assert result.variance.max() < 1e-12
    assert_close_rel(result.aleatoric, result.total, 1e-5, floor=2e-6)


def test_certain_passes_that_disagree_are_all_epistemic():
    result = ensemble(members(torch.tensor([[[1e4, 0.0]], [[0.0, 1e4]]])), X)
    assert result.total.item() == result.epistemic.item() == pytest.approx(math.log(2))
    assert (result.aleatoric.item(), result.variance.tolist()) == (0, [[0.25, 0.25]])


def test_nan_stays_in_its_sample():
    logits = torch.randn(3, 4, 5)
    expected = ensemble(members(logits), X)
    logits[1, 2, 0] = math.nan
    result = ensemble(members(logits), X)
    rest = torch.tensor([0, 1, 3])
    for name in FIELDS:
        assert getattr(result, name)[2].isnan().all()
        assert_same_bits(getattr(result, name)[rest], getattr(expected, name)[rest])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_results_are_float32_at_least(dtype):
    logits = torch.randn(3, 4, 5).to(dtype)
    result = ensemble(members(logits), X)
    assert {getattr(result, name).dtype for name in FIELDS} == {torch.promote_types(dtype, torch.float32)}
    assert_is(result, reference(logits), 1e-5)


# Every pass counts -------------------------------------------------------------------------------------------------------


@given(seed=SEEDS, order=st.permutations(range(4)))
def test_members_are_alike_and_one_wrong_member_changes_everything(seed, order):
    logits = torch.randn(4, 3, 5, generator=seeded(seed), dtype=torch.float64)
    result = ensemble(members(logits), X)
    assert_is(ensemble(members(logits[list(order)]), X), result)
    for i in range(4):
        wrong = logits.clone()
        wrong[i] += torch.tensor([9.0, 0, 0, 0, 0])
        changed = ensemble(members(wrong), X)
        assert all((getattr(changed, name) - getattr(result, name)).abs().min() > 1e-6 for name in FIELDS)


def test_an_ensemble_of_samples_takes_all_passes_of_every_member():
    """Member by member, the draws those of training mode under the same seed."""
    models = [net(p) for p in (0.2, 0.5, 0.8)]
    torch.manual_seed(3)
    result = ensemble(models, X, passes=4)
    torch.manual_seed(3)
    with torch.no_grad():
        by_hand = torch.stack([drawn(model) for model in models for _ in range(4)])
    assert_is(result, reference(by_hand), 1e-5)


def drawn(model):
    """One pass of a copy with dropout alone in training mode."""
    model = copy.deepcopy(model).eval()
    model[3].train()
    return model(X)


@pytest.mark.parametrize("samples", [2, 7])
def test_mc_dropout_takes_as_many_passes_as_asked(samples):
    model = net()
    torch.manual_seed(3)
    result = mc_dropout(model, X, samples)
    torch.manual_seed(3)
    with torch.no_grad():
        assert_is(result, reference(torch.stack([drawn(model) for _ in range(samples)])), 1e-5)
    assert result.epistemic.max() > 1e-4


def test_an_ensemble_is_one_pass_of_each_in_eval_mode():
    models = [net() for _ in range(3)]
    result = ensemble(nn.ModuleList(models), X)
    with torch.no_grad():
        assert_is(result, reference(torch.stack([copy.deepcopy(model).eval()(X) for model in models])), 1e-5)


# What is left as it was --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [mc_dropout, ensemble])
@pytest.mark.parametrize("fails", [False, True])
def test_modes_statistics_weights_and_random_state_are_as_before(run, fails):
    """Also if the model raises in its third pass."""
    model = net().train()
    given = model if run is mc_dropout else [model, net()]
    model[1].eval()
    model[3].p = 0.7
    calls = []

    def stop(module, args):
        assert not model.training
        calls.append(module)
        if fails and len(calls) == 3:
            raise RuntimeError("third pass")

    model[4].register_forward_pre_hook(stop)
    before, kept, state = modes(model), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError, match="third pass"):
            run(given, X, passes=4, generator=seeded())
    else:
        run(given, X, passes=4, generator=seeded())
    assert (modes(model), len(calls)) == (before, 3 if fails else 4)
    assert len(set(before)) == 2  # or nothing would tell that each module has its own
    for name, value in model.state_dict().items():
        assert_same_bits(value, kept[name])
    assert_same_bits(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_members_may_share_a_part():
    """Its modes come back although every member changes them."""
    body = net(classes=8)
    models = [nn.Sequential(body, nn.Linear(8, 4)) for _ in range(2)]
    body.train()
    body[1].eval()
    before = [modes(model) for model in models]
    ensemble(models, X, passes=2)
    assert [modes(model) for model in models] == before


def test_a_train_method_of_its_own_is_never_called():
    """It may do what cannot be undone, such as merging weights."""
    model = net()
    model.train = model.eval = lambda *_: pytest.fail("called")
    mc_dropout(model, X, 2)
    ensemble([model, net()], X)


def test_no_graph_is_kept():
    result = mc_dropout(net(), X.clone().requires_grad_(), 3)
    assert not any(getattr(result, name).requires_grad for name in FIELDS)


# Seeds -------------------------------------------------------------------------------------------------------------------


def test_a_generator_makes_the_result_whatever_the_global_state():
    model = net()
    torch.manual_seed(1)
    one = mc_dropout(model, X, 4, generator=seeded(7))
    torch.manual_seed(2)
    assert_same_result(mc_dropout(model, X, 4, generator=seeded(7)), one)
    assert not torch.equal(mc_dropout(model, X, 4, generator=seeded(8)).probs, one.probs)


def test_one_generator_gives_another_result_each_time():
    model, generator = net(), seeded()
    one, two = (mc_dropout(model, X, 4, generator=generator) for _ in range(2))
    assert not torch.equal(one.probs, two.probs)


def test_the_global_generator_is_drawn_from_without_one_and_can_be_given():
    model = net()
    torch.manual_seed(5)
    one, two = mc_dropout(model, X, 4), mc_dropout(model, X, 4)
    assert not torch.equal(one.probs, two.probs)
    torch.manual_seed(5)
    assert_same_result(mc_dropout(model, X, 4), one)
    state = torch.get_rng_state()
    mc_dropout(model, X, 4, generator=torch.default_generator)
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.cuda
def test_a_generator_holds_on_a_gpu(device):
    model, x = net().cuda(), X.cuda()
    state = torch.cuda.get_rng_state()
    one, two = (mc_dropout(model, x, 4, generator=seeded(7)) for _ in range(2))
    assert_same_result(one, two)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert one.epistemic.min() > 1e-4


# Inputs, heads and chunks ------------------------------------------------------------------------------------------------


def sizes_seen(model):
    """The batch size of every pass from now on."""
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    return seen


@pytest.mark.parametrize("chunk", [1, 2, 5, 9])
def test_chunks_change_no_ensemble_and_are_as_small_as_asked(chunk):
    models = [net() for _ in range(2)]
    whole, seen = ensemble(models, X), sizes_seen(models[1])
    assert_is(ensemble(models, X, chunk=chunk), whole, 1e-5)
    assert seen == {1: [1] * 5, 2: [2, 2, 1]}.get(chunk, [5])


def test_chunks_of_monte_carlo_passes():
    model = net()
    seen, result = sizes_seen(model), mc_dropout(model, X, 3, generator=seeded(), chunk=2)
    assert seen == [2, 2, 2, 2, 2, 2, 1, 1, 1]
    assert_same_result(mc_dropout(model, X, 3, generator=seeded(), chunk=2), result)
    assert_same_result(mc_dropout(model, X, 3, generator=seeded(), chunk=5), mc_dropout(model, X, 3, generator=seeded()))
    assert [tuple(getattr(result, name).shape) for name in FIELDS] == [(5, 4), (5,), (5,), (5,), (5, 4)]


@pytest.mark.parametrize("chunk", [None, 2])
def test_an_empty_batch_gives_an_empty_result(chunk):
    result = mc_dropout(net(), X[:0], 3, chunk=chunk)
    assert [tuple(getattr(result, name).shape) for name in FIELDS] == [(0, 4), (0,), (0,), (0,), (0, 4)]


NESTINGS = {
    "dict": (lambda a, b: {"lesion": a, "cell": b}, ["lesion", "cell"]),
    "list": (lambda a, b: [a, b], [0, 1]),
    "tuple": (lambda a, b: (a, b), [0, 1]),
}
ARGUMENTS = {
    "positional": ((X, -X), lambda *xs: xs),
    "with options": ((X, -X, None, torch.tensor(2.0)), lambda *xs: xs),
    "list": ([X, -X], lambda xs: xs),
    "dict": ({"a": X, "b": -X}, lambda xs: xs.values()),
}


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("nesting", NESTINGS)
def test_heads_and_inputs_come_in_any_nesting(nesting, arguments, chunk):
    (out, keys), (inputs, take) = NESTINGS[nesting], ARGUMENTS[arguments]
    models = [Heads(out, take) for _ in range(2)]
    result = ensemble(models, inputs, chunk=chunk)
    assert list(result) == keys
    with torch.no_grad():
        logits = torch.stack([m.body.eval()(X) + m.body(-X) for m in models])
    for key, expected in zip(keys, (logits[..., :3], logits[..., 3:]), strict=True):
        assert_is(result[key], reference(expected), 1e-5)
    assert list(mc_dropout(models[0], inputs, 3, chunk=chunk)) == keys


def test_a_single_head_in_a_dict_stays_in_it():
    assert list(ensemble([Says({"a": torch.randn(2, 3)}), Says({"a": torch.randn(2, 3)})], X)) == ["a"]


@torch.no_grad()
def test_fused_networks_with_missing_modalities():
    """What an absent sample holds plays no part, and a modality left out is one that all lack."""
    (r, x), (v, y) = built("resnet"), built("vit")
    model = fuse({"skin": add_dropout(r, 0.2), "cells": v}, {"lesion": 7, "cell": 5}, dropout=0.25, modality_dropout=0.5)
    present = torch.tensor([[True, True], [False, True]])
    result = mc_dropout(model, ({"skin": x, "cells": y}, present), 4, generator=seeded(), chunk=1)
    assert list(result) == ["lesion", "cell"]
    assert all(one.epistemic.min() > 0 for one in result.values())
    other = x.clone()
    other[1] = 100.0
    again = mc_dropout(model, ({"skin": other, "cells": y}, present), 4, generator=seeded(), chunk=1)
    left_out = mc_dropout(model, {"cells": y}, 4)
    for task in result:
        assert_same_result(again[task], result[task])
        assert left_out[task].epistemic.min() > 0
