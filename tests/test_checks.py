"""Checks of arguments: what is taken, and that every refusal names who expected what, and what came."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

import drifa_attn
from drifa_attn import MFA, MIFA, RRA, TaskLoss, add_dropout, fuse, mc_dropout, save_attention, wrap
from drifa_attn.checks import count, number


def network():
    return timm.create_model("test_resnet", num_classes=3)


def test_numbers_of_numpy_are_numbers(tmp_path):
    """Results of NumPy go where Python's go, files included."""
    eight, x = np.int64(8), torch.randn(2, 8, 3)
    assert MFA(eight, reduction=np.int32(2))(x).shape == x.shape
    assert len(MIFA((eight, np.int16(8)))([x, x])) == 2
    assert MIFA(eight, np.int64(2)).channels == (8, 8)
    assert RRA(eight, np.uint8(8), eps=np.float32(1e-3), momentum=np.float64(0.1))(x[..., None]).shape == (2, 8, 3, 1)
    model = wrap(network(), reduction=np.int64(16))
    save_attention(model, tmp_path / "attention.safetensors")
    net = fuse({"a": network()}, {"t": np.array([0, 2]).max() + 1}, dropout=np.float32(0.5))
    assert net.heads["t"].out_features == 3
    dropping = add_dropout(network(), np.float32(0.25))
    assert mc_dropout(dropping, torch.randn(2, 3, 32, 32), np.int64(2), chunk=np.int64(1)).probs.shape == (2, 3)
    assert (count("a", "b", np.int8(3)), number("a", "b", np.float16(0.5), "", lambda x: True)) == (3, 0.5)
    assert type(count("a", "b", np.int8(3))) is int


@pytest.mark.parametrize("value", [0, -1, 1.0, "8", None, True, np.float64(8), np.bool_(True), [8]])
def test_what_is_no_count_is_named(value):
    with pytest.raises(ValueError, match=r"MFA expected channels to be an integer >= 1, got "):
        MFA(value)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: wrap(network(), layouts="b c ..."), TypeError, "wrap expected layouts as a dict"),
        (lambda: wrap(network(), at=int), TypeError, "at expected a string, a list of module names or a predicate, got <class"),
        (lambda: fuse({"a": network()}, {"t": 2}, dropout="0.1"), ValueError, "fuse expected dropout in .0, 1., got '0.1'"),
        (lambda: fuse({"a": network()}, {"t": 2}, modality_dropout={}), ValueError, "fuse expected modality_dropout in"),
        (lambda: fuse({"a": network()}, {"t": 2}, dropout=True), ValueError, "fuse expected dropout in"),
        (lambda: fuse({"a": network()}, {"t": 2}, at=None), TypeError, "fuse expected at .* got NoneType"),
        (lambda: fuse({"a": network()}, {"t": 2}, example_inputs=torch.zeros(2)), TypeError, "example_inputs as a dict"),
        (lambda: fuse({"a": network()}, {"t": 2}, classifiers="fc"), TypeError, "classifiers as a dict"),
        (lambda: RRA(8, 8, eps="a"), ValueError, "RRA expected eps > 0, got 'a'"),
        (lambda: RRA(8, 8, eps=float("nan")), ValueError, "RRA expected eps > 0, got nan"),
        (lambda: RRA(8, 8, momentum=2), ValueError, r"RRA expected momentum in \[0, 1\], got 2"),
        (lambda: MIFA(None), ValueError, "MIFA expected channels to be an integer >= 1, got None"),
        (lambda: add_dropout(network(), "0.1"), ValueError, r"add_dropout expected a probability p in \(0, 1\), got '0.1'"),
    ],
)
def test_arguments_of_another_kind_are_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("given", [None, "resnet18", nn.Linear])
@pytest.mark.parametrize(
    "verb",
    [
        drifa_attn.unwrap,
        drifa_attn.attention_parameters,
        drifa_attn.parameter_groups,
        drifa_attn.gates,
        drifa_attn.gains,
        drifa_attn.freeze_backbone,
        drifa_attn.remove_dropout,
        drifa_attn.wrap,
        lambda model: drifa_attn.calibrate(model, None),
        lambda model: save_attention(model, "never written"),
    ],
)
def test_what_is_no_network_is_refused_by_every_verb(verb, given):
    with pytest.raises(TypeError, match="expected an nn.Module, got "):
        verb(given)


@pytest.mark.parametrize("classifier", [[""], "", nn.Linear(2, 2), 3])
def test_what_is_no_classifier_is_refused(classifier, tmp_path):
    model = wrap(network())
    for call in (
        lambda: drifa_attn.freeze_backbone(model, classifier=classifier),
        lambda: drifa_attn.parameter_groups(model, classifier=classifier),
        lambda: save_attention(model, tmp_path / "file", classifier=classifier),
    ):
        with pytest.raises((TypeError, ValueError), match="classifier"):
            call()
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.randn(8, 4), torch.rand(8, 4), r"labels of task 't' .* probabilities that sum to one"),
        (torch.randn(8, 4), torch.zeros(8, 4).long(), r"or floating-point \(b, k\) = \(8, 4\), got torch.int64 \(8, 4\)"),
        (torch.randn(8, 4), torch.zeros(7).long(), r"as integer classes \(b,\) = \(8,\) or .*, got torch.int64 \(7,\)"),
        (torch.randn(8, 4), torch.zeros(8).bool(), "got torch.bool"),
        (torch.randn(8, 1), torch.rand(8), "k >= 2 of task 't' .classes., got torch.float32 .8, 1.: kinds="),
        (torch.zeros(8, 4).long(), torch.zeros(8).long(), "floating-point logits"),
        (torch.randn(8), torch.zeros(8).long(), "floating-point logits"),
    ],
)
def test_what_is_no_class_is_refused_and_not_counted_wrong(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        TaskLoss(["t"])({"t": logits}, {"t": labels})
    with pytest.raises(TypeError, match="labels of task 't' as a tensor, got list"):
        TaskLoss(["t"])({"t": logits}, {"t": [1]})
