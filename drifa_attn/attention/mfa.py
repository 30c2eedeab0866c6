"""Multi-branch fusion attention (MFA), Fig. 2 of arXiv:2412.01248: HIFA, CLIA and their fusion."""

from typing import Any

import torch
from torch import Tensor, nn

from drifa_attn import functional, ops
from drifa_attn.checks import Init, check_count, check_init
from drifa_attn.functional import Linear
from drifa_attn.layout import Layout, check_features, check_layout, positions

SMALLEST_WIDTH = 8


def reduced_width(owner: str, channels: int, reduction: int | None) -> int:
    """The width attention works at: `channels` without a reduction, `max(channels // reduction, 8)` with one."""
    if reduction is None:
        return channels
    check_count(owner, "reduction", reduction)
    return max(channels // reduction, SMALLEST_WIDTH)


def glorot_(module: nn.Module) -> None:
    """The paper's initialisation of one linear map or convolution: Glorot-uniform weight, zero bias."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def pair(linear: Any) -> Linear:
    """The (weight, bias) of a linear map, as `functional` takes it."""
    return linear.weight, linear.bias


class HIFA(nn.Module):
    """Hierarchical information fusion attention, Fig. 2.

        h1 = σ(lin(conv1, x))          h2 = σ(lin(conv2, h1))
        h3 = σ(lin(conv3, h1 + h2))    h4 = σ(lin(conv4, h3))
        u  = mean(h1) + max(h2)        v  = mean(h3) + max(h4)
        G  = σ(lin(dense, [u ; v]))

    Args:
        channels: channels of the input, >= 1.

    Shape: x `b c ...` -> G `b c`, float32 at least, in (0, 1); at least one position.
    Raises: ValueError, TypeError: the input has other channels, no position, or is no floating-point tensor.
    Differs: none.
    """

    def __init__(self, channels: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        check_count("HIFA", "channels", channels)
        self.channels = channels
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

    def forward(self, x: Tensor) -> Tensor:
        """The global information G `b c` of features x `b c ...`."""
        check_features("HIFA", x, self.channels, "b c ...")
        with functional.exact(x):
            return functional.hifa(positions(x, "b c ..."), *self.weights())

    def extra_repr(self) -> str:
        return f"{self.channels}"


class CLIA(nn.Module):
    """Channel-wise local information attention, Fig. 2.

        p = mean(σ(lin(conv1, x)))    L = p + σ(lin(conv2, p))

    Args:
        channels: channels of the input, >= 1.

    Shape: x `b c ...` -> L `b c`, float32 at least, in (0, 2); at least one position.
    Raises: ValueError, TypeError: the input has other channels, no position, or is no floating-point tensor.
    Differs: none.
    """

    def __init__(self, channels: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        check_count("CLIA", "channels", channels)
        self.channels = channels
        self.conv1 = nn.Linear(channels, channels, device=device, dtype=dtype)
        self.conv2 = nn.Linear(channels, channels, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Paper initialisation: Glorot-uniform weights, zero biases."""
        self.apply(glorot_)

    def weights(self) -> tuple[Linear, ...]:
        """The weights in the order `functional.clia` takes them."""
        return pair(self.conv1), pair(self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        """The local information L `b c` of features x `b c ...`."""
        check_features("CLIA", x, self.channels, "b c ...")
        with functional.exact(x):
            return functional.clia(positions(x, "b c ..."), *self.weights())

    def extra_repr(self) -> str:
        return f"{self.channels}"


class MFA(nn.Module):
    """Multi-branch fusion attention, Fig. 2: HIFA and CLIA fused into one gate a channel.

        a = σ(global_scale · HIFA(x) + local_scale · CLIA(x))        y = x · a · alpha

    `init="identity"` adds a learned `strength`, zero at the start, `y = x · (1 + strength · (a · alpha − 1))`: the output is
    the input to the last bit until training moves it. `reduction=r` works at width `d = max(c // r, 8)`:
    `z = lin(squeeze, x)`, HIFA and CLIA on z, `a = σ(lin(expand, …))`. It fits timm's own slot, as
    `timm.create_model("resnet18", block_args=dict(attn_layer=drifa_attn.MFA))`.

    Args:
        channels: channels of the features, >= 1.
        reduction: None for the paper's width (8c² + 9c + 1 parameters), or an integer >= 1.
        init: "paper" (Glorot-uniform weights, zero biases, scales and alpha one) or "identity" (the same, strength zero).
        layout: "b c ..." (maps, volumes, sequences, vectors) or "b ... c" (channels-last maps, tokens).
        num_prefix_tokens: leading tokens of a `b n c` input that take no part in the pooling and pass unchanged.

    Shape: x of the layout -> y, same shape, dtype, memory format and strides; at least one position; an empty batch passes.
    Raises: ValueError, TypeError: an argument out of its range, or an input of another layout, width or kind.
    Differs: `reduction`, `init="identity"`, `layout` and `num_prefix_tokens` are not in the paper; by default none is used. The
        released notebooks call the layer DeeperGlobalLocalAttentionLayer1.
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
        check_count("MFA", "channels", channels)
        check_init("MFA", init)
        check_layout("MFA", layout, num_prefix_tokens)
        width = reduced_width("MFA", channels, reduction)
        self.channels, self.reduction, self.init, self.layout, self.num_prefix_tokens = (
            channels,
            reduction,
            init,
            layout,
            num_prefix_tokens,
        )
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
        self.strength: nn.Parameter | None = None
        if init == "identity":
            self.strength = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to the start named by `init`."""
        self.apply(glorot_)
        for one in (self.global_scale, self.local_scale, self.alpha):
            nn.init.ones_(one)
        if self.strength is not None:
            nn.init.zeros_(self.strength)

    def attention(self, x: Tensor) -> Tensor:
        """The gate a `b c` of features x, in (0, 1), float32 at least."""
        check_features("MFA", x, self.channels, self.layout, self.num_prefix_tokens)
        return ops.mfa(
            positions(x, self.layout, self.num_prefix_tokens),
            self.hifa.weights(),
            self.clia.weights(),
            self.global_scale,
            self.local_scale,
            squeeze=None if self.squeeze is None else pair(self.squeeze),
            expand=None if self.expand is None else pair(self.expand),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The features x, each channel multiplied by its gain."""
        factor = functional.gain(self.attention(x), self.alpha, self.strength)
        return ops.gate(x, factor, self.layout, self.num_prefix_tokens)

    def extra_repr(self) -> str:
        layout = f', layout="{self.layout}"' + (
            f", num_prefix_tokens={self.num_prefix_tokens}" if self.num_prefix_tokens else ""
        )
        return f'{self.channels}, reduction={self.reduction}, init="{self.init}"{layout}'
