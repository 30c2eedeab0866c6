"""What several fusions do with maps of features: bring them to one grid, let one attend to another, and put results back.

Axes: `b` samples, `c` channels, `n` and `l` positions, `h` heads, `d` channels of a head, `m` modalities. A grid is the sizes
of the axes of positions; a vector has the grid (1,).
"""

import math
from collections.abc import Sequence

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from drifa_attn.checks import check_modalities, check_present, count
from drifa_attn.functional import map_dtype, mask_absent, vector_dtype
from drifa_attn.layout import Place, check_features, positions

Grid = Sequence[int]

MOST_POSITIONS = 1024  # a block whose cost grows with the square of the positions leaves larger stages alone


def checked_maps(owner: str, xs: Sequence[Tensor], places: Sequence[Place], present: Tensor | None) -> list[Tensor]:
    """The positions `b c n` of features that fit these places, with zeros for absent modalities."""
    check_modalities(owner, xs, len(places))
    check_present(owner, present, xs)
    for x, place in zip(xs, places, strict=True):
        check_features(owner, x, place.channels, place.layout, place.num_prefix_tokens)
    maps = [positions(x, place.layout, place.num_prefix_tokens) for x, place in zip(xs, places, strict=True)]
    return mask_absent([z.to(map_dtype(z)) for z in maps], present)


def as_features(y: Tensor, x: Tensor, place: Place) -> Tensor:
    """Positions `b c n` (or `b c 1`, the same at each) in the layout and dtype of features x, with the prefix tokens of x."""
    if x.ndim == 2:
        return y[..., 0].to(x.dtype)
    y = y.expand(-1, -1, positions(x, place.layout, place.num_prefix_tokens).shape[-1]).to(x.dtype)
    if place.layout == "b c ...":
        return y.reshape(x.shape)
    prefix = x[:, : place.num_prefix_tokens]
    return torch.cat([prefix, y.mT], 1) if place.num_prefix_tokens else y.mT.reshape(x.shape)


def grid_of(x: Tensor, place: Place) -> tuple[int, ...]:
    """The sizes of the axes of positions of features x."""
    if x.ndim == 2:
        return (1,)
    if place.layout == "b c ...":
        return tuple(x.shape[2:])
    return (x.shape[1] - place.num_prefix_tokens, *x.shape[2:-1])


def resample(x: Tensor, grid: Grid, to: Grid) -> Tensor:
    """Area pooling by overlap: each cell averages the cells that it covers, each weighted by the share that it covers.

    Between whole-number ratios this is what `F.interpolate(mode="area")` gives. Grids of unlike rank are taken as one axis.

    Shape: `b c n` on `grid` -> `b c N` on `to`.
    """
    if tuple(grid) == tuple(to):
        return x
    if len(grid) != len(to):
        grid, to = (math.prod(grid),), (math.prod(to),)
    x = x.reshape(*x.shape[:2], *grid)
    for axis, (before, after) in enumerate(zip(grid, to, strict=True), start=2):
        if before != after:
            x = (x.movedim(axis, -1) @ overlaps(before, after, x).mT).movedim(-1, axis)
    return x.flatten(2)


def overlaps(before: int, after: int, like: Tensor) -> Tensor:
    """The share of each of `before` cells in each of `after` cells of one axis: `after before`, rows that sum to one."""
    new, old = torch.arange(after, device=like.device)[:, None], torch.arange(before, device=like.device)
    ends = torch.minimum((new + 1) * before, (old + 1) * after)
    return (ends - torch.maximum(new * before, old * after)).clamp(min=0).to(like.dtype) / before


def softmax(scores: Tensor, has: Tensor | None = None, dim: int = -1) -> Tensor:
    """Softmax in float32 at least, over what `has` selects; where that is nothing, the weights are equal, and not NaN."""
    scores = scores.to(vector_dtype(scores))
    if has is not None:
        scores = scores.masked_fill(~has, torch.finfo(scores.dtype).min)
    return scores.softmax(dim)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, has: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Multi-head softmax attention with scale 1/√d: what each of n queries reads of l keys, and the weights.

        A = softmax_l(qᵀ k / √d)        y = v Aᵀ, in each head

    Shape: q `b (h d) n`, k and v `b (h d) l`, has `b l` (True: this sample has this key) -> `b (h d) n`, `b h n l`.
    """
    q, k, v = (rearrange(t, "b (h d) n -> b h d n", h=heads) for t in (q, k, v))
    scores = einsum(q, k, "b h d n, b h d l -> b h n l") / math.sqrt(q.shape[2])
    weights = softmax(scores, None if has is None else has[:, None, None])
    y = einsum(v, weights.to(v.dtype), "b h d l, b h n l -> b h d n")
    return rearrange(y, "b h d n -> b (h d) n"), weights


def checked_heads(owner: str, width: int, heads: int) -> int:
    """The number of heads; a `ValueError` unless it divides the width."""
    heads = count(owner, "heads", heads)
    if width % heads:
        raise ValueError(f"{owner} expected a width that {heads} heads divide, got {width}: change dim or heads.")
    return heads


def multiple(width: int, of: int) -> int:
    """The smallest multiple of a number that is at least `width`."""
    return of * math.ceil(width / of)


def check_positions(owner: str, positions: int, most: int) -> None:
    """Raise a `ValueError` if these are more positions than a quadratic block takes."""
    if not torch.jit.is_tracing() and positions > most:
        raise ValueError(
            f"{owner} got {positions} positions, more than max_positions={most}: its matrices grow with their square. Give it "
            'smaller inputs, name later stages in at=, or raise it by fusion_options={"max_positions": ...}.'
        )


def linear(inputs: int, outputs: int, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Linear:
    """A linear map with a bias, Glorot-uniform, its bias zero."""
    layer = nn.Linear(inputs, outputs, device=device, dtype=dtype)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
