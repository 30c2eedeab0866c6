"""The classifier of MTTU-Net: a transformer over the positions of all modalities."""

from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from drifa_attn.checks import count
from drifa_attn.layout import Place

from .maps import MOST_POSITIONS, attend, check_positions, checked_heads, linear, multiple
from .protocol import Places, Readout
from .vectors import last_maps, last_places, scaled

DIM, HEADS, LAYERS, MLP_RATIO = 512, 8, 4, 4.0


class Layer(nn.Module):
    """One pre-norm transformer layer on tokens, some of which a sample may lack.

        t = t + lin(proj, MHA(lin(qkv, norm1(t))))
        t = t + lin(fc2, gelu(lin(fc1, norm2(t))))

    Shape: t `b n d`, has `b n` or None -> `b n d`.
    """

    def __init__(self, dim: int, heads: int, hidden: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-5, device=device, dtype=dtype) for _ in range(2))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, device=device, dtype=dtype)
        nn.init.xavier_uniform_(self.qkv.weight)
        self.proj = linear(dim, dim, device, dtype)
        self.fc1, self.fc2 = linear(dim, hidden, device, dtype), linear(hidden, dim, device, dtype)

    def attended(self, t: Tensor, has: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the tokens read of each other, `b n d`, and how they weigh each other, `b h n n`."""
        q, k, v = rearrange(self.qkv(self.norm1(t)), "b n (three d) -> three b d n", three=3)
        y, weights = attend(q, k, v, self.heads, has)
        return self.proj(y.mT), weights

    def forward(self, t: Tensor, has: Tensor | None) -> Tensor:
        """The tokens."""
        t = t + self.attended(t, has)[0]
        return t + self.fc2(nn.functional.gelu(self.fc1(self.norm2(t))))


class MTTU(Readout):
    """The classifier of MTTU-Net on the last stage's maps.

        t = norm(layers([lin(projections.i, x_i) + positions.i along positions]))        four pre-norm transformer layers
        z = [mean(x_1) ; … ; mean(x_m) ; max(x_1) ; … ; max(x_m) ; mean(t) ; max(t)]

    The first two parts are scaled by m over the number of modalities that are present, and zero for absent ones; tokens of
    absent modalities are in no softmax, mean or maximum. The source weighs the tasks of its loss by learned uncertainty, as
    `TaskLoss(tasks, "uncertainty")` does: half the source's loss, up to a constant.

    Args:
        outputs: the branches' outputs, which are not read.
        stages: the places of each stage; all modalities meet at the last, and its positions are learned.
        dim: the width d of tokens, a multiple of `heads`; None is `min(512, max c_i)`, and the next multiple where it is none.
        heads, layers: >= 1.
        mlp_ratio: of the width between `fc1` and `fc2`, > 0.
        max_positions: the most positions of all modalities together.

    Shape: {last stage: a list of maps}, present `b m` or None -> `b (2 Σc_i + 2 d)`; zeros for a sample that has none.
    Raises: ValueError: an option out of its range, more positions, features of other positions than at the start, or a last
        stage where not all modalities meet.
    Source: doi 10.1109/TMI.2022.3142321. Differs: segmentation and pseudo-labels are not part of a fusion.
    """

    reads_vectors = False

    def __init__(
        self,
        outputs: Places,
        stages: Sequence[Places],
        *,
        dim: int | None = None,
        heads: int = HEADS,
        layers: int = LAYERS,
        mlp_ratio: float = MLP_RATIO,
        max_positions: int = MOST_POSITIONS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.places, self.keeps = tuple(last_places("MTTU", outputs, stages)), frozenset({len(stages) - 1})
        channels, heads = [place.channels for place in self.places], count("MTTU", "heads", heads)
        d = multiple(min(DIM, max(channels)), heads) if dim is None else count("MTTU", "dim", dim)
        checked_heads("MTTU", d, heads)
        hidden = count("MTTU", "mlp_ratio · dim", round(mlp_ratio * d))
        check_positions("MTTU", sum(place.positions for place in self.places), max_positions)
        self.width = 2 * sum(channels) + 2 * d
        self.projections = nn.ModuleList(linear(c, d, device, dtype) for c in channels)
        self.positions = nn.ParameterList(
            0.02 * torch.randn(place.positions, d, device=device, dtype=dtype) for place in self.places
        )
        self.layers = nn.ModuleList(Layer(d, heads, hidden, device, dtype) for _ in range(count("MTTU", "layers", layers)))
        self.norm = nn.LayerNorm(d, eps=1e-5, device=device, dtype=dtype)

    def tokens(self, maps: Sequence[Tensor]) -> Tensor:
        """The positions of all modalities as tokens, `b n d`."""
        parts = []
        for x, place, projection, learned in zip(maps, self.places, self.projections, self.positions, strict=True):
            check_size(x, place)
            parts.append(projection(x.mT) + learned)
        return torch.cat(parts, 1)

    def transformed(self, t: Tensor, has: Tensor | None = None) -> Tensor:
        """The tokens behind the last norm; `has` `b n` says which a sample has."""
        for layer in self.layers:
            t = layer(t, has)
        return self.norm(t)

    def has(self, maps: Sequence[Tensor], present: Tensor | None) -> Tensor | None:
        """Which tokens a sample has, `b n`."""
        if present is None:
            return None
        return torch.cat([present[:, i, None].expand(-1, x.shape[-1]) for i, x in enumerate(maps)], 1)

    def maps(self, kept: Mapping[int, list[Tensor]], present: Tensor | None) -> list[Tensor]:
        """The maps of the last stage, `b c n`, zeros where absent."""
        (k,) = self.keeps
        return last_maps("MTTU", kept[k], self.places, present)

    def forward(self, vectors: list[Tensor], kept: Mapping[int, list[Tensor]], present: Tensor | None) -> Tensor:
        """The vector of every sample."""
        maps = self.maps(kept, present)
        has = self.has(maps, present)
        t = self.transformed(self.tokens(maps), has)
        parts = [*scaled([x.mean(-1) for x in maps], present), *scaled([x.amax(-1) for x in maps], present)]
        return torch.cat([*parts, *pooled(t, has)], 1)

    def gates(self, vectors: list[Tensor], kept: Mapping[int, list[Tensor]], present: Tensor | None) -> dict[str, Tensor]:  # type: ignore[override]
        """The attention of each layer among the tokens of all modalities, `b h n n`; each row sums to one."""
        maps = self.maps(kept, present)
        t, has, found = self.tokens(maps), self.has(maps, present), {}
        for k, layer in enumerate(self.layers):
            found[f"layers.{k}"] = layer.attended(t, has)[1]  # type: ignore[operator]
            t = layer(t, has)
        return found


def pooled(t: Tensor, has: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mean and the maximum over the tokens `b n d` that a sample has, `b d` each; zeros where it has none."""
    if has is None:
        return t.mean(1), t.amax(1)
    number, some = has.sum(1, keepdim=True), has.any(1, keepdim=True)
    mean = torch.where(has[..., None], t, 0).sum(1) / number.clamp(min=1)
    most = t.masked_fill(~has[..., None], torch.finfo(t.dtype).min).amax(1)
    return mean, torch.where(some, most, 0)


def check_size(x: Tensor, place: Place) -> None:
    """Raise a `ValueError` unless a map has as many positions as MTTU has learned."""
    if not torch.jit.is_tracing() and x.shape[-1] != place.positions:
        raise ValueError(
            f"MTTU has learned {place.positions} positions, got features of {x.shape[-1]}: give it inputs of the size that it "
            "was built with, or fuse again with example_inputs of this size."
        )
