"""The product with the gate, `y = x · factor`, and its gradients as Triton kernels."""

import torch
import triton
import triton.language as tl
from einops import rearrange
from torch import Tensor

from drifa_attn.layout import Layout, positions

from . import configs as config
from .common import launch, rounded, strides


@triton.jit
def gate_kernel(
    x,
    factor,
    y,
    n,
    c,
    num_prefix_tokens,
    x_b,
    x_c,
    x_n,
    y_b,
    y_c,
    y_n,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """`y = x · factor` in float32, rounded once, for a block of channels and positions; prefix tokens are copied."""
    blocks = tl.cdiv(c, ROWS)
    tiles = tl.cdiv(n, POSITIONS)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    p = tl.program_id(0) // blocks % tiles * POSITIONS + tl.arange(0, POSITIONS)
    b = (tl.program_id(0) // blocks // tiles).to(tl.int64)
    mask = (row < c)[:, None] & (p < n)[None, :]
    value = tl.load(x + b * x_b + row[:, None] * x_c + p[None, :] * x_n, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(factor + b * c + row, mask=row < c, other=0.0)
    value = tl.where((p < num_prefix_tokens)[None, :], value, value * m[:, None])
    tl.store(y + b * y_b + row[:, None] * y_c + p[None, :] * y_n, rounded(value, y.dtype.element_ty), mask=mask)


@triton.jit
def gate_back_kernel(
    dy,
    x,
    factor,
    dx,
    parts,
    n,
    c,
    num_prefix_tokens,
    dy_b,
    dy_c,
    dy_n,
    x_b,
    x_c,
    x_n,
    dx_b,
    dx_c,
    dx_n,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    TILES: tl.constexpr,
):
    """`dx = dy · factor` (dy for prefix tokens), and the sum of `dy · x` over TILES tiles to `parts` (`b chunks c`)."""
    blocks = tl.cdiv(c, ROWS)
    chunks = tl.cdiv(n, POSITIONS * TILES)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    chunk = tl.program_id(0) // blocks % chunks
    b = (tl.program_id(0) // blocks // chunks).to(tl.int64)
    m = tl.load(factor + b * c + row, mask=row < c, other=0.0)
    total = tl.zeros((ROWS, POSITIONS), tl.float32)
    for tile in range(TILES):
        p = (chunk * TILES + tile) * POSITIONS + tl.arange(0, POSITIONS)
        mask = (row < c)[:, None] & (p < n)[None, :]
        gated = (p >= num_prefix_tokens)[None, :]
        g = tl.load(dy + b * dy_b + row[:, None] * dy_c + p[None, :] * dy_n, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(x + b * x_b + row[:, None] * x_c + p[None, :] * x_n, mask=mask & gated, other=0.0).to(tl.float32)
        total += tl.where(gated, g * value, 0.0)
        g = tl.where(gated, g * m[:, None], g)
        tl.store(dx + b * dx_b + row[:, None] * dx_c + p[None, :] * dx_n, rounded(g, dx.dtype.element_ty), mask=mask)
    tl.store(parts + (b * chunks + chunk) * c + row, tl.sum(total, 1), mask=row < c)


def gate_forward(x: Tensor, factor: Tensor, layout: Layout, num_prefix_tokens: int) -> Tensor:
    """`y = x · factor`, in the dtype of x, rounded once; the prefix tokens of `y` are those of x.

    Shape: x of the layout, of any strides, factor `b c` float32 -> y as x, in the memory order of x.
    """
    out, x = torch.empty_like(x), positions(x, layout)
    (b, c, n), y = x.shape, positions(out, layout)
    tile = config.gate(x)
    launch(
        gate_kernel,
        b * triton.cdiv(n, tile.positions) * triton.cdiv(c, tile.rows),
        x,
        x=x,
        factor=factor.contiguous(),
        y=y,
        n=n,
        c=c,
        num_prefix_tokens=num_prefix_tokens,
        **strides("x", x),
        **strides("y", y),
        ROWS=tile.rows,
        POSITIONS=tile.positions,
        num_warps=tile.warps,
    )
    return written(y, out, layout)


def gate_backward(dy: Tensor, x: Tensor, factor: Tensor, layout: Layout, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """The gradients of `gate_forward`: `dx = dy · factor` and `dfactor = Σ_n dy · x` (float32), in one pass over dy and x."""
    out, dy, x = torch.empty_like(x), positions(dy, layout), positions(x, layout)
    (b, c, n), dx = x.shape, positions(out, layout)
    tile = config.gate(x)
    chunks = triton.cdiv(n, tile.positions * tile.tiles)
    parts = x.new_empty(b, chunks, c, dtype=torch.float32)
    launch(
        gate_back_kernel,
        b * chunks * triton.cdiv(c, tile.rows),
        x,
        dy=dy,
        x=x,
        factor=factor.contiguous(),
        dx=dx,
        parts=parts,
        n=n,
        c=c,
        num_prefix_tokens=num_prefix_tokens,
        **strides("dy", dy),
        **strides("x", x),
        **strides("dx", dx),
        ROWS=tile.rows,
        POSITIONS=tile.positions,
        TILES=tile.tiles,
        num_warps=tile.warps,
    )
    return written(dx, out, layout), parts.sum(1)


def written(y: Tensor, out: Tensor, layout: Layout) -> Tensor:
    """`out`, with the values of its positions `y`: they share memory, unless the strides of `out` allow no view."""
    if y.data_ptr() == out.data_ptr():
        return out
    return out.copy_((y if layout == "b c ..." else rearrange(y, "b c n -> b n c")).view(out.shape))
