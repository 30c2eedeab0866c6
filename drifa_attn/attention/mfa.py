"""Multi-branch fusion attention (MFA), Fig. 2 of arXiv:2412.01248: HIFA, CLIA and the gate that they share.

The linear maps are plain `nn.Linear` modules, whose weights the equations take. What other tools make of one (quantised,
pruned, with adapters, hooks or a forward of its own) is called instead.
"""

from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from drifa_attn import functional, ops
from drifa_attn.checks import Init, check_init, count
from drifa_attn.functional import Linear, Statistics
from drifa_attn.layout import Layout, Place, check_features, check_layout, checked_mask, flat_mask, positions

from .refines import Refines, Spec
from .start import check_samples, fit_, fit_statistics_, fit_vectors_, glorot_, is_start, reduced_width, start_, wide

FORWARD = nn.Linear.forward.__code__
PLAIN = (nn.Parameter, Tensor, FakeTensor)  # Tensor: the weights of a replica, or of torch.func.functional_call


def pair(linear: Any) -> Any:
    """A linear map as `functional` takes it: weight and bias of a plain `nn.Linear`, anything else itself; None for None."""
    if type(linear) is not nn.Linear or is_changed(linear):
        return linear
    held = linear._parameters or linear.__dict__  # of a replica; reading `linear.weight` takes as long as a small product
    weight, bias = held.get("weight"), held.get("bias")
    return (weight, bias) if type(weight) in PLAIN and type(bias) in PLAIN else linear


def is_changed(linear: nn.Linear) -> bool:
    """Whether something hangs on a module that only a call of it runs, or its forward is not that of its class.

    Compilers guard on what forward is, not on what a module holds. To that of torch 2.6 every method has another code, so there
    the kind of the method and where it is from decide.
    """
    if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks:
        return True
    if not torch.compiler.is_compiling() or getattr(linear.forward, "__code__", None) is FORWARD:
        return "forward" in linear.__dict__
    return type(linear.forward) is not MethodType or "forward" in linear.__dict__


def must_call(maps: Mapping[str, nn.Module | None]) -> str | None:
    """The first of these linear maps that must be called, and what it is, in words; None if all are plain."""
    for name, linear in maps.items():
        if not callable(pair(linear)):
            continue
        if type(linear) is not nn.Linear:
            return f"{name} is a {type(linear).__module__}.{type(linear).__qualname__}, which must be called"
        what = "hooks or a forward of its own" if is_changed(linear) else "no bias, or weights of another kind"
        return f"{name} is a Linear with {what}, which must be called"
    return None


def add_statistics(layer: nn.Module, width: int, init: Init, **factory: Any) -> None:
    """Give a layer the four buffers of `Statistics`; with the paper's start plain None: torch 2.6 exports no buffer of it."""
    for name in Statistics._fields:
        if init == "paper":
            setattr(layer, name, None)
        else:
            layer.register_buffer(name, torch.empty(width, **factory))


def statistics(layer: Any) -> Statistics | None:
    """The four buffers of a layer, as `functional` takes them."""
    held = layer._buffers
    return Statistics(*(held[name] for name in Statistics._fields)) if "global_center" in held else None


def unfitted(layer: Any) -> Statistics:
    """The buffers that calibration fills, or a `ValueError` for a layer that is not at the identity start."""
    owner, buffers = type(layer).__name__, statistics(layer)
    if buffers is None:
        raise ValueError(f'{owner}.calibrate expected init="identity", got "paper": build the layer with the identity start.')
    if reason := layer.must_call():
        raise ValueError(f"{owner}.calibrate expected plain nn.Linear maps, but {reason}: calibrate first, then change it.")
    if not layer.is_start():
        raise ValueError(f"{owner}.calibrate expected a layer at its start, got one whose gain is not one: build a new one.")
    return buffers


