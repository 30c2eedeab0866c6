"""Where channels and positions are, and what is refused."""

import math

import pytest
import torch
from hypothesis import given

from drifa_attn.layout import check_features, check_layout, positions, scale
from tests import strategies
from tests._compare import assert_same_bits

FIRST, LAST = "b c ...", "b ... c"


@pytest.mark.parametrize(
    ("shape", "layout", "prefix", "expected"),
    [
        ((2, 3), FIRST, 0, (2, 3, 1)),
        ((2, 3, 4), FIRST, 0, (2, 3, 4)),
        ((2, 3, 4, 5), FIRST, 0, (2, 3, 20)),
        ((2, 3, 4, 5, 6), FIRST, 0, (2, 3, 120)),
        ((2, 3), LAST, 0, (2, 3, 1)),
        ((2, 4, 3), LAST, 0, (2, 3, 4)),
        ((2, 4, 3), LAST, 1, (2, 3, 3)),
        ((2, 4, 5, 3), LAST, 0, (2, 3, 20)),
        ((0, 3, 4, 5), FIRST, 0, (0, 3, 20)),
    ],
)
def test_positions_are_one_axis_in_row_major_order(shape, layout, prefix, expected, device):
    """Every feature holds its own index; the indices of channel 0 must come in their order, and channels side by side."""
    x = torch.arange(math.prod(shape), device=device).view(shape)
    z = positions(x, layout, prefix)
    assert z.shape == expected
    between_channels = x.stride(1) if layout == FIRST else 1
    between_positions = 1 if layout == FIRST else shape[-1]
    start = x.stride(0) * torch.arange(shape[0], device=device)[:, None, None] + prefix * between_positions
    of_channels = between_channels * torch.arange(expected[1], device=device)[:, None]
    assert torch.equal(z, start + of_channels + between_positions * torch.arange(expected[2], device=device))


@given(strategies.features())
def test_positions_are_the_features_in_their_order(features):
    expected = features.positions().reshape(features.x.shape[0], features.channels, -1)
    assert_same_bits(positions(features.x, features.layout, features.num_prefix_tokens), expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_positions_copy_no_dense_map(memory_format, device):
    x = torch.randn(2, 3, 4, 5, device=device).to(memory_format=memory_format)
    assert positions(x, FIRST).data_ptr() == x.data_ptr()
    tokens = torch.randn(2, 6, 3, device=device)
    assert positions(tokens, LAST, 1).data_ptr() == tokens[:, 1:].data_ptr()


@given(strategies.features(), strategies.SEEDS)
def test_scale_multiplies_positions_and_nothing_else(features, seed):
    x, layout, prefix = features.x, features.layout, features.num_prefix_tokens
    factor = torch.randn(x.shape[0], features.channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y = scale(x, factor, layout, prefix)
    assert_same_bits(positions(y, layout, prefix), positions(x, layout, prefix) * factor[..., None])
    if prefix:
        assert_same_bits(y[:, :prefix], x[:, :prefix])


@given(strategies.features(), strategies.DTYPES)
def test_scale_keeps_dtype_and_strides(features, dtype):
    x = features.x.to(dtype)
    y = scale(x, torch.ones(x.shape[0], features.channels, dtype=torch.float32), features.layout, features.num_prefix_tokens)
    assert y.dtype == dtype
    kept = torch.empty_like(x, memory_format=torch.preserve_format)  # the strides of x where it is dense
    assert [s for s, n in zip(y.stride(), y.shape, strict=True) if n > 1] == [
        s for s, n in zip(kept.stride(), kept.shape, strict=True) if n > 1
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("layout", "prefix"), [(FIRST, 0), (LAST, 0), (LAST, 2)])
def test_scale_rounds_once(dtype, layout, prefix, device):
    """A gain near 1 is 1 in half precision: rounded before the product, it would be lost."""
    x = torch.randn(2, 8, 8).to(device, dtype)
    factor = 1 + torch.randn(2, 8).to(device) / 256
    expected = positions(x, layout, prefix).float() * factor[..., None]
    assert_same_bits(positions(scale(x, factor, layout, prefix), layout, prefix), expected.to(dtype))


def test_scale_leaves_non_finite_prefix_tokens_alone(device):
    x = torch.randn(2, 5, 3, device=device)
    x[0, 0], x[1, 1, 2] = math.nan, math.inf
    x.requires_grad_()
    factor = torch.randn(2, 3, device=device, requires_grad=True)
    y = scale(x, factor, LAST, 2)
    assert_same_bits(y[:, :2], x[:, :2])
    grads = torch.autograd.grad(y[:, 2:].sum(), (x, factor))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize(
    ("layout", "prefix", "message"),
    [
        ("b h w c", 0, r'MFA expected layout "b c \.\.\." or "b \.\.\. c", got \'b h w c\''),
        (None, 0, "got None"),
        (LAST, -1, r"num_prefix_tokens to be an integer >= 0 .*got -1\."),
        (LAST, True, "got True"),
        (LAST, 1.0, r"got 1\.0"),
        (FIRST, 2, r'got num_prefix_tokens=2 with layout "b c \.\.\."'),
    ],
)
def test_layout_is_checked(layout, prefix, message):
    with pytest.raises(ValueError, match=message):
        check_layout("MFA", layout, prefix)


@pytest.mark.parametrize(
    ("x", "layout", "prefix", "kind", "message"),
    [
        ([1.0], FIRST, 0, TypeError, "MFA expected a tensor, got list"),
        (None, FIRST, 0, TypeError, "got NoneType"),
        (torch.zeros(2, 3, 4, dtype=torch.int64), FIRST, 0, TypeError, r"got torch\.int64: convert it"),
        (torch.zeros(2, 3, 4, dtype=torch.complex64), FIRST, 0, TypeError, r"got torch\.complex64"),
        (torch.zeros(2, 4, 5), FIRST, 0, ValueError, r'"b c \.\.\." with c=3, got \(2, 4, 5\).*axis 1'),
        (torch.zeros(2, 3, 4), LAST, 0, ValueError, r'"b \.\.\. c" with c=3, got \(2, 3, 4\).*axis -1'),
        (torch.zeros(3), FIRST, 0, ValueError, r"got \(3,\)"),
        (torch.zeros(()), LAST, 0, ValueError, r"got \(\)"),
        (torch.zeros(2, 3, 0), FIRST, 0, ValueError, r"at least one position, got \(2, 3, 0\)"),
        (torch.zeros(2, 0, 4, 3), LAST, 0, ValueError, r"at least one position, got \(2, 0, 4, 3\)"),
        (torch.zeros(2, 2, 3), LAST, 2, ValueError, r"after 2 prefix tokens \(b n c\), got \(2, 2, 3\)"),
        (torch.zeros(2, 4, 4, 3), LAST, 1, ValueError, r"after 1 prefix tokens \(b n c\), got \(2, 4, 4, 3\)"),
        (torch.zeros(2, 3), LAST, 1, ValueError, r"got \(2, 3\)"),
    ],
)
def test_features_are_checked(x, layout, prefix, kind, message):
    with pytest.raises(kind, match=message):
        check_features("MFA", x, 3, layout, prefix)
