import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests._compare import assert_same_bits
from tests.ops._fused import (
    DEVICE,
    DTYPES,
    Problem,
    assert_no_worse,
    at,
    flat,
    gradients,
    interpret,
    lin,
    on_kernels,
    outside,
    problems,
)

pytest.importorskip("triton")
from drifa_attn.ops import triton_mifa  # noqa: E402  (imports triton, which may be missing)


def maps(x, weight, bias, squeeze_weight, squeeze_bias, present):
    """z, and t before σ; an absent sample is zeros."""
    x = x if present is None else torch.where(present[:, None, None], x, 0)
    z = x if squeeze_weight is None else lin(squeeze_weight, squeeze_bias, x)
    return z, lin(weight, bias, z)


def equations(where):
    """The six statistics, the extrema read where the kernel found them."""

    def stats(*inputs):
        z, t = maps(*inputs)
        wide = torch.promote_types(z.dtype, torch.float32)
        low_t, top_t = at(t, where[2]).sigmoid(), at(t, where[3]).sigmoid()
        vectors = (at(z, where[0]), z.mean(2), at(z, where[1]), low_t, t.sigmoid().mean(2), top_t)
        return torch.stack([vector.to(wide) for vector in vectors])

    return stats


def check(problem, masked):
    x, [weight, *_], [bias, *_], *squeeze = problem.tensors()
    present = None
    if masked:
        present = torch.arange(problem.b, device=DEVICE) % 2 == 0
        x[~present] = torch.nan
    inputs = (x, weight, bias, *squeeze, present)
    assert triton_mifa.supports(x, problem.width) is None
    stats, where = triton_mifa.mifa_forward(*inputs)
    assert (stats.dtype, where.dtype) == (torch.float32, torch.int32)
    z, t = maps(*(i if i is None or i.dtype == torch.bool else i.double() for i in inputs))
    low_t, top_t = t.amin(2).sigmoid(), t.amax(2).sigmoid()
    exact = torch.stack([z.amin(2), z.mean(2), z.amax(2), low_t, t.sigmoid().mean(2), top_t])
    grads = problem.numbers(*stats.shape)
    eager, eager_grads = gradients(equations(where), inputs, grads, problem.dtype)
    for half, name in ((slice(0, 3), "z"), (slice(3, 6), "t")):
        assert_no_worse(stats[half], eager[half], exact[half], problem.dtype, 2, f"stats of {name}")
        found = equations(where)(*(i if i is None or i.dtype == torch.bool else i.double() for i in inputs))
        assert_no_worse(found[half], eager[half], exact[half], problem.dtype, 4, f"where of {name}")
    results = triton_mifa.mifa_backward(grads, *inputs, stats, where)
    assert results[0].stride() == torch.empty_like(x).stride()
    _, exact_grads = gradients(equations(where), inputs, grads, torch.float64)
    for place, values in enumerate(zip(flat(results), eager_grads, exact_grads, strict=True)):
        assert_no_worse(*values, problem.dtype, 3, f"gradient {place}")


@outside
def test_everything_passes_in_the_interpreter():
    interpret(__file__)


@on_kernels
@settings(max_examples=5)
@given(problem=problems(), masked=st.booleans())
def test_statistics_and_gradients_err_little_more_than_eager(problem, masked):
    check(problem, masked)


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_width_of_two_blocks(dtype):
    check(Problem(2, 144, 70, None, "nchw", dtype, 1), True)


@on_kernels
def test_first_of_tied_positions_wins_and_absent_samples_are_not_read():
    x, [weight, *_], [bias, *_], *_ = Problem(2, 32, 300, None, "nchw", torch.bfloat16, 0).tensors()
    x, weight = (4 * x).round(), (8 * weight).round()  # sums without rounding: alike, in whatever order
    x[0] = x[0, :, :1]
    x[1] = torch.nan
    present = torch.tensor([True, False], device=DEVICE)
    stats, where = triton_mifa.mifa_forward(x, weight, bias, None, None, present)
    assert not where.any()
    assert not stats[:3, 1].any()
    again, _ = triton_mifa.mifa_forward(x, weight, bias, None, None, present)
    assert_same_bits(again, stats)
