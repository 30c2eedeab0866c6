"""The ops alone: `mfa_stats`, `mifa_stats` and `gate` of `drifa_attn.ops` against the same equations eagerly and compiled."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from drifa_attn import functional
from drifa_attn import ops as library
from drifa_attn.attention.mfa import pair
from drifa_attn.attention.start import glorot_
from drifa_attn.functional import Linear, pool_max, pool_mean, pool_min
from drifa_attn.layout import scale

from .cases import DTYPES, Case, Options, Setup, text
from .layers import RESNET18, RESNET50, stages


def mfa_stats(x: Tensor, conv1: Linear, conv2: Linear, conv3: Linear, conv4: Linear, clia: Linear) -> Tensor:
    """What leaves MFA's maps: mean h1, max h2, mean h3, max h4 and the mean of CLIA's map, `b c n -> 5 b c`."""
    h1 = functional.lin(x, conv1).sigmoid()
    h2 = functional.lin(h1, conv2).sigmoid()
    h3 = functional.lin(h1 + h2, conv3).sigmoid()
    h4 = functional.lin(h3, conv4).sigmoid()
    t = functional.lin(x, clia).sigmoid()
    return torch.stack([pool_mean(h1), pool_max(h2), pool_mean(h3), pool_max(h4), pool_mean(t)])


def mifa_stats(x: Tensor, conv: Linear) -> Tensor:
    """What leaves one modality of MIFA: min, mean and max of x and of its map t, `b c n -> 6 b c`."""
    t = functional.lin(x, conv).sigmoid()
    return torch.stack([pool(y) for y in (x, t) for pool in (pool_min, pool_mean, pool_max)])


def gate(x: Tensor, gain: Tensor) -> Tensor:
    """The features, each channel times its gain: `b c n`, `b c -> b c n`."""
    return scale(x, gain, "b c ...")


def fused_mfa_stats(x: Tensor, *linears: Linear) -> Tensor:
    """The op for `mfa_stats`, whose weights come as one sequence."""
    return library.mfa_stats(x, linears)


# The equations, the op, and how many linear maps it reads.
OPS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], int]] = {
    "mfa_stats": (mfa_stats, fused_mfa_stats, 5),
    "mifa_stats": (mifa_stats, library.mifa_stats, 1),
    "gate": (gate, library.gate, 0),
}


class Op(nn.Module):
    """A function of tensors and linear maps, with the maps' weights."""

    def __init__(self, function: Callable[..., Tensor], linears: nn.ModuleList) -> None:
        super().__init__()
        self.function, self.linears = function, linears

    def forward(self, *inputs: Tensor) -> Tensor:
        """The function's value."""
        return self.function(*inputs, *map(pair, self.linears))


def setup(op: str, provider: str, shape: tuple[int, ...], options: Options) -> Setup:
    """An op and its inputs, positions flattened as the layers do."""
    equations, fused, maps = OPS[op]
    b, c = shape[:2]
    linears = nn.ModuleList(nn.Linear(c, c) for _ in range(maps)).apply(glorot_).to(options.device, DTYPES[options.dtype])
    x = options.randn(*shape).flatten(2).requires_grad_()
    args = (x, torch.rand(b, c, device=options.device).requires_grad_()) if op == "gate" else (x,)
    exact = Op(equations, linears)
    return Setup(Op(fused, linears) if provider == "fused" else exact, args, exact)


def cases(options: Options) -> Iterator[list[Case]]:
    """All ops at one shape, side by side."""
    for shape in options.sizes(stages(8, RESNET18), stages(64, RESNET18, RESNET50)):
        yield [
            Case(op, provider, text(shape), partial(setup, op, provider, shape, options))
            for op in OPS
            for provider in ("eager", "compile", "fused")
        ]
