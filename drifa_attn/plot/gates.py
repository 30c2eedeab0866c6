"""What opened, and for what: the gates of one site over images and classes."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from drifa_attn.checks import count

from .given import What, check_names, check_what, classes_of, gates_of, named, several_samples
from .spread import deviation
from .style import DIFFERENCE, sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Rows(NamedTuple):
    """What is drawn of a site: gates less their mean over all samples, `image channel` and `class channel`.

    `owners` are the classes of the images, in rising order, and `classes` those of the second part.
    """

    images: Tensor
    means: Tensor
    owners: list[int]
    classes: list[int]


def gates(
    gates: Mapping[str, Any],
    labels: Any = None,
    *,
    site: str | None = None,
    names: Sequence[str] | None = None,
    channels: int = 48,
    per_class: int = 8,
    what: What = "gate",
) -> "Figure":
    """Draw which channels of a site open for which images, and for which classes.

    The colour is the gate less the channel's mean over all samples, a − mean_b(a): red is more open than usual, blue less. A
    row of the left part is an image, a row of the right part the mean of a class. Columns are the channels that differ most
    between classes (without labels: between images), next to those that open most for the same class. Vertical stripes within a
    class are what attention does for that class. Colours end at the 98th percentile; the title says how far gates deviate.

    Args:
        gates: what `drifa_attn.gates` or `drifa_attn.gains` returns, {site: `b c`}, b >= 2.
        labels: the class of each sample, `b` integers from 0; None draws images alone, in the order of the batch.
        site: the one to draw; None is the one whose gates deviate most.
        names: of the classes, in words.
        channels: how many to draw at most.
        per_class: how many images of each class to draw at most; the means are of all. Without labels, of the batch ten times.
        what: "gate" or "gain", the word beside the colours.

    Returns: the figure.
    Raises: TypeError, ValueError: no such dict, gates of one sample, no such site, one whose gates are not `b c`, or labels
        that do not fit. ImportError: matplotlib is missing.
    Differs: the paper shows no gates.
    """
    check_what("plot.gates", what)
    channels, per_class = count("plot.gates", "channels", channels), count("plot.gates", "per_class", per_class)
    found = gates_of("plot.gates", gates)
    several_samples("plot.gates", found)
    site = chosen(found, site)
    given = None if labels is None else classes_of("plot.gates", "labels", labels, len(found[site]))
    check_names("plot.gates", names, -1 if given is None else int(given.max()))
    rows = arranged(found[site], given, channels, per_class)
    shown, whole = rows.images.shape[1], found[site].shape[1]
    with sheet("plot.gates", 8.5 if given is None else 11, 5) as figure:
        limit = max(rows.images.abs().quantile(0.98).item(), 1e-6)
        parts = [rows.images] if given is None else [rows.images, rows.means]
        panels = figure.subplots(1, len(parts), squeeze=False, width_ratios=[3, 2][: len(parts)])[0]
        for axes, part in zip(panels, parts, strict=True):
            image = axes.imshow(part.numpy(), cmap=DIFFERENCE, vmin=-limit, vmax=limit, aspect="auto")
            axes.set(xticks=[], xlabel=f"channel ({shown} of {whole})")
        label_rows(panels, rows, names)
        figure.colorbar(image, ax=list(panels), pad=0.02, aspect=30).set_label(f"{what}, less the channel's mean")
        mean = deviation(found[site]).mean()
        figure.suptitle(f"{what.title()}s at {site}: they deviate by {mean:.3f} over {len(found[site])} samples")
    return figure


def chosen(found: Mapping[str, Tensor], site: str | None) -> str:
    """The site to draw, whose gates are one number a channel."""
    if site is not None and site not in found:
        raise ValueError(f"plot.gates got site={site!r}, but there are gates of {', '.join(found)}.")
    several = [name for name, gate in found.items() if gate.ndim == 2 and site in (None, name)]
    if not several:
        shapes = {name: tuple(gate.shape) for name, gate in found.items() if site in (None, name)}
        raise ValueError(f"plot.gates expected gates (b, c), got {shapes}: plot.modalities draws attention among positions.")
    return max(several, key=lambda name: deviation(found[name]).mean().item())


def arranged(gate: Tensor, labels: Tensor | None, channels: int, per_class: int) -> Rows:
    """The rows and columns of the picture, in order."""
    moved = gate - gate.mean(0)
    if labels is None:
        rows = moved[: 10 * per_class]
        columns = moved.var(0).argsort(descending=True)[:channels]
        ordered = columns[moved[:, columns].argmax(0).argsort(stable=True)]
        return Rows(rows[:, ordered], rows[:0], [], [])
    classes = labels.unique().tolist()
    means = torch.stack([moved[labels == k].mean(0) for k in classes])
    columns = (means.var(0) if len(classes) > 1 else moved.var(0)).argsort(descending=True)[:channels]
    columns = columns[means[:, columns].argmax(0).argsort(stable=True)]
    rows = torch.cat([(labels == k).nonzero()[:per_class, 0] for k in classes])
    return Rows(moved[rows][:, columns], means[:, columns], labels[rows].tolist(), classes)


def label_rows(panels: Sequence[Any], rows: Rows, names: Sequence[str] | None) -> None:
    """Titles, and the classes beside the rows."""
    if not rows.classes:
        panels[0].set(title="one row an image", ylabel="image of the batch")
        return
    starts = [rows.owners.index(k) for k in rows.classes]
    ends = [*starts[1:], len(rows.owners)]
    words = [named(k, names) for k in rows.classes]
    panels[0].set(yticks=[(a + b - 1) / 2 for a, b in zip(starts, ends, strict=True)], yticklabels=words)
    panels[0].set(title="one row an image", ylabel="class of the image")
    panels[0].hlines([start - 0.5 for start in starts[1:]], -0.5, rows.images.shape[1] - 0.5, color="black", linewidth=1)
    panels[1].set(title="one row a class: its mean", yticks=range(len(words)), yticklabels=words)
    for axes in panels:
        axes.tick_params(axis="y", length=0)
