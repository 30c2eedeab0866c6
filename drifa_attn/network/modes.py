"""How a network runs for one look at it: in eval mode, uncompiled, and afterwards as it was."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn


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
