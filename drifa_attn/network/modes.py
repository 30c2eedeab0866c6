"""How a network runs for one look at it: in eval mode, uncompiled, and afterwards as it was."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def eval_mode(model: nn.Module, *, but: Callable[[nn.Module], bool] | None = None) -> Iterator[None]:
    """Within this context a network is in eval mode, but for the modules that `but` selects; afterwards each mode is back.

    It sets flags alone: a network may do more in a `train` of its own than can be taken back.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = but is not None and but(module)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def eagerly() -> AbstractContextManager:
    """A context in which compiled code runs uncompiled: it has its dropout left out, and calls no hooks."""
    # Where dynamo was never imported, nothing is compiled, and importing it would take seconds.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def without_statistics(model: nn.Module) -> Iterator[None]:
    """Within this context batch norms in training mode compute what they always do, and keep the statistics that they have.

    The operation is the same, with a momentum of zero: autograd finds what it kept of the first run.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    before = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]  # type: ignore[union-attr]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)  # type: ignore[union-attr]


@contextmanager
def own_randomness() -> Iterator[None]:
    """Within this context the CPU draws random numbers of its own; afterwards torch's global state is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield
