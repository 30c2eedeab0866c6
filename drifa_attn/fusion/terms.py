"""The loss of one task by its kind, over the labels that are known.

Axes: `b` samples, `k` classes, labels or values. A label that is not known counts nothing and gives no gradient, whatever the
logits are there. A label out of its range is an error on the CPU. Elsewhere, where to read it is to wait for the device, and in
compiled code, where there is nothing to read, it is taken as not known, and the term is not valid.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from drifa_attn.checks import Kind

IGNORED = -100
ROUNDING = 1e-2  # how far from one the sum of probabilities may be: those of bfloat16 are


class Term(NamedTuple):
    """A sum of losses; how many samples or entries it counts, each by its weight; whether all labels are in their range."""

    total: Tensor
    number: Tensor
    valid: Tensor


def classes(z: Tensor, labels: Tensor, weight: Tensor | None) -> Term:
    """Cross entropy of logits `b k`, for classes `b`, −100 unknown."""
    labels = labels.long()
    known = (labels >= 0) & (labels < z.shape[1])
    target, z = labels.masked_fill(~known, IGNORED), z.masked_fill(~known[:, None], 0)
    counted = known if weight is None else known * weight[labels.masked_fill(~known, 0)]
    total = F.cross_entropy(z, target, weight, ignore_index=IGNORED, reduction="sum")
    return Term(total, counted.sum().to(z), (known | (labels == IGNORED)).all())


def soft_classes(z: Tensor, labels: Tensor, weight: Tensor | None) -> Term:
    """Cross entropy of logits `b k`, for probabilities `b k`, rows of NaN unknown."""
    p = labels.to(z)
    known = ((p >= 0).all(1) & ((p.sum(1) - 1).abs() <= ROUNDING))[:, None]
    p, z = p.masked_fill(~known, 0), z.masked_fill(~known, 0)
    counted = p if weight is None else p * weight
    total = F.cross_entropy(z, p, weight, reduction="sum")
    return Term(total, counted.sum(), (known | labels.isnan().all(1, keepdim=True)).all())


def multilabel(z: Tensor, labels: Tensor, weight: Tensor | None) -> Term:
    """Binary cross entropy of logits `b k`, for labels `b k` in [0, 1], NaN unknown."""
    known = (labels >= 0) & (labels <= 1)
    y, z = labels.to(z).masked_fill(~known, 0), z.masked_fill(~known, 0)
    each = F.binary_cross_entropy_with_logits(z, y, pos_weight=weight, reduction="none")
    return Term(each.masked_fill(~known, 0).sum(), known.sum().to(z), (known | labels.isnan()).all())


def regression(z: Tensor, labels: Tensor, weight: None) -> Term:
    """Squared error of values `b k`, for labels `b k`, NaN unknown."""
    known = labels.to(z).isfinite()
    y, z = labels.to(z).masked_fill(~known, 0), z.masked_fill(~known, 0)
    return Term((z - y).square().sum(), known.sum().to(z), (known | labels.isnan()).all())


TERMS: dict[str, Any] = {"classes": classes, "multilabel": multilabel, "regression": regression}
RANGES = {
    "classes": "0 to {last}, −100 where unknown, or probabilities that sum to one, NaN where unknown (several classes at once "
    "are kinds='multilabel')",
    "multilabel": "in [0, 1], NaN where unknown",
    "regression": "finite, NaN where unknown",
}


def term(task: str, kind: Kind, logits: Tensor, labels: Tensor, weight: Tensor | None) -> Term:
    """The loss of a task, in float32 at least: a sum of many overflows float16."""
    check_labelled(task, kind, logits, labels, weight)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels if kind == "classes" else labels.reshape(z.shape)
    of_kind = soft_classes if kind == "classes" and labels.is_floating_point() else TERMS[kind]
    found = of_kind(z, labels, None if weight is None else weight.to(z))
    if z.device.type == "cpu" and not torch.compiler.is_compiling() and not found.valid:
        wanted = RANGES[kind].format(last=logits.shape[1] - 1)
        raise ValueError(f"TaskLoss expected labels of task {task!r} ({kind}) {wanted}; some are not.")
    return found


def check_labelled(task: str, kind: Kind, logits: Any, labels: Any, weight: Tensor | None) -> None:
    """Raise unless these are logits and labels of this kind, by their types, dtypes, shapes and devices."""
    for what, given in (("logits", logits), ("labels", labels)):
        if not isinstance(given, Tensor):
            raise TypeError(f"TaskLoss expected {what} of task {task!r} as a tensor, got {type(given).__name__}.")
    fewest = 2 if kind == "classes" else 1
    if not logits.is_floating_point() or logits.ndim != 2 or logits.shape[1] < fewest:
        raise ValueError(
            f"TaskLoss expected floating-point logits (b, k) with k >= {fewest} of task {task!r} ({kind}), got "
            f"{logits.dtype} {tuple(logits.shape)}{': kinds= says what is no class.' if kind == 'classes' else '.'}"
        )
    shapes = {tuple(logits.shape)} | ({tuple(logits.shape[:1])} if logits.shape[1] == 1 else set())
    integers = not (labels.is_floating_point() or labels.is_complex() or labels.dtype is torch.bool)
    fits = labels.is_floating_point() and tuple(labels.shape) in shapes
    if not fits and not (kind == "classes" and integers and labels.shape == logits.shape[:1]):
        hard = f"integer classes (b,) = {tuple(logits.shape[:1])} or " if kind == "classes" else ""
        raise ValueError(
            f"TaskLoss expected labels of task {task!r} ({kind}) as {hard}floating-point (b, k) = {tuple(logits.shape)}, got "
            f"{labels.dtype} {tuple(labels.shape)}."
        )
    if labels.device != logits.device:
        raise ValueError(f"TaskLoss expected labels of task {task!r} on {logits.device}, got them on {labels.device}.")
    if weight is not None and len(weight) != logits.shape[1]:
        raise ValueError(f"TaskLoss got {len(weight)} class weights for task {task!r}, which has {logits.shape[1]} logits.")
