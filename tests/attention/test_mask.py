"""Masks of positions: what is False takes no part in any pooling and passes unchanged, as if it were cut off."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drifa_attn import CLIA, HIFA, MFA, MGIFA, MIFA, MLIFA, RRA, functional, ops
from drifa_attn.attention import Foreign, Spec
from drifa_attn.layout import scale, sizes
from tests import strategies
from tests._compare import assert_same_bits, assert_same_math
from tests.cases import listed, loss, perturb_

FILLS = st.sampled_from([0.0, 1e30, torch.nan, torch.inf, -torch.inf])
INPUTS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
BOUND = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 3e-2}


def drawn_mask(one, seed):
    """A mask of any positions of features as `b n`; now and then a sample has none, or all of them."""
    generator = torch.Generator().manual_seed(seed)
    n = one.positions()[:, 0].reshape(len(one.x), -1).shape[1]
    mask = torch.rand(len(one.x), n, generator=generator) < torch.rand(len(one.x), 1, generator=generator) * 1.4 - 0.2
    return mask


def filled(one, mask, value):
    """The features with a value in every position that is masked."""
    x = one.x.clone()
    first = one.layout == "b c ..."
    wide = torch.nn.functional.pad(mask, (one.num_prefix_tokens, 0), value=True).reshape(len(x), *sizes(x, one.layout))
    return torch.where(wide.unsqueeze(1 if first else -1), x, value)


def cut(x, one, mask, b):
    """Sample b of features as a sequence of their layout that holds its prefix tokens and the positions of its mask alone."""
    if one.layout == "b c ...":
        return x[b : b + 1].reshape(1, one.channels, -1)[..., mask[b]]
    p = one.num_prefix_tokens
    rest = x[b, p:].reshape(-1, one.channels)[mask[b]]
    return (torch.cat([x[b, :p], rest]) if p else rest)[None]


def real(mask, one):
    """What the mask says of the positions of features, prefix tokens left out, `b 1 ...`."""
    return mask.reshape(len(one.x), 1, *one.positions().shape[2:])


@given(strategies.features(), st.sampled_from([None, 3]), strategies.INITS, strategies.SEEDS, FILLS, st.booleans())
def test_a_mask_is_a_cut(features, reduction, init, seed, fill, spatial):
    torch.manual_seed(seed)
    mfa = perturb_(MFA(features.channels, reduction=reduction, init=init, dtype=torch.float64, **features.options))
    mask = drawn_mask(features, seed)
    x = filled(features, mask, fill)
    given_mask = mask.reshape(len(x), *sizes(x, features.layout)) if spatial and not features.num_prefix_tokens else mask
    y, gate, gain = mfa(x, mask=given_mask), mfa.gates(x, given_mask), mfa.gains(x, given_mask)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    of_masked = [features.positions(t)[~real(mask, features).expand_as(features.positions(t))] for t in (y, x)]
    assert_same_bits(*of_masked)
    if features.num_prefix_tokens:
        assert_same_bits(y[:, : features.num_prefix_tokens], x[:, : features.num_prefix_tokens])
    for b in range(len(x)):
        if not mask[b].any():
            assert_same_bits(y[b], x[b])
            assert_same_bits(gain[b], torch.ones_like(gain[b]))
            assert gate[b].isfinite().all()
            continue
        alone = cut(x, features, mask, b)
        assert_same_math(cut(y, features, mask, b), mfa(alone))
        assert_same_math(gate[b : b + 1], mfa.gates(alone))
        assert_same_math(gain[b : b + 1], mfa.gains(alone))


@given(strategies.features(layouts=["b c ..."]), strategies.SEEDS, FILLS)
def test_a_mask_of_hifa_and_clia_is_a_cut(features, seed, fill):
    torch.manual_seed(seed)
    mask = drawn_mask(features, seed)
    x = filled(features, mask, fill)
    for layer in (HIFA, CLIA):
        layer = perturb_(layer(features.channels, dtype=torch.float64))
        info = layer(x, mask=mask)
        assert info.isfinite().all()
        for b in range(len(x)):
            if mask[b].any():
                assert_same_math(info[b : b + 1], layer(cut(x, features, mask, b)))


@given(strategies.modalities(dtype=torch.float64), strategies.SEEDS, FILLS, st.booleans())
def test_masks_of_modalities_are_cuts(drawn, seed, fill, some):
    """A modality without a True is absent; `present` and the masks hold together; None is every position."""
    torch.manual_seed(seed)
    mifa = perturb_(MIFA([one.channels for one in drawn.each], dtype=torch.float64, **drawn.options))
    masks = [drawn_mask(one, seed + i) for i, one in enumerate(drawn.each)]
    xs = [filled(one, mask, fill) for one, mask in zip(drawn.each, masks, strict=True)]
    every = [torch.ones_like(mask) for mask in masks]
    if some:  # the first modality has no mask
        masks, xs = [every[0], *masks[1:]], [drawn.xs[0], *xs[1:]]
    given_masks = [None if some and i == 0 else mask for i, mask in enumerate(masks)]
    present = torch.ones(len(xs[0]), len(xs), dtype=torch.bool) if drawn.present is None else drawn.present
    has = present & torch.stack([mask.any(1) for mask in masks], 1)
    ys, gates, gains = (f(xs, drawn.present, given_masks) for f in (mifa, mifa.gates, mifa.gains))
    for b in range(len(xs[0])):
        alone = [
            cut(x, one, mask if has[b, i] else full, b)
            for i, (x, one, mask, full) in enumerate(zip(xs, drawn.each, masks, every, strict=True))
        ]
        expected = [f(alone, has[b : b + 1]) for f in (mifa, mifa.gates, mifa.gains)]
        for i, (y, x, one, mask) in enumerate(zip(ys, xs, drawn.each, masks, strict=True)):
            masked = ~real(mask, one)[b] if has[b, i] else torch.ones_like(real(mask, one)[b])
            inside = [one.positions(t)[b] for t in (y, x)]
            assert_same_bits(*[t[masked.expand_as(t)] for t in inside])
            if has[b, i]:
                assert_same_math(cut(y, one, mask, b), expected[0][i])
            assert_same_math(gates[i][b : b + 1], expected[1][i])
            assert_same_math(gains[i][b : b + 1], expected[2][i])


@given(strategies.modalities(equal=True, layouts=["b c ..."], dtype=torch.float64), strategies.SEEDS, FILLS)
def test_masks_of_mgifa_and_mlifa_are_cuts(drawn, seed, fill):
    torch.manual_seed(seed)
    masks = [drawn_mask(one, seed + i) for i, one in enumerate(drawn.each)]
    xs = [filled(one, mask, fill) for one, mask in zip(drawn.each, masks, strict=True)]
    has = torch.stack([mask.any(1) for mask in masks], 1)
    has = has if drawn.present is None else has & drawn.present
    c = drawn.each[0].channels
    for layer in (perturb_(MGIFA(c, dtype=torch.float64)), perturb_(MLIFA(c, len(xs), dtype=torch.float64))):
        info = layer(xs, drawn.present, masks)
        for b in range(len(xs[0])):
            alone = [
                cut(x, one, mask if has[b, i] else torch.ones_like(mask), b)
                for i, (x, one, mask) in enumerate(zip(xs, drawn.each, masks, strict=True))
            ]
            assert_same_math(info[b : b + 1], layer(alone, has[b : b + 1]))


@given(strategies.features(), st.sampled_from([None, 3]), strategies.SEEDS, FILLS)
def test_what_is_masked_reaches_no_gradient(features, reduction, seed, fill):
    """Gradients are those of what is cut, and what is masked gets the gradient of its own output alone."""
    torch.manual_seed(seed)
    mfa = perturb_(MFA(features.channels, reduction=reduction, dtype=torch.float64, **features.options))
    mask = drawn_mask(features, seed)
    x = filled(features, mask, fill).requires_grad_()
    direction = torch.randn(x.shape, dtype=torch.float64)
    leaves = [x, *mfa.parameters()]
    dx, *found = torch.autograd.grad(mfa(x, mask), leaves, direction)
    here = ~real(mask, features).expand_as(features.positions(dx))
    assert_same_bits(features.positions(dx)[here], features.positions(direction)[here])
    expected = [torch.zeros_like(p) for p in mfa.parameters()]
    for b in range(len(x)):
        if mask[b].any():
            alone = cut(x.detach(), features, mask, b).requires_grad_()
            of_alone, *rest = torch.autograd.grad(mfa(alone), [alone, *mfa.parameters()], cut(direction, features, mask, b))
            assert_same_math(cut(dx, features, mask, b), of_alone, rel=1e-9)
            expected = [total + one for total, one in zip(expected, rest, strict=True)]
    for one, other in zip(found, expected, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11 * max(1.0, other.abs().max().item()))


@pytest.mark.parametrize("options", [{}, {"reduction": 2, "layout": "b ... c", "num_prefix_tokens": 1}])
def test_gradients_with_a_mask_are_exact(options):
    torch.manual_seed(0)
    mfa = perturb_(MFA(3, dtype=torch.float64, **options))
    x = torch.randn((3, 3, 4) if not options else (3, 5, 3), dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 0, 1, 0]]).bool()
    assert torch.autograd.gradcheck(lambda x: mfa(x, mask), (x,))
    assert torch.autograd.gradgradcheck(lambda x: mfa(x, mask), (x,))
    mifa = perturb_(MIFA(3, dtype=torch.float64))
    a, b = (torch.randn(3, 3, n, dtype=torch.float64, requires_grad=True) for n in (4, 2))
    present = torch.tensor([[1, 1], [1, 1], [1, 0]]).bool()
    assert torch.autograd.gradcheck(lambda a, b: tuple(mifa([a, b], present, [mask, None])), (a, b))


def test_what_is_masked_of_a_modality_reaches_no_gradient():
    torch.manual_seed(0)
    mifa = perturb_(MIFA((3, 4), dtype=torch.float64))
    mask = torch.tensor([[1, 0, 1], [0, 0, 0]]).bool()
    a, b = torch.randn(2, 3, 3, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    a[~mask[:, None].expand_as(a)] = torch.nan
    a.requires_grad_()
    loss(mifa([a, b], mask=[mask, None])).backward()
    assert a.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in mifa.parameters())


@pytest.mark.parametrize("dtype", INPUTS)
@pytest.mark.parametrize("layout", ["b c ...", "b ... c"])
def test_every_dtype_takes_a_mask(dtype, layout, device):
    torch.manual_seed(0)
    mfa, x = perturb_(MFA(8, reduction=1, layout=layout)).to(device, dtype), torch.randn(3, 8, 6).to(device, dtype)
    mask = torch.arange(6, device=device) < torch.tensor([6, 4, 0], device=device)[:, None]
    x = torch.where(mask[:, None], x, torch.nan)
    x = x if layout == "b c ..." else x.mT
    y = mfa(x, mask)
    assert y.dtype == dtype
    assert mfa.gates(x, mask).dtype == torch.promote_types(dtype, torch.float32)
    alone = x[1:2, :, :4] if layout == "b c ..." else x[1:2, :4]
    found = y[1:2, :, :4] if layout == "b c ..." else y[1:2, :4]
    assert_same_math(found, mfa(alone), rel=BOUND[dtype])
    assert_same_math(y[:1], mfa(x[:1]), rel=BOUND[dtype])
    assert_same_bits(y[2], x[2])


def test_a_mask_that_is_true_everywhere_is_none(device):
    torch.manual_seed(0)
    mfa, x = perturb_(MFA(8)).to(device), torch.randn(2, 8, 5, 4, device=device)
    assert_same_math(mfa(x, torch.ones(2, 20, dtype=torch.bool, device=device)), mfa(x))
    mifa = perturb_(MIFA(8)).to(device)
    masks = [torch.ones(2, 5, 4, dtype=torch.bool, device=device)] * 2
    for y, expected in zip(mifa([x, x], mask=masks), mifa([x, x]), strict=True):
        assert_same_math(y, expected)


@pytest.mark.parametrize("init", ["paper", "identity"])
def test_the_identity_start_changes_no_bit_of_masked_features(init):
    x, mask = torch.randn(3, 8, 5), torch.rand(3, 5) > 0.5
    assert torch.equal(MFA(8, init=init)(x, mask), x) == (init == "identity")


def test_an_empty_batch_and_a_vector_take_a_mask():
    mfa, x = perturb_(MFA(8)), torch.randn(3, 8)
    assert mfa(x[:0], torch.ones(0, 1, dtype=torch.bool)).shape == (0, 8)
    assert MFA(8)(torch.randn(0, 8, 4, 5), torch.ones(0, 4, 5, dtype=torch.bool)).shape == (0, 8, 4, 5)
    for shape in ((3, 1), (3,)):
        y = mfa(x, torch.tensor([True, False, True]).reshape(shape))
        assert_same_bits(y[1], x[1])
        assert_same_math(y[::2], mfa(x)[::2])


def test_disabled_layers_pass_everything_on():
    mfa, mifa, x, mask = MFA(8), MIFA(8), torch.randn(2, 8, 5), torch.ones(2, 5, dtype=torch.bool)
    mfa.enabled = mifa.enabled = False
    assert mfa(x, mask) is x
    assert mifa([x, x], mask=[mask, None])[0] is x


# The functions -----------------------------------------------------------------------------------------------------------


def test_functions_and_operators_take_a_mask():
    torch.manual_seed(0)
    mfa, x = perturb_(MFA(16, dtype=torch.float64)), torch.randn(3, 16, 40, dtype=torch.float64)
    mask = torch.arange(40) < torch.tensor([40, 9, 0])[:, None]
    x[~mask[:, None].expand_as(x)] = torch.nan
    weights = mfa.hifa.weights(), mfa.clia.weights(), mfa.global_scale, mfa.local_scale
    gate = functional.mfa(x, *weights, mask=mask)
    with ops.use("fused"):  # the fused operators pool over every position: they must not run
        assert not ops.is_fused(x, 16, mask=mask)
        assert ops.is_fused(x, 16, mask=None)
        assert_same_bits(ops.mfa(x, *weights, mask=mask), gate)
        assert_same_bits(mfa.gates(x, mask), gate)
        factor = functional.gain(gate, mfa.alpha)
        assert_same_bits(ops.gate(x, factor, mask=mask), scale(x, factor, "b c ...", mask=mask))
        assert_same_bits(mfa(x, mask), scale(x, factor, "b c ...", mask=mask))
        mifa, xs = perturb_(MIFA(16, dtype=torch.float64)), [x, torch.randn(3, 16, 2, dtype=torch.float64)]
        assert not ops.is_fused(xs, 16, mask=[mask, None])
        assert ops.is_fused(xs, 16, mask=[None, None])
        weights = functional_weights(mifa)
        for one, other in zip(ops.mifa(xs, *weights, mask=[mask, None]), mifa.gates(xs, mask=[mask, None]), strict=True):
            assert_same_bits(one, other)


def functional_weights(mifa):
    dense = mifa.mgifa.dense.weight, mifa.mgifa.dense.bias
    return dense, mifa.mlifa.weights(), mifa.global_scale, mifa.local_scale


@pytest.mark.parametrize("mode", ["auto", "fused"])
def test_the_choice_says_that_a_mask_is_given(mode):
    mfa, mifa, x = MFA(16), MIFA(16), torch.randn(8, 16, 40, 40)
    mask = torch.ones(8, 1600, dtype=torch.bool)
    reason = "a mask is given, and the fused operators pool over every position"
    with ops.use(mode):
        assert ops.explain(mfa, x).path == "chunked"
        assert ops.explain(mfa, x, mask) == ("reference", reason)
        assert ops.explain(mifa, [x, x], mask=[None, mask]) == ("reference", reason)
        assert ops.explain(mifa, [x, x], mask=[None, None]).path == "chunked"


def test_poolings_of_a_mask():
    x = torch.tensor([[[3.0, -1.0, 8.0]], [[3.0, -1.0, 8.0]]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert functional.pool_mean(x, mask).tolist() == [[1.0], [0.0]]
    assert functional.pool_max(x, mask).tolist() == [[3.0], [0.0]]
    assert functional.pool_min(x, mask).tolist() == [[-1.0], [0.0]]


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_layers_compile_whole_with_a_mask(backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    mfa = perturb_(MFA(8, reduction=1, layout="b ... c", num_prefix_tokens=1, dtype=torch.float64))
    mifa = perturb_(MIFA((3, 8), dtype=torch.float64))
    for layer, arguments in ((mfa, masked_tokens), (mifa, masked_modalities)):
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        for batch in (2, 5):
            args = arguments(batch)
            leaves = [*listed(args[0]), *layer.parameters()]
            results = [(ys := m(*args), torch.autograd.grad(loss(ys), leaves)) for m in (compiled, layer)]
            for one, other in zip(*([*listed(ys), *grads] for ys, grads in results), strict=True):
                assert_same_math(one, other, rel=1e-8)


def masked_tokens(batch):
    return torch.randn(batch, 7, 8, dtype=torch.float64, requires_grad=True), torch.arange(6) < torch.arange(batch)[:, None]


def masked_modalities(batch):
    xs = [torch.randn(batch, c, n, dtype=torch.float64, requires_grad=True) for c, n in ((3, 6), (8, 2))]
    present = torch.arange(batch)[:, None] + torch.arange(2) > 0
    return xs, present, [torch.arange(6) < torch.arange(batch)[:, None], None]


def test_layers_export_with_a_mask():
    layer, (x, mask) = perturb_(MFA(8, dtype=torch.float64)), masked_tokens(3)
    x = x.detach().mT[..., 1:]
    program = torch.export.export(layer, (x, mask)).module()
    assert_same_math(program(x, mask), layer(x, mask))


# Errors ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(2, 20), TypeError, r"expected mask to be a boolean tensor \(b n\).*got torch\.float32: convert it"),
        ([True], TypeError, "expected mask to be a boolean tensor .* got list"),
        (torch.ones(2, 19).bool(), ValueError, r"\(b, n\) = \(2, 20\) or \(2, 4, 5\) for features .*got \(2, 19\)"),
        (torch.ones(20).bool(), ValueError, r"got \(20,\)"),
        (torch.ones(2, 5, 4).bool(), ValueError, r"got \(2, 5, 4\)"),
        (torch.ones(1, 20).bool(), ValueError, r"got \(1, 20\)"),
        (torch.ones(2, 20, device="meta").bool(), ValueError, "expected mask on cpu, where the features are, got meta"),
    ],
)
def test_masks_are_checked(mask, error, message):
    x = torch.zeros(2, 8, 4, 5)
    for layer in (MFA(8), HIFA(8), CLIA(8)):
        with pytest.raises(error, match=f"{type(layer).__name__} .*{message}"):
            layer(x, mask=mask)
    for layer in (MIFA(8), MGIFA(8), MLIFA(8)):
        with pytest.raises(error, match=rf"{type(layer).__name__} \(modality 1\) .*{message}"):
            layer([x, x], mask=[None, mask])


def test_masks_behind_prefix_tokens_and_of_modalities_are_checked():
    mfa = MFA(8, layout="b ... c", num_prefix_tokens=1)
    with pytest.raises(ValueError, match=r"= \(2, 6\), the positions behind 1 prefix tokens, for .*got \(2, 7\)"):
        mfa(torch.zeros(2, 7, 8), torch.ones(2, 7).bool())
    x, mask = torch.zeros(2, 8, 5), torch.ones(2, 5).bool()
    for layer in (MIFA(8), MGIFA(8), MLIFA(8)):
        name = type(layer).__name__
        with pytest.raises(TypeError, match=rf"{name} expected mask as a list .* per modality \(2\), got Tensor"):
            layer([x, x], mask=mask)
        with pytest.raises(ValueError, match=rf"{name} expected one mask, or None, per modality \(2\), got 1"):
            layer([x, x], mask=[mask])


def test_other_layers_take_no_mask():
    x, mask = torch.zeros(2, 8, 5, 5), torch.ones(2, 25).bool()
    with pytest.raises(ValueError, match="the attention 'eca' takes no mask, it reads whole maps: leave it out, or use MFA"):
        Foreign(8, Spec("eca"))(x, mask=mask)
    with pytest.raises(TypeError, match=r"RRA.forward\(\) got an unexpected keyword argument 'mask'"):
        RRA(8, 8)(x, mask=mask)


# Calibration -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", [None, 2])
def test_calibration_counts_real_positions_alone(reduction):
    """Padding of any length and content changes nothing."""
    torch.manual_seed(0)
    options = {"reduction": reduction, "init": "identity", "layout": "b ... c", "num_prefix_tokens": 1}
    mfa = MFA(16, **options, dtype=torch.float64)
    other, x = copy.deepcopy(mfa), torch.randn(20, 7, 16, dtype=torch.float64)
    mfa.calibrate(x)
    padded = torch.cat([x, torch.full((20, 3, 16), torch.nan, dtype=torch.float64)], 1)
    padded = torch.cat([padded, torch.randn(2, 10, 16)])  # two samples without any position
    mask = torch.arange(9) < torch.tensor([6] * 20 + [0] * 2)[:, None]
    other.calibrate(padded, mask=mask)
    for key, value in other.state_dict().items():
        torch.testing.assert_close(value, mfa.state_dict()[key], rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="MFA.calibrate expected at least 16 samples to calibrate with, got 15"):
        MFA(16, **options, dtype=torch.float64).calibrate(padded, mask=mask & (torch.arange(22) < 15)[:, None])


def test_calibration_of_modalities_counts_real_positions_alone():
    torch.manual_seed(0)
    mifa = MIFA((8, 9), init="identity", dtype=torch.float64)
    other = copy.deepcopy(mifa)
    a, b = torch.randn(20, 8, 5, dtype=torch.float64), torch.randn(20, 9, dtype=torch.float64)
    present = torch.rand(20, 2) > 0.2
    mifa.calibrate([a, b], present)
    padded = torch.cat([a, torch.full((20, 8, 3), torch.inf, dtype=torch.float64)], 2)
    lengths = torch.where(present[:, 0], 5, 0)  # an absent modality by its mask alone
    everything = torch.stack([torch.ones(20).bool(), present[:, 1]], 1)
    other.calibrate([padded, b], everything, [torch.arange(8) < lengths[:, None], None])
    for key, value in other.state_dict().items():
        torch.testing.assert_close(value, mifa.state_dict()[key], rtol=1e-9, atol=1e-12)
