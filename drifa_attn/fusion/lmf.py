"""Low-rank multimodal fusion: the outer product of all vectors, with a weight tensor of low rank."""

from collections.abc import Mapping, Sequence

import torch
from einops import einsum
from torch import Tensor, nn

from drifa_attn.checks import count

from .protocol import Places, Readout
from .vectors import masked, width_of

RANK = 4


class LowRank(Readout):
    """Low-rank multimodal fusion.

        z = Σ_r weights_r · Π_i ([1 ; v_i] · factors.i[r]) + bias        the product over the modalities that are present

    Args:
        outputs: where the features of each branch are, and how many channels they have.
        rank: of the weight tensor, r >= 1.
        dim: the width f, >= 1; None is the largest of the channels.

    Shape: m vectors `b c_i`, present `b m` or None -> `b f`; zeros for a sample that has none.
    Raises: ValueError: a `rank` or `dim` below one.
    Source: arXiv:1806.00064. Differs: an absent modality is left out of the product.
    """

    def __init__(
        self,
        outputs: Places,
        stages: Sequence[Places] = (),
        *,
        rank: int = RANK,
        dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.width, self.rank = width_of("LowRank", dim, outputs), count("LowRank", "rank", rank)
        self.factors = nn.ParameterList(
            torch.empty(self.rank, 1 + place.channels, self.width, device=device, dtype=dtype) for place in outputs
        )
        self.weights = nn.Parameter(torch.empty(self.rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(self.width, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-normal factors, weights of 1/r, a bias of zero."""
        for factor in self.factors:
            for one in factor:  # of each rank a matrix
                nn.init.xavier_normal_(one)
        nn.init.constant_(self.weights, 1 / self.rank)
        nn.init.zeros_(self.bias)

    def forward(self, vectors: list[Tensor], kept: Mapping[int, list[Tensor]], present: Tensor | None) -> Tensor:
        """The vector of every sample."""
        product: Tensor | float = 1.0
        for i, (v, factor) in enumerate(zip(masked(vectors, present), self.factors, strict=True)):
            one = einsum(torch.cat([torch.ones_like(v[:, :1]), v], 1), factor, "b c, r c f -> b r f")
            product = product * (one if present is None else torch.where(present[:, i, None, None], one, 1))
        z = einsum(product, self.weights, "b r f, r -> b f") + self.bias
        return z if present is None else torch.where(present.any(1, keepdim=True), z, 0)
