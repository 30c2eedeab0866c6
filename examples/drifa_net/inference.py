"""What a network says of a split, on any number of processes, and what that is worth."""

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from examples.drifa_net.data import Data, Pairs
from examples.drifa_net.metrics import scores
from examples.drifa_net.networks import named

Logits = dict[str, tuple[Tensor, Tensor]]  # logits and classes by task


@torch.no_grad()
def predict(net: nn.Module, pairs: Pairs, data: Data, accelerator: Accelerator, batch: int) -> Logits:
    """The logits for a split and its classes, in its order, on the CPU of every process; one of them computes each sample's."""
    net.eval()
    rank, processes = accelerator.process_index, accelerator.num_processes
    mine = list(range(rank, len(pairs), processes))
    parts: list[tuple[list[int], dict[str, Tensor], Tensor]] = []
    batches = [mine[k : k + batch] for k in range(0, len(mine), batch)]
    for places, given in zip(batches, data.loader(pairs, batches), strict=True):
        with accelerator.autocast():
            logits = net(*named(given, data, accelerator.device)[:2])
        parts.append((places, {task: values.float().cpu() for task, values in logits.items()}, given[2]))
    parts = gather_object(parts)
    order = torch.tensor([place for places, _, _ in parts for place in places]).argsort()
    targets = torch.cat([targets for _, _, targets in parts])[order]
    return {
        task: (torch.cat([logits[task] for _, logits, _ in parts])[order], targets[:, k]) for k, task in enumerate(data.tasks)
    }


def metrics(predictions: Logits) -> dict[str, dict[str, float | int]]:
    """The metrics of every task."""
    return {task: scores(logits.double().softmax(1), labels) for task, (logits, labels) in predictions.items()}
