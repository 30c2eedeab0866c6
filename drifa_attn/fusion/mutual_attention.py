"""Mutual attention (MTF): each modality's own features, asked by the others."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from drifa_attn.attention.mfa import pair
from drifa_attn.checks import count
from drifa_attn.functional import lin, without_autocast
from drifa_attn.layout import Place

from .additive import Additive, mean_of_others, others
from .maps import MOST_POSITIONS, attend, checked_heads, linear, multiple
from .protocol import Places

HEADS = 4


class MutualAttention(Additive):
    """The mutual attention of MTF: the others ask each modality about itself.

        A_ij = lin(outs.i, MHA(q = lin(queries.i.j, x_j), k = lin(keys.i, x_i), v = lin(values.i, x_i)))        c_i n_j
        y_i  = x_i + mean over the other modalities j of mean_positions(A_ij)

    It acts at the last stage, as in the source, and starts with `outs` of zero.

    Args:
        places: where the features of each modality are, and how many channels they have.
        heads: h >= 1; modality i works at the width h · ⌈c_i / h⌉.
        dims: those widths, multiples of h, one per modality; None is the default.
        max_positions: the most positions of all modalities together.

    Shape, Raises: as `Additive`.
    Source: doi 10.1007/s00371-022-02492-4. Differs: the source has two modalities, one of them a vector of metadata. A public
        copy makes the batch the sequence, so that samples attend to each other; that is not imitated. The source's ViT and
        its encoder of soft labels are backbones, which the user chooses.
    """

    def __init__(
        self,
        places: Sequence[Place],
        *,
        heads: int = HEADS,
        dims: Sequence[int] | None = None,
        max_positions: int = MOST_POSITIONS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(places, max_positions)
        channels, heads = [place.channels for place in places], count("MutualAttention", "heads", heads)
        dims = [multiple(c, heads) for c in channels] if dims is None else list(dims)
        if len(dims) != len(channels):
            raise ValueError(f"MutualAttention expected dims, one per modality ({len(channels)}), got {dims}.")
        self.heads = [checked_heads("MutualAttention", count("MutualAttention", "dims", w), heads) for w in dims][0]
        own = list(zip(channels, dims, strict=True))
        self.queries = nn.ModuleList(
            nn.ModuleDict({str(j): linear(channels[j], w, device, dtype) for j in others(i, len(own))})
            for i, (_, w) in enumerate(own)
        )
        self.keys = nn.ModuleList(linear(c, w, device, dtype) for c, w in own)
        self.values = nn.ModuleList(linear(c, w, device, dtype) for c, w in own)
        self.outs = nn.ModuleList(linear(w, c, device, dtype) for c, w in own)
        for out in self.outs:
            nn.init.zeros_(out.weight)  # type: ignore[arg-type]

    @classmethod
    def left_alone(cls, stages: Sequence[Places], k: int, **options: Any) -> str | None:
        """Why it does not act at stage k: it is not the last, or has one modality or too many positions."""
        return super().left_alone(stages, k, **options) if k == len(stages) - 1 else "it acts at the last stage"

    def started(self) -> list[nn.Parameter]:
        """The maps back to the features."""
        return list(self.outs.parameters())

    def attended(self, zs: Sequence[Tensor], i: int) -> dict[int, tuple[Tensor, Tensor]]:
        """What each other modality j reads of modality i, A_ij `b c_i n_j`, and its attention `b h n_j n_i`."""
        k, v, out = (pair(maps[i]) for maps in (self.keys, self.values, self.outs))
        found = {}
        for j, query in self.queries[i].items():  # type: ignore[operator,union-attr]
            y, weights = attend(lin(zs[int(j)], pair(query)), lin(zs[i], k), lin(zs[i], v), self.heads)
            found[int(j)] = lin(y, out), weights
        return found

    def deltas(self, zs: Sequence[Tensor], xs: Sequence[Tensor], present: Tensor | None) -> list[Tensor]:
        """What is added to each modality, the same at every position."""
        means = []
        for i in range(len(zs)):
            parts = {j: a.mean(-1, keepdim=True) for j, (a, _) in self.attended(zs, i).items()}
            means.append(mean_of_others(parts, present))
        return means

    def gates(self, xs: Sequence[Tensor], present: Tensor | None = None) -> list[Tensor]:
        """The attention `b h n_i` to the positions of each modality: the mean over those that ask; it sums to one."""
        zs = self.checked(xs, present)
        with without_autocast(xs[0]):
            found = [{j: weights.mean(2) for j, (_, weights) in self.attended(zs, i).items()} for i in range(len(zs))]
            return [mean_of_others(parts, present) for parts in found]
