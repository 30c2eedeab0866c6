"""What several readouts do with one vector per modality, and with maps of the last stage."""

from collections.abc import Sequence

import torch
from torch import Tensor

from drifa_attn.checks import count
from drifa_attn.layout import Place, check_features, positions

from .protocol import Places


def masked(vectors: Sequence[Tensor], present: Tensor | None) -> list[Tensor]:
    """The tensors `b ...`, with zeros where a sample lacks the modality, so that what they hold there has no effect."""
    if present is None:
        return list(vectors)
    rows = [present[:, i].reshape(-1, *[1] * (v.ndim - 1)) for i, v in enumerate(vectors)]
    return [torch.where(has, v, 0) for has, v in zip(rows, vectors, strict=True)]


def scaled(vectors: Sequence[Tensor], present: Tensor | None) -> list[Tensor]:
    """Vectors `b c_i` with zeros where absent, the others scaled by m over the number of modalities that are present."""
    if present is None:
        return list(vectors)
    number = present.sum(1, keepdim=True).clamp(min=1)
    return [v * (len(vectors) / number) for v in masked(vectors, present)]


def width_of(owner: str, dim: int | None, outputs: Sequence[Place]) -> int:
    """The width of a readout: `dim`, or without one the most channels of any branch."""
    return max(place.channels for place in outputs) if dim is None else count(owner, "dim", dim)


def last_places(owner: str, outputs: Sequence[Place], stages: Sequence[Places]) -> Places:
    """The places of the last stage; a `ValueError` unless all modalities meet there."""
    if not stages or len(stages[-1]) != len(outputs):
        raise ValueError(
            f"{owner} reads the maps of the last stage, and only {len(stages[-1]) if stages else 0} of {len(outputs)} "
            "modalities meet there: name a stage in at= that all have."
        )
    return stages[-1]


def last_maps(owner: str, kept: Sequence[Tensor], places: Places, present: Tensor | None) -> list[Tensor]:
    """The positions `b c n` of the features of a stage, with zeros for absent modalities."""
    for x, place in zip(kept, places, strict=True):
        check_features(owner, x, place.channels, place.layout, place.num_prefix_tokens)
    maps = [positions(x, place.layout, place.num_prefix_tokens) for x, place in zip(kept, places, strict=True)]
    return masked(maps, present)
