"""The multimodal transfer module: squeeze all modalities into one vector, and let it excite the channels of each."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from drifa_attn.attention import Init
from drifa_attn.attention.mfa import pair
from drifa_attn.checks import check_init, count, number
from drifa_attn.functional import dense, pool_mean, without_autocast
from drifa_attn.layout import Place, scale

from .additive import together
from .maps import checked_maps, linear
from .protocol import Places, Refiner

REDUCTION, SMALLEST_WIDTH = 4, 8


class MMTM(Refiner):
    """The multimodal transfer module.

        s   = [mean(x_1) ; … ; mean(x_m)]        zeros where absent
        e   = relu(lin(squeeze, s))
        y_i = x_i · scale · σ(lin(excites.i, e))

    `init="identity"` starts with excites of zero, so that with a scale of two every gain is exactly one.

    Args:
        places: where the features of each modality are, and how many channels they have.
        reduction: an integer >= 1; the width of e is `max(Σc_i // reduction, 8)`.
        scale: > 0.
        init: "identity", or "paper" (excites drawn at random, as the source has them).

    Shape: a list of features, present `b m` or None -> a list of the same shapes, dtypes and strides. Prefix tokens, absent
        modalities and a lone modality pass unchanged.
    Raises: ValueError, TypeError: an option out of its range, features of other channels, layout or batch size, or a `present`
        that is not a boolean `b m`.
    Source: arXiv:1911.08670. Differs: m other than 2, absent modalities and the identity start are not in it. A public
        implementation leaves the scale out; pass `scale=1`.
    """

    def __init__(
        self,
        places: Sequence[Place],
        *,
        reduction: int = REDUCTION,
        scale: float = 2.0,
        init: Init = "identity",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_init("MMTM", init)
        self.places, self.init = tuple(places), init
        self.scale = number("MMTM", "scale", scale, "> 0", lambda x: 0 < x < float("inf"))
        channels = [place.channels for place in places]
        width = max(sum(channels) // count("MMTM", "reduction", reduction), SMALLEST_WIDTH)
        self.squeeze = linear(sum(channels), width, device, dtype)
        self.excites = nn.ModuleList(linear(width, c, device, dtype) for c in channels)
        if init == "identity":
            for excite in self.excites:
                nn.init.zeros_(excite.weight)  # type: ignore[arg-type]

    @classmethod
    def left_alone(cls, stages: Sequence[Places], k: int, **options: Any) -> str | None:
        """Why it does not act at stage k: it has one modality."""
        return "one modality is alone there" if len(stages[k]) < 2 else None

    def is_start(self) -> bool:
        """Whether every gain is still exactly one."""
        return self.scale == 2 and not any(parameter.any() for parameter in self.excites.parameters())

    def gates(self, xs: Sequence[Tensor], present: Tensor | None = None) -> list[Tensor]:
        """The gates `b c_i` of features xs, in (0, 1), float32 at least."""
        zs = checked_maps("MMTM", xs, self.places, present)
        with without_autocast(xs[0]):
            s = torch.cat([pool_mean(z) for z in zs], 1)
            e = dense(s, pair(self.squeeze)).relu()
            return [dense(e, pair(excite)).sigmoid() for excite in self.excites]  # type: ignore[arg-type]

    def gains(self, xs: Sequence[Tensor], present: Tensor | None = None) -> list[Tensor]:
        """The factors `b c_i` of features xs: `scale` times the gates, and one for what is absent or alone."""
        factors, meets = [self.scale * a for a in self.gates(xs, present)], together(present)
        if meets is None:
            return factors
        return [torch.where(has[:, None], factor, 1) for has, factor in zip(meets.unbind(1), factors, strict=True)]

    def forward(self, xs: Sequence[Tensor], present: Tensor | None = None) -> list[Tensor]:
        """The features xs, each channel multiplied by its gain; while disabled, and with one modality, xs themselves."""
        if not self.enabled or len(self.places) < 2:
            return list(xs)
        places = [(place.layout, place.num_prefix_tokens) for place in self.places]
        return [scale(x, factor, *place) for x, factor, place in zip(xs, self.gains(xs, present), places, strict=True)]

    def extra_repr(self) -> str:
        return f'{[place.channels for place in self.places]}, scale={self.scale:g}, init="{self.init}"'
