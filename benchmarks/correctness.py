"""The check before the clock: what is about to be timed must compute what float64 computes."""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from . import measure
from .cases import Case, Setup, eager, switched
from .measure import tensors

# Largest relative error (L2) of an output, and of the gradient of one weight or input, against float64. A maximum may move to a
# nearly tied position that a float64 run does not choose, and its gradient with it: for gradients three times eager's own
# error is allowed instead, up to a cap that a wrong sign, a zero or a doubled gradient exceeds.
OUTPUT = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2}
NETWORK = {"fp32": 1e-3, "fp16": 5e-2, "bf16": 0.3}  # a whole network's outputs
GRADIENT = {"fp32": 1e-3, "fp16": 5e-2, "bf16": 0.1}
CAP = 0.5


def leaves(setup: Setup) -> list[Tensor]:
    """What gradients are taken of: inputs that ask for one, then parameters."""
    return [t for t in (*tensors(setup.args), *setup.module.parameters()) if t.requires_grad]


def like(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients to send back, of no special direction."""
    return [torch.linspace(0, 50, y.numel(), device=y.device).sin().view(y.shape).to(y) for y in outputs]


def results(run: Callable[..., Any], setup: Setup, gradients: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of one call."""
    with torch.set_grad_enabled(gradients):
        outputs = tensors(run(*setup.args))
    grads = torch.autograd.grad(outputs, leaves(setup), like(outputs)) if gradients else ()
    return [y.detach() for y in outputs], list(grads)


def doubled(value: Any) -> Any:
    """Arguments in float64."""
    if isinstance(value, Tensor):
        return value.detach().double().requires_grad_(value.requires_grad)
    return type(value)(doubled(one) for one in value)


def head(value: Any) -> Any:
    """The first two samples of arguments."""
    if isinstance(value, Tensor):
        return value[:2]
    return type(value)(head(one) for one in value)


def errors(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """`‖actual − exact‖ / ‖exact‖` of each tensor; one that is nearly zero beside the others is held to a thousandth of them.

    Such a one may be all cancellation: the bias before a softmax has no gradient but rounding.
    """
    norms = [torch.linalg.vector_norm(e).item() for e in exact]
    floor = 1e-3 * math.hypot(*norms)
    distances = [torch.linalg.vector_norm(a.to(e) - e).item() for a, e in zip(actual, exact, strict=True)]
    return [distance / (max(norm, floor) or 1.0) for distance, norm in zip(distances, norms, strict=True)]


class Reference:
    """What the providers of one op of a group share: float64 results, the errors of eager's gradients, the equations' cost."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str, bool], tuple[list[Tensor], list[Tensor], list[float]]] = {}
        self.costs: dict[tuple[str, str, str], measure.Cost] = {}

    def cost(self, case: Case, setup: Setup, mode: str) -> measure.Cost:
        """FLOPs and bytes of the equations."""
        key = (case.op, case.shape, mode)
        if key not in self.costs:
            self.costs[key] = switched("reference", measure.cost, setup.exact or setup.module, setup.args, mode)
        return self.costs[key]

    def get(self, case: Case, setup: Setup, gradients: bool) -> tuple[list[Tensor], list[Tensor], list[float]]:
        """Float64 outputs, float64 gradients, and the errors of eager's gradients."""
        key = (case.op, case.shape, gradients)
        if key not in self.known:
            plain = Setup(setup.exact or setup.module, setup.args)
            exact = Setup(deepcopy(plain.module).double(), doubled(plain.args))
            outputs, grads = results(eager(exact.module), exact, gradients)
            _, own = results(eager(plain.module), plain, gradients)
            self.known[key] = (outputs, grads, errors(own, grads))
        return self.known[key]


def check(case: Case, setup: Setup, run: Callable[..., Any], mode: str, dtype: str, reference: Reference) -> None:
    """Raise a `ValueError` if what is about to be timed does not compute what it should."""
    if case.network:
        setup = setup._replace(args=head(setup.args))
    gradients = mode != "forward" and not case.network
    outputs, grads, eager_errors = reference.get(case, setup, gradients)
    ours, own = results(run, setup, gradients)
    for i, found in enumerate(errors(ours, outputs)):
        bound = (NETWORK if case.network else OUTPUT)[dtype]
        if not found <= bound:
            raise ValueError(f"wrong: output {i} is off by {found:.1e} relative to float64, allowed {bound:.1e}")
    for i, (found, eager_error) in enumerate(zip(errors(own, grads), eager_errors, strict=True)):
        bound = min(max(GRADIENT[dtype], 3 * eager_error), CAP)
        if not found <= bound:
            raise ValueError(f"wrong: gradient {i} is off by {found:.1e} relative to float64, allowed {bound:.1e}")


def demand(holds: bool, otherwise: str) -> None:
    """Raise a `ValueError` that says what does not hold."""
    if not holds:
        raise ValueError(otherwise)
