"""The layer-wise kernels: one matrix product per layer, of any width, whose epilogue activates, pools and differentiates.

Maps are `b c n` views of `b n c` memory, in the dtype of `x`. No sigmoid bounds a squeezed map, so it is float32 if `x` is
float16.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from einops import rearrange
from torch import Tensor

from . import configs as config
from .common import launch, peak, precision, product, pull, rounded, sigmoid, strides

MEAN, MAX = 1, 2  # what `layer` pools


@triton.jit
def layer_kernel(
    x,
    weight,
    bias,
    present,
    other,
    gradient,
    vectors,
    positions,
    out,
    out_sum,
    parts,
    spots,
    n,
    c,
    d,
    x_b,
    x_c,
    x_n,
    STATS: tl.constexpr,
    STAT: tl.constexpr,
    SPOTS: tl.constexpr,
    SPOT: tl.constexpr,
    POOL: tl.constexpr,
    ACTIVE: tl.constexpr,
    SLOPE: tl.constexpr,
    PULLS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """`z = W x + bias` (c -> d) for a block of channels and positions of one sample, `h = σ(z)`; computes what is requested.

    POOL: write the sum of h, or the maximum of z and its position, to its slot of `parts` and `spots`. `out`: write h (z,
    unless ACTIVE). `out_sum`: write h + other. SLOPE: instead of h, the gradient of z, `pull · h(1 − h)`, see `pull`. A
    sample that is not `present` is zeros and is not read.
    """
    blocks = tl.cdiv(d, ROWS)
    tiles = tl.cdiv(n, POSITIONS)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)  # blocks of one tile run side by side and share it in L2
    tile = tl.program_id(0) // blocks % tiles
    b = (tl.program_id(0) // blocks // tiles).to(tl.int64)
    p = tile * POSITIONS + tl.arange(0, POSITIONS)
    inside, ok = row < d, (p < n)[None, :]
    readable = ok
    if present is not None:
        readable = ok & (tl.load(present + b) != 0)
    z = tl.zeros((ROWS, POSITIONS), tl.float32)
    for first in range(0, c, DEPTH):
        k = first + tl.arange(0, DEPTH)
        w = tl.load(weight + row[:, None] * c + k[None, :], mask=inside[:, None] & (k < c)[None, :], other=0.0)
        a = tl.load(x + b * x_b + k[:, None] * x_c + p[None, :] * x_n, mask=(k < c)[:, None] & readable, other=0.0)
        z = product(w, a, z, PRECISION)
    z += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    h = z
    if ACTIVE:
        h = sigmoid(z)
    if SLOPE:
        h = pull(tl.zeros_like(z), gradient, vectors, positions, b, p, PULLS, d, row) * h * (1.0 - h)
    slot = b * tiles + tile
    if POOL == 1:
        tl.store(parts + (slot * STATS + STAT) * d + row, tl.sum(tl.where(ok, h, 0.0), 1), mask=inside)
    if POOL == 2:
        top, at = peak(z, ok, p)
        tl.store(parts + (slot * STATS + STAT) * d + row, top, mask=inside)
        tl.store(spots + (slot * SPOTS + SPOT) * d + row, at, mask=inside)
    place = b * n * d + p[None, :] * d + row[:, None]
    mask = inside[:, None] & ok
    if out is not None:
        tl.store(out + place, rounded(h, out.dtype.element_ty), mask=mask)
    if out_sum is not None:
        h += tl.load(other + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_sum + place, rounded(h, out_sum.dtype.element_ty), mask=mask)


@triton.jit
def back_kernel(
    weight,
    q,
    weight2,
    q2,
    h,
    gradient,
    vectors,
    positions,
    out,
    parts,
    n,
    c,
    d,
    out_b,
    out_c,
    out_n,
    PULLS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """`Wᵀ q [+ W2ᵀ q2] + pull` (d -> c), the gradient of a map h. With `h`, the gradient before σ: times `h(1 − h)`.

    Its sum over the tile goes to `parts` (`b tiles c`), for the gradient of a bias.
    """
    blocks = tl.cdiv(c, ROWS)
    tiles = tl.cdiv(n, POSITIONS)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(0) // blocks % tiles
    b = (tl.program_id(0) // blocks // tiles).to(tl.int64)
    p = tile * POSITIONS + tl.arange(0, POSITIONS)
    inside, ok = row < c, (p < n)[None, :]
    total = tl.zeros((ROWS, POSITIONS), tl.float32)
    for first in range(0, d, DEPTH):
        k = first + tl.arange(0, DEPTH)
        w = tl.load(weight + k[None, :] * c + row[:, None], mask=inside[:, None] & (k < d)[None, :], other=0.0)
        a = tl.load(q + b * n * d + p[None, :] * d + k[:, None], mask=(k < d)[:, None] & ok, other=0.0)
        total = product(w, a, total, PRECISION)
    if q2 is not None:
        for first in range(0, d, DEPTH):
            k = first + tl.arange(0, DEPTH)
            w = tl.load(weight2 + k[None, :] * c + row[:, None], mask=inside[:, None] & (k < d)[None, :], other=0.0)
            a = tl.load(q2 + b * n * d + p[None, :] * d + k[:, None], mask=(k < d)[:, None] & ok, other=0.0)
            total = product(w, a, total, PRECISION)
    total = pull(total, gradient, vectors, positions, b, p, PULLS, c, row)
    mask = inside[:, None] & ok
    if h is not None:
        slope = tl.load(h + b * n * c + p[None, :] * c + row[:, None], mask=mask, other=0.0).to(tl.float32)
        total *= slope * (1.0 - slope)
        tl.store(parts + (b * tiles + tile) * c + row, tl.sum(tl.where(ok, total, 0.0), 1), mask=inside)
    place = b * out_b + row[:, None] * out_c + p[None, :] * out_n
    tl.store(out + place, rounded(total, out.dtype.element_ty), mask=mask)


@triton.jit
def weight_kernel(
    q,
    x,
    slabs,
    sums,
    samples,
    n,
    d,
    c,
    width,
    q_b,
    q_c,
    q_n,
    x_b,
    x_c,
    x_n,
    PRECISION: tl.constexpr,
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """`Σ q ⊗ x` over the positions of SAMPLES samples, for a block of the channels of q and one of those of x: `splits d c`.

    The first block of x also writes `Σ q`, the gradient of the bias, to `sums`: `splits width`.
    """
    rows, columns = tl.cdiv(d, ROWS), tl.cdiv(c, COLUMNS)
    row = tl.program_id(0) % rows * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(0) // rows % columns * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(0) // rows // columns
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    bias = tl.zeros((ROWS,), tl.float32)
    for item in range(SAMPLES):
        b = (split * SAMPLES + item).to(tl.int64)
        for first in range(0, n, POSITIONS):
            p = first + tl.arange(0, POSITIONS)
            ok = ((p < n) & (b < samples))[None, :]
            u = tl.load(q + b * q_b + row[:, None] * q_c + p[None, :] * q_n, mask=(row < d)[:, None] & ok, other=0.0)
            a = tl.load(x + b * x_b + k[:, None] * x_c + p[None, :] * x_n, mask=(k < c)[:, None] & ok, other=0.0)
            total = product(u, tl.trans(a), total, PRECISION)
            bias += tl.sum(u.to(tl.float32), 1)
    tl.store(sums + split * width + row, bias, mask=(row < width) & (tl.program_id(0) // rows % columns == 0))
    place = slabs + split.to(tl.int64) * d * c + row[:, None] * c + k[None, :]
    tl.store(place, total, mask=(row < d)[:, None] & (k < c)[None, :])


def new_map(x: Tensor, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """An empty map of `width` channels over the positions of `x`: `b c n`, in `b n c` memory."""
    return x.new_empty(x.shape[0], x.shape[2], width, dtype=dtype).mT


def unbounded(x: Tensor) -> torch.dtype:
    """The dtype of a map that no sigmoid bounds: it can exceed the range of float16."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def tiles_of(x: Tensor) -> int:
    """The number of tiles of positions per sample in the layer-wise kernels."""
    return triton.cdiv(x.shape[2], config.positions(x.shape[2]))


