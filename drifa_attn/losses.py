"""The loss of several tasks at once, Fig. 1A."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100


class TaskLoss(nn.Module):
    """The weighted sum of the tasks' cross entropies, with fixed or learned weights.

        L = Σ_t w_t · CE_t                        fixed; by default w_t = 1 / T (the paper: 0.5 and 0.5)
        L = Σ_t exp(−s_t) · CE_t + s_t / 2        weights="uncertainty", s_t = log σ_t² learned, zero at the start

    Args:
        tasks: their names.
        weights: None, {task: weight >= 0}, or "uncertainty" (Kendall et al., 2018; its parameters belong in the optimizer).

    Shape: {task: logits `b k`}, {task: classes `b`, −100 where a sample has no label} -> scalar. A task that no sample of the
        batch has a label for adds zero.
    Raises: ValueError: other tasks than named, or a weight that is negative.
    Source: Fig. 1A; the learned weights are arXiv:1705.07115. Differs: the paper has fixed weights alone.
    """

    weights: Tensor

    def __init__(self, tasks: Sequence[str], weights: Mapping[str, float] | Literal["uncertainty"] | None = None) -> None:
        super().__init__()
        if isinstance(tasks, str) or not tasks:
            raise ValueError(f"TaskLoss expected the names of the tasks, got {tasks!r}.")
        self.tasks = list(tasks)
        self.log_variances: nn.Parameter | None = None
        if weights == "uncertainty":
            self.log_variances = nn.Parameter(torch.zeros(len(self.tasks)))
            return
        fixed = dict.fromkeys(self.tasks, 1 / len(self.tasks)) if weights is None else weights
        if not isinstance(fixed, Mapping) or set(fixed) != set(self.tasks) or any(w < 0 for w in fixed.values()):
            raise ValueError(f'TaskLoss expected weights >= 0 for {self.tasks}, "uncertainty" or None, got {weights!r}.')
        self.register_buffer("weights", torch.tensor([float(fixed[task]) for task in self.tasks]), persistent=False)

    def forward(self, logits: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> Tensor:
        """The loss of a batch."""
        for what, given in (("logits", logits), ("labels", labels)):
            if set(given) != set(self.tasks):
                raise ValueError(f"TaskLoss expected {what} of the tasks {self.tasks}, got {list(given)}.")
        each = []
        for task in self.tasks:
            total = F.cross_entropy(logits[task], labels[task], ignore_index=IGNORED, reduction="sum")
            each.append(total / (labels[task] != IGNORED).sum().clamp(min=1))
        losses = torch.stack(each)
        if self.log_variances is None:
            return (self.weights.to(losses) * losses).sum()
        return (torch.exp(-self.log_variances) * losses + self.log_variances / 2).sum()
