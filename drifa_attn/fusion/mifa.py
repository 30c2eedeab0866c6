"""DRIFA: after every stage one MIFA reads all branches and gates each (Fig. 1A)."""

from collections.abc import Sequence
from typing import Any

import torch

from drifa_attn.attention import MIFA, Init
from drifa_attn.layout import Place

from .protocol import Refiner


class MIFARefiner(MIFA, Refiner):
    """The MIFA of one stage of a fused network.

    Args:
        places: where the features of each modality are, and how many channels they have.
        reduction, dim, init: as `MIFA` takes them; `reduction` is not used with a `dim`.

    Shape, Raises: as `MIFA`.
    Differs: the paper's MIFA has no reduction; pass `reduction=None`.
    """

    def __init__(
        self,
        places: Sequence[Place],
        *,
        reduction: int | None = 16,
        dim: int | None = None,
        init: Init = "identity",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        where: dict[str, Any] = {
            "layout": [place.layout for place in places],
            "num_prefix_tokens": [place.num_prefix_tokens for place in places],
        }
        super().__init__(
            [place.channels for place in places],
            len(places),
            dim=dim,
            reduction=None if dim else reduction,
            init=init,
            **where,
            device=device,
            dtype=dtype,
        )
