"""The result of a head kept up to date pass by pass, so that no pass has to be kept.

Axes: `b` samples, `k` classes on axis 1. Sums are float64, on devices that have none (MPS) float32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .result import RegressionUncertainty, Uncertainty


class Moments:
    """The mean m of n tensors and the squares M around it, by Welford's recursion.

    d = x − m        m ← m + d / n        M ← M + d · (x − m)        variance = M / n
    """

    def __init__(self) -> None:
        self.number = 0
        self.mean: Any = 0.0
        self.squares: Any = 0.0

    def add(self, x: Tensor) -> None:
        """Take one more tensor."""
        self.number += 1
        difference = x - self.mean
        self.mean = self.mean + difference / self.number
        self.squares = self.squares + difference * (x - self.mean)

    @property
    def variance(self) -> Tensor:
        """The mean squared distance from the mean."""
        return self.squares / self.number


class Values:
    """The passes of a regression head so far."""

    def __init__(self) -> None:
        self.moments = Moments()
        self.dtype = torch.float32

    def add(self, output: Tensor) -> None:
        """Take the values `b …` of one more pass."""
        self.dtype = torch.promote_types(self.dtype, output.dtype)
        self.moments.add(widest(output))

    def result(self) -> RegressionUncertainty:
        """The mean and the variance over the passes."""
        return RegressionUncertainty(self.moments.mean.to(self.dtype), self.moments.variance.to(self.dtype))


class Classes:
    """The passes of a head of classes so far: the moments of the probabilities, and the sum of their entropies."""

    def __init__(self) -> None:
        self.probs = Moments()
        self.entropies: Any = 0.0
        self.dtype = torch.float32

    def add(self, output: Tensor) -> None:
        """Take the logits `b k …` of one more pass; −inf is a class ruled out, NaN stays in its sample."""
        self.dtype = torch.promote_types(self.dtype, output.dtype)
        log_p = self.log_probs(widest(output))
        p = log_p.exp()
        self.probs.add(p)
        self.entropies = self.entropies + entropy(p, log_p)

    def log_probs(self, logits: Tensor) -> Tensor:
        """The logarithm of the probabilities `b k …`."""
        return logits.log_softmax(1)

    def shown(self, probs: Tensor) -> Tensor:
        """What a result says of all the probabilities."""
        return probs

    def result(self) -> Uncertainty:
        """What the passes say about the classes."""
        probs, aleatoric = self.probs.mean, self.entropies / self.probs.number
        total = entropy(probs, probs.log())
        each = self.shown(probs), total, aleatoric, total - aleatoric, self.shown(self.probs.variance)
        return Uncertainty(*(tensor.to(self.dtype) for tensor in each))


class Labels(Classes):
    """The passes of a multilabel head so far: a label is there, by the sigmoid of its logit, or it is not."""

    def log_probs(self, logits: Tensor) -> Tensor:
        """The logarithm of both probabilities of every label, `b 2 k …`."""
        return torch.stack([F.logsigmoid(logits), F.logsigmoid(-logits)], 1)

    def shown(self, probs: Tensor) -> Tensor:
        """Those of the labels that are there, `b k …`."""
        return probs[:, 0]


RUNNING: dict[str, type[Classes] | type[Values]] = {"classes": Classes, "multilabel": Labels, "regression": Values}


def widest(x: Tensor) -> Tensor:
    """`x` in float64 where its device has that."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def entropy(p: Tensor, log_p: Tensor) -> Tensor:
    """The entropy over axis 1, with 0 · log 0 = 0."""
    return -(p * log_p).masked_fill(p == 0, 0).sum(1)
