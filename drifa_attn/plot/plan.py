"""A plan as bars: what attention costs at each site, or a fusion at each stage."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from drifa_attn.fusion.plan import FusionPlan
from drifa_attn.wrapping.plan import Plan
from drifa_attn.wrapping.table import count, share

from .style import COLOURS, sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plan(plan: Plan | FusionPlan) -> "Figure":
    """Draw what a plan adds to a network, place by place.

    A bar of the left part is the number of parameters that are added, a bar of the right part the number of FLOPs for one
    sample, two for a multiply-add. Beside each bar stand its number and its share of the whole network without attention.

    Args:
        plan: what `drifa_attn.plan` returns, or the `plan` of a fused network.

    Returns: the figure, a bar for each site in calling order; of a fusion one for each stage that it refines, and one for its
        readout.
    Raises: TypeError: no plan. ValueError: nothing is added. ImportError: matplotlib is missing.
    Differs: none.
    """
    if not isinstance(plan, Plan | FusionPlan):
        raise TypeError(f"plot.plan expected what drifa_attn.plan returns, or net.plan, got {type(plan).__name__}.")
    places, title = costs(plan)
    names, *numbers = zip(*places, strict=True)
    with sheet("plot.plan", 10, 1.4 + 0.34 * len(places)) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        wholes = (plan.params, plan.flops)
        for axes, bars, whole, unit in zip(panels, numbers, wholes, ("parameters", "FLOPs per sample"), strict=True):
            draw(axes, bars, whole, unit)
        panels[0].set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
        figure.suptitle(title)
    return figure


def costs(plan: Plan | FusionPlan) -> tuple[list[tuple[str, int, int]], str]:
    """The places of a plan with their parameters and FLOPs, and the words above them."""
    if isinstance(plan, Plan):
        return [(site.name, site.params, site.flops) for site in plan.sites], f"What {plan.spec.name} adds to {plan.network}"
    stages = [(f"stage {k}", stage.params, stage.flops) for k, stage in enumerate(plan.stages) if stage.refiner]
    readout = [("readout", plan.readout_params, plan.readout_flops)] if plan.readout_params or plan.readout_flops else []
    if not stages and not readout:
        raise ValueError(f"plot.plan has nothing to draw: the fusion {plan.fusion!r} adds no parameters and no FLOPs.")
    return [*stages, *readout], f"What {plan.fusion} adds to {', '.join(plan.vectors)}"


def draw(axes: Any, bars: Sequence[int], whole: int, unit: str) -> None:
    """The bars of one kind of cost."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    rows = range(len(bars))
    axes.barh(rows, bars, color=COLOURS[0], height=0.7)
    for row, number in zip(rows, bars, strict=True):
        axes.annotate(
            f"{count(number)} ({share(number, whole)})", (number, row), (4, 0), textcoords="offset points", va="center"
        )
    axes.set(title=f"{count(sum(bars))} {unit} ({share(sum(bars), whole)} of {count(whole)})", xlabel=f"{unit} added")
    axes.set_xlim(0, 1.5 * max(*bars, 1))  # room for the words
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(axis="y", length=0)
