"""Gated multimodal units: each modality's vector is weighed by a gate that has read all of them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .maps import linear
from .protocol import Places, Readout
from .vectors import masked, width_of


class Gates(nn.ModuleList):
    """The gates of a gated multimodal unit, `σ(lin(i, [v_1 ; … ; v_m]))`, one linear map per modality."""

    def forward(self, vectors: list[Tensor], kept: Mapping[int, list[Tensor]], present: Tensor | None) -> list[Tensor]:
        """The gates `b f` of each modality, in (0, 1); absent vectors are read as zeros."""
        every = torch.cat(masked(vectors, present), 1)
        return [reader(every).sigmoid() for reader in self]


class Gated(Readout):
    """A gated multimodal unit for m modalities.

        z = Σ_i σ(lin(gates.i, [v_1 ; … ; v_m])) · tanh(lin(values.i, v_i))        over the modalities that are present

    Absent vectors are zero in what the gates read.

    Args:
        outputs: where the features of each branch are, and how many channels they have.
        dim: the width f, >= 1; None is the largest of the channels.

    Shape: m vectors `b c_i`, present `b m` or None -> `b f`.
    Raises: ValueError: a `dim` below one.
    Source: arXiv:1702.01992. Differs: for two modalities the source has one gate a and 1 − a; this is its form for m, with a
        gate for each. Absent modalities are not in it.
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
        self.width = width_of("Gated", dim, outputs)
        channels = [place.channels for place in outputs]
        self._modules["gates"] = Gates(linear(sum(channels), self.width, device, dtype) for _ in channels)
        self.values = nn.ModuleList(linear(c, self.width, device, dtype) for c in channels)

    @property
    def gates(self) -> Gates:  # type: ignore[override]
        """The module that makes the gates of what `forward` takes; a `Refines` has a method of this name."""
        return self._modules["gates"]  # type: ignore[return-value]

    def forward(self, vectors: list[Tensor], kept: Mapping[int, list[Tensor]], present: Tensor | None) -> Tensor:
        """The vector of every sample."""
        values = [lin(v).tanh() for lin, v in zip(self.values, masked(vectors, present), strict=True)]
        gates = self.gates(vectors, kept, present)
        return torch.stack(masked([a * value for a, value in zip(gates, values, strict=True)], present)).sum(0)
