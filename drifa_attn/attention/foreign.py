"""Any other attention as a layer of this library: in every layout, with a start that changes nothing, and with a switch."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from drifa_attn.layout import Layout, Place, check_features, check_layout

from .refines import Refines, Spec

Factory = Callable[..., nn.Module]
TOLERANCE = 1e-2  # of the largest feature: half precision rounds


def factory_of(spec: Spec) -> Factory:
    """What makes the module of this spec: the callable that came with it, or timm's attention of its name."""
    if spec.factory is not None:
        return spec.factory
    if ":" in spec.name:
        raise ValueError(f"the attention {spec.name!r} is a callable of yours: pass it again, attention=...")
    from timm.layers import get_attn  # not above: importing the package does not import timm

    try:
        return get_attn(spec.name)
    except Exception as error:  # timm asserts
        raise ValueError(
            'attention expected "mfa", a name that timm.layers.get_attn knows (se, ese, eca, cbam, gc, ...) or a callable '
            f"(channels) -> nn.Module, got {spec.name!r}."
        ) from error


def made(spec: Spec, channels: int) -> nn.Module:
    """The module of this spec for so many channels."""
    factory = factory_of(spec)
    try:
        module = factory(channels, **spec.options)
    except Exception as error:
        raise unusable(spec, f"{channels} channels", error) from error
    if not isinstance(module, nn.Module):
        raise TypeError(f"attention expected {spec.name!r} to give an nn.Module, got {type(module).__name__}.")
    return module


def unusable(spec: Spec, where: str, error: Exception) -> ValueError:
    """The error for an attention that cannot be built or run somewhere."""
    options = f" with attention_options={dict(spec.options)}" if spec.options else ""
    return ValueError(f"the attention {spec.name!r} does not work for {where}{options}: {type(error).__name__}: {error}")


def blended(x: Tensor, refined: Tensor, strength: Tensor) -> Tensor:
    """`x + strength · (refined − x)`; where the strength is zero, x bit for bit, negative zeros and what is not finite too."""
    y = x + strength * (refined - x)
    if not torch.is_grad_enabled():
        return torch.where(strength == 0, x, y).to(x.dtype)
    # A strength of zero has a gradient, which passes where y is x already.
    kept = (strength == 0) & ((y != x) | ((x == 0) & x.signbit()))
    return torch.where(kept, x, y).to(x.dtype)


def as_map(x: Tensor, layout: Layout) -> Tensor:
    """Features of any layout as a map `b c h w`, which is what attentions read.

    Volumes become one tall map, `b c d h w -> b c (d h) w`. Tokens become a square where their number is one, and else, like
    sequences and vectors, a column.
    """
    if layout == "b ... c":
        x = x.movedim(-1, 1)
        side = math.isqrt(x.shape[-1])
        if x.ndim == 3 and side * side == x.shape[-1]:
            return rearrange(x, "b c (h w) -> b c h w", h=side)
    if x.ndim == 4:
        return x
    return x.flatten(2, -2) if x.ndim > 4 else x.reshape(*x.shape[:2], -1, 1)


