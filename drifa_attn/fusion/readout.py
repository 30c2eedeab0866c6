"""Behind the branches: their vectors side by side."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .protocol import Places, Readout


class Concatenated(Readout):
    """The vectors of all branches side by side, `[f_1 ; … ; f_m]`.

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
        if present is not None:
            number = present.sum(1, keepdim=True).clamp(min=1)
            vectors = [torch.where(present[:, i, None], v, 0) * (len(vectors) / number) for i, v in enumerate(vectors)]
        return torch.cat(vectors, 1)
