import pytest
import torch
from hypothesis import given, settings

from tests._compare import assert_same_bits
from tests.ops._fused import (
    DEVICE,
    DTYPES,
    INTERPRETING,
    Problem,
    check_backward,
    check_forward,
    flat,
    interpret,
    on_kernels,
    outside,
    problems,
)

pytest.importorskip("triton")
from drifa_attn.ops import triton_mfa  # noqa: E402  (imports triton, which may be missing)

FORWARDS = {"chain": triton_mfa.mfa_forward, "layer-wise": triton_mfa.layerwise_forward}


@outside
def test_everything_passes_in_the_interpreter():
    interpret(__file__)


@on_kernels
@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS)
@settings(max_examples=6)
@given(problem=problems())
def test_forward_errs_at_most_twice_as_much_as_eager(forward, problem):
    check_forward(problem, forward)


@on_kernels
@settings(max_examples=6)
@given(problem=problems())
def test_backward_errs_at_most_three_times_as_much_as_eager(problem):
    check_backward(problem, triton_mfa)


@on_kernels
@pytest.mark.parametrize(("c", "d", "dtype"), [*((64, None, dtype) for dtype in DTYPES), (80, 130, torch.bfloat16)])
def test_widths_of_every_path(c, d, dtype):
    problem = Problem(2, c, 60, d, "nhwc", dtype, 1)
    check_forward(problem, triton_mfa.mfa_forward)
    check_backward(problem, triton_mfa)


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


@on_kernels
@pytest.mark.parametrize("width", [64, 144])
def test_results_are_deterministic_and_do_not_depend_on_the_layout(width):
    inputs = Problem(1, width, 130, None, "nchw", torch.bfloat16, 2).tensors()
    stats, where = triton_mfa.mfa_forward(*inputs)
    first = flat(triton_mfa.mfa_backward(stats, *inputs, stats, where))
    for x in (inputs[0], inputs[0].mT.contiguous().mT):
        again = triton_mfa.mfa_forward(x, *inputs[1:])
        assert_same_bits(again[0], stats)
        assert torch.equal(again[1], where)
        for one, other in zip(first, flat(triton_mfa.mfa_backward(stats, x, *inputs[1:], stats, where)), strict=True):
            assert_same_bits(one.contiguous(), other.contiguous())


@on_kernels
def test_samples_taken_a_few_at_a_time_give_the_same_gradients(monkeypatch):
    problem = Problem(3, 80, 24, None, "nchw", torch.float16, 3)
    inputs = problem.tensors()
    stats, where = triton_mfa.mfa_forward(*inputs)
    whole = flat(triton_mfa.mfa_backward(stats, *inputs, stats, where))
    monkeypatch.setattr(triton_mfa, "sample_chunks", lambda x, d: [slice(0, 2), slice(2, 4)])
    for one, other in zip(whole, flat(triton_mfa.mfa_backward(stats, *inputs, stats, where)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * one.abs().max().item())


@on_kernels
def test_float16_holds_a_squeeze_beyond_its_range():
    x, weights, biases, squeeze, bias = Problem(1, 64, 40, 16, "nhwc", torch.float16, 4).tensors()
    for forward in FORWARDS.values():
        stats, _ = forward(100 * x, [1e-4 * weight for weight in weights], biases, 1e3 * squeeze, bias)
        assert stats.isfinite().all()


@on_kernels
def test_nan_stays_in_its_sample():
    inputs = Problem(2, 32, 50, None, "nchw", torch.bfloat16, 5).tensors()
    expected, _ = triton_mfa.mfa_forward(*inputs)
    inputs[0][0] = torch.nan
    stats, where = triton_mfa.mfa_forward(*inputs)
    assert stats[::2, 0].isnan().all()
    assert_same_bits(stats[:, 1], expected[:, 1])
    assert where.max() < 50


def test_supports_names_its_reasons(monkeypatch):
    from drifa_attn.ops import launch

    x = torch.zeros(2, 64, 49, device=DEVICE if INTERPRETING else "cpu", dtype=torch.bfloat16)
    if not INTERPRETING:
        assert "cpu" in launch.supports(x, 64)
        return
    assert launch.supports(x, 64) is None
    for bad, width, word in (
        (x.double(), 64, "float64"),
        (x[..., :1], 64, "n = 1"),
        (x, 8, "below 16"),
        (x, 5000, "4096"),
        (x[:0], 64, "empty"),
        (x.to("meta"), 64, "meta"),
        (x.long(), 64, "int64"),
    ):
        assert word in launch.supports(bad, width)
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    monkeypatch.setattr(launch.importlib.metadata, "version", lambda name: "3.1.0")
    monkeypatch.setattr(launch, "triton_missing", launch.triton_missing.__wrapped__)
    assert "3.1.0" in launch.supports(x, 64)