class Foreign(Refines, nn.Module):
    """Another attention at a site: `y = x + strength · (module(x) − x)`, one learned strength per channel.

    The strength starts at zero, so the output equals the input bit for bit until training moves it. Until then the module's own
    weights get no gradient; give the strength a higher rate (`parameter_groups` gives it ten times the attention's). While
    `enabled` is False, y is x.

    Args:
        channels: channels of the features, >= 1.
        attention: its spec. The name is one that `timm.layers.get_attn` knows, or that of a callable that the spec holds,
            (channels, **options) -> a module that maps `b c h w` to the same shape.
        layout, num_prefix_tokens: as `MFA` takes them.

    Shape: x of the layout -> y, same shape and dtype. What the module reads is a map `b c h w`, see `as_map`.
    Raises: ValueError, TypeError: an unknown name, a module that gives another shape, features of another layout or width, or
        a mask, which only the paper's attention takes.
    Differs: none of it is in the paper.
    """

    def __init__(
        self,
        channels: int,
        attention: Spec,
        *,
        layout: Layout = "b c ...",
        num_prefix_tokens: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_layout("Foreign", layout, num_prefix_tokens)
        self.channels, self.layout, self.num_prefix_tokens = channels, layout, num_prefix_tokens
        self.name, self.options = attention.name, dict(attention.options)
        self.module = made(attention, channels).to(device=device, dtype=dtype)
        self.strength = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))

    def forward(self, x: Tensor, mask: None = None) -> Tensor:
        """The features x, refined as far as the strength goes; while disabled, x itself."""
        if mask is not None:
            raise ValueError(f"the attention {self.name!r} takes no mask, it reads whole maps: leave it out, or use MFA.")
        if not self.enabled:
            return x
        check_features("Foreign", x, self.channels, self.layout, self.num_prefix_tokens)
        prefix, positions = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :] if self.num_prefix_tokens else x
        refined = self.refined(as_map(positions, self.layout))
        strength: Tensor = self.strength
        if self.layout == "b ... c":
            refined = refined.flatten(2).mT
        else:
            strength = strength.reshape(-1, *[1] * (x.ndim - 2))
        y = blended(positions, refined.reshape(positions.shape), strength)
        return torch.cat([prefix, y], 1) if self.num_prefix_tokens else y

    def refined(self, x: Tensor) -> Tensor:
        """What the module makes of a map `b c h w`, of the same shape."""
        y = self.module(x)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(
                f"the attention {self.name!r} must keep the shape of its features, {tuple(x.shape)}, it gave {got}."
            )
        return y

    def gates(self, x: Tensor) -> Tensor:
        """The factors in [0, 1], `b c`, that the module multiplies features x by; see `factors`.

        Raises: ValueError: the module does something else.
        """
        factors = self.factors(x)
        if (factors > 1 + TOLERANCE).any():
            raise ValueError(f"the attention {self.name!r} has no gates: it multiplies features by up to {factors.max():.3g}.")
        return factors

    def gains(self, x: Tensor) -> Tensor:
        """The factors, `b c`, by which `forward` multiplies features x: `1 + strength · (factor − 1)`."""
        factors = self.factors(x)
        return 1 + self.strength.to(factors.dtype) * (factors - 1)

    def factors(self, x: Tensor) -> Tensor:
        """The factors >= 0, `b c`, that the module multiplies features x by: measured, as what explains its output best.

        Where the module has a factor for each position, this is their mean, weighted by the squares of the features.

        Raises: ValueError: the module does something else than to multiply, such as to add.
        """
        z = as_map(x[:, self.num_prefix_tokens :] if self.num_prefix_tokens else x, self.layout)
        z, y = (one.flatten(2).to(torch.promote_types(x.dtype, torch.float32)) for one in (z, self.refined(z)))
        size = z.abs().amax() if z.numel() else 0
        turned, appeared = y * z.sign() < -TOLERANCE * size, (z.abs() < 1e-4 * size) & (y.abs() > TOLERANCE * size)
        if (turned | appeared).any():
            raise ValueError(f"the attention {self.name!r} has no gates: it does not multiply its features by factors >= 0.")
        weight = z.square().sum(-1)
        return torch.where(weight > 0, (y * z).sum(-1) / weight, 1)

    def is_start(self) -> bool:
        """Whether the strength is still zero."""
        return not self.strength.any()

    def spec(self) -> Spec:
        """The name and the options; a callable is not kept and must be passed again."""
        return Spec(self.name, self.options)

    def extra_repr(self) -> str:
        return f'{self.channels}, attention="{self.name}", layout="{self.layout}", num_prefix_tokens={self.num_prefix_tokens}'


def foreign_cost(spec: Spec, place: Place) -> tuple[int, int]:
    """The parameters, and the FLOPs for one sample, counted on a copy without memory; it must keep the shape there."""
    from torch.utils.flop_counter import FlopCounterMode  # not above: it imports triton

    with torch.device("meta"):
        options: Mapping[str, Any] = {"layout": place.layout, "num_prefix_tokens": place.num_prefix_tokens}
        layer = Foreign(place.channels, spec, **options).to("meta").eval()
        try:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                layer(torch.empty(2, *place.shape))
        except Exception as error:
            raise unusable(spec, f"features {tuple(place.shape)}", error) from error
    return sum(parameter.numel() for parameter in layer.parameters()), counter.get_total_flops() // 2
