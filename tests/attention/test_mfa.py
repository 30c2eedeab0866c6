"""MFA, HIFA and CLIA (Fig. 2)."""

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

import drifa_attn
from drifa_attn import CLIA, HIFA, MFA, functional, ops
from drifa_attn.attention.mfa import pair, statistics
from drifa_attn.layout import positions, scale
from tests import reference, strategies
from tests._compare import assert_same_bits, assert_same_math
from tests.cases import perturb_, weights

CONVS = [f"hifa.conv{i}" for i in (1, 2, 3, 4)] + ["clia.conv1", "clia.conv2"]


def shapes(module):
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def linear(name, out, into):
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def built(channels, *, seed=0, start=False, **options):
    torch.manual_seed(seed)
    module = MFA(channels, **options)
    return module if start else perturb_(module)


def paper_shapes(c, width):
    return {
        **{key: shape for conv in CONVS for key, shape in linear(conv, width, width).items()},
        **linear("hifa.dense", width, 2 * width),
        **{"global_scale": (1,), "local_scale": (width,), "alpha": (c,)},
    }


@pytest.mark.parametrize("c", [1, 8, 33, 64])
def test_mfa_state_is_the_papers(c):
    mfa = MFA(c)
    assert shapes(mfa) == paper_shapes(c, c)
    assert sum(p.numel() for p in mfa.parameters()) == 8 * c * c + 9 * c + 1
    buffers = dict.fromkeys(functional.Statistics._fields, (c,))
    assert shapes(MFA(c, init="identity")) == {**paper_shapes(c, c), **buffers}
    assert sum(p.numel() for p in MFA(c, init="identity").parameters()) == 8 * c * c + 9 * c + 1
    assert shapes(HIFA(c)) == {k[5:]: v for k, v in paper_shapes(c, c).items() if k.startswith("hifa.")}
    assert shapes(CLIA(c)) == {k[5:]: v for k, v in paper_shapes(c, c).items() if k.startswith("clia.")}


@pytest.mark.parametrize(("c", "r", "width"), [(64, 4, 16), (64, 1, 64), (64, 16, 8), (33, 4, 8), (67, 4, 16), (2, 2, 8)])
def test_reduction_sets_the_width(c, r, width):
    expected = {**paper_shapes(c, width), **linear("squeeze", width, c), **linear("expand", c, width)}
    assert shapes(MFA(c, reduction=r)) == expected


@given(strategies.features(), st.sampled_from([None, 1, 3]), strategies.INITS, strategies.SEEDS, strategies.DTYPES)
def test_mfa_is_the_equations(features, reduction, init, seed, dtype):
    """Module, functional and the transcription agree; prefix tokens, which the paper does not have, pass unchanged."""
    x = features.x.to(dtype)
    mfa = built(features.channels, reduction=reduction, init=init, seed=seed, dtype=dtype, **features.options)
    w, array = weights(mfa), features.positions(x).double().numpy()
    assert_same_math(mfa.gates(x), reference.mfa_gate(w, array))
    y = mfa(x)
    assert_same_math(features.positions(y), reference.mfa(w, array))
    if features.num_prefix_tokens:
        assert_same_bits(y[:, : features.num_prefix_tokens], x[:, : features.num_prefix_tokens])
    gate = functional.mfa(
        positions(x, features.layout, features.num_prefix_tokens),
        mfa.hifa.weights(),
        mfa.clia.weights(),
        mfa.global_scale,
        mfa.local_scale,
        squeeze=pair(mfa.squeeze),
        expand=pair(mfa.expand),
        statistics=statistics(mfa),
    )
    factor = functional.gain(gate, mfa.alpha)
    with ops.use("reference"):
        assert_same_math(mfa(x), scale(x, factor, features.layout, features.num_prefix_tokens))


@given(strategies.features(), strategies.SEEDS)
def test_layouts_agree(features, seed):
    """The same positions, stored in either layout."""
    first, last = (built(features.channels, layout=layout, seed=seed, dtype=torch.float64) for layout in ("b c ...", "b ... c"))
    x = features.positions()
    assert_same_math(last(x.movedim(1, -1)).movedim(-1, 1), first(x))