class HIFA(nn.Module):
    """Hierarchical information fusion attention, Fig. 2.

        h1 = σ(lin(conv1, x))          h2 = σ(lin(conv2, h1))
        h3 = σ(lin(conv3, h1 + h2))    h4 = σ(lin(conv4, h3))
        u  = mean(h1) + max(h2)        v  = mean(h3) + max(h4)
        G  = σ(lin(dense, [u ; v]))

    Args:
        channels: channels of the input, >= 1.

    Shape: x `b c ...`, mask `b n` or as the positions of x, True where one is real -> G `b c`, float32 at least, in (0, 1); at
        least one position.
    Raises: ValueError, TypeError: the input has other channels, no position, or is not a floating-point tensor, or a mask that
        does not fit it.
    Differs: `mask` is not in the paper; None is the paper.
    """

    def __init__(self, channels: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.channels = channels = count("HIFA", "channels", channels)
        self.conv1 = nn.Linear(channels, channels, device=device, dtype=dtype)
        self.conv2 = nn.Linear(channels, channels, device=device, dtype=dtype)
        self.conv3 = nn.Linear(channels, channels, device=device, dtype=dtype)
        self.conv4 = nn.Linear(channels, channels, device=device, dtype=dtype)
        self.dense = nn.Linear(2 * channels, channels, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Paper initialisation: Glorot-uniform weights, zero biases."""
        self.apply(glorot_)

    def weights(self) -> tuple[Linear, ...]:
        """The weights in the order `functional.hifa` takes them."""
        return pair(self.conv1), pair(self.conv2), pair(self.conv3), pair(self.conv4), pair(self.dense)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The global information G `b c` of features x `b c ...`."""
        check_features("HIFA", x, self.channels, "b c ...")
        mask = checked_mask("HIFA", mask, x, "b c ...")
        with functional.without_autocast(x):
            return functional.hifa(positions(x, "b c ..."), *self.weights(), mask=mask)

    def calibrate(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Fit each map to what it reads, one after another, for features `b c n`; the information G `b c` afterwards."""
        conv1, conv2, conv3, conv4, dense = self.weights()
        h1 = fit_(conv1, x, mask).sigmoid_()
        h2 = fit_(conv2, h1, mask).sigmoid_()
        u = functional.pool_mean(h1, mask) + functional.pool_max(h2, mask)
        h3 = fit_(conv3, h1.add_(h2), mask).sigmoid_()
        del h1, h2
        h4 = fit_(conv4, h3, mask).sigmoid_()
        v = functional.pool_mean(h3, mask) + functional.pool_max(h4, mask)
        return fit_vectors_(dense, torch.cat([u, v], dim=1)).sigmoid()

    def extra_repr(self) -> str:
        return f"{self.channels}"


class CLIA(nn.Module):
    """Channel-wise local information attention, Fig. 2.

        p = mean(σ(lin(conv1, x)))    L = p + σ(lin(conv2, p))

    Args:
        channels: channels of the input, >= 1.

    Shape: x `b c ...`, mask `b n` or as the positions of x, True where one is real -> L `b c`, float32 at least, in (0, 2); at
        least one position.
    Raises: ValueError, TypeError: the input has other channels, no position, or is not a floating-point tensor, or a mask that
        does not fit it.
    Differs: `mask` is not in the paper; None is the paper.
    """

    def __init__(self, channels: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.channels = channels = count("CLIA", "channels", channels)
        self.conv1 = nn.Linear(channels, channels, device=device, dtype=dtype)
        self.conv2 = nn.Linear(channels, channels, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Paper initialisation: Glorot-uniform weights, zero biases."""
        self.apply(glorot_)

    def weights(self) -> tuple[Linear, ...]:
        """The weights in the order `functional.clia` takes them."""
        return pair(self.conv1), pair(self.conv2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The local information L `b c` of features x `b c ...`."""
        check_features("CLIA", x, self.channels, "b c ...")
        mask = checked_mask("CLIA", mask, x, "b c ...")
        with functional.without_autocast(x):
            return functional.clia(positions(x, "b c ..."), *self.weights(), mask=mask)

    def calibrate(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Fit each map to what it reads, one after another, for features `b c n`; the information L `b c` afterwards."""
        conv1, conv2 = self.weights()
        p = functional.pool_mean(fit_(conv1, x, mask).sigmoid_(), mask)
        return p + fit_vectors_(conv2, p).sigmoid()

    def extra_repr(self) -> str:
        return f"{self.channels}"


class MFA(Refines, nn.Module):
    """Multi-branch fusion attention, Fig. 2: HIFA and CLIA give one gate per channel.

        a = σ(global_scale · HIFA(x) + local_scale · CLIA(x))        y = x · a · alpha

    `init="identity"` starts where the gain `a · alpha` is exactly one: alpha is two and what σ reads is zero. The output equals
    the input bit for bit until training moves the weights. G and L are then standardised by four buffers, mean and deviation of
    each, which are zeros and ones until `calibrate` measures them. `reduction=r` works at width `d = max(c // r, 8)`:
    `z = lin(squeeze, x)`, HIFA and CLIA read z, and `a = σ(lin(expand, …))`. timm can build it into a network:
    `timm.create_model("resnet18", block_args=dict(attn_layer=drifa_attn.MFA))`. While `enabled` is False, y is x.

    Args:
        channels: channels of the features, >= 1.
        reduction: None for the paper's width (8c² + 9c + 1 parameters), or an integer >= 1.
        init: "paper" (Glorot-uniform weights, zero biases, scales and alpha one) or "identity" (the same, but alpha two, and
            `expand`, or without a reduction the scales, zero).
        layout: "b c ..." (maps, volumes, sequences, vectors) or "b ... c" (channels-last maps, tokens).
        num_prefix_tokens: leading tokens of a `b n c` input that are left out of the pooling and pass unchanged, >= 0.

    Shape: x of the layout -> y, same shape, dtype, memory format and strides; at least one position; the batch may be empty.
        mask, boolean, `b n` over the positions behind the prefix tokens, or `b` and their sizes, such as `b h w`: what is False
        (padding) takes no part in any pooling, whatever it holds, and passes unchanged bit for bit, as if it were cut off. A
        sample without a True passes unchanged.
    Raises: ValueError, TypeError: an argument out of its range, an input of another layout, width or kind, or a mask that does
        not fit it.
    Differs: `reduction`, `init="identity"`, `layout`, `num_prefix_tokens` and `mask` are not in the paper; the defaults do not
        use them. The released notebooks call the layer DeeperGlobalLocalAttentionLayer1.
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: int | None = None,
        init: Init = "paper",
        layout: Layout = "b c ...",
        num_prefix_tokens: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        channels = count("MFA", "channels", channels)
        reduction = None if reduction is None else count("MFA", "reduction", reduction)
        check_init("MFA", init)
        check_layout("MFA", layout, num_prefix_tokens)
        width = reduced_width("MFA", channels, reduction)
        self.channels, self.reduction, self.init = channels, reduction, init
        self.layout, self.num_prefix_tokens = layout, num_prefix_tokens
        self.squeeze: nn.Linear | None = None
        self.expand: nn.Linear | None = None
        if reduction is not None:
            self.squeeze = nn.Linear(channels, width, device=device, dtype=dtype)
            self.expand = nn.Linear(width, channels, device=device, dtype=dtype)
        self.hifa = HIFA(width, device=device, dtype=dtype)
        self.clia = CLIA(width, device=device, dtype=dtype)
        self.global_scale = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.local_scale = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.alpha = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        add_statistics(self, width, init, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set all weights to the start that `init` names."""
        self.apply(glorot_)
        start_(self.init, *self.gating(), statistics(self))

    def gating(self) -> tuple[list[Tensor], list[Tensor], list[nn.Linear]]:
        """The alphas, the scales and the maps before σ: what decides the gain."""
        return [self.alpha], [self.global_scale, self.local_scale], [] if self.expand is None else [self.expand]

    def is_start(self) -> bool:
        """Whether the gain is still exactly one by the identity start; False where `expand` must be called: none can tell."""
        return not callable(pair(self.expand)) and is_start(self.init, *self.gating())

    def must_call(self) -> str | None:
        """The first linear map that is no plain `nn.Linear`, in words: it is called, and no fused operator can take it."""
        maps = {"squeeze": self.squeeze, "expand": self.expand}
        for name, part in (("hifa", self.hifa), ("clia", self.clia)):
            maps |= {f"{name}.{child}": linear for child, linear in part.named_children()}  # type: ignore[misc]
        return must_call(maps)

    @torch.no_grad()
    def calibrate(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Fit the maps and the four buffers, in place, to features x of at least 16 samples, at the positions of a mask.

        Every map is scaled and shifted until what it gives for x has mean zero and deviation 1 (`squeeze`) or 1.5 (the others)
        in each channel. What decides the gain is not touched.

        Raises: ValueError, TypeError: fewer samples, paper init, a layer that has left its start, a linear map that is no plain
            `nn.Linear`, or features that `forward` does not take.
        """
        check_features("MFA.calibrate", x, self.channels, self.layout, self.num_prefix_tokens)
        mask = checked_mask("MFA.calibrate", mask, x, self.layout, self.num_prefix_tokens)
        z = positions(x, self.layout, self.num_prefix_tokens)
        if mask is not None:
            some = mask.any(1)
            z, mask = functional.as_map(z, mask)[some], mask[some]
        check_samples("MFA.calibrate", z.shape[0])
        buffers = unfitted(self)
        with functional.without_autocast(x):
            z = wide(z)
            z = z if self.squeeze is None else fit_(pair(self.squeeze), z, mask, deviation=1)
            fit_statistics_(buffers, self.hifa.calibrate(z, mask), self.clia.calibrate(z, mask))

    def gates(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The gate a `b c` of features x, in (0, 1), float32 at least."""
        return self.attend(x, mask)[0]

    def gains(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The factor of each channel, `b c`, for features x: `a · alpha`; one for a sample without a True in its mask."""
        factor = functional.gain(self.gates(x, mask), self.alpha)
        return factor if mask is None else torch.where(flat_mask(mask).any(1, keepdim=True), factor, 1)

    def attend(self, x: Tensor, mask: Tensor | None = None, alpha: Tensor | None = None) -> tuple[Tensor, bool]:
        """The gate of features x, with alpha their gain, and whether a fused operator runs: the one choice of a forward."""
        hifa, clia = self.hifa.weights(), self.clia.weights()
        squeeze, expand, measured = pair(self.squeeze), pair(self.expand), statistics(self)
        check_features("MFA", x, self.channels, self.layout, self.num_prefix_tokens)
        mask = checked_mask("MFA", mask, x, self.layout, self.num_prefix_tokens)
        z = positions(x, self.layout, self.num_prefix_tokens)
        way = ops.way(z, self.local_scale.shape[0], (*hifa, *clia, squeeze, expand), mask)
        weights = hifa, clia, self.global_scale, self.local_scale
        maps = {"squeeze": squeeze, "expand": expand, "statistics": measured}
        return ops.mfa(z, *weights, **maps, mask=mask, alpha=alpha, way=way), way == "fused"

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The features x, each channel multiplied by its gain; while disabled, x itself."""
        if not self.enabled:
            return x
        factor, fused = self.attend(x, mask, self.alpha)
        return ops.gate(x, factor, self.layout, self.num_prefix_tokens, mask=mask, fused=fused)

    def spec(self) -> Spec:
        """The reduction and the start; the place gives the rest."""
        return Spec("mfa", {"reduction": self.reduction, "init": self.init})

    @classmethod
    def cost(cls, place: Place, *, reduction: int | None = None, init: Init = "paper") -> tuple[int, int]:
        """The parameters, and the FLOPs for one sample: five products per position, three of pooled vectors."""
        check_init("MFA", init)
        c, d = place.channels, reduced_width("MFA", place.channels, reduction)
        params = 8 * d * d + 8 * d + 1 + c
        flops = 2 * (5 * place.positions * d * d + 3 * d * d)
        if reduction is None:
            return params, flops
        return params + 2 * c * d + c + d, flops + 2 * (place.positions + 1) * c * d

    def extra_repr(self) -> str:
        layout = f', layout="{self.layout}"' + (
            f", num_prefix_tokens={self.num_prefix_tokens}" if self.num_prefix_tokens else ""
        )
        return f'{self.channels}, reduction={self.reduction}, init="{self.init}"{layout}'
