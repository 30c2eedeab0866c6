"""The FLOPs of the fused ops, as `torch.utils.flop_counter` counts: two for each product and sum of a matrix product.

Formulas belong to that module's registry, but importing it loads triton, which importing this package must not do. They are
registered when somebody imports it, which a counter of FLOPs does before it counts.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

COUNTER = "torch.utils.flop_counter"

Shape = Sequence[int]


def products(x: Shape, d: int, maps: int, squeeze: Shape | None, squeezes: int) -> int:
    """The FLOPs of `maps` products of width d and, with a squeeze, `squeezes` of it, at every position of x `b c n`."""
    b, c, n = x
    return 2 * b * n * (maps * d * d + (squeezes * d * c if squeeze else 0))


def mfa_stats(x: Shape, weights: Sequence[Shape], biases: Any, squeeze: Shape | None, *rest: Any, **out: Any) -> int:
    """Five products forward."""
    return products(x, weights[0][0], 5, squeeze, 1)


def mfa_stats_backward(
    grads: Shape, x: Shape, weights: Sequence[Shape], biases: Any, squeeze: Shape | None, *rest: Any, **out: Any
) -> int:
    """Four products recomputed, two for each of the gradients of four; the fifth meets only the maxima."""
    d = weights[0][0]
    return products(x, d, 4 + 2 * 4, squeeze, 1 + 2) + 2 * 2 * x[0] * d * d


def mifa_stats(x: Shape, weight: Shape, bias: Any, squeeze: Shape | None, *rest: Any, **out: Any) -> int:
    """One product forward."""
    return products(x, weight[0], 1, squeeze, 1)


def mifa_stats_backward(grads: Shape, x: Shape, weight: Shape, bias: Any, squeeze: Shape | None, *rest: Any, **out: Any) -> int:
    """One product recomputed, and two for its gradients."""
    return products(x, weight[0], 1 + 2, squeeze, 1 + 2)


def register(counter: ModuleType) -> None:
    """Add the formulas to the counter's registry."""
    for formula in (mfa_stats, mfa_stats_backward, mifa_stats, mifa_stats_backward):
        counter.register_flop_formula(getattr(torch.ops.drifa_attn, formula.__name__))(formula)


class OnImport(MetaPathFinder):
    """Registers the formulas once the counter is imported, and looks for no other module."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            register(module)

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def register_when_imported() -> None:
    """Register the formulas now, if the counter is imported already, or when it will be."""
    if COUNTER in sys.modules:
        register(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, OnImport())
