"""What a fusion does when modalities are missing: its gates case by case."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .given import What, check_what, gates_of
from .style import AMOUNT, on_colour, sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def modalities(cases: Mapping[str, Mapping[str, Any]], *, what: What = "gate") -> "Figure":
    """Draw how open the gates of each modality are while others are missing, and how far they move.

        cases = {"all": drifa_attn.gates(net, inputs)}
        for name in inputs:
            cases[f"without {name}"] = drifa_attn.gates(net, {**inputs, name: None})
        drifa_attn.plot.modalities(cases)

    A row is a modality at a stage, a column a case. The left part is the mean gate, over samples and channels. The right part
    is how far each gate is from the same gate in the first case, |a − a_first| on average. Where a modality is missing its cell
    is empty. A row that is zero on the right takes no notice of who is missing.

    Of attention matrices, whose rows or columns sum to one, the left part is the number of positions that are looked at,
    exp(entropy) on average, and the right part is half the sum of the distances, in [0, 1]; a dash where their sizes differ.

    Args:
        cases: what `drifa_attn.gates` or `drifa_attn.gains` returns for the same samples in each case, by the name of the case.
        what: "gate" or "gain", the word in the title.

    Returns: the figure.
    Raises: TypeError, ValueError: fewer than two cases, no dict of gates, or cases of different samples. ImportError:
        matplotlib is missing.
    Differs: the paper has no missing modalities.
    """
    check_what("plot.modalities", what)
    found = checked(cases)
    rows = list(dict.fromkeys(name for gates in found.values() for name in gates))
    first, *others = found.values()
    matrices = {name: axis_of_ones([gates[name] for gates in found.values() if name in gates]) for name in rows}
    openness = [[size(gates.get(name), matrices[name]) for gates in found.values()] for name in rows]
    moved = [[apart(gates.get(name), first.get(name), matrices[name]) for gates in others] for name in rows]
    kinds = {axis is None for axis in matrices.values()}
    words = [word for plain, word in ((True, f"mean {what}"), (False, "positions looked at")) if plain in kinds]
    titles = (" or ".join(words), f"how far from {next(iter(found))!r}")
    tables = (openness, list(found)), (moved, list(found)[1:])
    with sheet("plot.modalities", 3 + 2.1 * len(found), 1.6 + 0.42 * len(rows)) as figure:
        panels = figure.subplots(1, 2, sharey=True, width_ratios=[len(found), len(others)])
        for axes, (cells, columns), title in zip(panels, tables, titles, strict=True):
            draw(axes, cells, columns, title)
        panels[0].set(yticks=range(len(rows)), yticklabels=rows)
        figure.suptitle(f"{what.title()}s with modalities missing, {len(next(iter(first.values())))} samples")
    return figure


def checked(cases: Any) -> dict[str, dict[str, Tensor]]:
    """The gates of every case; an error unless all are of the same samples."""
    if not isinstance(cases, Mapping):
        raise TypeError(f"plot.modalities expected a dict of gates by case, got {type(cases).__name__}.")
    if len(cases) < 2:
        raise ValueError(f"plot.modalities expected at least 2 cases, got {list(cases)}: all modalities, and one missing.")
    found = {str(case): gates_of("plot.modalities", gates) for case, gates in cases.items()}
    (first_case, first), *others = found.items()
    for case, gates in others:
        for name in gates:
            if name in first and len(gates[name]) != len(first[name]):
                raise ValueError(
                    f"plot.modalities expected the same samples in every case, but {name!r} has {len(first[name])} in "
                    f"{first_case!r} and {len(gates[name])} in {case!r}."
                )
    return found


def axis_of_ones(gates: Sequence[Tensor]) -> int | None:
    """The axis along which attention matrices sum to one, the last or the one before it; None for gates of channels."""
    for axis in (-1, -2):
        if all(gate.ndim > 2 and gate.shape[axis] > 1 and (gate.sum(axis) - 1).abs().max() < 1e-3 for gate in gates):
            return axis
    return None


def size(gate: Tensor | None, axis: int | None) -> float | None:
    """The mean gate, or of an attention matrix the number of positions that are looked at; None for what is absent."""
    if gate is None:
        return None
    if axis is None:
        return gate.mean().item()
    return (-torch.xlogy(gate, gate).sum(axis)).exp().mean().item()


def apart(gate: Tensor | None, first: Tensor | None, axis: int | None) -> float | None:
    """How far two gates of the same samples are apart on average; two attention matrices by half the sum along their axis."""
    if gate is None or first is None:
        return None
    if gate.shape != first.shape:
        return float("nan")
    distance = (gate - first).abs()
    return distance.mean().item() if axis is None else distance.sum(axis).mean().item() / 2


def told(cell: float | None, most: float) -> tuple[str, str]:
    """A cell in words, and their colour; NaN is what cannot be compared."""
    if cell is None or math.isnan(cell):
        return "absent" if cell is None else "–", "black"
    return f"{cell:.3f}", on_colour(cell / most)


def draw(axes: Any, cells: Sequence[Sequence[float | None]], cases: Sequence[str], title: str) -> None:
    """A table of numbers and colours; the colours of each table begin at zero."""
    numbers = torch.tensor([[float("nan") if cell is None else cell for cell in row] for row in cells])
    known = numbers[~numbers.isnan()]
    most = max(known.max().item(), 1e-6) if len(known) else 1.0
    axes.imshow(numbers.numpy(), cmap=AMOUNT, vmin=0, vmax=most, aspect="auto")
    for row, line in enumerate(cells):
        for column, cell in enumerate(line):
            word, colour = told(cell, most)
            axes.text(column, row, word, ha="center", va="center", color=colour)
    axes.set(title=title, xticks=range(len(cases)), xticklabels=cases)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
