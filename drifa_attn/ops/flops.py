"""The FLOP formulas of the fused operators, for `torch.utils.flop_counter`: two FLOPs per multiply-add of a matrix product.

Importing that module loads triton, so this file does not import it. `register` is called when a fused operator meets a running
counter. A counter copies the formulas when it is made, so `register` also adds them to every counter that is running.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

Shape = Sequence[int]


def products(x: Shape, d: int, maps: int, squeeze: Shape | None, squeezes: int) -> int:
    """The FLOPs of `maps` products of width d, and of `squeezes` products with a squeeze, at every position of x `b c n`."""
    b, c, n = x
    return 2 * b * n * (maps * d * d + (squeezes * d * c if squeeze else 0))


def mfa_stats(x: Shape, weights: Sequence[Shape], biases: Any, squeeze: Shape | None, *rest: Any, **out: Any) -> int:
    """Five products."""
    return products(x, weights[0][0], 5, squeeze, 1)


def mfa_stats_backward(
    grads: Shape, x: Shape, weights: Sequence[Shape], biases: Any, squeeze: Shape | None, *rest: Any, **out: Any
) -> int:
    """Four recomputed products and two for the gradients of each of four; the fifth product is needed at the maxima only."""
    d = weights[0][0]
    return products(x, d, 4 + 2 * 4, squeeze, 1 + 2) + 2 * 2 * x[0] * d * d


def tail(x: Shape, head: Sequence[Shape], expand: Sequence[Shape]) -> int:
    """The FLOPs of the three products behind the pooling of MFA, for the samples of x."""
    weights = [head[0], head[2], *expand[:1]]
    return 2 * x[0] * sum(out * into for out, into in weights)


def mfa_gain(
    x: Shape,
    weights: Sequence[Shape],
    biases: Any,
    squeeze: Shape | None,
    bias: Any,
    head: Sequence[Shape],
    measured: Any,
    expand: Sequence[Shape],
    *rest: Any,
    **out: Any,
) -> int:
    """Those of `mfa_stats` and of the tail."""
    return mfa_stats(x, weights, biases, squeeze) + tail(x, head, expand)


def mfa_gain_backward(
    grad: Shape,
    x: Shape,
    weights: Sequence[Shape],
    biases: Any,
    squeeze: Shape | None,
    bias: Any,
    head: Sequence[Shape],
    measured: Any,
    expand: Sequence[Shape],
    *rest: Any,
    **out: Any,
) -> int:
    """Those of `mfa_stats_backward`; the tail is recomputed, and has two products for the gradients of each of its own."""
    return mfa_stats_backward(grad, x, weights, biases, squeeze) + 3 * tail(x, head, expand)


def mifa_stats(x: Shape, weight: Shape, bias: Any, squeeze: Shape | None, *rest: Any, **out: Any) -> int:
    """One product."""
    return products(x, weight[0], 1, squeeze, 1)


def mifa_stats_backward(grads: Shape, x: Shape, weight: Shape, bias: Any, squeeze: Shape | None, *rest: Any, **out: Any) -> int:
    """One recomputed product, and two for its gradients."""
    return products(x, weight[0], 1 + 2, squeeze, 1 + 2)


FORMULAS = (mfa_stats, mfa_stats_backward, mfa_gain, mfa_gain_backward, mifa_stats, mifa_stats_backward)


def register() -> None:
    """Give the formulas to `torch.utils.flop_counter`, if somebody has imported it, and to every counter that is running."""
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None:
        return
    formulas = {getattr(torch.ops.drifa_attn, formula.__name__): formula for formula in FORMULAS}
    for operator, formula in formulas.items():
        if operator not in counter.flop_registry:
            counter.register_flop_formula(operator)(formula)
    for mode in _get_current_dispatch_mode_stack():
        running = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if running is not None:
            running.update({operator: counter.flop_registry[operator] for operator in formulas})
