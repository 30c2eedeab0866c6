"""The last steps of MFA as one Triton kernel, from the partial results of the chain to the gain: see `ops.tail`.

Everything here is a vector of one sample, in float32. A product of a weight and a vector is a sum over a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from drifa_attn.ops.tail import Tail

from . import configs as config
from .common import launch, named, peak_of, sigmoid, total_of, vector, weight_tile

CHUNKS = 16  # of the partial results, added at a time
TILE = 8192  # elements of a tile of expand
PROGRAMS = 4  # for one sample, at most: each computes what all channels share again


@triton.jit
def exact_sigmoid(z):
    """σ with a division that is rounded, so that σ(0) is ½ in every bit: the start passes features on unchanged."""
    return tl.div_rn(1.0, 1.0 + tl.exp(-z))


@triton.jit
def times(w, v):
    """`W v`."""
    return tl.sum(w * v[None, :], 1)


@triton.jit
def head_of(u, v, p, dense, dense_bias, conv2, conv2_bias, WIDTH: tl.constexpr, D: tl.constexpr):
    """`G = σ(lin(dense, [u ; v]))`, and `q = σ(lin(conv2, p))`, with which L = p + q."""
    left = weight_tile(dense, 0, 2 * WIDTH, tl.float32, WIDTH, WIDTH, D, D)
    total = times(left, u)
    right = weight_tile(dense + WIDTH, 0, 2 * WIDTH, tl.float32, WIDTH, WIDTH, D, D)
    total += times(right, v)
    local = times(weight_tile(conv2, 0, WIDTH, tl.float32, WIDTH, WIDTH, D, D), p)
    return exact_sigmoid(total + vector(dense_bias, 0, WIDTH, D)), exact_sigmoid(local + vector(conv2_bias, 0, WIDTH, D))


@triton.jit
def deviation(spread, WIDTH: tl.constexpr, D: tl.constexpr):
    """The spread of each channel; that of the padding is one."""
    return tl.where(tl.arange(0, D) < WIDTH, vector(spread, 0, WIDTH, D), 1.0)


@triton.jit
def standardised(info, center, spread, WIDTH: tl.constexpr, D: tl.constexpr):
    """`(info − center) / spread`; without statistics, info."""
    if center is None:
        return info
    else:
        return tl.div_rn(info - vector(center, 0, WIDTH, D), deviation(spread, WIDTH, D))


@triton.jit
def tail_kernel(
    parts,
    spots,
    dense,
    dense_bias,
    conv2,
    conv2_bias,
    global_scale,
    local_scale,
    global_center,
    global_spread,
    local_center,
    local_spread,
    expand,
    expand_bias,
    alpha,
    stats,
    where,
    gain,
    chunks,
    samples,
    n,
    c,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The five statistics of a sample, the positions of its maxima, and the gain of BLOCKS blocks of ROWS of its channels.

    parts `b chunks 5 D`, spots `b chunks 2 D` -> stats `5 b WIDTH`, where `2 b WIDTH`, gain `b c`. Without `expand`, c is WIDTH
    and ROWS is D.
    """
    programs = tl.cdiv(c, ROWS * BLOCKS)
    b = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs
    row = tl.arange(0, D)
    h1 = total_of(parts, b, chunks, 0, 5, row, WIDTH, D, CHUNKS) / n
    top2, at2 = peak_of(parts, spots, b, chunks, 1, 0, 5, 2, row, WIDTH, D, CHUNKS)
    h3 = total_of(parts, b, chunks, 2, 5, row, WIDTH, D, CHUNKS) / n
    top4, at4 = peak_of(parts, spots, b, chunks, 3, 1, 5, 2, row, WIDTH, D, CHUNKS)
    p = total_of(parts, b, chunks, 4, 5, row, WIDTH, D, CHUNKS) / n
    h2, h4 = sigmoid(top2), sigmoid(top4)
    mine = (row < WIDTH) & (program == 0)
    there = stats + b * WIDTH + row
    tl.store(there, h1, mask=mine)
    tl.store(there + samples * WIDTH, h2, mask=mine)
    tl.store(there + 2 * samples * WIDTH, h3, mask=mine)
    tl.store(there + 3 * samples * WIDTH, h4, mask=mine)
    tl.store(there + 4 * samples * WIDTH, p, mask=mine)
    # if all values are NaN, no position has the maximum
    tl.store(where + b * WIDTH + row, tl.minimum(at2, n - 1), mask=mine)
    tl.store(where + (samples + b) * WIDTH + row, tl.minimum(at4, n - 1), mask=mine)
    info, q = head_of(h1 + h2, h3 + h4, p, dense, dense_bias, conv2, conv2_bias, WIDTH, D)
    above = standardised(info, global_center, global_spread, WIDTH, D)
    below = standardised(p + q, local_center, local_spread, WIDTH, D)
    s = tl.load(global_scale).to(tl.float32) * above + vector(local_scale, 0, WIDTH, D) * below
    for block in tl.static_range(BLOCKS):
        channel = (program * BLOCKS + block) * ROWS + tl.arange(0, ROWS)
        if expand is None:
            z = s
        else:
            mask = (channel < c)[:, None] & (row < WIDTH)[None, :]
            e = tl.load(expand + channel[:, None] * WIDTH + row[None, :], mask=mask, other=0.0).to(tl.float32)
            z = times(e, s) + tl.load(expand_bias + channel, mask=channel < c, other=0.0).to(tl.float32)
        a = exact_sigmoid(z)
        if alpha is not None:
            a *= tl.load(alpha + channel, mask=channel < c, other=0.0).to(tl.float32)
        tl.store(gain + b * c + channel, a, mask=channel < c)


def tail_arguments(tail: Tail) -> dict[str, Tensor | None]:
    """The weights behind the pooling as kernel arguments; what is missing is None."""
    maybe: dict[str, Tensor | None] = dict.fromkeys("global_center global_spread local_center local_spread".split())
    maybe |= dict.fromkeys(("expand", "expand_bias"))
    if tail.measured:
        maybe |= named("global_center global_spread local_center local_spread", tail.measured)
    if tail.expand:
        maybe |= named("expand expand_bias", tail.expand)
    alpha = None if tail.alpha is None else tail.alpha.contiguous()
    return {**named("dense dense_bias conv2 conv2_bias global_scale local_scale", tail.head), **maybe, "alpha": alpha}


def tail_forward(x: Tensor, parts: Tensor, spots: Tensor, tail: Tail) -> tuple[Tensor, Tensor, Tensor]:
    """The gain `b c` of features x `b c n`, the statistics `5 b d` and the positions of the maxima `2 b d`, in one launch."""
    (b, c, n), d, (_, chunks, _, padded) = x.shape, tail.head[1].shape[0], parts.shape
    rows = min(TILE // padded, config.power_of_two(c)) if tail.expand else padded
    blocks = triton.cdiv(triton.cdiv(c, rows), PROGRAMS) if tail.expand else 1
    gain = x.new_empty(b, c, dtype=torch.float32)
    stats, where = x.new_empty(5, b, d, dtype=torch.float32), x.new_empty(2, b, d, dtype=torch.int32)
    launch(
        tail_kernel,
        b * triton.cdiv(c, rows * blocks),
        x,
        parts=parts,
        spots=spots,
        **tail_arguments(tail),
        stats=stats,
        where=where,
        gain=gain,
        chunks=chunks,
        samples=b,
        n=n,
        c=c,
        WIDTH=d,
        D=padded,
        CHUNKS=CHUNKS,
        ROWS=rows,
        BLOCKS=blocks,
        num_warps=8 if padded == 128 else 4,
    )
    return gain, stats, where
