"""What every layer that refines features has: the switch, the gates, the spec; building it from a spec, and its cost."""

import copy
import dataclasses
import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drifa_attn import MFA, MIFA, ops
from drifa_attn.attention import ATTENTIONS, Refines, Spec, build, cost
from drifa_attn.layout import Place
from drifa_attn.network.trace import FlopCount
from tests import strategies
from tests._compare import assert_same_bits, assert_same_math
from tests.cases import CASES, listed

NAMES = ["mfa", "mfa-reduced-identity", "mfa-tokens", "mifa", "mifa-three-masked"]
EVERY = pytest.mark.parametrize("name", NAMES)
SPECS = st.builds(
    lambda reduction, init: Spec("mfa", {"reduction": reduction, "init": init}),
    st.sampled_from([None, 1, 2, 16]),
    strategies.INITS,
)


def place_of(features):
    """The place of drawn features."""
    shape = tuple(features.x.shape[1:])
    return Place(channels=features.channels, shape=shape, **features.options)


@EVERY
def test_disabled_layers_pass_features_on_untouched(name):
    """The same tensors, in a new list for MIFA."""
    module, args = CASES[name].module(), CASES[name].args()
    module.enabled = False
    ys = module(*args)
    assert isinstance(ys, list) == isinstance(args[0], list)
    assert ys is not args[0] or not isinstance(ys, list)
    assert all(y is x for y, x in zip(listed(ys), listed(args[0]), strict=True))
    module.enabled = True
    assert all(not torch.equal(y, x) for y, x in zip(listed(module(*args)), listed(args[0]), strict=True))


def test_the_switch_is_an_attribute_that_copies_keep_and_state_dicts_do_not():
    mfa = MFA(8)
    assert (MFA.enabled, mfa.enabled, "enabled" in vars(mfa)) == (True, True, False)
    mfa.enabled = False
    assert (MFA.enabled, MFA(8).enabled) == (True, True)
    assert not any(twin.enabled for twin in (copy.deepcopy(mfa), pickle.loads(pickle.dumps(mfa))))
    assert set(mfa.state_dict()) == set(MFA(8).state_dict())


@pytest.mark.parametrize("name", ["mfa", "mifa-three-masked"])
@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_a_compiled_layer_sees_the_switch(name, mode):
    torch._dynamo.reset()
    module, args = CASES[name].module(), CASES[name].args()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with ops.use(mode), torch.no_grad():
        expected = listed(module(*args))
        for enabled in (True, False, True):
            module.enabled = enabled
            for y, x, e in zip(listed(compiled(*args)), listed(args[0]), expected, strict=True):
                assert_same_math(y, e if enabled else x)


@EVERY
def test_gates_do_not_depend_on_the_switch(name):
    module, args = CASES[name].module(), CASES[name].args()
    gates = listed(module.gates(*args))
    module.enabled = False
    for gate, again, x in zip(gates, listed(module.gates(*args)), listed(args[0]), strict=True):
        assert gate.shape[0] == len(x)
        assert ((gate >= 0) & (gate <= 1)).all()
        assert_same_bits(again, gate)


@given(strategies.features(dtype=torch.float32), SPECS)
def test_a_spec_builds_the_layer_again(features, spec):
    place = place_of(features)
    layer = build(spec, place)
    assert layer.spec() == spec == Spec(**json.loads(json.dumps(dataclasses.asdict(spec))))
    twin = build(layer.spec(), place, device="meta", dtype=torch.float64)
    assert repr(twin) == repr(layer)
    assert {(p.device.type, p.dtype) for p in twin.parameters()} == {("meta", torch.float64)}
    assert layer(features.x).shape == features.x.shape


@pytest.mark.parametrize("options", [{}, {"dim": 5}, {"reduction": 2}, {"init": "identity"}])
@pytest.mark.parametrize("channels", [8, (8, 3)])
def test_the_spec_of_mifa_builds_it_again(channels, options):
    mifa = MIFA(channels, **options)
    twin = MIFA(channels, **mifa.spec().options)
    assert mifa.spec().name == "mifa"
    assert {k: v.shape for k, v in twin.state_dict().items()} == {k: v.shape for k, v in mifa.state_dict().items()}
    assert (twin.spec(), twin.init) == (mifa.spec(), mifa.init)


@given(strategies.features(batch=1, dtype=torch.float32), SPECS)
def test_cost_is_what_counting_gives(features, spec):
    place = place_of(features)
    layer = build(spec, place, device="meta")
    with torch.no_grad(), FlopCount() as counter:
        layer(features.x.to("meta"))
    assert cost(spec, place) == (sum(p.numel() for p in layer.parameters()), counter.total)


def test_cost_builds_nothing(monkeypatch):
    monkeypatch.setattr(MFA, "__init__", None)
    assert cost(Spec("mfa"), Place(channels=2, layout="b c ...", num_prefix_tokens=0, shape=(2, 3))) == (
        51,
        2 * (5 * 3 + 3) * 4,
    )


def test_unknown_attentions_and_options_are_named():
    place = Place(channels=8, layout="b c ...", num_prefix_tokens=0, shape=(8, 2, 2))
    for ask in (build, cost):
        with pytest.raises(ValueError, match="attention expected \"mfa\", a name that timm.* got 'mifa'"):
            ask(Spec("mifa"), place)
        with pytest.raises(TypeError, match="rate"):
            ask(Spec("mfa", {"rate": 2}), place)
        with pytest.raises(ValueError, match="reduction to be an integer >= 1, got 0"):
            ask(Spec("mfa", {"reduction": 0}), place)
        with pytest.raises(ValueError, match='init "paper" or "identity", got \'zero\''):
            ask(Spec("mfa", {"init": "zero"}), place)
    assert ATTENTIONS == {"mfa": MFA}


def test_layers_that_define_neither_say_so():
    class Own(Refines, torch.nn.Module):
        pass

    assert Own().enabled
    with pytest.raises(NotImplementedError, match="Own has no gates"):
        Own().gates()
    with pytest.raises(NotImplementedError, match="Own has no spec"):
        Own().spec()


def test_of_the_papers_layers_mfa_and_mifa_refine(case):
    assert isinstance(case.module(), Refines) == isinstance(case.module(), MFA | MIFA)