class Pull(NamedTuple):
    """The gradient of a map from its pooled vectors: at every position, `b d`, and at `k` more positions, `b k d`."""

    everywhere: Tensor | None = None
    vectors: Tensor | None = None
    positions: Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        """The kernel arguments."""
        count = 0 if self.vectors is None else self.vectors.shape[1]
        return {"gradient": self.everywhere, "vectors": self.vectors, "positions": self.positions, "PULLS": count}

    def of(self, samples: slice) -> "Pull":
        """The gradient for these samples."""
        return Pull(*(None if t is None else t[samples] for t in self))


class Slot(NamedTuple):
    """Where a layer writes its pooling: MEAN or MAX, and the numbers of the statistic and of the maximum."""

    pool: int
    parts: Tensor
    spots: Tensor
    stat: int = 0
    spot: int = 0


def layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    present: Tensor | None = None,
    slot: Slot | None = None,
    out: Tensor | None = None,
    out_sum: Tensor | None = None,
    other: Tensor | None = None,
    pull: Pull | None = None,
    active: bool = True,
) -> None:
    """One layer, `z = W x + bias` and σ: see `layer_kernel`. `weight` is `d c` in the dtype of the products."""
    (b, c, n), d = x.shape, weight.shape[0]
    chosen, positions = config.product(x, d), config.positions(n)
    launch(
        layer_kernel,
        b * triton.cdiv(n, positions) * triton.cdiv(d, chosen.rows),
        x,
        x=x,
        weight=weight,
        bias=bias,
        present=present,
        other=other,
        **(pull or Pull()).arguments(),
        out=out,
        out_sum=out_sum,
        parts=None if slot is None else slot.parts,
        spots=None if slot is None else slot.spots,
        n=n,
        c=c,
        d=d,
        x_b=x.stride(0),
        x_c=x.stride(1),
        x_n=x.stride(2),
        STATS=0 if slot is None else slot.parts.shape[2],
        STAT=0 if slot is None else slot.stat,
        SPOTS=0 if slot is None else slot.spots.shape[2],
        SPOT=0 if slot is None else slot.spot,
        POOL=0 if slot is None else slot.pool,
        ACTIVE=active,
        SLOPE=pull is not None,
        PRECISION=precision(),
        ROWS=chosen.rows,
        POSITIONS=positions,
        DEPTH=min(chosen.depth, config.power_of_two(c)),
        num_warps=chosen.warps,
        num_stages=chosen.stages,
    )


