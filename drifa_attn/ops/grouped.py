"""MFA without gradients on a CPU: the equations of `functional`, for groups of samples whose maps stay in the cache.

A narrow map costs little arithmetic, so what counts is where it lies and how often it is read: products are matrix products of
`b d n`, the two that read the same map are one, σ is in place, and the maximum is taken before σ, which keeps order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from drifa_attn import functional
from drifa_attn.functional import Pair, Statistics

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
        pools = pooled(x, [tuple(t.to(x.dtype) for t in pair) for pair in (*convs, clia_conv)], squeeze)  # type: ignore[misc]
        h1, h2, h3, h4, p = pools
        global_info = functional.hifa_info(h1, h2.sigmoid(), h3, h4.sigmoid(), hifa_dense)
        local_info = functional.clia_info(p, clia_dense)
        return functional.fusion_gate(global_info, local_info, global_scale, local_scale, expand, statistics)


def pooled(x: Tensor, convs: Sequence[Pair], squeeze: Pair | None) -> list[Tensor]:
    """Mean h1, max h2 before σ, mean h3, max h4 before σ, and the mean of CLIA's map: `b d` each."""
    conv1, conv2, conv3, conv4, clia1 = convs
    both = torch.cat([conv1[0], clia1[0]]), torch.cat([conv1[1], clia1[1]])
    d = len(conv1[1])
    found = []
    for part in x.split(max(1, CACHE // (x.element_size() * d * x.shape[2]))):
        z = part if squeeze is None else product(squeeze, part)
        z = product(both, z).sigmoid_()
        mean1, mean_t = z.mean(2).chunk(2, 1)
        h = z[:, :d]
        z = product(conv2, h)
        max2 = z.amax(2)
        h = product(conv3, h.add_(z.sigmoid_())).sigmoid_()
        found.append((mean1, max2, h.mean(2), product(conv4, h).amax(2), mean_t))
    return [torch.cat(vectors) for vectors in zip(*found, strict=True)] if len(found) > 1 else list(found[0])


def product(linear: Pair, x: Tensor) -> Tensor:
    """`W x + bias` at every position: `b c n -> b d n`."""
    weight, bias = linear
    return torch.baddbmm(bias.to(x.dtype)[:, None], weight.to(x.dtype).expand(len(x), -1, -1), x)
