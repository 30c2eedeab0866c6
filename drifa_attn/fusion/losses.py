"""The loss of several tasks at once, Fig. 1A."""

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100


class TaskLoss(nn.Module):
    """The weighted sum of the tasks' cross entropies, with fixed or learned weights.

        L = Σ_t w_t · CE_t                        fixed; by default w_t = 1 / T (the paper: 0.5 and 0.5)
        L = Σ_t exp(−s_t) · CE_t + s_t / 2        weights="uncertainty", s_t = log σ_t² learned, zero at the start

    Args:
        tasks: their names, each once; a dict gives its keys.
        weights: None, {task: weight >= 0}, or "uncertainty" (Kendall et al., 2018; its parameters belong in the optimizer, and
            in DDP beside the network's).

    `auxiliary` is what a fusion adds in training, `net.losses()`: each is added as it is.

    Shape: {task: logits `b k`}, {task: classes `b`, −100 where a sample has no label}, {name: scalar} or None -> scalar,
        float32 at least. A task that no sample of the batch has a label for adds zero and moves nothing, its s_t included.
    Raises: ValueError: other tasks than named, a weight that is negative or not finite, or logits and labels of another kind
        (soft labels, one logit); TypeError: no dicts, no tensors.
    Source: Fig. 1A; the learned weights are arXiv:1705.07115. Differs: the paper has fixed weights alone.
    """

    weights: Tensor

    def __init__(self, tasks: Iterable[str], weights: Mapping[str, float] | Literal["uncertainty"] | None = None) -> None:
        super().__init__()
        self.tasks = [] if isinstance(tasks, str) else list(tasks)
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"TaskLoss expected the names of the tasks, each once, got {tasks!r}.")
        self.log_variances: nn.Parameter | None = None
        if weights == "uncertainty":
            self.log_variances = nn.Parameter(torch.zeros(len(self.tasks)))
            return
        fixed = dict.fromkeys(self.tasks, 1 / len(self.tasks)) if weights is None else weights
        if not isinstance(fixed, Mapping) or set(fixed) != set(self.tasks) or not all(map(is_weight, fixed.values())):
            raise ValueError(f'TaskLoss expected weights >= 0 for {self.tasks}, "uncertainty" or None, got {weights!r}.')
        self.register_buffer("weights", torch.tensor([float(fixed[task]) for task in self.tasks]), persistent=False)

    def forward(
        self, logits: Mapping[str, Tensor], labels: Mapping[str, Tensor], auxiliary: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The loss of a batch."""
        for what, given in (("logits", logits), ("labels", labels)):
            if not isinstance(given, Mapping):
                raise TypeError(f"TaskLoss expected {what} as a dict by task, got {type(given).__name__}.")
            if set(given) != set(self.tasks):
                raise ValueError(f"TaskLoss expected {what} of the tasks {self.tasks}, got {list(given)}.")
        each, counts = [], []
        for task in self.tasks:
            check_labelled(task, logits[task], labels[task])
            z = logits[task].to(torch.promote_types(logits[task].dtype, torch.float32))  # a sum of many overflows float16
            each.append(F.cross_entropy(z, labels[task], ignore_index=IGNORED, reduction="sum"))
            counts.append((labels[task] != IGNORED).sum())
        count = torch.stack(counts)
        losses = torch.stack(each) / count.clamp(min=1)
        added = auxiliary_sum(auxiliary)
        if self.log_variances is None:
            return (self.weights.to(losses) * losses).sum() + added
        return (torch.exp(-self.log_variances) * losses + (count > 0) * self.log_variances / 2).sum() + added


def auxiliary_sum(auxiliary: Mapping[str, Tensor] | None) -> Tensor | float:
    """The sum of what a fusion adds to the loss; zero where it adds nothing."""
    if not isinstance(auxiliary or {}, Mapping):
        raise TypeError(f"TaskLoss expected auxiliary as a dict, net.losses(), got {type(auxiliary).__name__}.")
    return sum((auxiliary or {}).values(), 0.0)


def check_labelled(task: str, logits: Any, labels: Any) -> None:
    """Raise unless these are logits `b k` of at least two classes and classes `b`."""
    for what, given in (("logits", logits), ("labels", labels)):
        if not isinstance(given, Tensor):
            raise TypeError(f"TaskLoss expected {what} of task {task!r} as a tensor, got {type(given).__name__}.")
    if not logits.is_floating_point() or logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"TaskLoss expected floating-point logits (b, k) with k >= 2 of task {task!r}, got {logits.dtype} "
            f"{tuple(logits.shape)}: it is for classes; use another loss for regression or one logit."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype is torch.bool or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"TaskLoss expected labels of task {task!r} as integer classes (b,) = {tuple(logits.shape[:1])}, got "
            f"{labels.dtype} {tuple(labels.shape)}: soft or several labels need another loss."
        )


def is_weight(weight: Any) -> bool:
    """Whether it is a finite number >= 0."""
    return isinstance(weight, Real) and 0 <= float(weight) < math.inf