def back(
    pairs: Sequence[tuple[Tensor, Tensor]],
    out: Tensor,
    *,
    pull: Pull | None = None,
    h: Tensor | None = None,
    parts: Tensor | None = None,
) -> None:
    """Write the gradient through one or two layers (weight `d c`, map q) to `out`; with `h`, its sums over tiles to `parts`."""
    (weight, q), (weight2, q2) = pairs[0], pairs[1] if len(pairs) == 2 else (None, None)
    (b, d, n), c = q.shape, weight.shape[1]
    chosen, positions = config.product(q, c), config.positions(n)
    launch(
        back_kernel,
        b * triton.cdiv(n, positions) * triton.cdiv(c, chosen.rows),
        q,
        weight=weight,
        q=q,
        weight2=weight2,
        q2=q2,
        h=h,
        **(pull or Pull()).arguments(),
        out=out,
        parts=parts,
        n=n,
        c=c,
        d=d,
        out_b=out.stride(0),
        out_c=out.stride(1),
        out_n=out.stride(2),
        PRECISION=precision(),
        ROWS=chosen.rows,
        POSITIONS=positions,
        DEPTH=min(chosen.depth, config.power_of_two(d)),
        num_warps=chosen.warps,
        num_stages=chosen.stages,
    )


def squeezed_map(
    x: Tensor, squeeze_weight: Tensor | None, squeeze_bias: Tensor | None, present: Tensor | None = None
) -> Tensor:
    """`z = lin(squeeze, x)`, or `x` itself. A sample that is not `present` counts as zeros and is not read."""
    if squeeze_weight is None or squeeze_bias is None:
        return x
    z = new_map(x, squeeze_weight.shape[0], unbounded(x))
    layer(x, squeeze_weight.to(x.dtype).contiguous(), squeeze_bias.contiguous(), present=present, out=z, active=False)
    return z


