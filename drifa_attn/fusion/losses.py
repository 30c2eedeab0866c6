"""The loss of several tasks at once, Fig. 1A."""

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn

from drifa_attn.checks import Kind, check_kinds, check_mapping, kinds_of

from .terms import term


class TaskLoss(nn.Module):
    """The weighted sum of the tasks' losses, with fixed or learned weights.

        L = Σ_t w_t · L_t                              fixed; by default w_t = 1 / T (the paper: 0.5 and 0.5)
        L = Σ_t h_t · exp(−s_t) · L_t + s_t / 2        weights="uncertainty", s_t = log σ_t² learned, zero at the start;
                                                       h_t = 1, of a regression 1 / 2

    The loss of a task over its samples i, with the softmax p of its logits z, the sigmoid σ, and class weights c (else one):

        classes        L_t = Σ_ik c_k · y_ik · (−log p_ik) / Σ_ik c_k · y_ik        y_ik is one for the class of sample i, else
                                                                                    zero; or a probability (soft labels)
        multilabel     L_t = mean_ik −(c_k · y_ik · log σ(z_ik) + (1 − y_ik) · log(1 − σ(z_ik)))
        regression     L_t = mean_ik (z_ik − y_ik)²

    Labels that are not known take no part in sums and means.

    Args:
        tasks: their names, each once; a dict gives its keys.
        weights: None, {task: weight >= 0}, or "uncertainty" (Kendall et al., 2018; its parameters belong in the optimizer, and
            in DDP beside the network's).
        kinds: {task: "classes", "multilabel" or "regression"}, as `mc_dropout` takes them; a task that is left out has classes,
            and one kind is that of all tasks.
        class_weights: {task: k weights >= 0}; for "multilabel" they are those of what is there, the positive labels.

    `auxiliary` is what a fusion adds in training, `net.losses()`: each is added as it is.

    Shape: {task: logits `b k`, k >= 2 for classes}, {task: labels}, {name: scalar} or None -> scalar, float32 at least. Labels
        of classes are integers `b`, −100 where a sample has none, or probabilities `b k`, rows of NaN where it has none; of the
        other kinds they are floating-point `b k` (`b` too where k is one), NaN where there is none. A task that no sample of
        the batch has a label for adds zero and moves nothing, its s_t included.
    Raises: ValueError: other tasks than named, a weight that is negative or not finite, logits or labels of another kind or
        shape, or labels out of their range; TypeError: no dicts, no tensors. The values of labels are read on the CPU alone: on
        a GPU that would wait for the device. There, and in compiled code, a label out of its range makes the loss of the batch
        NaN and all its gradients zero.
    Source: Fig. 1A; the learned weights are arXiv:1705.07115 (equations 7 and 10). Differs: the paper has classes and fixed
        weights alone. `F.cross_entropy` divides soft labels with weights by the number of samples, not by their weights.
    """

    weights: Tensor

    def __init__(
        self,
        tasks: Iterable[str],
        weights: Mapping[str, float] | Literal["uncertainty"] | None = None,
        *,
        kinds: Kind | Mapping[str, Kind] = "classes",
        class_weights: Mapping[str, Tensor | Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        self.tasks = names_of(tasks)
        check_kinds("TaskLoss", kinds)
        self.kinds = kinds_of("TaskLoss", kinds, self.tasks)
        check_mapping("TaskLoss", "class_weights", class_weights, "{task: weights}")
        for task, given in (class_weights or {}).items():
            tensor = checked_class_weights(task, given, self.kinds)
            self.register_buffer(f"class_weights_{self.tasks.index(task)}", tensor, persistent=False)
        self.log_variances: nn.Parameter | None = None
        if weights == "uncertainty":
            self.log_variances = nn.Parameter(torch.zeros(len(self.tasks)))
            halves = torch.tensor([0.5 if self.kinds[task] == "regression" else 1.0 for task in self.tasks])
            self.register_buffer("weights", halves, persistent=False)
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
        terms = [
            term(task, self.kinds[task], logits[task], labels[task], getattr(self, f"class_weights_{i}", None))
            for i, task in enumerate(self.tasks)
        ]
        number, valid = torch.stack([one.number for one in terms]), torch.stack([one.valid for one in terms])
        losses = torch.stack([one.total for one in terms]) / torch.where(number > 0, number, 1)
        each = self.weights.to(losses) * losses
        if self.log_variances is not None:
            each = torch.exp(-self.log_variances) * each + (number > 0) * self.log_variances / 2
        return each.sum().masked_fill(~valid.all(), math.nan) + auxiliary_sum(auxiliary)


def auxiliary_sum(auxiliary: Mapping[str, Tensor] | None) -> Tensor | float:
    """The sum of what a fusion adds to the loss; zero where it adds nothing."""
    if not isinstance(auxiliary or {}, Mapping):
        raise TypeError(f"TaskLoss expected auxiliary as a dict, net.losses(), got {type(auxiliary).__name__}.")
    return sum((auxiliary or {}).values(), 0.0)


def names_of(tasks: Any) -> list[str]:
    """The names of the tasks; a `ValueError` unless there are some, each once."""
    if isinstance(tasks, Mapping) and any(isinstance(value, str) for value in tasks.values()):
        raise ValueError(f"TaskLoss expected the names of the tasks, got {tasks!r}: what they are says kinds=...")
    names = [] if isinstance(tasks, str) else list(tasks)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"TaskLoss expected the names of the tasks, each once, got {tasks!r}.")
    return names


def checked_class_weights(task: str, given: Any, kinds: Mapping[str, Kind]) -> Tensor:
    """Weights of the classes of a task as a tensor; a `ValueError` unless they are finite, >= 0, and some are more."""
    if task not in kinds:
        raise ValueError(f"TaskLoss got class_weights of {task!r}, but its tasks are {list(kinds)}.")
    if kinds[task] == "regression":
        raise ValueError(f"TaskLoss got class_weights of task {task!r}, a regression, which has no classes.")
    weights = torch.as_tensor(given, dtype=torch.float32).detach().clone()
    if weights.ndim != 1 or not weights.any() or not ((weights >= 0) & weights.isfinite()).all():
        raise ValueError(f"TaskLoss expected class_weights of task {task!r} as k numbers >= 0, got {given!r:.80}.")
    return weights


def is_weight(weight: Any) -> bool:
    """Whether it is a finite number >= 0."""
    return isinstance(weight, Real) and 0 <= float(weight) < math.inf
