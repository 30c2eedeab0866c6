"""The hyper-branch of CAFNet: a fusion map that grows beside the branches, stage by stage."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drifa_attn.attention.mfa import pair
from drifa_attn.functional import lin
from drifa_attn.layout import Place

from .maps import grid_of, linear, resample, softmax
from .norms import NORMS, normed, on_rows
from .protocol import Places, Readout
from .vectors import last_maps, scaled

CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Scores(nn.Sequential):
    """One score for every position: three linear maps c -> c/2 -> c/4 -> 1 with relu between them, `b c n -> b 1 n`."""

    def __init__(self, channels: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        half, quarter = max(channels // 2, 1), max(channels // 4, 1)
        one, two, three = (linear(a, b, device, dtype) for a, b in ((channels, half), (half, quarter), (quarter, 1)))
        super().__init__(one, nn.ReLU(), two, nn.ReLU(), three)

    def forward(self, x: Tensor) -> Tensor:
        """The scores."""
        for layer in self:
            x = lin(x, pair(layer)) if isinstance(layer, nn.Linear) else layer(x)
        return x


class Residual(nn.Module):
    """A residual block on a map of any rank: `relu(bn2(conv2(relu(bn1(conv1(f))))) + shortcut(f))`.

    The shortcut is a linear map where channels or grid change, else f itself.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, *, changes: bool, **factory: Any) -> None:
        super().__init__()
        self.conv1 = CONVS[rank](inputs, outputs, 3, padding=1, **factory)
        self.bn1 = NORMS[rank](outputs, **factory)
        self.conv2 = CONVS[rank](outputs, outputs, 3, padding=1, **factory)
        self.bn2 = NORMS[rank](outputs, **factory)
        self.proj = linear(inputs, outputs, factory["device"], factory["dtype"]) if changes else None

    def forward(self, f: Tensor, stride: Sequence[int]) -> Tensor:
        """The block; the first convolution and the shortcut take every `stride`-th position of each axis."""
        conv = CONV[len(stride)]
        y = normed(self.bn1, conv(f, self.conv1.weight, self.conv1.bias, tuple(stride), 1)).relu()
        y = normed(self.bn2, self.conv2(y))
        if self.proj is not None:
            f = f[(..., *[slice(None, None, step) for step in stride])]  # type: ignore[index]
            f = lin(f.flatten(2), pair(self.proj)).reshape(*y.shape)
        return (y + f).relu()


