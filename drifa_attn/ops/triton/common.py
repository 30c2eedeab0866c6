"""The parts that all Triton kernels share.

The rows of a tile are channels and its columns are positions, so that each thread pools on its own. When this file imports
triton, triton decides between its compiler and its interpreter for the rest of the process.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from drifa_attn.ops import choose
from drifa_attn.ops.choose import interpreting

INTERPRET = tl.constexpr(interpreting())
NOWHERE = tl.constexpr(2**31 - 1)


def launch(kernel: Any, programs: int, device_of: Tensor, **arguments: Any) -> None:
    """Run `programs` programs of `kernel` on the device of `device_of`.

    A product may be fused with the sum that follows it. This is stated here because the default of the compiler will change.
    """
    with torch.cuda.device_of(device_of):
        kernel[(programs,)](**arguments, enable_fp_fusion=True)


def strides(name: str, t: Tensor) -> dict[str, int]:
    """The strides of `t` as kernel arguments."""
    return {f"{name}_{axis}": stride for axis, stride in zip("bcn", t.stride(), strict=True)}


def named(names: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Weights as kernel arguments, each in its own memory and dtype: a kernel casts and pads what it loads."""
    return {name: t.contiguous() for name, t in zip(names.split(), tensors, strict=True)}


def precision() -> str:
    """How float32 operands are multiplied: exactly, unless PyTorch's switch allows TF32. The interpreter always is exact."""
    return "tf32" if choose.tf32_allowed() and not interpreting() else "ieee"


@triton.jit
def sigmoid(z):
    """σ in float32, by one exponential and one approximate reciprocal (1 ulp)."""
    e = 1.0 + tl.exp(-z)
    if INTERPRET:
        return 1.0 / e
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [e], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """`total + a b`, summed in float32; two dtypes are multiplied in float32. The interpreter has no bfloat16 product."""
    if INTERPRET:
        return total + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    elif a.dtype == b.dtype:
        return tl.dot(a, b, total, input_precision=PRECISION)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=PRECISION)


