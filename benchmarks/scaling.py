"""How the cost of MFA grows with batch, resolution and channels, and MIFA's with the number of modalities."""

import math
from collections.abc import Iterator, Sequence
from functools import partial

from drifa_attn import MFA, MIFA

from .cases import DTYPES, Case, Options, Setup, text
from .rows import Row

STEPS = (1, 2, 4)  # what a size is multiplied by
AXES = ("batch", "side", "channels", "modalities")
INSIDE = {"batch": 0, "channels": 1, "side": 2}  # the axes that are a part of the shape of an input, and which


def setup(shape: tuple[int, ...], modalities: int, options: Options) -> Setup:
    """MFA, or MIFA over several features of one shape; of one too, so that the axis is one layer's."""
    if not modalities:
        return Setup(MFA(shape[1]).to(options.device, DTYPES[options.dtype]), (options.randn(*shape, grad=True),))
    xs = [options.randn(*shape, grad=True) for _ in range(modalities)]
    return Setup(MIFA(shape[1], modalities).to(options.device, DTYPES[options.dtype]), (xs,))


def grown(axis: str, base: tuple[int, ...], step: int) -> tuple[tuple[int, ...], int]:
    """The shape and the number of modalities (0 is MFA) at one step along an axis."""
    b, c, *sides = base
    if axis == "batch":
        return (b * step, c, *sides), 0
    if axis == "channels":
        return (b, c * step, *sides), 0
    if axis == "side":
        return (b, c, *(side * step for side in sides)), 0
    return base, step


def cases(options: Options) -> Iterator[list[Case]]:
    """One axis after the other, all its steps side by side."""
    for base in options.sizes([(4, 64, 28, 28)], [(32, 64, 28, 28)]):
        for axis in AXES:
            group = []
            for step in STEPS:
                shape, modalities = grown(axis, base, step)
                op = f"{'MIFA' if modalities else 'MFA'} by {axis}"
                build = partial(setup, shape, modalities, options)
                group += [Case(op, p, text(shape, max(modalities, 1)), build) for p in ("eager", "compile", "fused", "auto")]
            yield group


def along(row: Row, axis: str) -> float:
    """The size of a row along an axis: a part of its shape, or what stands before the star, one where there is none."""
    if axis in INSIDE:
        return float(row.sizes[INSIDE[axis]])
    before, star, _ = row.shape.rpartition("*")
    return float(before) if star else 1.0


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of `log cost` over `log size`, by least squares: cost grows as `size ** exponent`."""
    if len(set(sizes)) < 2:
        raise ValueError(f"an exponent needs costs at two sizes at least, got {list(sizes)}.")
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)
