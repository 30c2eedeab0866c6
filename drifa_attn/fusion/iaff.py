"""Iterative attentional feature fusion: AFF whose weights have read a first fusion, not a sum."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .aff import AFF, REDUCTION, MultiScale
from .protocol import Places


class IAFF(AFF):
    """Iterative attentional feature fusion of the last stage's maps.

        a = M_first(x + y)        w = a · x + (1 − a) · y        b = M_second(w)        fold(x, y) = b · x + (1 − b) · y

    Args, Shape, Raises, Source: as `AFF`. Differs: the fold has no factor of two, as in the paper; public code computes the
        second weights otherwise.
    """

    factor = 1

    def __init__(
        self,
        outputs: Places,
        stages: Sequence[Places],
        *,
        reduction: int = REDUCTION,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(outputs, stages, reduction=reduction, device=device, dtype=dtype)
        width = self.first.local.reduce.out_features
        self.second = MultiScale(self.width, width, device, dtype)

    def weight(self, x: Tensor, y: Tensor) -> Tensor:
        """How much of x is in the fold of x and y, in (0, 1)."""
        a = self.first(x + y)
        return self.second(a * x + (1 - a) * y)
