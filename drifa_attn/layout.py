"""Which axis of a feature holds the channels, and how any layout becomes `b c n`.

Layouts are written in einops notation. `"b c ..."` holds maps (`b c h w`), volumes (`b c d h w`), sequences (`b c l`) and
vectors (`b c`). `"b ... c"` holds channels-last maps (`b h w c`) and tokens (`b n c`). All axes but batch and channels are
positions, `n` together. The first `num_prefix_tokens` tokens (class token, registers) are not spatial, so they are not
positions.

A `mask` is boolean, True at the positions that are real. It has the shape `b n`, over the positions behind the prefix tokens,
or `b` and the sizes of these positions, such as `b h w`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
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
    axis, shape = 1 if layout == "b c ..." else -1, x.shape
    if len(shape) < (3 if num_prefix_tokens else 2) or shape[axis] != channels:
        raise ValueError(
            f'{owner} expected x "{layout}" with c={channels}, got {tuple(x.shape)}: '
            f"build it with the channels of axis {axis}, or name the layout its features have."
        )
    positions = shape[2:] if axis == 1 else shape[1:-1]
    if 0 in positions or (num_prefix_tokens and (len(shape) != 3 or shape[1] <= num_prefix_tokens)):
        raise ValueError(
            f'{owner} expected x "{layout}" with at least one position'
            f"{f' after {num_prefix_tokens} prefix tokens (b n c)' if num_prefix_tokens else ''}, got {tuple(x.shape)}."
        )


def sizes(x: Tensor, layout: Layout) -> tuple[int, ...]:
    """The sizes of the axes of positions, prefix tokens among them."""
    return tuple(x.shape[2:] if layout == "b c ..." else x.shape[1:-1])


def checked_mask(owner: str, mask: Tensor | None, x: Tensor, layout: Layout, num_prefix_tokens: int = 0) -> Tensor | None:
    """The mask of features x as `b n`; a `TypeError` or `ValueError` unless it is a boolean one that fits them."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"{owner} expected mask to be a boolean tensor (b n), True at real positions, got {got}: convert it with .bool()."
        )
    if mask.device != x.device:
        raise ValueError(f"{owner} expected mask on {x.device}, where the features are, got {mask.device}.")
    axes = sizes(x, layout)
    flat, spatial = (x.shape[0], math.prod(axes) - num_prefix_tokens), (x.shape[0], *axes)
    if not torch.jit.is_tracing() and mask.shape != flat and (num_prefix_tokens or mask.shape != spatial):
        behind = f", the positions behind {num_prefix_tokens} prefix tokens," if num_prefix_tokens else f" or {spatial}"
        raise ValueError(
            f"{owner} expected mask of shape (b, n) = {flat}{behind if flat != spatial else ''} for features {tuple(x.shape)}, "
            f"got {tuple(mask.shape)}."
        )
    return flat_mask(mask)


def flat_mask(mask: Tensor) -> Tensor:
    """A mask of any number of axes as `b n`."""
    return mask[:, None] if mask.ndim == 1 else mask.flatten(1)


def checked_masks(
    owner: str, mask: Sequence[Tensor | None] | None, xs: Sequence[Tensor], places: Sequence[tuple[Layout, int]]
) -> list[Tensor | None] | None:
    """The masks of several modalities as `b n_i`, or None if none has one; an error unless there is one, or None, for each."""
    if mask is None:
        return None
    if isinstance(mask, Tensor) or not isinstance(mask, Sequence):
        raise TypeError(
            f"{owner} expected mask as a list with one tensor or None per modality ({len(xs)}), got {type(mask).__name__}."
        )
    if len(mask) != len(xs):
        raise ValueError(f"{owner} expected one mask, or None, per modality ({len(xs)}), got {len(mask)}.")
    each = [checked_mask(f"{owner} (modality {i})", *part, *places[i]) for i, part in enumerate(zip(mask, xs, strict=True))]
    return None if all(one is None for one in each) else each


def positions(x: Tensor, layout: Layout, num_prefix_tokens: int = 0) -> Tensor:
    """The positions that attention reads, as a view if the strides allow it: any layout -> `b c n`."""
    if x.ndim == 2:
        return x.unsqueeze(-1)
    if layout == "b c ...":
        return x.flatten(2)
    return (x[:, num_prefix_tokens:] if num_prefix_tokens else x).flatten(1, -2).mT


def spread(factor: Tensor, x: Tensor, layout: Layout, num_prefix_tokens: int = 0, mask: Tensor | None = None) -> Tensor:
    """One factor per channel (`b c`) with as many axes as `x`; of a prefix token, and where the mask is False, it is 1."""
    b, c = factor.shape
    ones = [1] * (x.ndim - 2)  # in the place of every axis of positions
    factor = factor.reshape(b, c, *ones) if layout == "b c ..." else factor.reshape(b, *ones, c)
    if mask is not None:
        is_real = F.pad(mask, (num_prefix_tokens, 0)).reshape(x.shape[0], *sizes(x, layout))
        factor = torch.where(is_real.unsqueeze(1 if layout == "b c ..." else -1), factor, 1)
    elif num_prefix_tokens:
        is_position = torch.arange(x.shape[1], device=x.device) >= num_prefix_tokens
        factor = torch.where(is_position[:, None], factor, 1)
    return factor


def scale(x: Tensor, factor: Tensor, layout: Layout, num_prefix_tokens: int = 0, mask: Tensor | None = None) -> Tensor:
    """`x · factor` with one factor per channel (`b c`); dtype, strides, prefix tokens and what is masked stay those of `x`.

    The product is rounded once. A factor near 1 would become 1 if it were cast to bfloat16 before the product.
    """
    y = x * spread(factor, x, layout, num_prefix_tokens, mask)
    return y if y.dtype == x.dtype else y.to(x.dtype)
