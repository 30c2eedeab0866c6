"""What every layer that refines features has in common: a switch, its gates, and a description that builds it again.

`Spec` describes an attention without its weights, `build` makes it for a place in a network, and `cost` says what it costs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from drifa_attn.layout import Place


@dataclass(frozen=True)
class Spec:
    """An attention without its weights: its name, and the arguments that do not depend on the place, which JSON can hold.

    `Spec("mfa", {"reduction": 16, "init": "identity"})`. A name that `ATTENTIONS` knows can be built with `build`.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


class Refines:
    """A layer that refines features. It is a mixin: write `class MFA(Refines, nn.Module)`.

    Attributes:
        enabled: False makes `forward` pass features on untouched. Set it on the layer; a compiled layer sees the change.
    """

    enabled: bool = True

    def gates(self, *inputs: Any) -> Tensor | list[Tensor]:
        """The gates, `b c` per feature, in (0, 1), for what `forward` takes."""
        raise NotImplementedError(f"{type(self).__name__} has no gates: it does not multiply channels.")

    def spec(self) -> Spec:
        """The description of this layer; `build` makes a new one from it."""
        raise NotImplementedError(f"{type(self).__name__} has no spec: define one to save it to a file.")


# The attentions that `build` knows, by name; the file of an attention adds its line. Each is built as
# `attention(channels, layout=..., num_prefix_tokens=..., device=..., dtype=..., **options)`, and has a class method
# `cost(place, **options)` that gives what `cost` gives.
ATTENTIONS: dict[str, type[Refines]] = {}


def known(spec: Spec) -> Any:
    """The class of this spec, or a `ValueError` that lists the known names."""
    if spec.name not in ATTENTIONS:
        raise ValueError(f"attention expected one of {', '.join(map(repr, sorted(ATTENTIONS)))}, got {spec.name!r}.")
    return ATTENTIONS[spec.name]


def build(spec: Spec, place: Place, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> nn.Module:
    """The attention of this spec for the features of a place, with new weights.

    Raises: ValueError: an unknown name, or an option out of its range. TypeError: an unknown option.
    """
    where: dict[str, Any] = {"layout": place.layout, "num_prefix_tokens": place.num_prefix_tokens}
    return known(spec)(place.channels, **where, **spec.options, device=device, dtype=dtype)


def cost(spec: Spec, place: Place) -> tuple[int, int]:
    """The parameters of an attention at a place, and the FLOPs of its matrix products for one sample. Nothing is built.

    Raises: ValueError: an unknown name, or an option out of its range. TypeError: an unknown option.
    """
    return known(spec).cost(place, **spec.options)
