"""GLoRIA: global and attended local embeddings of each modality, and losses that draw those of one sample together."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import einsum
from torch import Tensor, nn

from drifa_attn.attention.mfa import pair
from drifa_attn.checks import count, number
from drifa_attn.functional import lin, vector_dtype, without_autocast

from .additive import mean_of_others, others
from .contrast import attention, global_loss, local_loss
from .maps import MOST_POSITIONS, check_positions, linear
from .protocol import Places, Readout
from .vectors import last_maps, last_places, masked, scaled

DIM, WEIGHT, TEMPERATURES = 128, 0.1, (4.0, 5.0, 10.0)


class GLoRIA(Readout):
    """GLoRIA's representations for m modalities: here the positions of the other modalities are the words.

        l_i  = lin(local_embedders.i, x_i)        g_i = lin(global_embedders.i, v_i)
        a    = softmax over i's positions of temp1 · softmax over j's positions of l_iᵀ l_j        c_ij = l_i a
        z    = [g_1 ; … ; g_m ; mean over the other modalities j of mean_positions(c_1j) ; … ; the same of m]

    A lone modality has `mean(l_i)` in the place of what it is asked for. Both parts are scaled by m over the number of
    modalities that are present, and zero for absent ones. In training, `losses()` gives the contrastive losses of the last
    forward, times `gloria_weight`: see `local_loss` and `global_loss`. Pairs of modalities are averaged, both orders; samples
    that lack one of a pair are left out of it.

    Args:
        outputs: where the vectors v_i of each branch come from.
        stages: the places of each stage; all modalities meet at the last.
        dim: d >= 1.
        temperatures: temp1, temp2, temp3, > 0.
        gloria_weight: of the losses, >= 0; zero computes none.
        max_positions: the most positions of all modalities together.

    Shape: m vectors `b c_i`, {last stage: a list of maps}, present `b m` or None -> `b (2 m d)`; zeros for a sample that has
        none.
    Raises: ValueError: an option out of its range, more positions, or a last stage where not all modalities meet.
    Source: Huang et al., ICCV 2021. Differs: the source aligns an image with the words of a report.
    """

    def __init__(
        self,
        outputs: Places,
        stages: Sequence[Places],
        *,
        dim: int = DIM,
        temperatures: Sequence[float] = TEMPERATURES,
        gloria_weight: float = WEIGHT,
        max_positions: int = MOST_POSITIONS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.places, self.keeps = tuple(last_places("GLoRIA", outputs, stages)), frozenset({len(stages) - 1})
        dim, self.max_positions = count("GLoRIA", "dim", dim), count("GLoRIA", "max_positions", max_positions)
        self.temperatures = checked_temperatures(temperatures)
        self.gloria_weight = number("GLoRIA", "gloria_weight", gloria_weight, ">= 0", lambda x: 0 <= x < float("inf"))
        check_positions("GLoRIA", sum(place.positions for place in self.places), self.max_positions)
        self.width = 2 * dim * len(outputs)
        self.local_embedders = nn.ModuleList(linear(p.channels, dim, device, dtype) for p in self.places)
        self.global_embedders = nn.ModuleList(linear(p.channels, dim, device, dtype) for p in outputs)
        self.terms: dict[str, Tensor] = {}

    def embedded(
        self, vectors: list[Tensor], kept: Mapping[int, list[Tensor]], present: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The global embeddings `b d` and the local ones `b d n_i`; for absent modalities those of zeros."""
        (k,) = self.keeps
        maps = last_maps("GLoRIA", kept[k], self.places, present)
        check_positions("GLoRIA", sum(x.shape[-1] for x in maps), self.max_positions)
        every = [embed(v) for embed, v in zip(self.global_embedders, masked(vectors, present), strict=True)]
        return every, [lin(x, pair(embed)) for embed, x in zip(self.local_embedders, maps, strict=True)]

    def forward(self, vectors: list[Tensor], kept: Mapping[int, list[Tensor]], present: Tensor | None) -> Tensor:
        """The vector of every sample."""
        g, local = self.embedded(vectors, kept, present)
        if self.training and self.gloria_weight:
            self.terms = self.contrasted(g, local, present)
        elif self.terms:
            self.terms = {}
        asked = [self.asked(local, i, present) for i in range(len(local))]
        return torch.cat([*scaled(g, present), *scaled(asked, present)], 1)

    def asked(self, local: list[Tensor], i: int, present: Tensor | None) -> Tensor:
        """What the others ask modality i for, `b d`; its mean where it is alone."""
        alone = local[i].mean(-1)
        contexts = {}
        for j in others(i, len(local)):
            a = attention(local[i], local[j], self.temperatures[0]).to(local[i].dtype)
            contexts[j] = einsum(local[i], a, "b d n, b n t -> b d t").mean(-1)
        if not contexts:
            return alone
        mean = mean_of_others(contexts, present)
        if present is None:
            return mean
        return torch.where(present[:, others(i, len(local))].any(1, keepdim=True), mean, alone)

    def contrasted(self, g: list[Tensor], local: list[Tensor], present: Tensor | None) -> dict[str, Tensor]:
        """The losses of a batch, weighted."""
        pairs = [(i, j) for i in range(len(g)) for j in others(i, len(g))]
        if not pairs:
            return {}
        with without_autocast(g[0]):
            g, local = ([t.to(vector_dtype(t)) for t in ts] for ts in (g, local))
            sums: list[Any] = [0.0, 0.0]
            for i, j in pairs:
                has = None if present is None else present[:, i] & present[:, j]
                sums[0] = sums[0] + local_loss(local[i], local[j], self.temperatures, has)
                sums[1] = sums[1] + global_loss(g[i], g[j], self.temperatures[2], has)
        factor = self.gloria_weight / len(pairs)
        return {"gloria local": factor * sums[0], "gloria global": factor * sums[1]}

    def losses(self) -> dict[str, Tensor]:
        """The local and the global loss of the last forward, if that was in training; each times `gloria_weight`."""
        return dict(self.terms)

    def gates(self, vectors: list[Tensor], kept: Mapping[int, list[Tensor]], present: Tensor | None) -> dict[str, Tensor]:  # type: ignore[override]
        """The attention `b n_i n_j` of each position of modality j to those of modality i, "i.j"; each column sums to one."""
        _, local = self.embedded(vectors, kept, present)
        names = self.names or range(len(local))
        pairs = [(i, j) for i in range(len(local)) for j in others(i, len(local))]
        return {f"{names[i]}.{names[j]}": attention(local[i], local[j], self.temperatures[0]) for i, j in pairs}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"terms": {}}  # those of a batch are no part of a copy


def checked_temperatures(temperatures: Sequence[float]) -> tuple[float, ...]:
    """Three positive numbers."""
    if not isinstance(temperatures, Sequence) or len(temperatures) != 3:
        raise ValueError(f"GLoRIA expected three temperatures, got {temperatures!r}.")
    return tuple(number("GLoRIA", "temperatures", t, "> 0", lambda x: 0 < x < float("inf")) for t in temperatures)
