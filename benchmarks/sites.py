"""The attention that `wrap(resnet50)` adds, at its five sites one after another, beside SE and beside what nothing can avoid.

A whole network hides what its attention takes behind its own scatter; here nothing else runs. Without gradients, on the maps of
images of 224 pixels. "MFA /16, products alone" is the floor of it: its products over positions and the final multiplication,
without σ, pooling and all that turns pooled vectors into a gate.
"""

from collections.abc import Iterator
from functools import partial

from torch import Tensor, nn

from .cases import DTYPES, Case, Options, Setup, text
from .layers import ALONE, RESNET50, layer

SITES = ((64, 112), *RESNET50)  # channels and side
REDUCED = "MFA /16"


class InTurn(nn.Module):
    """One layer a site, each on its own map."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        """What every layer makes of its map."""
        outputs = [layer(x) for layer, x in zip(self.layers, xs, strict=True)]
        return outputs if isinstance(outputs[0], Tensor) else [y for several in outputs for y in several]


def setup(op: str, batch: int, options: Options) -> Setup:
    """The five layers and their maps."""
    module = InTurn([layer(op, c) for c, _ in SITES]).to(options.device, DTYPES[options.dtype])
    return Setup(module, ([options.randn(batch, c, side, side) for c, side in SITES],))


def cases(options: Options) -> Iterator[list[Case]]:
    """All attentions at one batch, side by side; the shape of a row is that of the first site."""
    ways = [(REDUCED, provider) for provider in ("eager", "auto")]
    ways += [(op, "peers") for op in (f"{REDUCED}{ALONE}", "SE", "ECA", "CBAM")]
    ways += [(REDUCED, "compile"), (REDUCED, "auto-compile"), ("SE", "compile")]
    first = (*SITES[0], SITES[0][1])
    for shape in options.sizes([(batch, *first) for batch in (1, 8)], [(batch, *first) for batch in (1, 64)]):
        if shape[1:] != first:
            raise ValueError(f"--shape {text(shape)} names other features than the first site's, Bx{text(first)}.")
        yield [Case(op, provider, text(shape), partial(setup, op, shape[0], options)) for op, provider in ways]
