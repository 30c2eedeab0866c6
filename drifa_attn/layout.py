"""Where the channels are: feature layouts in einops notation, and their way to `b c n` and back.

`"b c ..."` holds maps (`b c h w`), volumes (`b c d h w`), sequences (`b c l`) and vectors (`b c`); `"b ... c"` holds
channels-last maps (`b h w c`) and tokens (`b n c`). The first `num_prefix_tokens` tokens (class token, registers) are not
spatial: they are no positions.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

Layout = Literal["b c ...", "b ... c"]
LAYOUTS = ("b c ...", "b ... c")


@dataclass(frozen=True, kw_only=True)
class Place:
    """What attention has to know of a feature: its channels, where they are, and its size.

    Attributes:
        channels: their number.
        layout: "b c ..." or "b ... c".
        num_prefix_tokens: leading tokens (class token, registers) that are no positions.
        shape: of the tensor for one sample, the batch axis left out.
    """

    channels: int
    layout: Layout
    num_prefix_tokens: int
    shape: tuple[int, ...]

    @property
    def positions(self) -> int:
        """How many positions it has, prefix tokens left out."""
        spatial = self.shape[1:] if self.layout == "b c ..." else self.shape[:-1]
        return math.prod(spatial) - self.num_prefix_tokens


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
    if torch.jit.is_tracing():  # sizes are tensors there, and a comparison would be baked in with a warning
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
    """The positions attention reads, as a view where strides allow: any layout -> `b c n`."""
    if layout == "b c ...":
        return rearrange(x, "b c ... -> b c (...)")
    return rearrange(x[:, num_prefix_tokens:] if num_prefix_tokens else x, "b ... c -> b c (...)")


def spread(factor: Tensor, x: Tensor, layout: Layout, num_prefix_tokens: int = 0) -> Tensor:
    """One factor a channel (`b c`) with the axes of x; with prefix tokens it is 1 at those."""
    ones = " ".join("1" * (x.ndim - 2))
    factor = rearrange(factor, f"b c -> b c {ones}" if layout == "b c ..." else f"b c -> b {ones} c")
    if num_prefix_tokens:
        is_position = torch.arange(x.shape[1], device=x.device) >= num_prefix_tokens
        factor = torch.where(rearrange(is_position, "n -> n 1"), factor, 1)
    return factor


def scale(x: Tensor, factor: Tensor, layout: Layout, num_prefix_tokens: int = 0) -> Tensor:
    """`x · factor` with one factor a channel (`b c`); dtype, strides and prefix tokens stay those of `x`.

    The product is rounded once: a gain near 1 would vanish if it were cast to bfloat16 before.
    """
    return (x * spread(factor, x, layout, num_prefix_tokens)).to(x.dtype)
