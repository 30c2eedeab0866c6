"""A reliability curve: whether answers are right as often as they claim."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from drifa_attn.checks import count
from drifa_attn.uncertainty.result import Uncertainty

from .answers import Answers, answers_of
from .style import COLOURS, GREY, sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Z = 1.96  # of an interval that holds 95 %


class Bins(NamedTuple):
    """The bins that hold answers: how many each, how sure on average, what share is right; and the calibration error."""

    counts: Tensor
    confidence: Tensor
    accuracy: Tensor
    error: float


def reliability(results: Uncertainty | Mapping[str, Uncertainty], labels: Any, *, bins: int = 10) -> "Figure":
    """Draw how often answers are right beside how sure they are.

    Answers are sorted into bins of equal width by their confidence, the probability of the class that is answered. A point is a
    bin: its mean confidence, and the share of its answers that is right, with the 95 % interval of Wilson. On the diagonal
    confidence is what it claims; below it the network is too sure. ECE, the expected calibration error, is the mean distance
    from the diagonal, weighted by answers: Σ_bins n / N · |right − confidence|. The lower part counts the answers of each bin.

    Args:
        results: an `Uncertainty`, or several by name, `{"one network": …, "ensemble": …}`, with the same labels.
        labels: of the shape of the result's `total`: integers `b …` from 0, −100 where unknown. Of a multilabel head `b k`, 0
            or 1, NaN or −100 where unknown; each label counts as an answer.
        bins: how many, >= 1.

    Returns: the figure.
    Raises: TypeError, ValueError: no `Uncertainty`, or labels that do not fit. ImportError: matplotlib is missing.
    Source: arXiv:1706.04599 (ECE). Differs: none.
    """
    bins = count("plot.reliability", "bins", bins)
    found = {name: binned(one, bins) for name, one in answers_of("plot.reliability", results, labels).items()}
    with sheet("plot.reliability", 5.4, 6.4) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        upper.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="right as often as claimed")
        for colour, (name, one) in zip(COLOURS, found.items(), strict=False):
            bars = torch.stack(interval(one.accuracy, one.counts)).sub(one.accuracy).abs().numpy()
            label = f"{name}, ECE {one.error:.3f}" if name else f"ECE {one.error:.3f}"
            x, y = one.confidence.numpy(), one.accuracy.numpy()
            upper.errorbar(x, y, bars, color=colour, marker="o", elinewidth=1, capsize=3, label=label)
            lower.plot(x, one.counts.numpy(), color=colour, marker="o")
        upper.set(ylabel="share of answers that is right", xlim=(0, 1.01), ylim=(0, 1.01), title="Reliability")
        upper.legend(loc="best")
        lower.set(xlabel="confidence: probability of the answer", ylabel="answers in the bin", yscale="log")
    return figure


def binned(answers: Answers, bins: int) -> Bins:
    """The answers in bins of equal width; bins without answers are left out."""
    place = (answers.confidence * bins).long().clamp(max=bins - 1)
    counts = torch.bincount(place, minlength=bins)
    means = [torch.zeros(bins).index_add(0, place, one.float()) for one in (answers.confidence, answers.right)]
    held = counts > 0
    confidence, accuracy = (one[held] / counts[held] for one in means)
    error = (counts[held] * (accuracy - confidence).abs()).sum() / counts.sum()
    return Bins(counts[held], confidence, accuracy, error.item())


def interval(share: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The ends of Wilson's interval for a share of so many answers."""
    scale = 1 + Z**2 / counts
    middle = (share + Z**2 / (2 * counts)) / scale
    half = Z * (share * (1 - share) / counts + Z**2 / (4 * counts**2)).sqrt() / scale
    return (middle - half).clamp(min=0), (middle + half).clamp(max=1)
