"""Single layers: MFA and MIFA against timm's attention (SE, ECA, CBAM, GC) and against none."""

from collections.abc import Callable, Iterator
from functools import partial

from timm import layers as timm_layers
from timm.layers.cbam import CbamModule
from torch import nn

from drifa_attn import MFA, MIFA

from .cases import DTYPES, Case, Options, Setup, text

RESNET18 = ((64, 56), (128, 28), (256, 14), (512, 7))  # channels and side of the stages, for images of 224 pixels
RESNET50 = ((256, 56), (512, 28), (1024, 14), (2048, 7))
OURS = ("MFA", "MFA /16", "MIFA")
PEERS = ("SE", "ECA", "CBAM", "GC", "none")


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


def layer(op: str, channels: int) -> nn.Module:
    """A layer by the name it has in the rows."""
    if op == "MIFA":
        return MIFA(channels)
    if op in OURS:
        return MFA(channels, reduction=16 if op == "MFA /16" else None)
    return peer(op, channels)


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
