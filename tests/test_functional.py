"""The equations, piece by piece: against the NumPy transcription, and what their precision and gradients promise."""

import pytest
import torch
from hypothesis import given

from drifa_attn import CLIA, HIFA, MFA, MGIFA, MIFA, MLIFA, functional, ops
from tests import reference, strategies
from tests._compare import assert_same_bits, assert_same_math
from tests.cases import perturb_, weights

HALVES = [torch.float16, torch.bfloat16]
CHANNELS_FIRST = ["b c ..."]


def built(layer, *args, seed=0, **options):
    torch.manual_seed(seed)
    return perturb_(layer(*args, **options))


def flat(x):
    """`b c ...` -> `b c n`, a view where strides allow."""
    return x.flatten(2) if x.ndim > 2 else x[..., None]


@given(strategies.features(layouts=CHANNELS_FIRST), strategies.SEEDS, strategies.DTYPES)
def test_hifa_and_clia_are_the_equations(features, seed, dtype):
    x = features.x.to(dtype)
    for name, layer in (("hifa", HIFA), ("clia", CLIA)):
        layer = built(layer, features.channels, seed=seed, dtype=dtype)
        expected = getattr(reference, name)(weights(layer), x.double().numpy())
        assert_same_math(getattr(functional, name)(flat(x), *layer.weights()), expected, name=name)
        assert_same_math(layer(x), expected, name=f"{name} module")


@given(strategies.modalities(equal=True, layouts=CHANNELS_FIRST), strategies.SEEDS, strategies.DTYPES)
def test_mgifa_and_mlifa_are_the_equations(drawn, seed, dtype):
    xs, present, c = [x.to(dtype) for x in drawn.xs], drawn.present, drawn.each[0].channels
    arrays, mask = [x.double().numpy() for x in xs], None if present is None else present.numpy()
    mgifa, mlifa = built(MGIFA, c, seed=seed, dtype=dtype), built(MLIFA, c, len(xs), seed=seed, dtype=dtype)
    expected = reference.mgifa(weights(mgifa), arrays, mask)
    assert_same_math(functional.mgifa([flat(x) for x in xs], (mgifa.dense.weight, mgifa.dense.bias), present), expected)
    assert_same_math(mgifa(xs, present), expected, name="mgifa module")
    expected = reference.mlifa(weights(mlifa), arrays, mask)
    assert_same_math(functional.mlifa([flat(x) for x in xs], mlifa.weights(), present), expected)
    assert_same_math(mlifa(xs, present), expected, name="mlifa module")


@given(strategies.features(layouts=CHANNELS_FIRST))
def test_informations_stay_in_their_range(features):
    x, c = 100 * features.x, features.channels
    for value, top in (
        (built(HIFA, c)(x), 1),
        (built(CLIA, c)(x), 2),
        (built(MGIFA, c)([x, x]), 3),
        (built(MLIFA, c)([x, x]), 6),
        (built(MFA, c).gates(x), 1),
        (built(MIFA, c).gates([x, x])[0], 1),
    ):
        assert value.shape == x.shape[:2]
        assert value.min() >= 0
        assert value.max() <= top


