"""Passes are added up one by one, and members are taken one by one: nothing is kept that nothing asks for."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from drifa_attn import add_dropout, ensemble, mc_dropout
from tests._compare import assert_close_rel, assert_same_bits
from tests._uncertainty import FIELDS, X, assert_same_result, members, net, seeded
from tests.networks import built

KINDS = pytest.mark.parametrize("kind", ["classes", "multilabel", "regression"])


class Fresh(nn.Module):
    """A network that gives a new tensor a pass, and counts how many of those before are alive then."""

    def __init__(self):
        super().__init__()
        self.drop, self.given, self.alive = nn.Dropout(0.5), [], []

    def forward(self, x):
        self.alive.append(sum(given() is not None for given in self.given))
        output = self.drop(x)
        self.given.append(weakref.ref(output))
        return output


@KINDS
@pytest.mark.parametrize("chunk", [None, 2])
def test_no_output_lives_until_the_next_pass(kind, chunk):
    model = Fresh()
    mc_dropout(model, X, 10, kinds=kind, chunk=chunk)
    assert model.alive == [0] * 10 * (3 if chunk else 1)
    ensemble([model, Fresh()], X, 4, kinds=kind, heads=lambda output: {"a": output, "b": output})
    assert set(model.alive) == {0}


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-3])
@pytest.mark.parametrize("passes", [2, 30])
def test_small_disagreement_keeps_its_digits(spread, passes):
    """Against the definition, of all passes at once: the mean divergence from the mean, in float64."""
    logits = torch.randn(1, 50, 7) + spread * torch.randn(passes, 50, 7)
    log_p = logits.double().log_softmax(2)
    mean = log_p.exp().mean(0)
    expected = (log_p.exp() * (log_p - mean.log())).sum(2).mean(0)
    found = ensemble(members(logits), X).epistemic
    assert found.dtype is torch.float32
    assert_close_rel(found, expected, 1e-6)
    assert ((found - expected).abs() / expected).max() < 1e-4
    double = ensemble(members(logits.double()), X).epistemic
    assert (double - expected).abs().max() < 1e-14


# Members from an iterable ------------------------------------------------------------------------------------------------


def plain(seed):
    torch.manual_seed(seed)
    return net()


def carrying(seed):
    """A network that refers to itself, as the modules do that carry a step."""
    torch.manual_seed(seed)
    return add_dropout(copy.deepcopy(built("resnet")[0]), 0.3)


@pytest.mark.parametrize("passes", [None, 2])
@pytest.mark.parametrize("build", [plain, carrying])
def test_one_member_of_a_generator_is_alive_at_a_time(build, passes):
    seen, alive = [], []

    def built_one(seed):
        alive.append(sum(member() is not None for member in seen))
        model = build(seed)
        seen.extend(weakref.ref(module) for module in model.modules())
        return model

    x = X if build is plain else built("resnet")[1]
    gc.disable()  # or luck would help
    try:
        result = ensemble((built_one(seed) for seed in range(3)), x, passes, generator=seeded(), chunk=2)
    finally:
        gc.enable()
    assert alive == [0, 0, 0]
    again = ensemble([build(seed) for seed in range(3)], x, passes, generator=seeded(), chunk=2)
    assert_same_result(result, again)  # whatever was drawn while they were built


def test_what_makes_the_members_draws_and_trains_as_ever():
    """The passes' generator and the passes' modes are none of its business."""
    torch.manual_seed(0)
    expected = [torch.rand(2) for _ in range(3)]

    def trained():
        for number in range(3):
            assert torch.is_grad_enabled()
            drawn.append(torch.rand(2))
            layer = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5))
            nn.init.constant_(layer[0].weight, number)
            layer(X).sum().backward()
            torch.manual_seed(0)
            [torch.rand(2) for _ in range(number + 1)]
            yield layer

    drawn = []
    torch.manual_seed(0)
    ensemble(trained(), X, 3, generator=seeded())
    for one, other in zip(drawn, expected, strict=True):
        assert_same_bits(one, other)


def test_the_stream_of_a_generator_goes_on_from_member_to_member():
    """Else two equal members would drop the same."""
    model = net()
    result = ensemble([model, copy.deepcopy(model)], X, 1, generator=seeded())
    assert result.variance.max() > 1e-3


def test_members_of_an_iterable_are_checked_when_their_turn_comes():
    one, two = net(), net()
    with pytest.raises(ValueError, match="one network as members 0 and 2"):
        ensemble(iter([one, two, one]), X)
    with pytest.raises(TypeError, match=r"ensemble, member 1, expected an nn\.Module, got str"):
        ensemble(iter([one, "two"]), X)
    for few in ([], [one]):
        with pytest.raises(ValueError, match=f"ensemble expected at least 2 passes in all, got {len(few)}"):
            ensemble(iter(few), X)
    assert_same_result(ensemble(iter([one, two]), X), ensemble([one, two], X))
    ensemble(iter([one]), X, 2)


def test_a_list_is_checked_before_the_first_pass():
    one, two = net(), net()
    one.register_forward_pre_hook(lambda *_: pytest.fail("ran"))
    for models in ([one, two, one], [one, "two"], [one]):
        with pytest.raises((TypeError, ValueError), match="ensemble"):
            ensemble(models, X)


@pytest.mark.parametrize("chunk", [None, 2])
def test_chunks_run_within_each_member(chunk):
    ran = []
    models = [net() for _ in range(3)]
    for number, model in enumerate(models):
        model.register_forward_pre_hook(lambda _, args, number=number: ran.append((number, len(args[0]))))
    result = ensemble(models, X, chunk=chunk)
    assert ran == [(number, size) for number in range(3) for size in ([2, 2, 1] if chunk else [5])]
    assert [len(getattr(result, name)) for name in FIELDS] == [5] * 5
