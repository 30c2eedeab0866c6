"""Heads of every kind, picked from outputs of every kind, of networks with inputs of every kind."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from drifa_attn import RegressionUncertainty, Uncertainty, ensemble, fuse, mc_dropout
from tests._compare import assert_close_rel, assert_same_bits, assert_same_math, exact
from tests._uncertainty import FIELDS, Says, X, assert_same_result, members, seeded
from tests.strategies import SEEDS

Pair = namedtuple("Pair", "logits hidden")


@dataclass
class Plain:
    logits: torch.Tensor
    hidden: object = None
    loss: object = None


@dataclass
class LikeHuggingFace(OrderedDict):
    """An ordered dict and a dataclass at once, without the fields that are None among its keys."""

    loss: object = None
    logits: object = None
    hidden: object = None

    def __post_init__(self):
        for name in ("loss", "logits", "hidden"):
            if getattr(self, name) is not None:
                self[name] = getattr(self, name)


def entropy(p):
    return -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0)


# Kinds -------------------------------------------------------------------------------------------------------------------


@given(seed=SEEDS, shape=st.lists(st.integers(1, 3), min_size=1, max_size=2), k=st.integers(2, 4))
def test_every_pixel_is_a_sample(seed, shape, k):
    """Of `b k …` each place has the result that it would have alone."""
    logits = 3 * torch.randn(3, 2, k, *shape, generator=seeded(seed), dtype=torch.float64)
    result = ensemble(members(logits), X)
    alone = ensemble(members(logits.movedim(2, -1).reshape(3, -1, k)), X)
    for name in FIELDS:
        found, expected = getattr(result, name), getattr(alone, name)
        if name in ("probs", "variance"):
            assert found.shape == (2, k, *shape)
            found = found.movedim(1, -1).reshape(-1, k)
        else:
            assert found.shape == (2, *shape)
            found = found.reshape(-1)
        assert_same_math(found, expected)


@given(seed=SEEDS, shape=st.lists(st.integers(1, 3), min_size=0, max_size=3), size=st.sampled_from([2, 20]))
def test_labels_are_the_equations_one_by_one(seed, shape, size):
    logits = size * torch.randn(4, 3, *shape, generator=seeded(seed), dtype=torch.float64)
    result = ensemble(members(logits), X, kinds="multilabel")
    z = np.asarray(exact(logits))
    p = 1 / (1 + np.exp(-z))
    mean = p.mean(0)
    total, aleatoric = entropy(mean) + entropy(1 - mean), (entropy(p) + entropy(1 - p)).mean(0)
    expected = Uncertainty(mean, total, aleatoric, total - aleatoric, ((p - mean) ** 2).mean(0))
    for name in FIELDS:
        assert getattr(result, name).shape == logits.shape[1:]
        assert_close_rel(getattr(result, name), getattr(expected, name), 1e-9, floor=1e-9, name=name)


def test_certain_labels_that_disagree_are_all_epistemic():
    result = ensemble(members(torch.tensor([[[1e4, -torch.inf, 1e4]], [[-1e4, -torch.inf, 1e4]]])), X, kinds="multilabel")
    assert result.probs.tolist() == [[0.5, 0, 1]]
    assert result.variance.tolist() == [[0.25, 0, 0]]
    assert_same_math(result.epistemic, torch.tensor([[2.0, 1, 1]]).log())
    assert not result.aleatoric.any()


def test_a_single_logit_is_two_classes_of_which_one_is_zero():
    logits = torch.randn(3, 5, 1)
    result = ensemble(members(logits), X, kinds="multilabel")
    both = ensemble(members(torch.cat([torch.zeros_like(logits), logits], 2)), X)
    assert_same_math(result.probs[:, 0], both.probs[:, 1])
    assert_same_math(result.variance[:, 0], both.variance[:, 1])
    for name in ("total", "aleatoric", "epistemic"):
        assert_same_math(getattr(result, name)[:, 0], getattr(both, name))


@given(seed=SEEDS, shape=st.lists(st.integers(1, 3), min_size=0, max_size=3), offset=st.sampled_from([0.0, 1e6]))
def test_values_have_a_mean_and_a_variance(seed, shape, offset):
    values = offset + torch.randn(5, 3, *shape, generator=seeded(seed), dtype=torch.float64)
    result = ensemble(members(values), X, kinds="regression")
    assert isinstance(result, RegressionUncertainty)
    assert_close_rel(result.mean, values.mean(0), 1e-12, floor=1e-12)
    assert_close_rel(result.variance, values.var(0, correction=0), 1e-6, floor=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["classes", "multilabel", "regression"])
def test_results_are_float32_at_least(kind, dtype):
    result = ensemble(members(torch.randn(3, 4, 5).to(dtype)), X, kinds=kind)
    assert {value.dtype for value in vars(result).values()} == {torch.promote_types(dtype, torch.float32)}


def test_nan_stays_in_its_place():
    for kind in ("multilabel", "regression"):
        values = torch.randn(3, 4, 5)
        expected = ensemble(members(values), X, kinds=kind)
        values[1, 2, 0] = torch.nan
        for name, value in vars(ensemble(members(values), X, kinds=kind)).items():
            assert value[2, 0].isnan()
            value[2, 0] = getattr(expected, name)[2, 0]
            assert_same_bits(value, getattr(expected, name))


def test_kinds_are_those_of_the_heads_by_name():
    output = {"lesion": torch.randn(5, 3), "findings": torch.randn(5, 4), "age": torch.randn(5, 1)}
    kinds = {"age": "regression", "findings": "multilabel"}
    for chunk in (None, 2):
        result = ensemble([Says(output), Says(output)], X[:5], kinds=kinds, chunk=chunk)
        assert list(result) == ["lesion", "findings", "age"]
        assert [type(one) for one in result.values()] == [Uncertainty, Uncertainty, RegressionUncertainty]
    assert (result["findings"].total.shape, result["lesion"].total.shape) == ((15, 4), (15,))  # what it says, three chunks
    assert_same_math(result["age"].mean[:5], output["age"])


@torch.no_grad()
def test_a_fused_network_with_a_value_beside_classes():
    net = fuse({n: timm.create_model("test_resnet") for n in "ab"}, {"age": 1, "lesion": 3}, dropout=0.3)
    inputs = {name: torch.randn(4, 3, 32, 32) for name in "ab"}
    with pytest.raises(ValueError, match=r"head 'age' gives one number for .* \(4, 1\), .*kinds=\{'age': \"regression\"\}"):
        mc_dropout(net, inputs, 3)
    result = mc_dropout(net, inputs, 3, kinds={"age": "regression"})
    assert (result["age"].mean.shape, result["lesion"].probs.shape) == ((4, 1), (4, 3))
    assert result["age"].variance.min() > 0


# Picking -----------------------------------------------------------------------------------------------------------------


A, B = torch.randn(2, 5, 3), torch.randn(2, 5, 4)
HIDDEN = [torch.randn(5, 2, 7)]
OUTPUTS = {
    "tuple": (lambda a, b: (a, b, HIDDEN), 0, 1),
    "list": (lambda a, b: [a, b, HIDDEN], 0, 1),
    "from behind": (lambda a, b: (HIDDEN, b, a), -1, -2),
    "dict": (lambda a, b: {"one": a, "two": b, "hidden": HIDDEN}, "one", "two"),
    "integers": (lambda a, b: {7: a, 8: b, "hidden": HIDDEN}, 7, 8),
    "named tuple": (lambda a, b: Pair(a, b), "logits", "hidden"),
    "named tuple by index": (lambda a, b: Pair(a, b), 0, 1),
    "dataclass": (lambda a, b: Plain(a, b, HIDDEN), "logits", "hidden"),
    "Hugging Face": (lambda a, b: LikeHuggingFace(HIDDEN, a, b), "logits", "hidden"),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_heads_are_picked_from_outputs_of_every_kind(kind):
    out, one, two = OUTPUTS[kind]
    models = [Says(out(a, b)) for a, b in zip(A, B, strict=True)]
    first, second = ensemble(members(A), X), ensemble(members(B), X)
    assert_same_result(ensemble(models, X, heads=one), first)
    assert_same_result(ensemble(models, X, heads=two), second)
    both = ensemble(models, X, heads=[two, one])
    assert list(both) == [two, one]
    assert_same_result(both[one], first)
    assert_same_result(both[two], second)
    if kind not in ("named tuple", "named tuple by index"):
        with pytest.raises(TypeError, match=r"expected one floating-point tensor .* got list: .*heads= picks them"):
            ensemble(models, X)


@pytest.mark.parametrize("out", [lambda a: Plain(a), lambda a: LikeHuggingFace(logits=a), lambda a: {"logits": a}])
def test_what_is_none_in_a_dataclass_is_no_head(out):
    result = ensemble([Says(out(a)) for a in A], X)
    assert list(result) == ["logits"]
    assert_same_result(result["logits"], ensemble(members(A), X))


def test_a_callable_picks_logits_or_several():
    models = [Says({"deep": {"logits": a.mT, "other": b}}) for a, b in zip(A, B, strict=True)]
    result = ensemble(models, X, heads=lambda output: output["deep"]["logits"].mT)
    assert_same_result(result, ensemble(members(A), X))
    both = ensemble(models, X, heads=lambda output: {"z": output["deep"]["other"]})
    assert_same_result(both["z"], ensemble(members(B), X))


def test_a_head_that_is_picked_by_name_has_its_kind_by_name_too():
    models = [Says({"age": a, "hidden": HIDDEN}) for a in A]
    for kinds in ("regression", {"age": "regression"}):
        assert_same_math(ensemble(models, X, heads="age", kinds=kinds).mean, A.mean(0))


BAD = {
    "no name": ({"heads": "two"}, ValueError, r"member 0, found no head 'two': the output holds \['one', 'hidden'\]"),
    "no index": ({"heads": 3}, ValueError, r"found no head 3: the output holds \['one', 'hidden'\]"),
    "a flag": ({"heads": True}, TypeError, r"heads as a name, an index, a list of these or a callable, got True"),
    "a number": ({"heads": 1.5}, TypeError, "heads as a name, .* got 1.5"),
    "a list of others": ({"heads": [None]}, TypeError, r"heads as a name, .* got \[None\]"),
    "none": ({"heads": []}, ValueError, r"heads as a list with each head once, got \[\]"),
    "twice": ({"heads": ["one", "one"]}, ValueError, "with each head once"),
    "kind": ({"heads": "one", "kinds": "binary"}, ValueError, r"each of kinds to be one of \('classes', .* got 'binary'"),
    "kinds": ({"heads": "one", "kinds": 3}, TypeError, r"kinds as one of \('classes', .*, or a dict of them by name, got 3"),
    "of others": ({"heads": ["one"], "kinds": {"two": "regression"}}, ValueError, r"kinds for \['two'\], but .* \['one'\]"),
    "of no name": (
        {"heads": lambda output: output["one"], "kinds": {"one": "regression"}},
        ValueError,
        r"kinds for \['one'\], but the model gives one head without a name",
    ),
    "of another": ({"heads": "one", "kinds": {"two": "regression"}}, ValueError, r"kinds for \['two'\], but .* \['one'\]"),
    "a list": ({"heads": "hidden"}, TypeError, "got list"),
}


@pytest.mark.parametrize("what", BAD)
def test_mistakes_are_named(what):
    options, error, message = BAD[what]
    with pytest.raises(error, match=message):
        ensemble([Says({"one": a, "hidden": HIDDEN}) for a in A], X, **options)


def test_an_index_of_one_tensor_is_refused():
    with pytest.raises(ValueError, match="found no head 0: the output is a Tensor"):
        ensemble(members(A), X, heads=0)


# Keyword arguments -------------------------------------------------------------------------------------------------------


class Bag(nn.Module):
    """A network whose inputs are keyword arguments."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.25)), nn.Linear(8, 2)

    def forward(self, features, *, scale=1.0):
        return self.head(self.body(features)) * scale


