"""How the layers of this room start: the width that attention works at, the first weights, and weights fitted to real features.

Axes: `b` samples, `c` channels read, `d` channels written, `n` positions (1 for pooled vectors).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from drifa_attn.checks import Init, count
from drifa_attn.functional import Linear, Statistics, lin

SMALLEST_WIDTH = 8
SMALLEST_SPREAD = 1e-4  # a channel that hardly differs between samples is not enlarged without limit
FEWEST_SAMPLES = 16
BEFORE_SIGMOID = 1.5  # the deviation of what a sigmoid reads, where it is steep without being saturated


def reduced_width(owner: str, channels: int, reduction: int | None) -> int:
    """The width that attention works at: `channels` without a reduction, `max(channels // reduction, 8)` with one."""
    if reduction is None:
        return channels
    return max(channels // count(owner, "reduction", reduction), SMALLEST_WIDTH)


def glorot_(module: nn.Module) -> None:
    """The paper's initialisation of one linear map or convolution: Glorot-uniform weight, zero bias."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def start_(
    init: Init, alphas: Sequence[Tensor], scales: Sequence[Tensor], expands: Sequence[nn.Linear], statistics: Statistics | None
) -> None:
    """The start of what gates: "paper" sets scales and alphas to one.

    "identity" sets alpha to two and the last thing before σ to zero, so that the gain `σ(0) · 2` is exactly one: the `expands`,
    or the scales where there are none. The statistics start at mean zero and deviation one, which changes nothing.
    """
    for tensor in (*alphas, *scales):
        nn.init.ones_(tensor)
    if init == "paper":
        return
    for alpha in alphas:
        nn.init.constant_(alpha, 2)
    for zero in last(scales, expands):
        nn.init.zeros_(zero)
    if statistics is not None:
        for name, buffer in statistics._asdict().items():
            nn.init.constant_(buffer, float(name.endswith("spread")))


def last(scales: Sequence[Tensor], expands: Sequence[nn.Linear]) -> list[Tensor]:
    """What is zero at the identity start."""
    return [tensor for expand in expands for tensor in (expand.weight, expand.bias)] or list(scales)


def is_start(init: Init, alphas: Sequence[Tensor], scales: Sequence[Tensor], expands: Sequence[nn.Linear]) -> bool:
    """Whether these are still the weights of the identity start, so that the gain is exactly one."""
    return init == "identity" and all((a == 2).all() for a in alphas) and not any(z.any() for z in last(scales, expands))


def check_samples(owner: str, samples: int) -> None:
    """Raise a `ValueError` if statistics of so few samples would say little."""
    if samples < FEWEST_SAMPLES:
        raise ValueError(
            f"{owner} expected at least {FEWEST_SAMPLES} samples to calibrate with, got {samples}: pass a larger batch."
        )


def wide(x: Tensor) -> Tensor:
    """`x` in the precision that statistics are measured in: float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def fit_(linear: Linear, x: Tensor, mask: Tensor | None = None, deviation: float = BEFORE_SIGMOID) -> Tensor:
    """Scale and shift a linear map, in place, so that each channel of `lin(linear, x)` has mean zero and this deviation.

    Layer-sequential unit variance (arXiv:1511.06422), here also with a mean of zero, over samples and the positions of a mask.

    Shape: x `b c n`, mask `b n` -> the new outputs `b d n`.
    Raises: ValueError: a map that must be called has no weight that could be scaled.
    """
    if callable(linear):
        raise ValueError(f"calibrate expected a plain nn.Linear, got a changed {type(linear).__name__}: calibrate before that.")
    weight, bias = linear
    y = lin(x, linear)
    spread, center = torch.std_mean(y, (0, 2), correction=0) if mask is None else torch.std_mean(y.mT[mask], 0, correction=0)
    factor = deviation / spread.clamp(min=SMALLEST_SPREAD)
    weight.copy_(weight * factor[:, None])
    bias.copy_((bias - center) * factor)
    return (y - center[:, None]).mul_(factor[:, None])


def fit_vectors_(linear: Linear, v: Tensor) -> Tensor:
    """The same for pooled vectors: `b c -> b d`."""
    return fit_(linear, v[..., None])[..., 0]


def fit_statistics_(statistics: Statistics, global_info: Tensor, local_info: Tensor) -> None:
    """Measure the statistics, in place, of G and L `b d`."""
    for info, center, spread in ((global_info, *statistics[:2]), (local_info, *statistics[2:])):
        deviation, mean = torch.std_mean(info, 0, correction=0)
        center.copy_(mean)
        spread.copy_(deviation.clamp(min=SMALLEST_SPREAD))
