"""The Triton kernels of MFA against float64, and what they promise about ties, order, range and NaN."""

import inspect

import pytest
import torch
from hypothesis import given, settings

from tests._compare import assert_same_bits, assert_same_math
from tests._triton import skip_without_triton
from tests.ops._fused import (
    DTYPES,
    INTERPRETING,
    Problem,
    as_float64,
    check_backward,
    check_forward,
    flat,
    lin,
    mfa_maps,
    on_kernels,
    problems,
)

skip_without_triton()
from drifa_attn.ops import choose, chunked, triton  # noqa: E402  (imports triton, which may be missing)
from drifa_attn.ops.triton import mfa  # noqa: E402

FORWARDS = {"chain": mfa.mfa_forward, "layer-wise": mfa.layerwise_forward}


def test_backends_have_equal_functions():
    for name in triton.__all__:
        ours, theirs = inspect.signature(getattr(triton, name)), inspect.signature(getattr(chunked, name))
        assert str(ours) == str(theirs), name
    written = {name for name, value in vars(chunked).items() if inspect.isfunction(value)}
    assert {name for name in written if name.endswith(("_forward", "_backward"))} == set(triton.__all__)


@on_kernels
@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS)
@settings(max_examples=6)
@given(problem=problems())
def test_forward_errs_at_most_twice_as_much_as_the_reference(forward, problem):
    check_forward(problem, forward)


@on_kernels
@settings(max_examples=6)
@given(problem=problems())
def test_backward_errs_at_most_three_times_as_much_as_the_reference(problem):
    check_backward(problem, mfa)


@on_kernels
@pytest.mark.parametrize(("c", "d", "dtype"), [*((64, None, dtype) for dtype in DTYPES), (80, 130, torch.bfloat16)])
def test_widths_of_every_path(c, d, dtype):
    problem = Problem(2, c, 60, d, "nhwc", dtype, 1)
    check_forward(problem, mfa.mfa_forward)
    check_backward(problem, mfa)


@on_kernels
@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS)
def test_first_of_tied_positions_wins(forward):
    """A constant map ties everywhere, across tiles and chunks; σ saturates, but the ties are those before it."""
    x, weights, *given = Problem(2, 32, 700, None, "nchw", torch.bfloat16, 0).tensors()
    weights = [weight.sign() / 4 for weight in weights]  # sums without rounding: alike, in whatever order
    _, where = forward(x[..., :1].expand_as(x), weights, *given)
    assert not where.any()
    steep = [50 * weight.abs() for weight in weights]
    x[:] = 0.5
    x[0, :, 300] = 1
    stats, where = forward(x, steep, *given)
    assert (stats[1] == 1).all()
    assert not where[:, 1].any()


def assert_same_result(actual, expected):
    """On a GPU bit for bit. The interpreter multiplies with NumPy, whose products depend on strides and on the processor."""
    (assert_same_math if INTERPRETING else assert_same_bits)(actual.contiguous(), expected.contiguous())


@on_kernels
@pytest.mark.parametrize("width", [64, 144])
def test_results_do_not_depend_on_the_layout(width):
    inputs = Problem(1, width, 130, None, "nchw", torch.bfloat16, 2).tensors()
    stats, where = mfa.mfa_forward(*inputs)
    first = flat(mfa.mfa_backward(stats, *inputs, stats, where))
    x = inputs[0].mT.contiguous().mT
    again, where_again = mfa.mfa_forward(x, *inputs[1:])
    assert_same_result(again, stats)
    assert INTERPRETING or torch.equal(where_again, where)
    for one, other in zip(flat(mfa.mfa_backward(stats, x, *inputs[1:], stats, where)), first, strict=True):
        assert_same_result(one, other)


@on_kernels
@pytest.mark.parametrize("width", [64, 144])
def test_results_are_deterministic(width):
    inputs = Problem(1, width, 130, None, "nchw", torch.bfloat16, 2).tensors()
    runs = []
    for _ in range(2):
        stats, where = mfa.mfa_forward(*inputs)
        runs.append([stats, where, *flat(mfa.mfa_backward(stats, *inputs, stats, where))])
    for one, other in zip(*runs, strict=True):
        assert_same_bits(one, other)


@on_kernels
def test_samples_taken_a_few_at_a_time_give_the_same_gradients(monkeypatch):
    problem = Problem(3, 80, 24, None, "nchw", torch.float16, 3)
    inputs = problem.tensors()
    stats, where = mfa.mfa_forward(*inputs)
    whole = flat(mfa.mfa_backward(stats, *inputs, stats, where))
    monkeypatch.setattr(mfa, "sample_chunks", lambda x, d: [slice(0, 2), slice(2, 4)])
    for one, other in zip(whole, flat(mfa.mfa_backward(stats, *inputs, stats, where)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * one.abs().max().item())


@on_kernels
def test_float16_holds_a_squeeze_beyond_its_range():
    """z exceeds the range of float16; small weights bring it back, so that every statistic is told from a saturated one."""
    x, weights, biases, squeeze, bias = Problem(1, 64, 40, 16, "nhwc", torch.float16, 4).tensors()
    x, squeeze = 100 * x, 1e3 * squeeze
    weights = [1e-5 * weight if i in (0, 4) else weight for i, weight in enumerate(weights)]  # of conv1 and clia.conv1
    inputs = x, weights, biases, squeeze, bias
    assert lin(squeeze, bias, x.float()).abs().max() > 65504
    h1, z2, h3, z4, t = mfa_maps(*as_float64(inputs))
    exact = torch.stack([h1.mean(2), z2.amax(2).sigmoid(), h3.mean(2), z4.amax(2).sigmoid(), t.mean(2)])
    assert ((exact > 0.02) & (exact < 0.98)).all()
    for forward in FORWARDS.values():
        assert_same_math(forward(*inputs)[0], exact, rel=2e-3)


@on_kernels
def test_nan_stays_in_its_sample():
    inputs = Problem(2, 32, 50, None, "nchw", torch.bfloat16, 5).tensors()
    expected, _ = mfa.mfa_forward(*inputs)
    inputs[0][0] = torch.nan
    stats, where = mfa.mfa_forward(*inputs)
    assert stats[::2, 0].isnan().all()
    assert_same_bits(stats[:, 1], expected[:, 1])
    assert where.max() < 50


def test_reasons_against_triton_are_named(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(2, 64, 49, dtype=torch.bfloat16)
    assert choose.unsupported(x, 64) == "x is on cpu, the kernels run on CUDA"
    monkeypatch.setattr(choose, "interpreting", lambda: True)
    assert choose.unsupported(x, 64) is None
    for bad, width, word in (
        (x.double(), 64, "float64"),
        (x, 5000, "4096"),
        (x[:0], 64, "empty"),
        (x.to("meta"), 64, "meta"),
        (x.long(), 64, "int64"),
    ):
        assert word in choose.unsupported(bad, width)
    monkeypatch.setattr(choose.importlib.metadata, "version", lambda name: "3.1.0")
    monkeypatch.setattr(choose, "triton_missing", choose.triton_missing.__wrapped__)
    assert "3.1.0" in choose.unsupported(x, 64)
