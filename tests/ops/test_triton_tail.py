"""The tail of MFA on the Triton kernels: the gain and every gradient against float64, at any width, with each option."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drifa_attn.ops import chunked
from tests._compare import assert_same_bits
from tests._triton import skip_without_triton
from tests.ops._fused import DEVICE, DTYPES, Problem, assert_no_worse, flat, on_kernels

skip_without_triton()
from drifa_attn.ops import triton  # noqa: E402  (imports triton, which may be missing)


def tail_of(numbers, c, d, measured, alpha):
    """Weights behind the pooling; where c is not d, with an expansion."""
    head = [numbers(d, 2 * d, scale=d**-0.5), numbers(d), numbers(d, d, scale=d**-0.5), numbers(d), numbers(1), numbers(d)]
    spread = [numbers(d), numbers(d).abs() + 0.5, numbers(d), numbers(d).abs() + 0.5] if measured else []
    expand = [] if c == d else [numbers(c, d, scale=d**-0.5), numbers(c)]
    return head, spread, expand, numbers(c) if alpha else None


def as_double(value):
    """Tensors, and lists of them, in float64."""
    if isinstance(value, list | tuple):
        return [as_double(one) for one in value]
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def check(problem, measured, alpha):
    """The gain errs at most twice, gradients three times as much as the chunked operators in the same dtype."""
    inputs = problem.tensors()
    numbers = problem._replace(seed=problem.seed + 7).numbers()
    tail = tail_of(numbers, problem.c, problem.width, measured, alpha)
    gain, stats, where = triton.mfa_gain_forward(*inputs, *tail)
    plain, *_ = chunked.mfa_gain_forward(*inputs, *tail)
    exact, exact_stats, _ = chunked.mfa_gain_forward(*as_double(inputs), *as_double(tail))
    assert gain.dtype == torch.float32
    assert_no_worse(gain, plain, exact, problem.dtype, 2, "gain")
    grad = numbers(*gain.shape)
    found = triton.mfa_gain_backward(grad, *inputs, *tail, stats, where)
    plain = chunked.mfa_gain_backward(grad, *inputs, *tail, stats, where)
    exact = chunked.mfa_gain_backward(grad.double(), *as_double(inputs), *as_double(tail), exact_stats, where)
    assert found[0].stride() == torch.empty_like(inputs[0]).stride()
    for place, values in enumerate(zip(*map(flat, (found, plain, exact)), strict=True)):
        assert_no_worse(*values, problem.dtype, 4, f"gradient {place}")


@on_kernels
@settings(max_examples=6)
@given(
    width=st.sampled_from([(16, None), (24, None), (40, 8), (24, 16), (300, 19), (33, None)]),
    n=st.sampled_from([1, 7, 65, 300]),
    layout=st.sampled_from(["nchw", "nhwc", "sliced"]),
    dtype=st.sampled_from(DTYPES),
    measured=st.booleans(),
    alpha=st.booleans(),
)
def test_gain_and_gradients_err_little_more_than_the_chunked_ones(width, n, layout, dtype, measured, alpha):
    check(Problem(3, width[0], n, width[1], layout, dtype, 11), measured, alpha)


@on_kernels
@pytest.mark.parametrize(("c", "d"), [(128, None), (144, None), (520, 128)])
def test_widths_of_every_path(c, d):
    check(Problem(2, c, 60, d, "nchw", torch.bfloat16, 3), True, True)


@on_kernels
def test_weights_of_other_dtypes_and_strides_are_read_as_they_are():
    """Under autocast the weights are float32 and x is not; a weight may be the transpose of another."""
    x, weights, biases, *squeeze = Problem(2, 40, 50, 16, "nchw", torch.bfloat16, 5).tensors()
    numbers = Problem(2, 40, 50, 16, "nchw", torch.bfloat16, 6).numbers()
    head, _, expand, alpha = tail_of(numbers, 40, 16, False, True)
    expected = triton.mfa_gain_forward(x, weights, biases, *squeeze, head, [], expand, alpha)
    turned = [weight.t().contiguous().t() for weight in weights]
    half = [bias.bfloat16() for bias in biases]
    narrow = triton.mfa_gain_forward(x, [weight.bfloat16() for weight in turned], half, *squeeze, head, [], expand, alpha)
    for actual, one in zip(narrow, expected, strict=True):
        assert_same_bits(actual, one)  # the numbers are those that bfloat16 holds


@on_kernels
def test_the_identity_start_is_one_in_every_bit():
    x, weights, biases, *squeeze = Problem(2, 40, 50, 16, "nchw", torch.bfloat16, 5).tensors()
    head, *_ = tail_of(Problem(2, 40, 50, 16, "nchw", torch.bfloat16, 6).numbers(), 40, 16, False, True)
    zeros, ones = torch.zeros(16, device=DEVICE), torch.ones(16, device=DEVICE)
    expand, alpha = [torch.zeros(40, 16, device=DEVICE), torch.zeros(40, device=DEVICE)], torch.full((40,), 2.0, device=DEVICE)
    gain, *_ = triton.mfa_gain_forward(x, weights, biases, *squeeze, head, [zeros, ones] * 2, expand, alpha)
    assert_same_bits(gain, torch.ones_like(gain))
