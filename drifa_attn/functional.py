"""The equations of DRIFA's attention as functions that take the weights as arguments.

This file is the reference for every layer, test and fused operator of the package. Axes: `b` batch, `c` channels, `d` the width
that attention works at, `n` positions (pixels, voxels, tokens; 1 for a vector), `m` modalities, `r` the three poolings (min,
mean, max). Each linear map is a `Linear`: the pair (weight `out in`, bias `out`), or a function `... in -> ... out` that is
called, such as a quantised layer or one with adapters. A `mask`, `b n`, is True at the positions that are real: what is False,
even NaN, takes no part in any pooling.

Precision: a map of positions is computed in the dtype of `x`. The exception is float16, which is computed in float32, because
an unbounded product can exceed the range of float16. Pooled vectors and gates are computed in float32, or in float64 if `x`
is float64. Autocast never lowers either. A module that is called computes in the dtype of its own weights.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]
Linear = Pair | Callable[[Tensor], Tensor]
Masks = Sequence[Tensor | None] | None  # `b n_i` or None, one per modality


class Statistics(NamedTuple):
    """The mean (center) and the deviation (spread) of G and of L over a batch of real features, per channel: `d` each."""

    global_center: Tensor
    global_spread: Tensor
    local_center: Tensor
    local_spread: Tensor


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Disables autocast on the device of `x`, so that the dtypes are those that this file states."""
    if torch._C._is_any_autocast_enabled():
        kind = x.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            return torch.autocast(kind, enabled=False)
    return nullcontext()


def vector_dtype(x: Tensor) -> torch.dtype:
    """The dtype of pooled vectors and gates: float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def map_dtype(x: Tensor) -> torch.dtype:
    """The dtype of maps of positions: float32 for float16, else that of `x`."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def as_map(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """`x` in the dtype that its maps are computed in, and zero where the mask is False: `b c n -> b c n`."""
    x = x.to(map_dtype(x))
    return x if mask is None else torch.where(mask[:, None], x, 0)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype; where it has it already, nothing is called: `Tensor.to` takes as long as a small product."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def each(mask: Masks, xs: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The mask of each modality, None for those that have none."""
    return [None] * len(xs) if mask is None else mask


def as_maps(xs: Sequence[Tensor], mask: Masks) -> list[Tensor]:
    """`as_map` of every modality."""
    return [as_map(x, one) for x, one in zip(xs, each(mask, xs), strict=True)]


