"""What several passes tell about a head: of classes and of labels an `Uncertainty`, of values a `RegressionUncertainty`."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Uncertainty:
    """What `s` passes say about `b` samples of `k` classes: the mean prediction, and how uncertain it is.

        probs = mean_s p_s                               total     = −Σ_k probs · log probs
        aleatoric = mean_s (−Σ_k p_s · log p_s)          epistemic = mean_s Σ_k p_s · log(p_s / probs)

    The class is `probs.argmax(1)`. Entropies are in nats, in [0, log k]; `total = aleatoric + epistemic` to rounding. Of a
    segmentation, `b k h w`, each pixel is such a sample.

    Of a multilabel head each label is a distribution over two classes, to be there (`p`, by a sigmoid) and not to be there
    (`1 − p`): all five are `b k …`, `probs` and `variance` are those of `p`, and entropies are in [0, log 2].

    Attributes:
        probs: `b k …`, the mean of the passes' softmax.
        total: `b …`, the predictive entropy.
        aleatoric: `b …`, the expected entropy: how uncertain each single pass is.
        epistemic: `b …`, the mutual information, as the mean divergence of a pass from the mean: how much the passes disagree.
            It is `total − aleatoric`, which is the same, of sums in float64: its error is some 1e-15, and by that alone it can
            be negative; it is not clamped. On devices without float64 (MPS) sums are float32 and the error is some 1e-6.
        variance: `b k …`, of a class's probability over the passes (their mean squared distance from `probs`), in [0, 1/4].

    All are float32, float64 for float64 logits. Source: Fig. 1B; the decomposition is that of arXiv:1703.02910.
    """

    probs: Tensor
    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    variance: Tensor


@dataclass(frozen=True, eq=False)
class RegressionUncertainty:
    """What `s` passes say about values: their mean, and how much the passes disagree.

        mean = mean_s y_s            variance = mean_s (y_s − mean)²

    Attributes:
        mean: of the head's shape, `b …`.
        variance: of the head's shape, >= 0, in squared units of the value. It is the epistemic part alone: what is noise in
            the data no spread of predictions tells.

    Both are float32, float64 for float64 values. Source: arXiv:1703.04977. Differs: the paper has classes alone.
    """

    mean: Tensor
    variance: Tensor


Result = TypeVar("Result", Uncertainty, RegressionUncertainty)


def joined(parts: Sequence[Result]) -> Result:
    """The result of a batch from those of its chunks."""
    names = [field.name for field in fields(parts[0])]
    return type(parts[0])(*(torch.cat([getattr(part, name) for part in parts]) for name in names))
