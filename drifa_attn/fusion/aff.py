"""Attentional feature fusion: two maps, weighed against each other at every position and channel."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from drifa_attn.attention.mfa import pair
from drifa_attn.checks import count
from drifa_attn.functional import lin

from .maps import grid_of, linear, resample
from .norms import normed, on_rows
from .protocol import Places, Readout
from .vectors import last_maps, last_places

REDUCTION = 4


class Bottleneck(nn.Module):
    """Two linear maps with batch norms, `bn2(lin(expand, relu(bn1(lin(reduce, u)))))`: `b c n -> b c n`."""

    def __init__(self, channels: int, width: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.reduce, self.expand = linear(channels, width, device, dtype), linear(width, channels, device, dtype)
        self.bn1 = nn.BatchNorm1d(width, device=device, dtype=dtype)
        self.bn2 = nn.BatchNorm1d(channels, device=device, dtype=dtype)

    def forward(self, u: Tensor) -> Tensor:
        """The map, before any σ."""
        return normed(self.bn2, lin(normed(self.bn1, lin(u, pair(self.reduce))).relu(), pair(self.expand)))


class MultiScale(nn.Module):
    """The multi-scale channel attention of AFF, `σ(local(u) + context(mean(u)))`: `b c n -> b c n`, in (0, 1)."""

    def __init__(self, channels: int, width: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.local, self.context = (Bottleneck(channels, width, device, dtype) for _ in range(2))

    def forward(self, u: Tensor) -> Tensor:
        """The weights."""
        return (self.local(u) + self.context(u.mean(-1, keepdim=True))).sigmoid()


class AFF(Readout):
    """Attentional feature fusion of the last stage's maps.

        M(u) = σ(local(u) + context(mean(u)))        a = M_first(x + y)
        fold(x, y) = 2 (a · x + (1 − a) · y)         z = mean(fold(…, x_m))

    `local` and `context` are bottlenecks of two linear maps with batch norms. Maps of another grid or other channels are
    resampled to the grid and projected to the channels of the first modality's. More than two are folded in order, by the same
    weights. A lone modality is its own fold. In training, batch norms see only the samples that have both; where that is one
    value per channel, they use their running statistics.

    Args:
        outputs: the branches' outputs, which are not read.
        stages: the places of each stage; all modalities meet at the last.
        reduction: r >= 1; the bottlenecks have the width max(c // r, 1).

    Shape: {last stage: a list of maps}, present `b m` or None -> `b c`, c of the first modality; zeros for a sample that has
        none.
    Raises: ValueError: a `reduction` below one, or a last stage where not all modalities meet.
    Source: arXiv:2009.14082. Differs: none for two maps of one shape; folding, projection and absent modalities are not in it.
    """

    factor, reads_vectors = 2, False

    def __init__(
        self,
        outputs: Places,
        stages: Sequence[Places],
        *,
        reduction: int = REDUCTION,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.places = tuple(last_places(name, outputs, stages))
        self.keeps = frozenset({len(stages) - 1})
        self.width = c = self.places[0].channels
        width = max(c // count(name, "reduction", reduction), 1)
        self.projections = nn.ModuleDict(
            {str(i): linear(p.channels, c, device, dtype) for i, p in enumerate(self.places) if p.channels != c}
        )
        self.first = MultiScale(c, width, device, dtype)

    def weight(self, x: Tensor, y: Tensor) -> Tensor:
        """How much of x is in the fold of x and y, in (0, 1)."""
        return self.first(x + y)

    def aligned(self, kept: Mapping[int, list[Tensor]], present: Tensor | None) -> list[Tensor]:
        """The maps of all modalities on the first's grid, with its channels: `b c n`, zeros where absent."""
        (k,) = self.keeps
        maps = last_maps(type(self).__name__, kept[k], self.places, present)
        grids = [grid_of(x, place) for x, place in zip(kept[k], self.places, strict=True)]
        found = []
        for i, (x, grid) in enumerate(zip(maps, grids, strict=True)):
            x = resample(x, grid, grids[0])
            found.append(lin(x, pair(self.projections[str(i)])) if str(i) in self.projections else x)
        return found

    def folded(self, kept: Mapping[int, list[Tensor]], present: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """The fold `b c n` of all maps, and the share `b c n` of each in it; the shares sum to one."""
        z, *rest = self.aligned(kept, present)
        shares, has = [torch.ones_like(z)], None if present is None else present[:, 0]
        for i, y in enumerate(rest, start=1):
            both = None if present is None else has & present[:, i]  # type: ignore[operator]
            a = on_rows(self.weight, [z, y], both, training=self.training)
            fold = self.factor * (a * z + (1 - a) * y)
            if present is None:
                shares, z = [*(a * share for share in shares), 1 - a], fold
                continue
            choose = partial(chosen, both, has)  # type: ignore[arg-type]
            shares = [*(choose(a * share, share, torch.zeros_like(a)) for share in shares), choose(1 - a, 0 * a, 1 + 0 * a)]
            z, has = choose(fold, z, y), has | present[:, i]  # type: ignore[operator]
        return z, shares

    def forward(self, vectors: list[Tensor], kept: Mapping[int, list[Tensor]], present: Tensor | None) -> Tensor:
        """The vector of every sample."""
        z = self.folded(kept, present)[0].mean(-1)
        return z if present is None else torch.where(present.any(1, keepdim=True), z, 0)

    def gates(self, vectors: list[Tensor], kept: Mapping[int, list[Tensor]], present: Tensor | None) -> list[Tensor]:  # type: ignore[override]
        """The share of each modality, `b c n`, in [0, 1]; they sum to one."""
        return self.folded(kept, present)[1]


def chosen(both: Tensor, has: Tensor, fold: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Sample by sample what holds if it has both, or the first alone, or not the first."""
    return torch.where(both[:, None, None], fold, torch.where(has[:, None, None], first, second))
