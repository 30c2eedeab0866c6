"""The picture of `maps`."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

BINS = 60  # of gates


class Seen(NamedTuple):
    """What is drawn: the image `h w 3`, the class, its probability and Grad-CAM with attention off and on, and the gates."""

    image: Tensor
    target: int
    off: tuple[float, Tensor]
    on: tuple[float, Tensor]
    gates: dict[str, Tensor]


def draw(seen: Seen, path: Path) -> None:
    """The image, the two maps over it, and a strip of every site's gates from closed (0) to open (1)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, max(4.6, 0.3 * len(seen.gates) + 1.4)), layout="constrained")
    panels = figure.subplots(1, 4, width_ratios=[1, 1, 1, 1.3])
    panels[0].imshow(seen.image.numpy())
    panels[0].set(xticks=[], yticks=[], title="image")
    height, width = seen.image.shape[:2]
    for axes, name, (probability, cam) in zip(panels[1:], ("off", "on"), (seen.off, seen.on), strict=False):
        axes.imshow(seen.image.mean(2).numpy(), cmap="gray", vmin=-0.3, vmax=1.3)
        place = (-0.5, width - 0.5, height - 0.5, -0.5)
        axes.imshow(cam.numpy(), cmap="inferno", alpha=0.55, vmin=0, vmax=1, interpolation="bilinear", extent=place)
        axes.set(xticks=[], yticks=[], title=f"attention {name}: {100 * probability:.1f} %")
    draw_gates(panels[3], seen.gates)
    figure.suptitle(f"Evidence for class {seen.target} (black: none)")
    figure.savefig(path, dpi=130)


def draw_gates(axes: Any, gates: dict[str, Tensor]) -> None:
    """A strip for every site: how many channels have which gate."""
    names = list(gates)
    counts = torch.stack([torch.histc(a.float(), BINS, 0, 1) / a.numel() for a in gates.values()])
    axes.imshow(counts.sqrt().numpy(), cmap="Blues", aspect="auto", extent=(0, 1, len(names) - 0.5, -0.5), vmin=0)
    for row, a in enumerate(gates.values()):
        axes.plot([a.mean().item()] * 2, [row - 0.45, row + 0.45], color="#b2182b", linewidth=1.5)
    axes.set(xlim=(0, 1), yticks=range(len(names)), xlabel="gates of all channels (red: mean)", title="gates by site")
    axes.set_yticklabels(names, size=8)
    axes.hlines([row + 0.5 for row in range(len(names) - 1)], 0, 1, color="white", linewidth=2)
