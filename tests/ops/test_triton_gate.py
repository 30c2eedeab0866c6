"""The Triton kernels of the gate: one product, rounded once, and its gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests._compare import assert_same_bits
from tests._triton import skip_without_triton
from tests.ops._fused import DEVICE, assert_no_worse, on_kernels, stored

skip_without_triton()
from drifa_attn.ops import triton  # noqa: E402  (imports triton, which may be missing)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def problem(b, c, n, prefix, layout, dtype, seed):
    """x and dy (`b n c`, the layout of tokens), the factor, and the factor at every position."""
    generator = torch.Generator().manual_seed(seed)
    x, dy = (stored(torch.randn(b, c, n, generator=generator).to(dtype).to(DEVICE), layout).mT for _ in range(2))
    factor = (torch.rand(b, c, generator=generator) + 0.5).to(DEVICE)
    everywhere = factor[:, None].repeat(1, n, 1)
    everywhere[:, :prefix] = 1
    return x, dy, factor, everywhere


@on_kernels
@settings(max_examples=8)
@given(
    b=st.integers(1, 3),
    c=st.sampled_from([1, 7, 64, 129, 130]),
    n=st.sampled_from([1, 7, 49, 130]),
    prefix=st.integers(0, 2),
    layout=st.sampled_from(["nchw", "nhwc", "sliced"]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_gate_is_one_product_rounded_once(b, c, n, prefix, layout, dtype, seed):
    x, dy, factor, everywhere = problem(b, c, n, prefix, layout, dtype, seed)
    y = triton.gate_forward(x, factor, "b ... c", prefix)
    dx, d_factor = triton.gate_backward(dy, x, factor, "b ... c", prefix)
    assert y.stride() == dx.stride() == torch.empty_like(x).stride()
    assert_same_bits(y, (x.float() * everywhere).to(dtype))
    assert_same_bits(dx, (dy.float() * everywhere).to(dtype))
    assert d_factor.dtype == torch.float32
    exact = (dy.double() * x.double())[:, prefix:].sum(1)
    reference = (dy.float() * x.float())[:, prefix:].sum(1)
    assert_no_worse(d_factor, reference, exact, torch.float32, 3, "dfactor")


@on_kernels
def test_gradient_of_another_layout_than_x():
    x, dy, factor, everywhere = problem(2, 64, 50, 0, "nchw", torch.bfloat16, 0)
    dx, _ = triton.gate_backward(dy.contiguous(), x, factor, "b ... c", 0)
    assert_same_bits(dx, (dy.float() * everywhere).to(x.dtype))


@on_kernels
def test_factor_one_changes_no_bit():
    x, *_ = problem(2, 33, 130, 0, "nhwc", torch.float16, 1)
    assert_same_bits(triton.gate_forward(x, torch.ones(2, 33, device=DEVICE), "b ... c", 0), x)


MEMORY = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "cropped": lambda x: x.to(memory_format=torch.channels_last)[:, :, 1:, 1:],  # has no view as `b c n`
    "transposed": lambda x: x.mT,  # nor has a result with these strides
}


@on_kernels
@pytest.mark.parametrize("stored", MEMORY.values(), ids=MEMORY)
def test_maps_keep_their_memory_format(stored):
    x, factor = stored(torch.randn(2, 7, 5, 3, device=DEVICE)), torch.rand(2, 7, device=DEVICE)
    y, (dx, _) = triton.gate_forward(x, factor, "b c ...", 0), triton.gate_backward(x, x, factor, "b c ...", 0)
    assert y.stride() == dx.stride() == torch.empty_like(x).stride()
    assert_same_bits(y, x * factor[..., None, None])
    assert_same_bits(dx, y)