@pytest.mark.parametrize("pool", [functional.pool_max, functional.pool_min])
def test_pool_shares_a_gradient_equally_among_ties(pool, device):
    x = torch.tensor([[[1.0, 3.0, 3.0, 2.0, 1.0, 1.0]]], device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(pool(x), x, torch.ones(1, 1, device=device))
    best = (x == pool(x)[..., None]).to(x)
    assert best.sum() in (2, 3)
    assert_same_bits(grad, best / best.sum())


def test_mfa_gradient_of_tied_positions_is_equal(device):
    x = torch.randn(2, 7, 1, 1, dtype=torch.float64).to(device).expand(2, 7, 3, 2).clone().requires_grad_()
    with ops.use("reference"):  # the fused ops take the first
        (grad,) = torch.autograd.grad(built(MFA, 7, dtype=torch.float64).to(device)(x).sum(), x)
    assert_same_math(grad, grad[..., :1, :1].expand_as(grad))
    assert grad.abs().min() > 0


@pytest.mark.parametrize("dtype", HALVES)
def test_pooled_vectors_are_accumulated_in_float32(dtype, device):
    """A running sum in half precision stops at 2048 (float16 overflows too): the mean of many ones would be far below one."""
    x = torch.full((1, 2, 2**17), 3.0, dtype=dtype, device=device)
    for pool in (functional.pool_mean, functional.pool_max, functional.pool_min):
        assert_same_bits(pool(x), torch.full((1, 2), 3.0, device=device))


def test_dtypes_of_maps_and_vectors():
    kinds = {
        torch.float16: (torch.float32, torch.float32),
        torch.bfloat16: (torch.bfloat16, torch.float32),
        torch.float32: (torch.float32, torch.float32),
        torch.float64: (torch.float64, torch.float64),
    }
    for dtype, (maps, vectors) in kinds.items():
        x = torch.zeros(1, 2, 3, dtype=dtype)
        assert (functional.as_map(x).dtype, functional.vector_dtype(x)) == (maps, vectors)


def test_float16_gates_are_as_exact_as_float32_gates(device):
    """float16 stores the input; nothing after that may round to it."""
    x = torch.randn(2, 33, 6, 5).half()
    for layer, call, expected in (
        (built(MFA, 33), "gates", reference.mfa_gate),
        (built(MFA, 33, reduction=2), "gates", reference.mfa_gate),
        (built(HIFA, 33), "forward", reference.hifa),
        (built(CLIA, 33), "forward", reference.clia),
    ):
        assert_same_math(getattr(layer.to(device), call)(x.to(device)), expected(weights(layer), x.double().numpy()))
    for layer, call, expected in (
        (built(MIFA, 33), "gates", lambda w, xs: reference.mifa_gates(w, xs)[0]),
        (built(MIFA, 33, dim=8), "gates", lambda w, xs: reference.mifa_gates(w, xs)[0]),
        (built(MGIFA, 33), "forward", reference.mgifa),
        (built(MLIFA, 33), "forward", reference.mlifa),
    ):
        value = getattr(layer.to(device), call)([x.to(device), x.to(device)])
        assert_same_math(value[0] if isinstance(value, list) else value, expected(weights(layer), [x.double().numpy()] * 2))


def test_bfloat16_gates_lose_only_what_bfloat16_maps_lose(device):
    x, layer = torch.randn(2, 33, 6, 5).bfloat16(), built(MFA, 33)
    gate = layer.to(device).gates(x.to(device))
    assert gate.dtype == torch.float32
    assert_same_math(gate, reference.mfa_gate(weights(layer), x.double().numpy()), rel=1e-2)


@pytest.mark.parametrize("lower", HALVES)
def test_autocast_lowers_no_equation(lower, device):
    """The functions themselves, the modules' way in left out."""
    x, mfa, mifa = torch.randn(2, 7, 5, device=device), built(MFA, 7).to(device), built(MIFA, 7).to(device)
    hifa, clia, scales = mfa.hifa.weights(), mfa.clia.weights(), (mfa.global_scale, mfa.local_scale)
    dense = (mifa.mgifa.dense.weight, mifa.mgifa.dense.bias)
    expected = functional.mfa(x, hifa, clia, *scales)
    (shared, _) = functional.mifa([x, x], dense, mifa.mlifa.weights(), mifa.global_scale, mifa.local_scale)
    with torch.autocast(device.type, dtype=lower):
        assert_same_bits(functional.mfa(x, hifa, clia, *scales), expected)
        gates = functional.mifa([x, x], dense, mifa.mlifa.weights(), mifa.global_scale, mifa.local_scale)
        assert torch.is_autocast_enabled(device.type)
    for gate in gates:
        assert_same_bits(gate, shared)


def test_gain_is_exactly_one_at_the_identity_start(device):
    a, alpha = torch.rand(3, 7, device=device), torch.randn(7, device=device)
    assert_same_bits(functional.gain(a, alpha), a * alpha)
    half = torch.zeros(3, 7, device=device).sigmoid()
    assert_same_bits(functional.gain(half, torch.full((7,), 2.0, device=device)), torch.ones(3, 7, device=device))


def test_statistics_of_zeros_and_ones_change_no_bit(device):
    """So a layer that is not calibrated is the paper's equation."""
    info = [torch.rand(3, 7, device=device) for _ in range(2)]
    scales = torch.randn(1, device=device), torch.randn(7, device=device)
    zeros, ones = torch.zeros(7, device=device), torch.ones(7, device=device)
    plain = functional.fusion_gate(*info, *scales)
    assert_same_bits(functional.fusion_gate(*info, *scales, statistics=functional.Statistics(zeros, ones, zeros, ones)), plain)
    moved = functional.Statistics(ones, ones / 4, zeros, ones * 2)
    expected = (scales[0] * 4 * (info[0] - 1) + scales[1] * info[1] / 2).sigmoid()
    assert_same_math(functional.fusion_gate(*info, *scales, statistics=moved), expected)


def test_mifa_gate_is_one_tensor_at_equal_channels(device):
    x, mifa = torch.randn(2, 7, 5, device=device), built(MIFA, 7, 3).to(device)
    first, second, third = mifa.gates([x, x, x])
    assert first is second is third


def test_gradients_are_exact_to_the_last_entry(device):
    """The slow check, every entry of the Jacobian, once per equation; the ladder checks projections of every option."""
    x, y = (torch.randn(2, 3, n, dtype=torch.float64, device=device, requires_grad=True) for n in (4, 2))
    mfa, mifa = (built(layer, 3, dtype=torch.float64).to(device) for layer in (MFA, MIFA))
    assert torch.autograd.gradcheck(mfa.gates, (x,))
    assert torch.autograd.gradcheck(lambda x, y: mifa.gates([x, y])[0], (x, y))
    with ops.use("reference"):  # the fused ops have no second derivative
        assert torch.autograd.gradgradcheck(mfa.gates, (x,))
