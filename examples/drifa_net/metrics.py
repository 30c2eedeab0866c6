"""How good predictions are, and how good their confidence is."""

import math
from collections.abc import Sequence
from statistics import mean

import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torchmetrics.functional import classification

from examples.drifa_net.data import IGNORE

BINS = 15


def scores(probs: Tensor, labels: Tensor) -> dict[str, float | int]:
    """What a task's predictions are worth: probabilities `b k`, classes `b` -> the metrics by name.

    Balanced accuracy, macro-F1 and AUROC (one against the rest) are means over the classes, so that rare ones count as much as
    frequent ones. A class that no label has is left out, as scikit-learn does; `absent` names it. (Macro-F1 counts it where it
    is predicted.) AUROC of one class alone is NaN. ECE is the expected calibration error over 15 bins of confidence; ECE, NLL
    and Brier score are the better the lower. Samples whose class is IGNORE are left out; "samples" counts the others.

    Raises: ValueError: no sample has a label.
    """
    probs, labels = counted(probs, labels)
    if not len(labels):
        raise ValueError("scores expected at least one sample with a label, got none: no metric says anything of it.")
    classes, predicted = probs.shape[1], probs.argmax(1)
    present = labels.unique().tolist()
    ranks = [roc_auc_score(labels == k, probs[:, k]) for k in present] if len(present) > 1 else [math.nan]
    return {
        "samples": len(labels),
        "accuracy": (predicted == labels).double().mean().item(),
        "balanced_accuracy": mean((predicted[labels == k] == k).double().mean().item() for k in present),
        "macro_f1": classification.multiclass_f1_score(predicted, labels, classes, average="macro").item(),
        "auroc": mean(map(float, ranks)),
        "ece": classification.multiclass_calibration_error(probs, labels, classes, n_bins=BINS).item(),
        "nll": F.nll_loss(probs.clamp(min=1e-12).log(), labels).item(),
        "brier": (probs - F.one_hot(labels, classes)).square().sum(1).mean().item(),
    }


def absent(labels: Tensor, classes: Sequence[str]) -> list[str]:
    """The classes that no label has, which `scores` leaves out."""
    found = set(labels.tolist())
    return [name for k, name in enumerate(classes) if k not in found]


def counted(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Both without the samples that have no label, the values in float64."""
    kept = labels != IGNORE
    return values[kept].double(), labels[kept]


def risk_coverage(probs: Tensor, labels: Tensor, uncertainty: Tensor) -> Tensor:
    """The share of errors among the most certain 1, 2, …, b samples: `b`. The least certain are abstained from first."""
    wrong = (probs.argmax(1) != labels)[uncertainty.argsort(stable=True)].double()
    return wrong.cumsum(0) / torch.arange(1, len(wrong) + 1)


def abstention(probs: Tensor, labels: Tensor, uncertainty: Tensor, share: float = 0.1) -> dict[str, float | int]:
    """The accuracy on what is left when the most uncertain share of the samples is referred to a human, and AURC.

    AURC, the area under the risk-coverage curve, is the mean risk over all coverages.
    """
    curve = risk_coverage(probs, labels, uncertainty)
    kept = len(labels) - round(share * len(labels))
    return {
        "aurc": curve.mean().item(),
        "accuracy_all": 1 - curve[-1].item(),
        "kept": kept,
        "accuracy_kept": 1 - curve[kept - 1].item(),
    }


def reliability(probs: Tensor, labels: Tensor, bins: int = BINS) -> tuple[Tensor, Tensor, Tensor]:
    """The mean confidence, the accuracy and the share of the samples in every bin of confidence: `bins` each."""
    confidence, predicted = probs.double().max(1)
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    count = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, torch.ones_like(confidence))
    sums = [torch.zeros_like(count).index_add_(0, place, x) for x in (confidence, (predicted == labels).double())]
    return sums[0] / count, sums[1] / count, count / len(labels)
