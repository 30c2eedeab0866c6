"""What refiners have in common that add to each modality what they read of the others."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from drifa_attn.checks import count
from drifa_attn.functional import without_autocast
from drifa_attn.layout import Place

from .maps import MOST_POSITIONS, as_features, check_positions, checked_maps
from .protocol import Places, Refiner


class Additive(Refiner):
    """A refiner that adds to the features of each modality what it reads of the others: `y_i = x_i + delta_i`.

    A subclass says what it adds, `deltas(zs, xs, present)`: positions `b c_i n_i` with zeros where absent, the features
    themselves -> `b c_i n_i` each, or `b c_i 1` for what is the same at every position; and `started()`, the parameters that
    are zero at the start.

    Args:
        places: where the features of each modality are, and how many channels they have.
        max_positions: the most positions; larger stages are left alone, larger features refused.

    Attributes:
        amount: of the positions of each modality, what `max_positions` limits: their sum, or the largest.

    Shape: a list of features, present `b m` or None -> a list of the same shapes and dtypes. Prefix tokens, absent modalities
        and a lone modality pass unchanged.
    Raises: ValueError, TypeError: features of other channels, layout or batch size, more positions, or a `present` that is
        not a boolean `b m`.
    """

    amount: Callable[..., int] = staticmethod(sum)

    def __init__(self, places: Sequence[Place], max_positions: int = MOST_POSITIONS) -> None:
        super().__init__()
        self.places = tuple(places)
        self.max_positions = count(type(self).__name__, "max_positions", max_positions)

    @classmethod
    def left_alone(cls, stages: Sequence[Places], k: int, *, max_positions: int = MOST_POSITIONS, **options: Any) -> str | None:
        """Why it does not act at stage k: it has one modality, or too many positions."""
        if len(stages[k]) < 2:
            return "one modality is alone there"
        positions = cls.amount([place.positions for place in stages[k]])
        return f"{positions} positions are more than max_positions={max_positions}" if positions > max_positions else None

    def deltas(self, zs: Sequence[Tensor], xs: Sequence[Tensor], present: Tensor | None) -> list[Tensor]:
        """What is added to each modality."""
        raise NotImplementedError

    def started(self) -> list[nn.Parameter]:
        """The parameters that are zero at the start."""
        raise NotImplementedError

    def is_start(self) -> bool:
        """Whether nothing is added yet, because training has not moved the layer."""
        return not any(parameter.any() for parameter in self.started())

    def checked(self, xs: Sequence[Tensor], present: Tensor | None) -> list[Tensor]:
        """The positions `b c n` of features that fit this layer, with zeros where absent."""
        zs = checked_maps(type(self).__name__, xs, self.places, present)
        check_positions(type(self).__name__, self.amount([z.shape[-1] for z in zs]), self.max_positions)
        return zs

    def forward(self, xs: Sequence[Tensor], present: Tensor | None = None) -> list[Tensor]:
        """The features xs, each with what is added to it; while disabled, and with one modality, xs themselves."""
        if not self.enabled or len(self.places) < 2:
            return list(xs)
        zs, meets = self.checked(xs, present), together(present)
        with without_autocast(xs[0]):
            deltas = self.deltas(zs, xs, present)
            ys = [z + delta.to(z.dtype) for z, delta in zip(zs, deltas, strict=True)]
        ys = [as_features(y, x, place) for y, x, place in zip(ys, xs, self.places, strict=True)]
        if meets is None:
            return ys
        rows = [has.reshape(-1, *[1] * (x.ndim - 1)) for has, x in zip(meets.unbind(1), xs, strict=True)]
        return [torch.where(has, y, x) for has, y, x in zip(rows, ys, xs, strict=True)]

    def extra_repr(self) -> str:
        return f"{[place.channels for place in self.places]}, max_positions={self.max_positions}"


def together(present: Tensor | None) -> Tensor | None:
    """Which modalities of a sample are present and not alone, `b m`; None where all are."""
    return None if present is None else present & (present.sum(1, keepdim=True) > 1)


def others(i: int, modalities: int) -> list[int]:
    """The numbers of the modalities other than i."""
    return [j for j in range(modalities) if j != i]


def mean_of_others(parts: dict[int, Tensor], present: Tensor | None) -> Tensor:
    """The mean over those modalities that a sample has, of tensors `b ...` of one shape; zeros where it has none."""
    first = next(iter(parts.values()))
    if present is None:
        return sum(parts.values(), torch.zeros_like(first)) / len(parts)
    has = {j: present[:, j].reshape(-1, *[1] * (first.ndim - 1)) for j in parts}
    number = sum(one.to(first.dtype) for one in has.values())
    total = sum(torch.where(has[j], part, 0) for j, part in parts.items())
    return total / number.clamp(min=1)  # type: ignore[union-attr]