def called(linear: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    """`linear(v)`, computed in the dtype of the first weights that it has, in the dtype of v: `... c -> ... d`."""
    for weight in linear.parameters() if isinstance(linear, nn.Module) else ():
        if weight.is_floating_point():
            return linear(v.to(weight.dtype)).to(v.dtype)
    return linear(v)


def lin(x: Tensor, linear: Linear) -> Tensor:
    """`W x + bias` with the same matrix at every position, of a pair computed as a 1x1 convolution: `b c n -> b d n`."""
    if callable(linear):
        return called(linear, x.mT).mT
    weight, bias = linear
    return F.conv1d(x, cast(weight, x.dtype)[..., None], cast(bias, x.dtype))


def dense(v: Tensor, linear: Linear) -> Tensor:
    """`W v + bias` of a pooled vector, of a pair in the dtype of the vector: `... c -> ... d`."""
    if callable(linear):
        return called(linear, v)
    weight, bias = linear
    return F.linear(v, cast(weight, v.dtype), cast(bias, v.dtype))


def pool_mean(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean over positions, summed in float32 at least; zero where a mask leaves none: `b c n -> b c`."""
    if mask is None:
        return x.mean(-1, dtype=vector_dtype(x))
    return torch.where(mask[:, None], x, 0).sum(-1, dtype=vector_dtype(x)) / mask.sum(-1, keepdim=True).clamp(min=1)


def largest(x: Tensor) -> Tensor:
    """The maximum over positions; tied ones share its gradient equally, in compiled code the first of them takes it.

    Compiled code may compute x again for backward, with other bits, and then finds no value that equals the maximum: it keeps
    the place of the maximum instead.
    """
    return x.max(-1).values if torch.compiler.is_compiling() else x.amax(-1)


def smallest(x: Tensor) -> Tensor:
    """The minimum over positions, as `largest`."""
    return x.min(-1).values if torch.compiler.is_compiling() else x.amin(-1)


def pool_max(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The maximum over positions, see `largest` for ties; zero where a mask leaves none: `b c n -> b c`."""
    if mask is None:
        return largest(x).to(vector_dtype(x))
    best = largest(torch.where(mask[:, None], x, -math.inf))
    return torch.where(mask.any(-1, keepdim=True), best, 0).to(vector_dtype(x))


def pool_min(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The minimum over positions, see `largest` for ties; zero where a mask leaves none: `b c n -> b c`."""
    if mask is None:
        return smallest(x).to(vector_dtype(x))
    best = smallest(torch.where(mask[:, None], x, math.inf))
    return torch.where(mask.any(-1, keepdim=True), best, 0).to(vector_dtype(x))


def hifa(
    x: Tensor,
    conv1: Linear,
    conv2: Linear,
    conv3: Linear,
    conv4: Linear,
    dense_: Linear,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Hierarchical information fusion attention (Fig. 2).

        h1 = σ(lin(conv1, x))          h2 = σ(lin(conv2, h1))
        h3 = σ(lin(conv3, h1 + h2))    h4 = σ(lin(conv4, h3))
        u  = mean(h1) + max(h2)        v  = mean(h3) + max(h4)
        G  = σ(lin(dense, [u ; v]))

    Shape: x `b c n`, mask `b n` -> G `b c`; the convolutions are `c c`, dense_ is `c 2c`.
    Differs: `mask` is not in the paper; None is the paper.
    """
    x = as_map(x, mask)
    h1 = lin(x, conv1).sigmoid()
    h2 = lin(h1, conv2).sigmoid()
    h3 = lin(h1 + h2, conv3).sigmoid()
    h4 = lin(h3, conv4).sigmoid()
    return hifa_info(pool_mean(h1, mask), pool_max(h2, mask), pool_mean(h3, mask), pool_max(h4, mask), dense_)


def hifa_info(mean1: Tensor, max2: Tensor, mean3: Tensor, max4: Tensor, dense_: Linear) -> Tensor:
    """G from the pooled maps of HIFA, `b c` each: `σ(lin(dense, [mean1 + max2 ; mean3 + max4]))`."""
    return dense(torch.cat([mean1 + max2, mean3 + max4], dim=1), dense_).sigmoid()


def clia(x: Tensor, conv1: Linear, conv2: Linear, *, mask: Tensor | None = None) -> Tensor:
    """Channel-wise local information attention (Fig. 2).

        p = mean(σ(lin(conv1, x)))    L = p + σ(lin(conv2, p))

    Shape: x `b c n`, mask `b n` -> L `b c`.
    Differs: `mask` is not in the paper; None is the paper.
    """
    return clia_info(pool_mean(lin(as_map(x, mask), conv1).sigmoid(), mask), conv2)


def clia_info(p: Tensor, conv2: Linear) -> Tensor:
    """L from the pooled map of CLIA, `b c`: `p + σ(lin(conv2, p))`."""
    return p + dense(p, conv2).sigmoid()


def standardised(info: Tensor, center: Tensor, spread: Tensor) -> Tensor:
    """`(info − center) / spread`: information `b d` with mean zero and deviation one over the data that was measured."""
    return (info - cast(center, info.dtype)) / cast(spread, info.dtype)


def fusion_gate(
    global_info: Tensor,
    local_info: Tensor,
    global_scale: Tensor,
    local_scale: Tensor,
    expand: Linear | None = None,
    statistics: Statistics | None = None,
) -> Tensor:
    """The last step of MFA and MIFA, the gate: `a = σ(global_scale · G + local_scale · L)`.

    With `expand`, a linear map takes the sum from the reduced width to the channels: `a = σ(lin(expand, …))`. With
    `statistics`, G and L are standardised before they are weighed.

    Shape: G and L `b d`, global_scale `1`, local_scale and the statistics `d` -> a `b c` (c = d without `expand`), in (0, 1).
    Differs: `expand` and `statistics` are not in the paper. Statistics of zeros and ones change no bit.
    """
    dtype = global_info.dtype
    if statistics is not None:
        global_info = standardised(global_info, statistics.global_center, statistics.global_spread)
        local_info = standardised(local_info, statistics.local_center, statistics.local_spread)
    fused = cast(global_scale, dtype) * global_info + cast(local_scale, dtype) * local_info
    return (fused if expand is None else dense(fused, expand)).sigmoid()


def gain(a: Tensor, alpha: Tensor) -> Tensor:
    """The factor of each feature: `a · alpha`.

    Shape: a `b c`, alpha `c` -> `b c`. At a = σ(0) = ½ and alpha = 2 the factor is exactly 1.
    Differs: none.
    """
    return a * cast(alpha, a.dtype)


def mfa(
    x: Tensor,
    hifa_weights: Sequence[Linear],
    clia_weights: Sequence[Linear],
    global_scale: Tensor,
    local_scale: Tensor,
    *,
    squeeze: Linear | None = None,
    expand: Linear | None = None,
    statistics: Statistics | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The gate of multi-branch fusion attention (Fig. 2): `a = σ(global_scale · HIFA(x) + local_scale · CLIA(x))`.

    The attended features are `y = x · gain(a, alpha)`. With `squeeze` (c -> d), HIFA and CLIA read `lin(squeeze, x)`.

    Shape: x `b c n`, mask `b n` -> a `b c`, in (0, 1); where a mask leaves no position, every pooling is zero.
    Differs: `squeeze`, `expand`, `statistics` and `mask` are not in the paper; None is the paper.
    """
    with without_autocast(x):
        x = as_map(x, mask)
        z = x if squeeze is None else lin(x, squeeze)
        global_info, local_info = hifa(z, *hifa_weights, mask=mask), clia(z, *clia_weights, mask=mask)
        return fusion_gate(global_info, local_info, global_scale, local_scale, expand, statistics)


def pool_modalities(xs: Sequence[Tensor], present: Tensor | None = None, mask: Masks = None) -> Tensor:
    """`Σ_i r(x_i)` for r in (min, mean, max), over the modalities that a sample has: m times `b c n_i` -> `r b c`."""
    parts = zip(xs, each(mask, xs), strict=True)
    pools = torch.stack([torch.stack([pool_min(*part), pool_mean(*part), pool_max(*part)]) for part in parts])  # m r b c
    if present is not None:
        pools = torch.where(rearrange(present, "b m -> m 1 b 1"), pools, 0)
    return reduce(pools, "m r b c -> r b c", "sum")


def mask_absent(xs: Sequence[Tensor], present: Tensor | None) -> list[Tensor]:
    """Zeroes absent modalities, so that their values, even NaN, cannot affect gates or gradients."""
    if present is None:
        return list(xs)
    return [torch.where(rearrange(has, "b -> b 1 1"), x, 0) for x, has in zip(xs, present.unbind(1), strict=True)]


def mgifa(xs: Sequence[Tensor], dense_: Linear, present: Tensor | None = None, mask: Masks = None) -> Tensor:
    """Multimodal global information fusion attention (Fig. 3): `G = Σ_r σ(lin(dense, Σ_i r(x_i)))`, one dense for all r.

    Shape: m tensors x_i `b c n_i` (the n_i may differ), present `b m`, mask m times `b n_i` or None -> G `b c`.
    Differs: `present` and `mask` are not in the paper; None is the paper.
    """
    return mgifa_info(pool_modalities(as_maps(xs, mask), present, mask), dense_)


def mgifa_info(pools: Tensor, dense_: Linear) -> Tensor:
    """G from the poolings, summed over modalities, `r b c`: `Σ_r σ(lin(dense, pools_r))`."""
    return reduce(dense(pools, dense_).sigmoid(), "r b c -> b c", "sum")


def mlifa(xs: Sequence[Tensor], convs: Sequence[Linear], present: Tensor | None = None, mask: Masks = None) -> Tensor:
    """Multimodal local information fusion attention (Fig. 3): `L = Σ_r Σ_i r(t_i)`, `t_i = σ(lin(convs[i], x_i))`.

    Shape: m tensors x_i `b c n_i` (the n_i may differ), present `b m`, mask m times `b n_i` or None -> L `b c`.
    Differs: `present` and `mask` are not in the paper; None is the paper.
    """
    maps = [lin(x, conv).sigmoid() for x, conv in zip(as_maps(xs, mask), convs, strict=True)]
    return reduce(pool_modalities(maps, present, mask), "r b c -> b c", "sum")


def mifa(
    xs: Sequence[Tensor],
    mgifa_dense: Linear,
    mlifa_convs: Sequence[Linear],
    global_scale: Tensor,
    local_scale: Tensor,
    *,
    present: Tensor | None = None,
    mask: Masks = None,
    squeezes: Sequence[Linear] | None = None,
    expands: Sequence[Linear] | None = None,
    statistics: Statistics | None = None,
) -> list[Tensor]:
    """The gates of multimodal information fusion attention (Fig. 3): `a = σ(global_scale · G + local_scale · L)`.

    All modalities share one gate. The attended features are `y_i = x_i · gain(a, alphas[i])`. With `squeezes` (c_i -> d), all
    modalities are read at one width d, and `expands` (d -> c_i) map the shared sum to one gate per modality. The values of an
    absent modality, even NaN, affect neither gates nor gradients; a modality of which a mask leaves no position is absent.

    Shape: m tensors x_i `b c_i n_i`, present `b m`, mask m times `b n_i` or None -> m gates a_i `b c_i`, in (0, 1).
    Differs: `present`, `mask`, `squeezes`, `expands` and `statistics` are not in the paper; None is the paper.
    """
    with without_autocast(xs[0]):
        xs = mask_absent(as_maps(xs, mask), present)
        zs = xs if squeezes is None else [lin(x, squeeze) for x, squeeze in zip(xs, squeezes, strict=True)]
        global_info, local_info = mgifa(zs, mgifa_dense, present, mask), mlifa(zs, mlifa_convs, present, mask)
        return fusion_gates(global_info, local_info, global_scale, local_scale, expands, statistics, modalities=len(xs))


def fusion_gates(
    global_info: Tensor,
    local_info: Tensor,
    global_scale: Tensor,
    local_scale: Tensor,
    expands: Sequence[Linear] | None,
    statistics: Statistics | None,
    *,
    modalities: int,
) -> list[Tensor]:
    """One gate per modality from the information that they share: the same gate, or with `expands` one of its own."""
    fused = global_info, local_info, global_scale, local_scale
    if expands is None:
        return [fusion_gate(*fused, statistics=statistics)] * modalities
    return [fusion_gate(*fused, expand, statistics) for expand in expands]
