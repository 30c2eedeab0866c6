"""What a fusion is: a refiner between the stages of the branches, and a readout behind them.

A system of one's own is a `Refiner`, or a `Readout`, or both; `fuse(..., fusion=...)` takes its name or its classes.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from drifa_attn.attention import Refines
from drifa_attn.layout import Place


class Refiner(Refines, nn.Module):
    """Refines the features of several modalities after a stage: `__init__(places, **options)`, one `Place` per modality.

    Attributes:
        names: the modalities that meet here; `fuse` sets them.

    Shape: a list of features, present `b m` (True: this sample has this modality) or None -> a list of features of the same
        shapes; what belongs to an absent modality passes unchanged.
    """

    names: Sequence[str] = ()

    def forward(self, xs: Sequence[Tensor], present: Tensor | None = None) -> list[Tensor]:
        """The features xs, refined."""
        raise NotImplementedError(f"{type(self).__name__} has no forward: a Refiner maps features to features.")


class Readout(nn.Module):
    """Makes one vector per sample of all branches: `__init__(outputs, stages, **options)`, places by branch, and by stage.

    Attributes:
        width: of that vector.
        keeps: the stages whose refined features it wants to see; empty for most.

    Shape: a list of vectors `b c_i`, one per branch; {stage: its refined features} for the stages in `keeps`; present `b m` or
        None -> `b width`.
    """

    width: int
    keeps: frozenset[int] = frozenset()

    def forward(self, vectors: list[Tensor], kept: Mapping[int, list[Tensor]], present: Tensor | None) -> Tensor:
        """The vector of every sample."""
        raise NotImplementedError(f"{type(self).__name__} has no forward: a Readout maps vectors to one vector.")

    def losses(self) -> dict[str, Tensor]:
        """Auxiliary losses of the last forward in training; {} for most."""
        return {}


Places = Sequence[Place]
