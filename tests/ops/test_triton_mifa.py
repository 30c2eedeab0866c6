"""The Triton kernels of MIFA against float64, and what they promise about ties and absent samples."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests._compare import assert_same_bits
from tests._triton import skip_without_triton
from tests.ops._fused import DEVICE, DTYPES, Problem, check_mifa, on_kernels, problems

skip_without_triton()
from drifa_attn.ops import triton  # noqa: E402  (imports triton, which may be missing)


@on_kernels
@settings(max_examples=5)
@given(problem=problems(), masked=st.booleans())
def test_statistics_and_gradients_err_little_more_than_the_reference(problem, masked):
    check_mifa(problem, triton, masked=masked)


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_width_of_two_blocks(dtype):
    check_mifa(Problem(2, 144, 70, None, "nchw", dtype, 1), triton, masked=True)


@on_kernels
def test_first_of_tied_positions_wins_and_absent_samples_are_not_read():
    x, [weight, *_], [bias, *_], *_ = Problem(2, 32, 300, None, "nchw", torch.bfloat16, 0).tensors()
    x, weight = (4 * x).round(), (8 * weight).round()  # sums without rounding: alike, in whatever order
    x[0] = x[0, :, :1]
    x[1] = torch.nan
    present = torch.tensor([True, False], device=DEVICE)
    stats, where = triton.mifa_forward(x, weight, bias, None, None, present)
    assert not where.any()
    assert not stats[:3, 1].any()
    again, _ = triton.mifa_forward(x, weight, bias, None, None, present)
    assert_same_bits(again, stats)
