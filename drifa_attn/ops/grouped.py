"""MFA without gradients on a CPU: the equations of `functional`, for groups of samples whose maps stay in the cache.

A narrow map costs little arithmetic, so what counts is where it lies, how often it is read, and how many operations are called.
Products are matrix products of `b d n`, or of `d n` where a group is one sample, which takes fewer calls. σ is in place. Of the
last map, which nothing else reads, the maximum is taken before σ, which keeps order, and before the bias. A mean is a sum that
the next operation multiplies by the share of one position.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from drifa_attn import functional
from drifa_attn.functional import Pair, Statistics, cast

CACHE = 2**18  # bytes a thread of one map of a group; measured on one core and on two from 2**16 to 2**21
LONG, ROWS = 2**13, 16  # positions from which a feature is squeezed some channels at a time, and how many; measured on one core


def mfa(
    x: Tensor,
    hifa_weights: Sequence[Pair],
    clia_weights: Sequence[Pair],
    global_scale: Tensor,
    local_scale: Tensor,
    *,
    squeeze: Pair | None = None,
    expand: Pair | None = None,
    statistics: Statistics | None = None,
) -> Tensor:
    """`functional.mfa` without a mask: x `b c n` -> a `b c`."""
    dtype = x.dtype
    *convs, hifa_dense = [cast_pair(linear, dtype) for linear in hifa_weights]
    clia_conv, clia_dense = [cast_pair(linear, dtype) for linear in clia_weights]
    with functional.without_autocast(x):
        u, v, s = pooled(x, [*convs, clia_conv], squeeze and cast_pair(squeeze, dtype))
        share = 1 / x.shape[2]
        global_info = dense(torch.cat([u, v], -1), hifa_dense).sigmoid_()
        local_info = dense(s, clia_dense, share).sigmoid_().add_(s, alpha=share)
        if statistics:
            global_center, global_spread, local_center, local_spread = [cast(buffer, dtype) for buffer in statistics]
            global_info.sub_(global_center).div_(global_spread)
            local_info.sub_(local_center).div_(local_spread)
        fused = torch.addcmul(local_info.mul_(cast(local_scale, dtype)), cast(global_scale, dtype), global_info)
        a = (dense(fused, cast_pair(expand, dtype)) if expand else fused).sigmoid_()
        return a.view(len(x), -1)


def pooled(x: Tensor, convs: Sequence[Pair], squeeze: Pair | None) -> Sequence[Tensor]:
    """HIFA's u and v of `b c n`, and the sum of CLIA's map, which is n times p: `b d` each, or of one sample `d` each."""
    b, _, n = x.shape
    if b == 1:
        return pools(x.squeeze(0), convs, squeeze)
    if torch.compiler.is_compiling():  # their number would be part of the graph
        return pools(x, convs, squeeze)
    size = max(1, CACHE * torch.get_num_threads() // (x.element_size() * len(convs[0][1]) * n))
    groups, join = (x.unbind(), torch.stack) if size == 1 else (x.split(size), torch.cat)
    found = [pools(group, convs, squeeze) for group in groups]
    return [join(vectors) for vectors in zip(*found, strict=True)]


def pools(x: Tensor, convs: Sequence[Pair], squeeze: Pair | None) -> Sequence[Tensor]:
    """The same of one group, `b c n` -> `b d` each, or of one sample, `c n` -> `d` each."""
    conv1, conv2, conv3, (weight4, bias4), clia_conv = convs
    share = 1 / x.shape[-1]
    z = squeezed(squeeze, x) if squeeze else x
    s = product(clia_conv, z).sigmoid_().sum(-1)
    h1 = product(conv1, z).sigmoid_()
    h2 = product(conv2, h1).sigmoid_()
    u = h2.amax(-1).add_(h1.sum(-1), alpha=share)
    h3 = product(conv3, h1.add_(h2)).sigmoid_()
    max4 = times(weight4, h3).amax(-1).add_(bias4).sigmoid_()
    return u, max4.add_(h3.sum(-1), alpha=share), s


def cast_pair(linear: Pair, dtype: torch.dtype) -> Pair:
    """Weight and bias in a dtype."""
    weight, bias = linear
    return linear if weight.dtype == bias.dtype == dtype else (weight.to(dtype), bias.to(dtype))


def times(weight: Tensor, x: Tensor) -> Tensor:
    """`W x` at every position: `b c n -> b d n`, or `c n -> d n`."""
    return torch.mm(weight, x) if x.ndim == 2 else torch.bmm(weight.expand(len(x), -1, -1), x)


def product(linear: Pair, x: Tensor) -> Tensor:
    """`W x + bias` at every position, as `times`."""
    weight, bias = linear
    if x.ndim == 2:
        return torch.addmm(bias.unsqueeze(1), weight, x)
    return torch.baddbmm(bias.unsqueeze(1), weight.expand(len(x), -1, -1), x)


def squeezed(linear: Pair, x: Tensor) -> Tensor:
    """`product` of features that no cache holds: where channels are long, each of them lies on many pages of its own.

    A product goes through x column by column, so it asks for a page of every channel at once.
    """
    weight, bias = linear
    if x.ndim > 2 or torch.compiler.is_compiling() or x.shape[1] < LONG or x.stride(1) != 1:
        return product(linear, x)
    (first, rows), *others = zip(weight.split(ROWS, 1), x.split(ROWS), strict=True)
    z = product((first, bias), rows)
    for part, rows in others:
        z.addmm_(part, rows)
    return z


def dense(v: Tensor, linear: Pair, share: float = 1) -> Tensor:
    """`W (share · v) + bias` of `b c -> b d`, or of `c -> d`."""
    weight, bias = linear
    if v.ndim == 1:
        return torch.addmv(bias, weight, v, alpha=share)
    return torch.addmm(bias, v, weight.t(), alpha=share)
