"""DRIFA-Net, the paper's network of two branches: a whole forward pass and a training step."""

from collections.abc import Iterator
from functools import partial

from .cases import DTYPES, Case, Options, Setup, text


def setup(shape: tuple[int, ...], options: Options) -> Setup:
    """The network with the paper's heads, and one image a branch."""
    from examples.drifa_net.model import DrifaNet

    module = DrifaNet(in_channels=shape[1]).to(options.device, DTYPES[options.dtype])
    return Setup(module, ([options.randn(*shape), options.randn(*shape)],))


def cases(options: Options) -> Iterator[list[Case]]:
    """The network by every provider, side by side."""
    for shape in options.sizes([(8, 3, 128, 128)], [(64, 3, 128, 128)]):
        build = partial(setup, shape, options)
        providers = ("eager", "compile", "fused", "auto")
        yield [Case("DRIFA-Net", provider, text(shape, 2), build, network=True) for provider in providers]