class Stage(nn.Module):
    """One stage of the hyper-branch: the modalities weighed at every position, and mixed with the map from before."""

    def __init__(self, places: Places, before: Place | None, **factory: Any) -> None:
        super().__init__()
        self.places, c, device, dtype = tuple(places), places[0].channels, factory["device"], factory["dtype"]
        self.projs = nn.ModuleDict(
            {str(i): linear(p.channels, c, device, dtype) for i, p in enumerate(places) if p.channels != c}
        )
        self.scores = nn.ModuleList(Scores(c, device, dtype) for _ in places)
        if before is not None:
            grid, old, inputs = grid_of_place(places[0]), grid_of_place(before), before.channels
            changes = inputs != c or grid != old
            blocks = [Residual(inputs, c, len(grid), changes=changes, **factory)]
            self.blocks = nn.ModuleList([*blocks, Residual(c, c, len(grid), changes=False, **factory)])
            self.mixes = nn.ModuleList(Scores(c, device, dtype) for _ in range(2))

    def weighed(self, xs: Sequence[Tensor], present: Tensor | None) -> tuple[Tensor, Tensor]:
        """The modalities' maps on the first's grid as one, `b c n`, and the weight of each at every position, `b m n`."""
        maps = last_maps("HyperBranch", xs, self.places, present)
        grids = [grid_of(x, place) for x, place in zip(xs, self.places, strict=True)]
        us = [resample(x, grid, grids[0]) for x, grid in zip(maps, grids, strict=True)]
        us = [lin(u, pair(self.projs[str(i)])) if str(i) in self.projs else u for i, u in enumerate(us)]
        scores = torch.cat([score(u) for score, u in zip(self.scores, us, strict=True)], 1)
        weights = softmax(scores, None if present is None else present[:, :, None], 1).to(scores.dtype)
        return torch.stack([weights[:, i, None] * u for i, u in enumerate(us)]).sum(0), weights

    def advance(self, f: Tensor, old: Sequence[int], grid: Sequence[int]) -> Tensor:
        """The map from before through two residual blocks, on this stage's grid: `b c n`."""
        stride = [1] * len(grid)
        if len(old) == len(grid) and all(a % b == 0 for a, b in zip(old, grid, strict=True)):
            stride = [a // b for a, b in zip(old, grid, strict=True)]
        else:
            f, old = resample(f, old, grid), grid
        f = self.blocks[0](f.reshape(*f.shape[:2], *old), stride)
        return self.blocks[1](f, [1] * len(grid)).flatten(2)

    def mixed(self, g: Tensor, f: Tensor) -> Tensor:
        """The map of this stage and the map from before, weighed at every position."""
        both = softmax(torch.cat([self.mixes[0](g), self.mixes[1](f)], 1), dim=1).to(g.dtype)
        return both[:, :1] * g + both[:, 1:] * f


class HyperBranch(Readout):
    """The hyper-branch (AF) of CAFNet behind its co-attention.

        g = Σ_i softmax_i(scores.i(u_i)) · u_i        u_i: features of modality i, at every position of the first's grid
        f = g at the first stage, then softmax over {g, f} of (mixes.0(g), mixes.1(blocks(f))) · {g, blocks(f)}
        z = [v_1 ; … ; v_m ; mean(f_last)]

    `scores` and `mixes` are three linear maps with relu between them. Features of another grid are resampled to the first
    modality's, and where channels differ projected by `projs`. `blocks` are two residual blocks; the stride of the first is
    the whole-number ratio of the grids, where there is none f is resampled first. Stages where not all modalities meet are not
    read.

    Args:
        outputs: where the vectors of each branch come from.
        stages: the places of each stage.

    Shape: m vectors `b c_i`, {stage: a list of maps}, present `b m` or None -> `b (Σc_i + c)`, c of the first modality at the
        last stage; zeros for a sample that has none.
    Raises: ValueError: no stage where all modalities meet.
    Source: doi 10.1016/j.patcog.2022.108990. Differs: m other than 2, unlike shapes and absent modalities are not in it.
    """

    def __init__(
        self,
        outputs: Places,
        stages: Sequence[Places],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        met = {k: places for k, places in enumerate(stages) if len(places) == len(outputs)}
        if not met:
            raise ValueError(f"HyperBranch found no stage where all {len(outputs)} modalities meet: name one in at=.")
        self.keeps, before = frozenset(met), [None, *(places[0] for places in met.values())]
        self.stages = nn.ModuleList(
            Stage(places, old, device=device, dtype=dtype) for places, old in zip(met.values(), before, strict=False)
        )
        self.width = sum(place.channels for place in outputs) + met[max(met)][0].channels

    def parts(self) -> list[Stage]:
        """The stages."""
        return list(self.stages)  # type: ignore[arg-type]

    def fused(self, kept: Mapping[int, list[Tensor]], present: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """The last fusion map `b c n`, and the weights of the modalities `b m n` at each stage."""
        f: Tensor | None = None
        old: tuple[int, ...] = ()
        weights, some = [], None if present is None else present.any(1)
        for k, stage in zip(sorted(self.keeps), self.parts(), strict=True):
            grid = flat(grid_of(kept[k][0], stage.places[0]))
            g, weight = stage.weighed(kept[k], present)
            if f is not None:
                run = partial(stage.advance, old=old, grid=grid)
                g = stage.mixed(g, on_rows(run, [f], some, training=self.training))
            f, old = g, grid
            weights.append(weight)
        return f, weights  # type: ignore[return-value]

    def forward(self, vectors: list[Tensor], kept: Mapping[int, list[Tensor]], present: Tensor | None) -> Tensor:
        """The vector of every sample."""
        f = self.fused(kept, present)[0].mean(-1)
        if present is not None:
            f = torch.where(present.any(1, keepdim=True), f, 0)
        return torch.cat([*scaled(vectors, present), f], 1)

    def gates(self, vectors: list[Tensor], kept: Mapping[int, list[Tensor]], present: Tensor | None) -> dict[str, Tensor]:  # type: ignore[override]
        """The weights of the modalities at every position, `b m n` for each stage; they sum to one."""
        found = self.fused(kept, present)[1]
        return {f"stages.{k}": weights for k, weights in enumerate(found)}


def flat(grid: Sequence[int]) -> tuple[int, ...]:
    """A grid of at most three axes; more are taken as one."""
    return tuple(grid) if len(grid) <= 3 else (int(torch.Size(grid).numel()),)


def grid_of_place(place: Place) -> tuple[int, ...]:
    """The grid that the features of a place have."""
    if len(place.shape) == 1:
        return (1,)
    axes = place.shape[1:] if place.layout == "b c ..." else place.shape[:-1]
    return flat((axes[0] - place.num_prefix_tokens, *axes[1:]))
