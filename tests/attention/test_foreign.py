"""Any attention as a layer of this library: `Foreign`."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck

from drifa_attn.attention import Foreign, Spec, build, cost
from drifa_attn.attention.foreign import as_map, blended
from drifa_attn.layout import Place
from tests import strategies
from tests._compare import assert_same_bits, assert_same_math

NAMES = ["se", "ese", "eca", "ceca", "gc", "gca", "cbam", "lcbam", "nl"]


class Halved(nn.Module):
    """Half the features, and one number to train."""

    def __init__(self, channels, factor=0.5):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x):
        return x * self.factor


class Shifted(nn.Module):
    def __init__(self, channels):
        super().__init__()

    def forward(self, x):
        return x + 1


class Strided(nn.Module):
    def __init__(self, channels):
        super().__init__()

    def forward(self, x):
        return x[..., ::2]


def own(factory, **options):
    return Spec(f"tests:{factory.__name__}", options, factory)


def layer(name="se", channels=16, *, strength=0.0, **options):
    torch.manual_seed(0)
    spec = name if isinstance(name, Spec) else Spec(name)
    foreign = Foreign(channels, spec, **options).eval()
    nn.init.constant_(foreign.strength, strength)
    return foreign


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_the_start_changes_no_bit(name, dtype, device):
    x = torch.randn(3, 16, 6, 5, device=device).to(dtype)
    x[0, :, ::2] = -0.0
    x[0, :, 1::2] = 0.0
    foreign = layer(name, device=device, dtype=dtype)
    assert_same_bits(foreign(x), x)
    x[1, 2, 3] = torch.inf
    x[2, 3, 1] = torch.nan
    assert_same_bits(foreign(x), x)


@given(strategies.features(dtype=torch.float32, channels=17), st.sampled_from(["se", "eca", "cbam"]))
def test_any_layout_is_read_as_a_map(features, name):
    """Prefix tokens pass, strides and shape stay, and a layout only says where the channels are."""
    foreign = layer(name, 17, strength=0.5, **features.options)
    y = foreign(features.x)
    assert (y.shape, y.dtype) == (features.x.shape, features.x.dtype)
    if features.num_prefix_tokens:
        assert_same_bits(y[:, : features.num_prefix_tokens], features.x[:, : features.num_prefix_tokens])
    x = features.positions()
    first = layer(name, 17, strength=0.5)
    if features.layout == "b c ..." or x.ndim == 4 or name != "cbam":  # tokens may become another map
        assert_same_math(features.positions(y), first(x.contiguous()))


@pytest.mark.parametrize(
    ("shape", "layout", "expected"),
    [
        ((2, 8), "b c ...", (2, 8, 1, 1)),
        ((2, 8, 6), "b c ...", (2, 8, 6, 1)),
        ((2, 8, 3, 4), "b c ...", (2, 8, 3, 4)),
        ((2, 8, 5, 3, 4), "b c ...", (2, 8, 15, 4)),
        ((2, 3, 4, 8), "b ... c", (2, 8, 3, 4)),
        ((2, 9, 8), "b ... c", (2, 8, 3, 3)),
        ((2, 10, 8), "b ... c", (2, 8, 10, 1)),
        ((2, 8), "b ... c", (2, 8, 1, 1)),
    ],
)
def test_the_map_that_an_attention_reads(shape, layout, expected):
    assert as_map(torch.randn(shape), layout).shape == expected


def test_tokens_become_rows_of_the_picture():
    x = torch.arange(9.0).reshape(1, 9, 1)
    assert as_map(x, "b ... c")[0, 0].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_the_equation_and_its_gradients(device):
    x, refined = (torch.randn(2, 3, 4, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    strength = torch.rand(3, 1, dtype=torch.float64, device=device, requires_grad=True)
    assert_same_math(blended(x, refined, strength), x + strength * (refined - x))
    assert gradcheck(blended, (x, refined, strength))
    zero = torch.zeros(3, 1, dtype=torch.float64, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(blended(x, refined, zero).sum(), zero)
    assert_same_math(gradient, (refined - x).sum((0, 2)).reshape(3, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_the_same_bits(dtype, device):
    """In less time. A strength of zero keeps every x, also where the attention makes it infinite or no number."""
    odd = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-30, 3.0, -2.0])
    x, refined = (torch.cartesian_prod(odd, odd).mT.to(device, dtype)[:, None] for _ in range(2))
    refined = refined.flip(0)
    for strength in (torch.tensor([[0.0]]), torch.tensor([[0.5]]), torch.tensor([[-0.0]])):
        found = blended(x, refined, strength.to(device).requires_grad_())
        with torch.no_grad():
            assert_same_bits(blended(x, refined, strength.to(device)), found.detach())
        assert found.dtype == dtype
        if not strength.any():
            assert_same_bits(found.detach(), x)


def test_at_the_start_only_the_strength_is_trained(device):
    foreign, x = layer("se", device=device).train(), torch.randn(4, 16, 3, 3, device=device)
    foreign(x).square().sum().backward()
    assert {name for name, p in foreign.named_parameters() if p.grad.abs().max() > 0} == {"strength"}
    assert foreign.is_start()
    torch.optim.SGD(foreign.parameters(), lr=0.1).step()
    assert not foreign.is_start()
    foreign(x).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in foreign.parameters())


@pytest.mark.parametrize("name", ["se", "ese", "eca", "ceca", "gc"])
def test_gates_are_what_multiplies_the_channels(name, device):
    foreign, x = layer(name, strength=0.25, device=device), torch.randn(3, 16, 4, 4, device=device)
    gates = foreign.gates(x)
    assert ((gates > 0) & (gates < 1)).all()
    assert_same_math(foreign.refined(x), x * gates[..., None, None])
    assert_same_math(foreign.gains(x), 1 + 0.25 * (gates - 1))
    assert_same_math(foreign(x), x * foreign.gains(x)[..., None, None])


def test_gates_over_positions_are_their_mean(device):
    foreign, x = layer("cbam", strength=1.0, device=device), torch.randn(3, 16, 4, 4, device=device)
    ratio = foreign.refined(x) / x
    gates = foreign.gates(x)
    assert (gates >= ratio.amin((2, 3)) - 1e-5).all()
    assert (gates <= ratio.amax((2, 3)) + 1e-5).all()


def test_what_does_not_multiply_has_no_gates():
    x = torch.randn(3, 16, 4, 4)
    with pytest.raises(ValueError, match="'tests:Shifted' has no gates: it does not multiply"):
        layer(own(Shifted)).gates(x)
    twice = layer(own(Halved, factor=2.0), strength=0.5)
    with pytest.raises(ValueError, match="'tests:Halved' has no gates: it multiplies features by up to 2"):
        twice.gates(x)
    assert_same_math(twice.gains(x), torch.full((3, 16), 1.5))
    assert_same_bits(layer("se").gates(torch.zeros(2, 16, 3, 3)), torch.ones(2, 16))


def test_a_layer_can_be_copied_and_described():
    foreign = layer(own(Halved, factor=0.25), strength=0.5, layout="b ... c", num_prefix_tokens=1)
    x = torch.randn(2, 5, 16)
    for twin in (copy.deepcopy(foreign), pickle.loads(pickle.dumps(foreign))):
        assert_same_bits(twin(x), foreign(x))
    assert foreign.spec() == Spec("tests:Halved", {"factor": 0.25})
    assert 'attention="tests:Halved", layout="b ... c", num_prefix_tokens=1' in repr(foreign)
    foreign.enabled = False
    assert foreign(x) is x


@pytest.mark.parametrize("name", NAMES)
def test_cost_is_what_is_built(name):
    place = Place(channels=16, layout="b c ...", num_prefix_tokens=0, shape=(16, 6, 5))
    params, flops = cost(Spec(name), place)
    assert params == sum(p.numel() for p in build(Spec(name), place).parameters())
    assert flops >= 0


def test_what_cannot_be_used_says_why():
    place = Place(channels=16, layout="b c ...", num_prefix_tokens=0, shape=(16, 5, 5))
    with pytest.raises(ValueError, match=r"'tests:Strided' does not work for features \(16, 5, 5\).*must keep the shape"):
        cost(own(Strided), place)
    with pytest.raises(ValueError, match="'se' does not work for 16 channels with attention_options={'width': 3}: TypeError"):
        build(Spec("se", {"width": 3}), place)
    with pytest.raises(ValueError, match="'tests:Halved' is a callable of yours: pass it again"):
        build(Spec("tests:Halved"), place)
    with pytest.raises(TypeError, match="'f' to give an nn.Module, got int"):
        build(Spec("f", {}, lambda channels: channels), place)
    with pytest.raises(ValueError, match="Foreign expected x"):
        layer("se")(torch.randn(2, 15, 3, 3))
