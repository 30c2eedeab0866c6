"""MFA without gradients on a CPU: the equations of `functional`, for groups of samples whose maps stay in the cache.

A narrow map costs little arithmetic, so what counts is where it lies, how often it is read, and how many operations are called.
Products are matrix products of `b d n`, the two that read the same map are one, σ is in place, and the maximum is taken before
σ, which keeps order. Two biases are not added to a map: that of squeeze goes into the bias of the next product, and that of
conv4 is added to the maximum.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from drifa_attn import functional
from drifa_attn.functional import Pair, Statistics, cast

CACHE = 2**19  # bytes of one map of a group; measured on one core from 2**17 to 2**22


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
    *convs, hifa_dense = hifa_weights
    clia_conv, clia_dense = clia_weights
    with functional.without_autocast(x):
        mean1, max2, mean3, max4, p = pooled(x, [*convs, clia_conv], squeeze)
        global_info = functional.hifa_info(mean1, max2.sigmoid_(), mean3, max4.sigmoid_(), hifa_dense)
        local_info = functional.clia_info(p, clia_dense)
        return functional.fusion_gate(global_info, local_info, global_scale, local_scale, expand, statistics)


def pooled(x: Tensor, convs: Sequence[Pair], squeeze: Pair | None) -> Sequence[Tensor]:
    """Mean h1, max h2 before σ, mean h3, max h4 before σ, and the mean of CLIA's map: `b d` each."""
    b, _, n = x.shape
    conv1, conv2, conv3, conv4, clia1 = (cast_pair(conv, x.dtype) for conv in convs)
    squeeze = squeeze and cast_pair(squeeze, x.dtype)
    both, bias = (torch.cat(parts) for parts in zip(conv1, clia1, strict=True))
    if squeeze:
        bias = torch.addmv(bias, both, squeeze[1])
    d = conv1[1].shape[0]
    size = max(1, CACHE // (x.element_size() * d * n))
    found = []
    for part in x.split(size) if size < b else (x,):
        z = times(squeeze[0], part) if squeeze else part
        z = product((both, bias), z).sigmoid_()
        means, h = z.mean(2), z[:, :d]
        z = product(conv2, h)
        max2 = z.amax(2)
        h = product(conv3, h.add_(z.sigmoid_())).sigmoid_()
        max4 = times(conv4[0], h).amax(2).add_(conv4[1])
        found.append((means[:, :d], max2, h.mean(2), max4, means[:, d:]))
    return [torch.cat(vectors) for vectors in zip(*found, strict=True)] if len(found) > 1 else found[0]


def cast_pair(linear: Pair, dtype: torch.dtype) -> Pair:
    """Weight and bias in a dtype."""
    weight, bias = linear
    return cast(weight, dtype), cast(bias, dtype)


def times(weight: Tensor, x: Tensor) -> Tensor:
    """`W x` at every position: `b c n -> b d n`."""
    return torch.bmm(weight.expand(x.shape[0], -1, -1), x)


def product(linear: Pair, x: Tensor) -> Tensor:
    """`W x + bias` at every position: `b c n -> b d n`."""
    weight, bias = linear
    return torch.baddbmm(bias[:, None], weight.expand(x.shape[0], -1, -1), x)
