"""Numbers and tables as every example of this folder writes them."""

from collections.abc import Sequence
from statistics import mean, stdev


def mean_sd(values: Sequence[float], digits: int = 3) -> str:
    """The mean and, of several values, the standard deviation."""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))