@pytest.mark.parametrize("chunk", [None, 2])
def test_keyword_arguments_come_beside_inputs_or_alone(chunk):
    model, scale = Bag(), torch.rand(5, 1)
    one = mc_dropout(model, kwargs={"features": X, "scale": scale}, passes=4, generator=seeded(), chunk=chunk)
    two = mc_dropout(model, X, 4, kwargs={"scale": scale}, generator=seeded(), chunk=chunk)
    assert_same_result(one, two)
    assert not torch.equal(one.probs, mc_dropout(model, X, 4, generator=seeded(), chunk=chunk).probs)


class Unsigned:
    """A forward as torch.jit.trace makes it."""

    def __call__(self, *_):
        raise RuntimeError("the network's own")

    @property
    def __signature__(self):
        raise ValueError("no signature found")


def test_a_dict_of_keywords_that_is_given_as_one_argument_is_told_so():
    message = r"mc_dropout gave the model one dict with \['features'\] .* and got TypeError: .* kwargs=\{\.\.\.\}"
    with pytest.raises(TypeError, match=message):
        mc_dropout(Bag(), {"features": X}, 3)
    with pytest.raises(TypeError, match=r"^linear\(\)"):  # not of parameters' names: the network's own error
        mc_dropout(Bag(), {"other": X}, 3)
    traced = Bag()
    traced.forward = Unsigned()
    with pytest.raises(RuntimeError, match="the network's own"):
        mc_dropout(traced, {"features": X}, 3)
    with pytest.raises(TypeError, match=r"mc_dropout expected kwargs as a dict \{parameter: value\}, got Tensor"):
        mc_dropout(Bag(), kwargs=X)
    with pytest.raises(TypeError, match=r"expected inputs as a tensor, .* or kwargs, got \(\)"):
        mc_dropout(Bag())
