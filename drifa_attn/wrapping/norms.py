"""Batch norms of a network that holds attention: whose statistics moved since then, and norms that stay in eval mode.

Training moves the statistics of a batch norm even where its weights are frozen.
"""

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

SEEN = "drifa_batches"  # the attribute of a batch norm that says how many batches it had seen


def tracking(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms that count their batches, by name."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    return {name: norm for name, norm in found.items() if norm.num_batches_tracked is not None}


def remember(model: nn.Module) -> None:
    """Note how many batches each batch norm has seen until now; what was noted before stays."""
    for norm in tracking(model).values():
        if SEEN not in vars(norm) and not norm.num_batches_tracked.is_meta:  # type: ignore[union-attr]
            setattr(norm, SEEN, int(norm.num_batches_tracked))  # type: ignore[arg-type]


def forget(model: nn.Module) -> None:
    """Take the notes away."""
    for norm in tracking(model).values():
        vars(norm).pop(SEEN, None)


def moved(model: nn.Module) -> list[str]:
    """The batch norms that have seen more batches than were noted."""
    return [
        name
        for name, norm in tracking(model).items()
        if SEEN in vars(norm) and int(norm.num_batches_tracked) != vars(norm)[SEEN]  # type: ignore[arg-type]
    ]


class StaysInEval:
    """The `train` of a batch norm that is frozen: it is in eval mode, whatever the network around it is set to."""

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm

    def __call__(self, mode: bool = True) -> Any:
        self.norm.training = False
        return self.norm


def keep_in_eval(model: nn.Module, *, enable: bool) -> None:
    """Let the batch norms whose weights are frozen stay in eval mode through later calls of `train`, or no longer."""
    for module in model.modules():
        if not isinstance(module, _BatchNorm):
            continue
        if isinstance(vars(module).get("train"), StaysInEval):
            del module.train
        if enable and not any(parameter.requires_grad for parameter in module.parameters()):
            module.train = StaysInEval(module)  # type: ignore[assignment, method-assign]
            module.train()