@given(strategies.features(layouts=["b c ..."]), strategies.SEEDS)
def test_positions_have_no_order(features, seed):
    mfa = built(features.channels, seed=seed, dtype=torch.float64)
    x = features.x if features.x.ndim > 2 else features.x[..., None]
    order = torch.randperm(x.shape[-1], generator=torch.Generator().manual_seed(seed))
    assert_same_math(mfa(x[..., order]), mfa(x)[..., order])


@given(strategies.features(batch=3, layouts=["b c ..."]), st.permutations(range(3)), strategies.SEEDS)
def test_samples_have_no_order_and_do_not_meet(features, order, seed):
    mfa, x = built(features.channels, seed=seed, dtype=torch.float64), features.x
    assert_same_math(mfa(x[order]), mfa(x)[order])
    assert_same_math(mfa(x[1:2]), mfa(x)[1:2])


@given(strategies.features(), strategies.SEEDS)
def test_identity_start_changes_no_bit(features, seed):
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        x = features.x.to(dtype)
        for reduction in (None, 2):
            mfa = built(features.channels, init="identity", reduction=reduction, seed=seed, start=True, **features.options)
            assert_same_bits(mfa(x), x)


@pytest.mark.parametrize("reduction", [None, 2])
def test_the_identity_start_is_the_papers_equation(reduction, device):
    """With the paper's weights it gives the paper's output, bit for bit: only the start differs."""
    x, paper = torch.randn(2, 7, 5, device=device), built(7, reduction=reduction).to(device)
    mfa = MFA(7, reduction=reduction, init="identity").to(device)
    mfa.load_state_dict(paper.state_dict(), strict=False)
    assert_same_bits(mfa(x), paper(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", [None, 2])
def test_identity_start_passes_signed_zeros_and_infinities_elsewhere(dtype, reduction, device):
    """The sample with an infinity becomes NaN where its gate does; no other sample and no negative zero changes."""
    mfa, x = (
        built(7, init="identity", reduction=reduction, start=True).to(device),
        torch.randn(3, 7, 5, device=device).to(dtype),
    )
    x[0, :, ::2] = -0.0
    assert_same_bits(mfa(x), x)
    x[2, 3, 1] = torch.inf
    assert_same_bits(mfa(x)[:2], x[:2])


def test_paper_start_is_the_papers(device):
    mfa = built(64, init="paper", start=True).to(device)
    assert mfa.global_center is None
    assert_same_bits(mfa.global_scale, torch.ones(1, device=device))
    gate = mfa.gates(torch.randn(4, 64, 9, 9, device=device))
    assert gate.mean().item() == pytest.approx(0.82, abs=0.03)  # σ(0.5 + 1.0)


@pytest.mark.parametrize(
    ("reduction", "first"),
    [(None, {"alpha", "global_scale", "local_scale"}), (2, {"alpha", "expand.weight", "expand.bias"})],
)
def test_identity_start_trains(reduction, first, device):
    """At first only what is zero, and alpha, get a gradient; one step later everything does."""
    mfa = built(7, init="identity", reduction=reduction, start=True).to(device)
    x = torch.randn(2, 7, 5, device=device)
    sgd = torch.optim.SGD(mfa.parameters(), lr=1.0)
    mfa(x).square().mean().backward()
    assert {name for name, p in mfa.named_parameters() if p.grad.abs().max() > 0} == first
    sgd.step()
    mfa(x).square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in mfa.parameters())


def test_prefix_tokens_are_no_positions(device):
    mfa, x = built(8, layout="b ... c", num_prefix_tokens=2).to(device), torch.randn(2, 9, 8, device=device)
    y = mfa(x)
    other = x.clone()
    other[:, :2] = torch.tensor([torch.nan, 1e30], device=device)[:, None]
    assert_same_math(mfa(other)[:, 2:], y[:, 2:])
    assert_same_bits(mfa(other)[:, :2], other[:, :2])
    without = built(8, layout="b ... c").to(device)
    assert_same_math(without(x[:, 2:]), y[:, 2:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", [None, 1])
def test_large_half_precision_maps_stay_finite(dtype, reduction, device):
    """A constant map of any size has the gate of one position; no product, sum or mean may exceed the range on the way."""
    mfa = built(3, reduction=reduction).to(device)
    torch.nn.init.ones_(mfa.alpha)  # the true output is in range
    x = torch.full((1, 3, 1024, 1024), 60000.0, dtype=dtype, device=device, requires_grad=True)
    gate, one = mfa.gates(x), mfa.gates(x[..., :1, :1].float())
    assert_same_math(gate, one, rel=1e-5 if dtype == torch.float16 else 2e-2)
    with torch.autocast(device.type, dtype=dtype):
        y = mfa(x)
    assert_same_bits(y, mfa(x))
    assert y.isfinite().all()
    grads = torch.autograd.grad(y.float().mean(), [x, *mfa.parameters()])
    assert all(grad.isfinite().all() for grad in grads)


def test_timm_has_a_slot_for_it(device):
    net = timm.create_model("resnet18", block_args={"attn_layer": drifa_attn.MFA}, zero_init_last=False)
    net.to(device)
    mfas = [module for module in net.modules() if isinstance(module, MFA)]
    assert [mfa.channels for mfa in mfas] == [64, 64, 128, 128, 256, 256, 512, 512]
    net(torch.randn(2, 3, 64, 64, device=device)).square().mean().backward()
    assert all(p.grad.abs().max() > 0 for mfa in mfas for p in mfa.parameters())


def test_repr_names_the_options():
    assert repr(MFA(8)).startswith('MFA(\n  8, reduction=None, init="paper", layout="b c ..."\n')
    text = MFA(8, reduction=2, init="identity", layout="b ... c", num_prefix_tokens=1).extra_repr()
    assert text == '8, reduction=2, init="identity", layout="b ... c", num_prefix_tokens=1'
    assert (HIFA(8).extra_repr(), CLIA(9).extra_repr()) == ("8", "9")


@pytest.mark.parametrize("layer", [HIFA, CLIA, MFA])
@pytest.mark.parametrize("channels", [0, -3, 2.0, True, None, "8"])
def test_channels_are_checked(layer, channels):
    with pytest.raises(ValueError, match=f"{layer.__name__} expected channels to be an integer >= 1, got {channels!r}"):
        layer(channels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": 0}, "MFA expected reduction to be an integer >= 1, got 0"),
        ({"reduction": 2.5}, r"got 2\.5"),
        ({"init": "zero"}, 'MFA expected init "paper" or "identity", got \'zero\''),
        ({"layout": "bchw"}, "MFA expected layout .* got 'bchw'"),
        ({"num_prefix_tokens": 1}, 'MFA got num_prefix_tokens=1 with layout "b c'),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        MFA(8, **options)


@pytest.mark.parametrize("layer", [HIFA, CLIA, MFA])
def test_input_is_checked(layer):
    for x, kind, message in (
        (torch.zeros(2, 7, 5, 5), ValueError, rf"{layer.__name__} expected x .* with c=8, got \(2, 7, 5, 5\)"),
        (torch.zeros(2, 8, 0, 5), ValueError, r"at least one position, got \(2, 8, 0, 5\)"),
        (torch.zeros(2, 8, 5, dtype=torch.uint8), TypeError, r"floating-point tensor, got torch\.uint8"),
        ([torch.zeros(2, 8)], TypeError, "expected a tensor, got list"),
    ):
        with pytest.raises(kind, match=message):
            layer(8)(x)


def test_misspelt_options_are_no_options():
    with pytest.raises(TypeError, match="reductoin"):
        MFA(8, reductoin=2)
    with pytest.raises(TypeError, match="positional"):
        MFA(8, 2)
