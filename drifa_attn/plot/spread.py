"""How far each site attends: the deviation of its gates over a batch."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .given import What, check_what, gates_of, several_samples
from .style import COLOURS, sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST, MOST = 0.1, 0.9  # the quantiles of the channels between which the line runs


def spread(gates: Mapping[str, Any], *, what: What = "gate") -> "Figure":
    """Draw how far the gates of each site deviate over a batch.

    A bar is the mean over channels of the standard deviation over samples, std_b(a), and the line upon it runs from the lowest
    to the highest tenth of the channels. Gates are in (0, 1), so that 0.5 is the most. A site with a short bar multiplies its
    channels by nearly the same numbers for every sample: it does not attend, it scales.

    Args:
        gates: what `drifa_attn.gates` or `drifa_attn.gains` returns, {site: `b c`}, b >= 2.
        what: "gate" or "gain", the word on the axis.

    Returns: the figure, a bar for each site in calling order.
    Raises: TypeError, ValueError: no such dict, an empty one, or gates of one sample. ImportError: matplotlib is missing.
    Differs: the paper shows no gates.
    """
    check_what("plot.spread", what)
    found = gates_of("plot.spread", gates)
    samples = several_samples("plot.spread", found)
    spreads = [deviation(gate) for gate in found.values()]
    means = [one.mean().item() for one in spreads]
    ends = [one.quantile(q).item() for q in (LEAST, MOST) for one in spreads]
    with sheet("plot.spread", 7, 1.2 + 0.34 * len(found)) as figure:
        axes = figure.subplots()
        rows = range(len(found))
        axes.barh(rows, means, color=COLOURS[0], height=0.7)
        axes.hlines(rows, ends[: len(found)], ends[len(found) :], color="black", linewidth=1.2)
        right = 1.02 * max(*ends, *means, 1e-6)
        for row, mean in enumerate(means):
            axes.text(right, row, f"{mean:.3f}", va="center")
        axes.set(yticks=rows, yticklabels=list(found), ylim=(len(found) - 0.5, -0.5), xlim=(0, 1.12 * right))
        axes.set_title("How far each site attends (bar and number: mean over channels)")
        axes.set_xlabel(f"standard deviation of a {what} over {samples} samples (line: the middle 80 % of channels)")
    return figure


def deviation(gate: Tensor) -> Tensor:
    """The standard deviation over samples of every number of a gate."""
    return gate.std(0).flatten()