def bias_sums(x: Tensor, width: int) -> Tensor:
    """Empty memory for the sums of the tiles of a map: `b tiles 1 width`."""
    return x.new_empty(x.shape[0], tiles_of(x), 1, width, dtype=torch.float32)


def rows_of(x: Tensor) -> Tensor:
    """A map as a matrix of positions by channels, `b c n` -> `(b n) c`: a copy unless it lies in `b n c` memory."""
    return rearrange(x, "b c n -> (b n) c")


def weight_gradient(q: Tensor, rows: Tensor) -> Tensor:
    """`Σ q ⊗ a` over samples and positions for the rows of a, summed in float32, rounded to q's dtype: -> `d c`."""
    return rows_of(q).mT @ rows.to(q.dtype)


def split(b: int) -> tuple[int, int]:
    """A batch in parts: the samples of one, and their number, by a rule that no device changes."""
    samples = triton.cdiv(b, config.SPLITS)
    return samples, triton.cdiv(b, samples)


def weight_slabs(q: Tensor, x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """`Σ q ⊗ x` and `Σ q` of every part of a batch, in float32: `b d n`, `b c n` -> `splits d c`, `splits width`."""
    (b, d, n), c = q.shape, x.shape[1]
    rows, columns = min(64, config.power_of_two(d)), min(64, config.power_of_two(c))
    samples, splits = split(b)
    slabs = x.new_empty(splits, d, c, dtype=torch.float32)
    sums = x.new_empty(splits, width, dtype=torch.float32)
    launch(
        weight_kernel,
        splits * triton.cdiv(d, rows) * triton.cdiv(c, columns),
        x,
        q=q,
        x=x,
        slabs=slabs,
        sums=sums,
        samples=b,
        n=n,
        d=d,
        c=c,
        width=width,
        **strides("q", q),
        **strides("x", x),
        PRECISION=precision(),
        SAMPLES=samples,
        ROWS=rows,
        COLUMNS=columns,
        POSITIONS=min(64, config.power_of_two(n)),
        num_warps=4,
        num_stages=3,
    )
    return slabs, sums


def sample_chunks(x: Tensor, width: int) -> Iterator[slice]:
    """Slices of the batch whose maps of `width` channels have at most 128 MiB each: smaller ones are launched too often."""
    step = max(1, 2**27 // (x.shape[2] * width * x.element_size()))
    return (slice(first, first + step) for first in range(0, x.shape[0], step))


def squeeze_back(dz: Tensor, x: Tensor, squeeze_weight: Tensor, dx: Tensor) -> list[Tensor]:
    """Write the gradient through `z = lin(squeeze, x)` to `dx` and give those of its weight and bias."""
    back([(squeeze_weight.to(x.dtype).contiguous(), dz)], dx)
    return [weight_gradient(dz, rows_of(x)), dz.sum((0, 2), dtype=torch.float32)]


def summed(gradients: Iterable[list[Tensor]]) -> list[Tensor]:
    """The sum of lists of tensors, entry by entry, in their order, in float32 where there are several."""
    return reduce(lambda total, more: [t.float() + m for t, m in zip(total, more, strict=True)], gradients)
