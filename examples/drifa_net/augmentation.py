"""What training images go through: flips, quarter turns and shifts."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

SHIFT = 0.1  # of height and width, at most

Augmentation = Callable[[Tensor, Generator], Tensor]


def augmentation_of(turns: bool) -> Augmentation:
    """What training images go through: shifts, and flips and turns too where the pictures have no up and no left."""
    return augment if turns else shift


def augment(image: Tensor, generator: Generator) -> Tensor:
    """Flip `c h w` or not, turn it by a multiple of 90 degrees (of 180 where it is no square) and shift it.

    Of `c d h w` every slice is flipped and turned alike.
    """
    flip, turns = (int(torch.randint(n, (), generator=generator)) for n in (2, 4))
    square = image.shape[-2] == image.shape[-1]
    image = torch.rot90(image.flip(-1) if flip else image, turns if square else 2 * turns, (-2, -1))
    return shift(image, generator)


def shift(image: Tensor, generator: Generator) -> Tensor:
    """Move `c h w` or `c d h w` by up to a tenth of its size each way, its edge repeated behind it."""
    margins = [int(SHIFT * n) for n in image.shape[1:]]
    starts = [int(torch.randint(2 * margin + 1, (), generator=generator)) for margin in margins]
    padded = F.pad(image, [margin for margin in reversed(margins) for _ in range(2)], mode="replicate")
    kept = (slice(start, start + n) for start, n in zip(starts, image.shape[1:], strict=True))
    return padded[(slice(None), *kept)].contiguous()
