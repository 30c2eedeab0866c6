"""What `torch.compile` makes of a network before any code is generated: how many graphs, and what they give."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def graphs(model: nn.Module, run: Callable[[nn.Module], Any]) -> tuple[int, Any]:
    """The number of graphs that a network is compiled into, and its output."""
    found: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        found.append(graph)
        return graph.forward

    torch._dynamo.reset()
    output = run(torch.compile(model, backend=keep, dynamic=False))
    return len(found), output


def warm() -> None:
    """Load all that the compiler needs, once for all processes that are forked from this one."""
    graphs(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU()), lambda model: model(torch.zeros(1, 1, 2, 2)))
