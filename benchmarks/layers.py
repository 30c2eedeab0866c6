"""Single layers: MFA and MIFA against timm's attention (SE, ECA, CBAM, GC), against none, and against MFA's products alone."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from timm import layers as timm_layers
from timm.layers.cbam import CbamModule
from torch import Tensor, nn

from drifa_attn import MFA, MIFA, functional
from drifa_attn.attention.mfa import pair
from drifa_attn.ops import grouped

from .cases import DTYPES, Case, Options, Setup, text

RESNET18 = ((64, 56), (128, 28), (256, 14), (512, 7))  # channels and side of the stages, for images of 224 pixels
RESNET50 = ((256, 56), (512, 28), (1024, 14), (2048, 7))
OURS = ("MFA", "MFA /16", "MIFA")
ALONE = ", products alone"  # behind the name of an MFA: what no way to compute it can avoid
PEERS = ("SE", "ECA", "CBAM", "GC", "none", f"MFA{ALONE}")


def stages(batch: int, *networks: tuple[tuple[int, int], ...]) -> list[tuple[int, ...]]:
    """The features of networks' stages, as shapes."""
    return [(batch, c, side, side) for network in networks for c, side in network]


def peer(name: str, channels: int) -> nn.Module:
    """An attention of timm, as timm builds it, or none."""
    builders: dict[str, Callable[..., nn.Module]] = {
        "SE": timm_layers.SEModule,
        "ECA": timm_layers.EcaModule,
        "CBAM": CbamModule,
        "GC": timm_layers.GlobalContext,
        "none": lambda _: nn.Identity(),
    }
    return builders[name](channels)


class Products(nn.Module):
    """What an MFA multiplies, and nothing else: its products over positions, then each channel by a number.

    Shape: x `b c h w` -> the last products of CLIA and of HIFA, `b d n` each (`d n` of one sample), and `x · alpha`.
    """

    def __init__(self, attention: MFA) -> None:
        super().__init__()
        self.squeeze, self.alpha = attention.squeeze, attention.alpha
        self.in_turn = nn.ModuleList(list(attention.hifa.children())[:4])
        self.beside = attention.clia.conv1

    def forward(self, x: Tensor) -> list[Tensor]:
        """The products, each as it is cheapest: narrow ones as matrices, wide ones as convolutions."""
        product, z = wide if self.squeeze is None else grouped.product, x.flatten(2)
        if self.squeeze is not None:
            z = grouped.squeezed(pair(self.squeeze), z.squeeze(0) if len(z) == 1 else z)
        h = z
        for conv in self.in_turn:
            h = product(pair(conv), h)
        return [product(pair(self.beside), z), h, x * self.alpha[:, None, None]]


def wide(linear: functional.Linear, x: Tensor) -> Tensor:
    """`lin`, with its arguments in the order of `grouped.product`."""
    return functional.lin(x, linear)


def layer(op: str, channels: int) -> Any:
    """A layer by the name it has in the rows."""
    if op.endswith(ALONE):
        return Products(layer(op.removesuffix(ALONE), channels))
    if op == "MIFA":
        return MIFA(channels)
    if op == "MFA":
        return MFA(channels)
    return reduced(channels) if op == "MFA /16" else peer(op, channels)


def reduced(channels: int) -> MFA:
    """What `wrap` puts at a site, moved off its start, where every gain is one and no mistake would show."""
    layer = MFA(channels, reduction=16, init="identity")
    with torch.no_grad():
        for tensor in (*layer.expand.parameters(), *layer.buffers()):
            tensor.add_(torch.rand_like(tensor), alpha=0.1)
    return layer


def setup(op: str, shape: tuple[int, ...], options: Options) -> Setup:
    """A layer and its input; MIFA has two modalities."""
    module = layer(op, shape[1]).to(options.device, DTYPES[options.dtype])
    xs = [options.randn(*shape, grad=True) for _ in range(2 if op == "MIFA" else 1)]
    return Setup(module, (xs,) if op == "MIFA" else (xs[0],))


def cases(options: Options) -> Iterator[list[Case]]:
    """All layers at one shape, side by side."""
    for shape in options.sizes(stages(8, RESNET18), stages(64, RESNET18, RESNET50)):
        mine = [
            Case(op, provider, text(shape, 2 if op == "MIFA" else 1), partial(setup, op, shape, options))
            for op in OURS
            for provider in ("eager", "compile", "fused", "auto")
        ]
        yield mine + [Case(op, "peers", text(shape), partial(setup, op, shape, options)) for op in PEERS]
