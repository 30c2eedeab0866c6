"""What the steps of a comparison cost, and the bar that shows how many are left."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn


def kept(model: nn.Module, run: Callable[[], Any]) -> int:
    """The bytes that a forward pass keeps for the backward pass; memory that is shared counts once, weights do not."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(found.values())


def followed(name: str, runs: Iterator[tuple[str, int]], total: int, console: Console) -> None:
    """Do all runs, which say what comes next and how many are finished, with a bar and the time that is left."""
    columns = (
        TextColumn("{task.description:<40}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=total)
        for description, finished in runs:
            progress.update(task, description=description, completed=finished)
