"""IO-aware exact attention: MFA and MIFA at the price of reading the input.

Only a few vectors leave the pyramid of maps that MFA and MIFA compute. The fused ops compute those, and for backward keep x and
the vectors alone: the maps are computed anew, a cache's worth at a time. Three implementations stand behind one dispatcher:

- eager: the equations of `functional`, on which everything else is tested;
- lean: the same in chunks, in plain PyTorch, on any device;
- triton: one pass over x on a GPU.

`DRIFA_FUSED` (auto, 0, 1) in the environment, or `fused(mode)`, chooses; `explain(layer, x)` tells what runs and why.
Differs: the gradient of a maximum or minimum goes to the first of tied positions, ties being those before σ, where the plain
equations share it among them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor

from drifa_attn import functional
from drifa_attn.functional import Linear
from drifa_attn.layout import Layout, positions, scale

from . import register
from .dispatch import Choice, choose, fused, plain

__all__ = ["Choice", "explain", "fused", "gate", "mfa", "mfa_stats", "mifa", "mifa_stats"]


def mfa_stats(x: Tensor, weights: Sequence[Linear], squeeze: Linear | None = None) -> Tensor:
    """The five vectors that leave the maps of HIFA and CLIA (Fig. 2): mean h1, max h2, mean h3, max h4, mean of CLIA's map.

    Args:
        x: features of any strides.
        weights: HIFA's conv1, conv2, conv3, conv4 and CLIA's conv1, each `d d`.
        squeeze: `d c`; None, where d = c, reads x itself.

    Shape: x `b c n` -> `5 b d`, float32 at least.
    Differs: a tied maximum's gradient goes to its first position.
    """
    w, b = zip(*weights, strict=True)
    return register.mfa_stats(x, list(w), list(b), *(squeeze or (None, None)), torch.is_grad_enabled())[0]


def mifa_stats(x: Tensor, conv: Linear, squeeze: Linear | None = None, present: Tensor | None = None) -> Tensor:
    """What leaves the maps of one modality of MIFA (Fig. 3): min, mean, max of z and of `t = σ(lin(conv, z))`.

    Args:
        x: features of any strides.
        conv: the modality's convolution, `d d`.
        squeeze: `d c`, z = lin(squeeze, x); None, where d = c, is z = x.
        present: which samples have this modality; the others count as zeros.

    Shape: x `b c n`, present `b` -> `6 b d`, float32 at least.
    Differs: a tied extremum's gradient goes to its first position.
    """
    return register.mifa_stats(x, *conv, *(squeeze or (None, None)), present, torch.is_grad_enabled())[0]


def gate(x: Tensor, factor: Tensor, layout: Layout = "b c ...", prefix: int = 0) -> Tensor:
    """`x · factor` with one factor a channel, and for backward no map of products.

    Shape: x of the layout, factor `b c`, float32 at least -> as x: same dtype and strides, prefix tokens unchanged. The
        product is rounded once.
    Differs: none.
    """
    if plain(positions(x, layout), factor.shape[1]):
        return scale(x, factor, layout, prefix)
    return register.gate(x, factor, layout, prefix)


def mfa(
    x: Tensor,
    hifa_weights: Sequence[Linear],
    clia_weights: Sequence[Linear],
    global_scale: Tensor,
    local_scale: Tensor,
    *,
    squeeze: Linear | None = None,
    expand: Linear | None = None,
) -> Tensor:
    """`functional.mfa` by the implementation `choose` names."""
    *convs, hifa_dense = hifa_weights
    clia_conv, clia_dense = clia_weights
    if plain(x, local_scale.shape[0]):
        return functional.mfa(x, hifa_weights, clia_weights, global_scale, local_scale, squeeze=squeeze, expand=expand)
    with functional.exact(x):
        h1, h2, h3, h4, p = mfa_stats(x, [*convs, clia_conv], squeeze).unbind(0)
        global_info = functional.hifa_info(h1, h2, h3, h4, hifa_dense)
        return functional.fusion_gate(global_info, functional.clia_info(p, clia_dense), global_scale, local_scale, expand)


def mifa(
    xs: Sequence[Tensor],
    mgifa_dense: Linear,
    mlifa_convs: Sequence[Linear],
    global_scale: Tensor,
    local_scale: Tensor,
    *,
    present: Tensor | None = None,
    squeezes: Sequence[Linear] | None = None,
    expands: Sequence[Linear] | None = None,
) -> list[Tensor]:
    """`functional.mifa` by the implementation `choose` names for its largest modality."""
    if plain(largest(xs), local_scale.shape[0], products=1):
        weights = (mgifa_dense, mlifa_convs, global_scale, local_scale)
        return functional.mifa(xs, *weights, present=present, squeezes=squeezes, expands=expands)
    masks: Sequence[Tensor | None] = [None] * len(xs) if present is None else present.unbind(1)
    with functional.exact(xs[0]):
        maps: Sequence[Linear | None] = [None] * len(xs) if squeezes is None else squeezes
        parts = zip(xs, mlifa_convs, maps, masks, strict=True)
        pools = torch.stack([mifa_stats(*part) for part in parts])  # m (2 r) b d
        if present is not None:
            pools = torch.where(rearrange(present, "b m -> m 1 b 1"), pools, 0)
        of_x, of_maps = reduce(pools, "m (two r) b d -> two r b d", "sum", two=2)
        global_info = functional.mgifa_info(of_x, mgifa_dense)
        local_info = reduce(of_maps, "r b d -> b d", "sum")
        return functional.fusion_gates(global_info, local_info, global_scale, local_scale, expands, len(xs))


def largest(xs: Sequence[Tensor]) -> Tensor:
    """The modality with most elements; under tracing, where sizes are tensors, the first."""
    most = xs[0]
    for x in [] if torch.jit.is_tracing() else xs[1:]:
        if x.shape[1] * x.shape[2] > most.shape[1] * most.shape[2]:
            most = x
    return most


def explain(layer: Any, x: Any) -> Choice:
    """Which implementation a layer takes for an input, and why.

    Args:
        layer: an `MFA` or `MIFA`.
        x: what its forward takes: features, or for a `MIFA` a list of them.

    Raises: TypeError: another layer.
    """
    if hasattr(layer, "layouts"):
        places = zip(layer.layouts, layer.num_prefix_tokens, strict=True)
        x, products = largest([positions(one, *place) for one, place in zip(x, places, strict=True)]), 1
    elif hasattr(layer, "local_scale") and hasattr(layer, "layout"):
        x, products = positions(x, layer.layout, layer.num_prefix_tokens), 5
    else:
        raise TypeError(f"ops.explain expected an MFA or MIFA, got {type(layer).__name__}: name one within it.")
    return choose(x, layer.local_scale.shape[0], products=products)
