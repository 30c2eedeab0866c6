"""The picture of `maps`."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drifa_attn.plot.cam import overlay
from drifa_attn.plot.evidence import Evidence
from drifa_attn.plot.style import COLOURS, bare, sheet

BINS = 60  # of gates


class Seen(NamedTuple):
    """What is drawn: the image `h w 3`, the class with its maps, and the gates."""

    image: Tensor
    evidence: Evidence
    gates: dict[str, Tensor]


def draw(seen: Seen, path: Path) -> None:
    """The image, the two maps over it, and a strip of every site's gates from closed (0) to open (1)."""
    with sheet("maps", 16, max(4.6, 0.3 * len(seen.gates) + 1.4)) as figure:
        panels = figure.subplots(1, 4, width_ratios=[1, 1, 1, 1.3])
        panels[0].imshow(seen.image.numpy())
        panels[0].set_title("image")
        for axes, name, (probability, cam) in zip(panels[1:], ("off", "on"), seen.evidence[1:], strict=False):
            overlay(axes, seen.image, cam[0])
            axes.set_title(f"attention {name}: {100 * probability.item():.1f} %")
        for axes in panels[:3]:
            bare(axes)
        draw_gates(panels[3], seen.gates)
        figure.suptitle(f"Evidence for class {seen.evidence.classes.item()} (grey: none)")
        figure.savefig(path)


def draw_gates(axes: Any, gates: dict[str, Tensor]) -> None:
    """A strip for every site: how many channels have which gate."""
    names = list(gates)
    counts = torch.stack([torch.histc(a.float(), BINS, 0, 1) / a.numel() for a in gates.values()])
    axes.imshow(counts.sqrt().numpy(), cmap="Blues", aspect="auto", extent=(0, 1, len(names) - 0.5, -0.5), vmin=0)
    for row, a in enumerate(gates.values()):
        axes.plot([a.mean().item()] * 2, [row - 0.45, row + 0.45], color=COLOURS[1], linewidth=1.5)
    axes.set(xlim=(0, 1), yticks=range(len(names)), xlabel="gates of all channels (orange: mean)", title="gates by site")
    axes.set_yticklabels(names, size=8)
    axes.hlines([row + 0.5 for row in range(len(names) - 1)], 0, 1, color="white", linewidth=2)
