"""`wrap(model, attention=...)`: any attention at the sites that `wrap` finds."""

import copy

import pytest
import timm
import torch
from torch import nn

import drifa_attn
from drifa_attn import MFA, gains, gates, load_attention, plan, save_attention, unwrap, wrap
from drifa_attn.attention import Foreign
from drifa_attn.wrapping.inject import placed
from tests._compare import assert_same_bits, assert_same_math
from tests._wrapping import EVERY, refused, registered
from tests.networks import built

NAMES = ["se", "ese", "eca", "cbam", "gc", "gca", "lcbam", "nl"]


class Scaled(nn.Module):
    def __init__(self, channels, start=0.5):
        super().__init__()
        self.factor = nn.Parameter(torch.full((channels, 1, 1), start))

    def forward(self, x):
        return x * self.factor


def network():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=4).eval()


def moved(model):
    for _, attention in placed(model):
        nn.init.constant_(attention.strength, 0.5)
    return model


@pytest.fixture
def x():
    return torch.randn(2, 3, 32, 32)


@EVERY
@torch.no_grad()
def test_any_network_takes_another_attention_without_a_change(name):
    model, x = built(name)
    expected, before = model(x), registered(model)
    wrap(model, attention="cbam", example_input=x)
    assert all(type(attention) is Foreign for _, attention in placed(model))
    assert_same_bits(model(x), expected)
    assert not torch.equal(moved(model)(x), expected)
    assert set(gates(model, x)) == {site.name for site, _ in placed(model)}
    with drifa_attn.disabled(model):
        assert_same_bits(model(x), expected)
    unwrap(model)
    assert registered(model) == before
    assert_same_bits(model(x), expected)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_attention_of_timm_that_keeps_the_shape(name, x):
    model = network()
    expected, chosen = model(x), plan(model, attention=name, example_input=x)
    wrap(model, attention=name)
    assert_same_bits(model(x), expected)
    assert f"attention={name}()" in str(chosen)
    added = drifa_attn.attention_parameters(model)
    assert sum(site.params for site in chosen.sites) == sum(p.numel() for p in added)
    assert all(attention.spec() == chosen.spec for _, attention in placed(model))


@pytest.mark.parametrize("given", ["name", "class", "function"])
@torch.no_grad()
def test_files_keep_the_name_and_the_options(given, x, tmp_path):
    def scaled(channels, **options):
        return Scaled(channels, **options)

    attention = {"name": "se", "class": Scaled, "function": scaled}[given]
    options = {"rd_ratio": 0.25} if given == "name" else {"start": 0.25}
    model = moved(wrap(network(), attention=attention, attention_options=options))
    path = tmp_path / "attention.safetensors"
    save_attention(model, path)
    again = {} if given == "name" else {"attention": attention}
    assert_same_bits(load_attention(network(), path, **again)(x), model(x))
    if given == "name":
        with refused(model := network(), x, ValueError, "the attention 'se', which needs no callable: leave attention= out"):
            load_attention(model, path, attention=Scaled)
    else:
        with refused(model := network(), x, ValueError, "caled' is a callable of yours: pass it again"):
            load_attention(model, path)


@torch.no_grad()
def test_gates_and_gains_of_another_attention(x):
    model = moved(wrap(network(), attention="eca"))
    for name, gate in gates(model, x).items():
        assert_same_math(gains(model, x)[name], 1 + 0.5 * (gate - 1))
    with pytest.raises(ValueError, match="'gca' has no gates"):
        gates(wrap(network(), attention="gca"), x)


@torch.no_grad()
def test_attention_within_another_attention_is_its_own_affair(x):
    """One verb reaches a site once, also where the callable makes a layer of this library."""
    model = wrap(network(), attention=MFA)
    with drifa_attn.disabled(model):
        assert all(not attention.enabled and attention.module.enabled for _, attention in placed(model))
    assert len(gates(model, x)) == 5
    assert len(drifa_attn.attention_parameters(model)) == len({id(p) for _, a in placed(model) for p in a.parameters()})


def test_compiled_and_copied(x):
    torch._dynamo.reset()
    model = moved(wrap(network(), attention="se"))
    with torch.no_grad():
        expected = model(x)
        assert_same_bits(copy.deepcopy(model)(x), expected)
        assert_same_math(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
        assert_same_math(torch.export.export(model, (x,), strict=False).module()(x), expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attention": "sea"}, ValueError, 'attention expected "mfa", a name that timm.layers.get_attn knows'),
        ({"attention": 3}, TypeError, "attention expected a name or a callable"),
        (
            {"attention": "se", "reduction": 8},
            ValueError,
            "reduction and init are of attention='mfa'; 'se' takes attention_options",
        ),
        ({"attention": "se", "init": "paper"}, ValueError, "reduction and init are of attention='mfa'"),
        ({"attention": "se", "variant": "paper"}, ValueError, "sets at, attention, reduction and init itself"),
        ({"attention_options": {"rd_ratio": 1}}, ValueError, "attention='mfa' takes reduction and init, not attention_options"),
        (
            {"attention": "se", "attention_options": {"ratio": 1}},
            ValueError,
            "'se' does not work for [0-9]+ channels.*TypeError",
        ),
        ({"attention": "halo"}, ValueError, "'halo' does not work for"),
        ({"attention": lambda channels: nn.Conv2d(channels, 3, 1)}, ValueError, "must keep the shape of its features"),
        ({"attention": lambda channels: None}, TypeError, "to give an nn.Module, got NoneType"),
    ],
)
def test_what_cannot_be_put_there_is_refused(options, error, message, x):
    with refused(model := network(), x, error, message):
        wrap(model, **options)
