"""Which axis of a feature holds the channels, and how any layout becomes `b c n`.

Layouts are written in einops notation. `"b c ..."` holds maps (`b c h w`), volumes (`b c d h w`), sequences (`b c l`) and
vectors (`b c`). `"b ... c"` holds channels-last maps (`b h w c`) and tokens (`b n c`). All axes but batch and channels are
positions, `n` together. The first `num_prefix_tokens` tokens (class token, registers) are not spatial, so they are not
positions.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

Layout = Literal["b c ...", "b ... c"]
LAYOUTS = ("b c ...", "b ... c")


@dataclass(frozen=True, kw_only=True)
class Place:
    """What attention must know about a feature: its channels, which axis they are on, and its size.

    Attributes:
        channels: their number.
        layout: "b c ..." or "b ... c".
        num_prefix_tokens: leading tokens (class token, registers) that are not positions.
        shape: the shape of the tensor for one sample, without the batch axis.
    """

    channels: int
    layout: Layout
    num_prefix_tokens: int
    shape: tuple[int, ...]

    @property
    def positions(self) -> int:
        """The number of positions, without prefix tokens."""
        spatial = self.shape[1:] if self.layout == "b c ..." else self.shape[:-1]
        return math.prod(spatial) - self.num_prefix_tokens


def as_place(place: Place) -> dict[str, Any]:
    """The fields of a place by name; those of a subclass are left out."""
    return {field.name: getattr(place, field.name) for field in fields(Place)}


def check_layout(owner: str, layout: str, num_prefix_tokens: int) -> None:
    """Raise a `ValueError` unless `layout` is known and `num_prefix_tokens` fits it."""
    if layout not in LAYOUTS:
        raise ValueError(f'{owner} expected layout "b c ..." or "b ... c", got {layout!r}.')
    if not isinstance(num_prefix_tokens, int) or isinstance(num_prefix_tokens, bool) or num_prefix_tokens < 0:
        raise ValueError(
            f"{owner} expected num_prefix_tokens to be an integer >= 0 (number of prefix tokens), got {num_prefix_tokens!r}."
        )
    if num_prefix_tokens and layout == "b c ...":
        raise ValueError(
            f'{owner} got num_prefix_tokens={num_prefix_tokens} with layout "b c ...": prefix tokens need layout "b ... c".'
        )


def check_features(owner: str, x: Tensor, channels: int, layout: Layout, num_prefix_tokens: int = 0) -> None:
    """Raise a `TypeError` or `ValueError` unless `x` is a floating tensor of this layout with these channels."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{owner} expected a tensor, got {type(x).__name__}.")
    if not x.is_floating_point():
        raise TypeError(f"{owner} expected a floating-point tensor, got {x.dtype}: convert it, e.g. x.float().")
    if torch.jit.is_tracing():  # sizes are tensors: a comparison would become a constant of the graph, with a warning
        return
    axis = 1 if layout == "b c ..." else -1
    if x.ndim < (3 if num_prefix_tokens else 2) or x.shape[axis] != channels:
        raise ValueError(
            f'{owner} expected x "{layout}" with c={channels}, got {tuple(x.shape)}: '
            f"build it with the channels of axis {axis}, or name the layout its features have."
        )
    positions = x.shape[2:] if axis == 1 else x.shape[1:-1]
    if 0 in positions or (num_prefix_tokens and x.ndim != 3) or (num_prefix_tokens and x.shape[1] <= num_prefix_tokens):
        raise ValueError(
            f'{owner} expected x "{layout}" with at least one position'
            f"{f' after {num_prefix_tokens} prefix tokens (b n c)' if num_prefix_tokens else ''}, got {tuple(x.shape)}."
        )


def positions(x: Tensor, layout: Layout, num_prefix_tokens: int = 0) -> Tensor:
    """The positions that attention reads, as a view if the strides allow it: any layout -> `b c n`."""
    if x.ndim == 2:
        return x[..., None]
    if layout == "b c ...":
        return x.flatten(2)
    return (x[:, num_prefix_tokens:] if num_prefix_tokens else x).flatten(1, -2).mT


def spread(factor: Tensor, x: Tensor, layout: Layout, num_prefix_tokens: int = 0) -> Tensor:
    """One factor per channel (`b c`) with as many axes as `x`; the factor of a prefix token is 1."""
    ones = [None] * (x.ndim - 2)  # an axis of length 1 in the place of every axis of positions
    factor = factor[(..., *ones)] if layout == "b c ..." else factor[(slice(None), *ones)]
    if num_prefix_tokens:
        is_position = torch.arange(x.shape[1], device=x.device) >= num_prefix_tokens
        factor = torch.where(is_position[:, None], factor, 1)
    return factor


def scale(x: Tensor, factor: Tensor, layout: Layout, num_prefix_tokens: int = 0) -> Tensor:
    """`x · factor` with one factor per channel (`b c`); dtype, strides and prefix tokens stay those of `x`.

    The product is rounded once. A factor near 1 would become 1 if it were cast to bfloat16 before the product.
    """
    return (x * spread(factor, x, layout, num_prefix_tokens)).to(x.dtype)
