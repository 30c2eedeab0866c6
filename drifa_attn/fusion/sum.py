"""A control: the vectors of all branches, each brought to one width, added up."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .maps import linear
from .protocol import Places, Readout
from .vectors import masked, scaled, width_of


class Summed(Readout):
    """The sum of the branches' vectors, each projected to one width.

        z = m/k · Σ_i lin(projections.i, v_i)        over the k modalities that are present

    Args:
        outputs: where the features of each branch are, and how many channels they have.
        dim: the width f, >= 1; None is the largest of the channels.

    Shape: m vectors `b c_i`, present `b m` or None -> `b f`.
    Raises: ValueError: a `dim` below one.
    Differs: none; it is a control, without a source.
    """

    def __init__(
        self,
        outputs: Places,
        stages: Sequence[Places] = (),
        *,
        dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.width = width_of("Summed", dim, outputs)
        self.projections = nn.ModuleList(linear(place.channels, self.width, device, dtype) for place in outputs)

    def forward(self, vectors: list[Tensor], kept: Mapping[int, list[Tensor]], present: Tensor | None) -> Tensor:
        """The vector of every sample."""
        projected = [lin(v) for lin, v in zip(self.projections, masked(vectors, present), strict=True)]
        return torch.stack(scaled(projected, present)).sum(0)
