"""What a fusion is: a refiner between the stages of the branches, and a readout behind them.

A system of one's own is a `Refiner`, or a `Readout`, or both; `fuse(..., fusion=...)` takes its name or its classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from drifa_attn.attention import Refines
from drifa_attn.layout import Place

Places = Sequence[Place]


class Refiner(Refines, nn.Module):
    """Refines the features of several modalities after a stage: `__init__(places, **options)`, one `Place` per modality.

    Attributes:
        names: the modalities that meet here; `fuse` sets them.

    Shape: a list of features, present `b m` (True: this sample has this modality) or None -> a list of features of the same
        shapes; what belongs to an absent modality passes unchanged.
    """

    names: Sequence[str] = ()

    @classmethod
    def left_alone(cls, stages: Sequence[Places], k: int, **options: Any) -> str | None:
        """Why it does not act at stage k, in words for the plan; None where it acts. Options are those of `__init__`."""
        return None

    def forward(self, xs: Sequence[Tensor], present: Tensor | None = None) -> list[Tensor]:
        """The features xs, refined."""
        raise NotImplementedError(f"{type(self).__name__} has no forward: a Refiner maps features to features.")


class Untouched(Refiner):
    """A stage whose features pass on as they are.

    Args:
        reason: why, in words for the plan.
    """

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason

    def forward(self, xs: Sequence[Tensor], present: Tensor | None = None) -> list[Tensor]:
        """The features xs."""
        return list(xs)

    def extra_repr(self) -> str:
        return self.reason


class Readout(Refines, nn.Module):
    """Makes one vector per sample of all branches: `__init__(outputs, stages, **options)`, places by branch, and by stage.

    It has gates where it weighs what it reads. It cannot be disabled: without it the heads read nothing.

    Attributes:
        width: of that vector.
        keeps: the stages whose refined features it wants to see; empty for most.
        reads_vectors: whether it reads the branches' vectors, or the maps alone.
        names: the modalities; `fuse` sets them.

    Shape: a list of vectors `b c_i`, one per branch; {stage: its refined features} for the stages in `keeps`; present `b m` or
        None -> `b width`.
    """

    part = "head"  # it starts with weights that are drawn, as heads do
    width: int
    keeps: frozenset[int] = frozenset()
    reads_vectors: bool = True
    names: Sequence[str] = ()

    def forward(self, vectors: list[Tensor], kept: Mapping[int, list[Tensor]], present: Tensor | None) -> Tensor:
        """The vector of every sample."""
        raise NotImplementedError(f"{type(self).__name__} has no forward: a Readout maps vectors to one vector.")

    def losses(self) -> dict[str, Tensor]:
        """Auxiliary losses of the last forward in training, weighted; {} for most."""
        return {}