@triton.jit
def rounded(t, dtype: tl.constexpr):
    """Float32 `t` in `dtype`, rounded to nearest even. The interpreter truncates to bfloat16, so this rounds by hand there."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = t.to(tl.int32, bitcast=True)
        t = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return t.to(dtype)


@triton.jit
def peak(t, ok, p):
    """The maximum of each row over the positions `p` that are `ok`, and its first position."""
    t = tl.where(ok, t, float("-inf"))
    top = tl.max(t, 1)
    return top, tl.min(tl.where(t == top[:, None], p[None, :], NOWHERE), 1)


@triton.jit
def higher(top, at, new_top, new_at):
    """The higher of two maxima and its position; if they are equal, the first one, which has the earlier position."""
    return tl.maximum(top, new_top), tl.where(new_top > top, new_at, at)


@triton.jit
def pull(total, everywhere, vectors, positions, b, p, PULLS: tl.constexpr, width, row):
    """`total` plus the gradients of pooled vectors of sample b: `everywhere` (`b width`), and PULLS `vectors` at one position.

    vectors and positions are `b PULLS width`: the gradient of a maximum goes to the one position of that maximum.
    """
    if everywhere is not None:
        total += tl.load(everywhere + b * width + row, mask=row < width, other=0.0)[:, None]
    for k in tl.static_range(PULLS):
        at = tl.load(positions + (b * PULLS + k) * width + row, mask=row < width, other=-1)
        gradient = tl.load(vectors + (b * PULLS + k) * width + row, mask=row < width, other=0.0)
        total += tl.where(at[:, None] == p[None, :], gradient[:, None], 0.0)
    return total


@triton.jit
def weight_tile(
    weight, zero, stride, dtype: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    """A weight of ROWS rows and COLUMNS columns as a tile `R C` in `dtype`; the padding is zero.

    `zero` is 0, which the compiler cannot know. Otherwise it would move the load out of a loop, and spill.
    """
    row, column = tl.arange(0, R)[:, None], tl.arange(0, C)[None, :]
    if ROWS == R and COLUMNS == C:
        w = tl.load(weight + zero + row * stride + column)
    else:
        w = tl.load(weight + zero + row * stride + column, mask=(row < ROWS) & (column < COLUMNS), other=0.0)
    if w.dtype == dtype:
        return w
    else:
        return rounded(w.to(tl.float32), dtype)


@triton.jit
def vector(values, zero, WIDTH: tl.constexpr, D: tl.constexpr):
    """WIDTH values in float32, as a tile of D; the padding is zero. `zero` as in `weight_tile`."""
    row = tl.arange(0, D)
    if WIDTH == D:
        return tl.load(values + zero + row).to(tl.float32)
    else:
        return tl.load(values + zero + row, mask=row < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def total_of(parts, b, chunks, s: tl.constexpr, STATS: tl.constexpr, row, width, padded, CHUNKS: tl.constexpr):
    """The sum of statistic `s` of sample b over its chunks, in their order: of `b chunks STATS padded`, the channels `row`."""
    total = tl.zeros(row.shape, tl.float32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        mask = (chunk < chunks)[None, :] & (row < width)[:, None]
        total += tl.sum(
            tl.load(parts + ((b * chunks + chunk[None, :]) * STATS + s) * padded + row[:, None], mask=mask, other=0.0), 1
        )
    return total


@triton.jit
def peak_of(
    parts,
    spots,
    b,
    chunks,
    s: tl.constexpr,
    k: tl.constexpr,
    STATS: tl.constexpr,
    PEAKS: tl.constexpr,
    row,
    width,
    padded,
    CHUNKS: tl.constexpr,
):
    """The maximum over its chunks of statistic `s` of sample b, maximum number `k`, and its first position."""
    top = tl.full(row.shape, float("-inf"), tl.float32)
    at = tl.zeros(row.shape, tl.int32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        mask = (chunk < chunks)[None, :] & (row < width)[:, None]
        place = b * chunks + chunk[None, :]
        values = tl.load(parts + (place * STATS + s) * padded + row[:, None], mask=mask, other=float("-inf"))
        positions = tl.load(spots + (place * PEAKS + k) * padded + row[:, None], mask=mask, other=NOWHERE)
        new_top = tl.max(values, 1)
        top, at = higher(top, at, new_top, tl.min(tl.where(values == new_top[:, None], positions, NOWHERE), 1))
    return top, at


@triton.constexpr_function
def bit(bits, s):
    """Whether bit `s` is set."""
    return bits >> s & 1 == 1


@triton.constexpr_function
def ones_below(bits, s):
    """How many of the lowest `s` bits are set."""
    return (bits & ((1 << s) - 1)).bit_count()


@triton.jit
def finish_kernel(
    parts,
    spots,
    stats,
    where,
    chunks,
    samples,
    n,
    width,
    padded,
    STATS: tl.constexpr,
    PEAKS: tl.constexpr,
    PEAK_BITS: tl.constexpr,
    NEGATED_BITS: tl.constexpr,
    SIGMOID_BITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Reduce the partial results of the chunks of a sample in a fixed order: `b chunks STATS padded` -> `STATS b width`.

    Bit s of PEAK_BITS says that statistic s is a maximum with a position (else a sum, to become a mean), of NEGATED_BITS
    that it is the maximum of the negative, of SIGMOID_BITS that σ follows. PEAKS is the number of maxima.
    """
    blocks = tl.cdiv(width, ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    inside = row < width
    for s in tl.static_range(STATS):
        if bit(PEAK_BITS, s):
            value, at = peak_of(parts, spots, b, chunks, s, ones_below(PEAK_BITS, s), STATS, PEAKS, row, width, padded, CHUNKS)
            if bit(NEGATED_BITS, s):
                value = -value
            # if all values are NaN, no position has the maximum
            tl.store(where + (ones_below(PEAK_BITS, s) * samples + b) * width + row, tl.minimum(at, n - 1), mask=inside)
        else:
            value = total_of(parts, b, chunks, s, STATS, row, width, padded, CHUNKS) / n
        if bit(SIGMOID_BITS, s):
            value = sigmoid(value)
        tl.store(stats + (s * samples + b) * width + row, value, mask=inside)


class Pools(NamedTuple):
    """The statistics of a pass over positions: `stats` is their number, and the bits say what each is (see `finish_kernel`)."""

    stats: int
    peaks: int
    negated: int
    sigmoids: int

    @property
    def spots(self) -> int:
        return self.peaks.bit_count()


def partials(x: Tensor, pools: Pools, chunks: int, padded: int) -> tuple[Tensor, Tensor]:
    """Empty memory for the sums and maxima of each chunk of positions, and for the positions of the maxima."""
    parts = x.new_empty(x.shape[0], chunks, pools.stats, padded, dtype=torch.float32)
    return parts, x.new_empty(x.shape[0], chunks, pools.spots, padded, dtype=torch.int32)


def finish(x: Tensor, pools: Pools, parts: Tensor, spots: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The statistics `s b width` in float32 and the positions of the maxima, from the partial results of the chunks."""
    b, chunks, _, padded = parts.shape
    stats = x.new_empty(pools.stats, b, width, dtype=torch.float32)
    where = x.new_empty(pools.spots, b, width, dtype=torch.int32)
    rows = 64
    launch(
        finish_kernel,
        b * triton.cdiv(width, rows),
        x,
        parts=parts,
        spots=spots,
        stats=stats,
        where=where,
        chunks=chunks,
        samples=b,
        n=x.shape[2],
        width=width,
        padded=padded,
        STATS=pools.stats,
        PEAKS=pools.spots,
        PEAK_BITS=pools.peaks,
        NEGATED_BITS=pools.negated,
        SIGMOID_BITS=pools.sigmoids,
        CHUNKS=32,
        ROWS=rows,
        num_warps=4,
    )
    return stats, where
