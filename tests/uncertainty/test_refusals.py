"""Every mistake with `mc_dropout` and `ensemble` is named, with what to do."""

import pytest
import torch

from drifa_attn import ensemble, mc_dropout
from tests._uncertainty import Heads, Says, X, members, net

BAD = {
    "one sample": (lambda: mc_dropout(net(), X, 1), ValueError, r"mc_dropout expected at least 2 passes in all, got 1"),
    "no sample": (lambda: mc_dropout(net(), X, 0), ValueError, r"mc_dropout expected passes to be an integer >= 1, got 0"),
    "half": (lambda: mc_dropout(net(), X, 2.5), ValueError, r"mc_dropout expected passes to be an integer >= 1, got 2\.5"),
    "no member": (lambda: ensemble([], X), ValueError, r"ensemble expected at least 2 passes in all, got 0"),
    "one member": (lambda: ensemble([net()], X), ValueError, r"ensemble expected at least 2 passes in all, got 1"),
    "one pass": (lambda: ensemble([net()], X, passes=1), ValueError, r"ensemble expected at least 2 passes in all, got 1"),
    "ensemble of none": (
        lambda: ensemble([net()], X, 0),
        ValueError,
        r"ensemble expected passes to be an integer >= 1, got 0",
    ),
    "a model": (lambda: ensemble(net(), X), TypeError, r"expected a list of members, got one Sequential: .* mc_dropout"),
    "a name": (lambda: mc_dropout("resnet", X), TypeError, r"mc_dropout expected an nn\.Module, got str"),
    "names": (lambda: ensemble({"a": net(), "b": net()}, X), TypeError, r"member 0, expected an nn\.Module, got str"),
    "twice": (lambda: ensemble([(m := net()), net(), m], X), ValueError, r"one network as members 0 and 2"),
    "seed": (lambda: mc_dropout(net(), X, generator=0), TypeError, r"expected a torch\.Generator, got 0: torch\.Generator\(\)"),
    "inputs": (lambda: mc_dropout(net(), 3), TypeError, r"mc_dropout expected inputs as a tensor, .*, got 3\."),
    "chunk": (lambda: mc_dropout(net(), X, chunk=0), ValueError, r"mc_dropout expected chunk to be an integer >= 1, got 0"),
    "sizes": (
        lambda: mc_dropout(Heads(max), (X, X[:2]), chunk=2),
        ValueError,
        r"inputs of one batch size to take in chunks, got \[2, 5\]: leave chunk out",
    ),
    "single logit": (
        lambda: ensemble(members(torch.randn(2, 5, 1)), X),
        ValueError,
        r"member 0, gives one number for a sample, \(5, 1\), .*kinds=\"regression\" for a value, or \"multilabel\"",
    ),
    "vector": (
        lambda: ensemble(members(torch.randn(2, 5)), X),
        ValueError,
        r"member 0, gives one number for a sample, \(5,\), .*kinds=\"regression\"",
    ),
    "no class": (lambda: ensemble(members(torch.randn(2, 5, 0)), X), ValueError, r"k >= 2, got \(5, 0\)"),
    "single map": (lambda: ensemble(members(torch.randn(2, 5, 1, 4)), X), ValueError, r"one number .*, \(5, 1, 4\), .*kinds="),
    "number": (lambda: ensemble(members(torch.randn(2)), X), ValueError, r"expected classes \(b k …\) .*, got \(\)"),
    "classes": (lambda: ensemble(members(torch.ones(2, 5, 3).long()), X), TypeError, r"floating-point .*, got torch\.int64"),
    "text": (lambda: ensemble([Says("a"), Says("b")], X), TypeError, r"floating-point tensor \(b k …\) .* got str: .*heads="),
    "nothing": (lambda: ensemble([Says({}), Says({})], X), ValueError, r"expected logits from the model, got none: \{\}"),
    "head": (
        lambda: ensemble([Says({"a": torch.randn(5)}), Says({"a": torch.randn(5)})], X),
        ValueError,
        r"ensemble, member 0, head 'a' gives one number .*kinds=\{'a': \"regression\"\}",
    ),
    "unlike": (
        lambda: ensemble([Says(torch.randn(5, 3)), Says(torch.randn(5, 3)), Says(torch.randn(5, 4))], X),
        ValueError,
        r"ensemble, member 2, gives logits \(5, 4\), but the first pass gave \(5, 3\)",
    ),
    "unlike heads": (
        lambda: ensemble([Says({"a": torch.randn(5, 3)}), Says([torch.randn(5, 3)])], X),
        ValueError,
        r"member 1, gives logits \{0: \(5, 3\)\}, but the first pass gave \{'a': \(5, 3\)\}",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_mistakes_are_named(what):
    call, error, message = BAD[what]
    with pytest.raises(error, match=message):
        call()
