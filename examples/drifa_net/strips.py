"""How open every gate of a network is, and what that does to the features."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import drifa_attn
from examples.drifa_net.data import Data
from examples.drifa_net.methods import Method

BINS = 60


def gates(method: Method) -> dict[str, tuple[Tensor, Tensor]]:
    """Every gate a of the test images, and the gain that comes of it, `n c` each by the name of its site."""
    net = method.net
    parts = [(drifa_attn.gates(net, *given), drifa_attn.gains(net, *given)) for *given, _ in method.batches()]
    return {
        name: tuple(torch.cat([one[name] for one in column]) for column in zip(*parts, strict=True)) for name in parts[0][0]
    }


def grouped(found: Mapping[str, Any], data: Data) -> dict[str, dict[str, Any]]:
    """The sites in panels: MIFA, and MFA of each branch, by short names."""
    panels: dict[str, dict[str, Any]] = {}
    for name, values in found.items():
        head, *rest = name.removeprefix("net.").split(".")
        if head == "branches":
            panels.setdefault(f"MFA, {data.branches[int(rest[0])]}", {})[".".join(rest[1:])] = values
        else:
            panels.setdefault("MIFA", {})[f"stage {'.'.join(rest)}"] = values
    return panels


def draw_gates(method: Method, path: Path) -> None:
    """A histogram of each site's gates over samples and channels, with what it does to the features."""
    panels = grouped(gates(method), method.data)
    tallest = max(len(sites) for sites in panels.values())
    figure = Figure(figsize=(7.2 * len(panels), 0.3 * tallest + 2.2), layout="constrained")
    for axes, (title, sites) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
        draw_histograms(axes, title, sites)
    figure.suptitle(
        "Gates of test images: a strip a site, from closed (0) to open (1).\nRight: how far a gate differs between images, and "
        "how\nfar it takes the features from what they were. A gate\nthat does not differ attends to nothing.",
        size=11,
    )
    figure.savefig(path, dpi=130)


def draw_histograms(axes: Axes, title: str, sites: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """One row a site: its gates over images and channels as a strip from 0 to 1, and its two numbers."""
    counts = torch.stack([torch.histc(a.float(), BINS, 0, 1) / a.numel() for a, _ in sites.values()])
    axes.imshow(counts.sqrt().numpy(), cmap="Blues", aspect="auto", extent=(0, 1, len(sites) - 0.5, -0.5), vmin=0)
    for row, (a, gain) in enumerate(sites.values()):
        differs, moves = a.std(0, correction=0).mean().item(), 100 * (gain - 1).abs().mean().item()
        axes.annotate(f"±{differs:.3f}   {moves:.1f} %", (1.02, row), va="center", size=8, annotation_clip=False)
        axes.plot([a.mean().item()] * 2, [row - 0.45, row + 0.45], color="#b2182b", linewidth=1.5)
    axes.set(xlim=(0, 1), yticks=range(len(sites)), xlabel="gate (red: mean)", title=title)
    axes.set_yticklabels(list(sites), size=8)
    axes.hlines([row + 0.5 for row in range(len(sites) - 1)], 0, 1, color="white", linewidth=2)
    axes.spines[:].set_visible(False)
