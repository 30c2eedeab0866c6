"""The co-attention of CAFNet: each modality's values, related to each other as the positions of the others are."""

from collections.abc import Callable, Sequence

import torch
from einops import einsum
from torch import Tensor, nn

from drifa_attn.attention.mfa import pair
from drifa_attn.functional import lin, without_autocast
from drifa_attn.layout import Place

from .additive import Additive, mean_of_others, others
from .maps import MOST_POSITIONS, grid_of, linear, resample, softmax

REDUCTION = 8


class CoAttention(Additive):
    """The co-attention (CA) of CAFNet.

        A_j = softmax_l(lin(queries.j, x_j)ᵀ lin(keys.j, x_j))        n_i l, on x_j resampled to the grid of modality i
        y_i = x_i + gammas.i · mean over the other modalities j of lin(values.i, x_i) A_jᵀ

    Its cost grows with the square of the positions. It acts at stages where every modality has at most `max_positions`;
    `print(net.plan)` says where. It starts with `gammas` of zero.

    Args:
        places: where the features of each modality are, and how many channels they have.
        max_positions: the most positions of any modality.

    Shape, Raises: as `Additive`.
    Source: doi 10.1016/j.patcog.2022.108990. Differs: the transpose of A is the paper's, public code leaves it out. The source
        has two modalities of one grid.
    """

    amount: Callable[..., int] = staticmethod(max)

    def __init__(
        self,
        places: Sequence[Place],
        *,
        max_positions: int = MOST_POSITIONS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(places, max_positions)
        channels = [place.channels for place in places]
        self.queries = nn.ModuleList(linear(c, max(c // REDUCTION, 1), device, dtype) for c in channels)
        self.keys = nn.ModuleList(linear(c, max(c // REDUCTION, 1), device, dtype) for c in channels)
        self.values = nn.ModuleList(linear(c, c, device, dtype) for c in channels)
        self.gammas = nn.ParameterList(torch.zeros(1, device=device, dtype=dtype) for _ in channels)

    def started(self) -> list[nn.Parameter]:
        """The factors of what is added."""
        return list(self.gammas)

    def related(self, zs: Sequence[Tensor], xs: Sequence[Tensor], present: Tensor | None) -> list[Tensor]:
        """For each modality the mean over the others j of A_j on its grid, `b n_i n_i`; each row sums to one."""
        grids = [grid_of(x, place) for x, place in zip(xs, self.places, strict=True)]
        found = []
        for i, to in enumerate(grids):
            parts = {}
            for j in others(i, len(zs)):
                z = resample(zs[j], grids[j], to)
                scores = einsum(lin(z, pair(self.queries[j])), lin(z, pair(self.keys[j])), "b d n, b d l -> b n l")
                parts[j] = softmax(scores)
            found.append(mean_of_others(parts, present))
        return found

    def deltas(self, zs: Sequence[Tensor], xs: Sequence[Tensor], present: Tensor | None) -> list[Tensor]:
        """What is added to each modality: by linearity the mean of A_j is taken before the product."""
        added = []
        for z, value, gamma, a in zip(zs, self.values, self.gammas, self.related(zs, xs, present), strict=True):
            read = einsum(lin(z, pair(value)), a.to(z.dtype), "b c l, b n l -> b c n")
            added.append(gamma.to(z.dtype) * read)
        return added

    def gates(self, xs: Sequence[Tensor], present: Tensor | None = None) -> list[Tensor]:
        """The attention `b n_i n_i` among the positions of each modality: the mean of A_j over the others."""
        zs = self.checked(xs, present)
        with without_autocast(xs[0]):
            return self.related(zs, xs, present)
