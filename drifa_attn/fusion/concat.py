"""The control: every branch to its end, and their vectors side by side."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .protocol import Places, Readout
from .vectors import scaled


class Concatenated(Readout):
    """The vectors of all branches side by side, `[v_1 ; … ; v_m]`.

    The vector of an absent modality is zero, and the others are scaled by m over the number of modalities that are present, so
    that the sum which a linear head computes keeps its size.

    Shape: m vectors `b c_i`, present `b m` or None -> `b Σc_i`.
    Differs: absent modalities are not in the paper. It has no weights, so `device` and `dtype` do not matter.
    """

    def __init__(
        self,
        outputs: Places,
        stages: Sequence[Places] = (),
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.width = sum(place.channels for place in outputs)

    def forward(self, vectors: list[Tensor], kept: Mapping[int, list[Tensor]], present: Tensor | None) -> Tensor:
        """The vector of every sample."""
        return torch.cat(scaled(vectors, present), 1)
