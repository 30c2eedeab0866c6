"""A risk-coverage curve: how many answers are wrong if the most uncertain ones are not given."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from drifa_attn.uncertainty.result import Uncertainty

from .answers import MEASURES, answers_of
from .style import COLOURS, GREY, sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Measure = Literal["total", "aleatoric", "epistemic"]


def risk_coverage(
    results: Uncertainty | Mapping[str, Uncertainty], labels: Any, *, by: Measure | Sequence[Measure] = "total"
) -> "Figure":
    """Draw how many answers are wrong among those that are given, when the most uncertain are left out.

    Coverage is the share of samples that is answered, the least uncertain first; risk is the share of these answers that is
    wrong. A curve that rises says that uncertainty finds the wrong answers; a flat one says that it does not. AURC is the mean
    risk over all coverages, less is better. Samples of equal uncertainty are taken together. The dotted line of a colour is the
    risk if samples are left out at random, and for one result the dashed line is the best order that there could be.

    Args:
        results: an `Uncertainty`, or several by name, with the same labels.
        labels: as `plot.reliability` takes them.
        by: which uncertainty sorts the samples, "total", "aleatoric" or "epistemic", or a list of some.

    Returns: the figure.
    Raises: TypeError, ValueError: no `Uncertainty`, labels that do not fit, no such measure, or more curves than colours.
        ImportError: matplotlib is missing.
    Source: arXiv:1705.08500. Differs: none.
    """
    kinds = [by] if isinstance(by, str) else list(by)
    if not kinds or any(kind not in MEASURES for kind in kinds):
        raise ValueError(f"plot.risk_coverage expected by as one of {MEASURES}, or a list of some, got {by!r}.")
    found = answers_of("plot.risk_coverage", results, labels)
    pairs = [(name, kind) for name in found for kind in kinds]
    if len(pairs) > len(COLOURS):
        raise ValueError(f"plot.risk_coverage expected at most {len(COLOURS)} curves, got {len(pairs)}.")
    with sheet("plot.risk_coverage", 6.4, 4.6) as figure:
        axes = figure.subplots()
        for colour, (name, kind) in zip(COLOURS, pairs, strict=False):
            wrong = ~found[name].right
            coverage, risk = curve(wrong, found[name].measures[kind])
            label = ", ".join([name] * bool(name) + [kind] * (len(kinds) > 1 or not name))
            axes.plot(coverage, risk, color=colour, label=f"{label}: AURC {area(coverage, risk):.3f}")
            axes.axhline(wrong.float().mean().item(), color=colour, linestyle=":", linewidth=1)
        if len(found) == 1:
            coverage, risk = curve(wrong, torch.arange(len(wrong))[wrong.int().argsort().argsort()])  # no two are equal
            label = f"best order: AURC {area(coverage, risk):.3f}"
            axes.plot(coverage, risk, color=GREY, linestyle="--", linewidth=1, label=label)
        axes.set(xlim=(0, 1.01), title="Risk and coverage (dotted: left out at random)")
        axes.set(xlabel="coverage: share of samples answered", ylabel="risk: share of answers that is wrong")
        axes.set_ylim(bottom=0)
        axes.legend(loc="best")
    return figure


def curve(wrong: Tensor, uncertainty: Tensor) -> tuple[Tensor, Tensor]:
    """Coverage and risk after each group of samples of equal uncertainty, the least uncertain first."""
    values, order = uncertainty.sort()
    ends = values.unique_consecutive(return_counts=True)[1].cumsum(0)
    return ends / len(wrong), wrong[order].cumsum(0)[ends - 1] / ends


def area(coverage: Tensor, risk: Tensor) -> float:
    """The mean risk over all coverages; within a group of equal uncertainty, in random order, it is that of the whole group."""
    return (risk * coverage.diff(prepend=coverage.new_zeros(1))).sum().item()
