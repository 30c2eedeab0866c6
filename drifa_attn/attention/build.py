"""The attentions by name: `build` makes one for a place in a network, and `cost` says what it costs there."""

from typing import Any

import torch
from torch import nn

from drifa_attn.layout import Place

from .foreign import Foreign, foreign_cost
from .mfa import MFA
from .refines import Spec

# The attentions of this library, one line each; every other name is timm's, or that of a callable. Each is built as
# `attention(channels, layout=..., num_prefix_tokens=..., device=..., dtype=..., **options)`, and has a class method
# `cost(place, **options)` that gives what `cost` gives.
ATTENTIONS: dict[str, Any] = {
    "mfa": MFA,
}


def build(spec: Spec, place: Place, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> nn.Module:
    """The attention of this spec for the features of a place, with new weights.

    Raises: ValueError: an unknown name, or an option out of its range. TypeError: an unknown option.
    """
    where: dict[str, Any] = {
        "layout": place.layout,
        "num_prefix_tokens": place.num_prefix_tokens,
        "device": device,
        "dtype": dtype,
    }
    if spec.name in ATTENTIONS:
        return ATTENTIONS[spec.name](place.channels, **where, **spec.options)
    return Foreign(place.channels, spec, **where)


def cost(spec: Spec, place: Place) -> tuple[int, int]:
    """The parameters of an attention at a place, and the FLOPs of its matrix products for one sample.

    Nothing is built for a name that `ATTENTIONS` knows; any other attention is built without memory.

    Raises: ValueError: an unknown name, or an option out of its range. TypeError: an unknown option.
    """
    if spec.name in ATTENTIONS:
        return ATTENTIONS[spec.name].cost(place, **spec.options)
    return foreign_cost(spec, place)
