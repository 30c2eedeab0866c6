"""The chunked operators against float64, in every dtype; maxima are read where the operator found them, as ties may differ."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from drifa_attn.ops import chunked
from tests.ops._fused import check_backward, check_forward, check_mifa, problems

DTYPE = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
CHUNK = st.sampled_from([2**20, 64])  # many parts of one sample


@given(problem=problems(), dtype=DTYPE, chunk=CHUNK)
def test_mfa_errs_little_more_than_the_reference(problem, dtype, chunk):
    problem = problem._replace(dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "CHUNK", chunk)
        check_forward(problem, chunked.mfa_forward)
        check_backward(problem, chunked)


@given(problem=problems(), dtype=DTYPE, chunk=CHUNK, masked=st.booleans())
def test_mifa_errs_little_more_than_the_reference(problem, dtype, chunk, masked):
    assume(dtype == torch.float32 or problem.b * problem.c * problem.n >= 16)  # with few numbers the reference may be lucky
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "CHUNK", chunk)
        check_mifa(problem._replace(dtype=dtype), chunked, masked=masked)
