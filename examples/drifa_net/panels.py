"""Figure 4: pictures, and over each the heat map of every method, a column a method."""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from examples.drifa_net.data import Data
from examples.drifa_net.evidence import Evidence, is_flat, mean, task_of
from examples.drifa_net.methods import Method

CELL, LEFT, GAP = 1.15, 1.35, 0.04  # inches: a picture's width, of classes' names, between pictures
LINE, TITLES = 0.15, 0.5  # inches: of a line above a branch, and of the columns' titles with what is free around them
WRONG = "#d6301f"


def heading(branch: str, found: Evidence, data: Data) -> list[str]:
    """What stands above a branch's pictures: what they are, how far columns are alike, and the classes without a picture."""
    task, one, count = task_of(data, branch), found.one, len(found.maps)
    stages = dict.fromkeys(found.stages)
    flat = sum(found.flat(a) for a in range(count))
    lines = [f"{branch}: evidence for {task} in {'; '.join(stages)} (dark: none, light: most)"]
    numbers = [f"maps of different images correlate by {mean([found.unmoved(a) for a in range(count)]):.2f}"]
    if count > 1:
        numbers.insert(0, f"columns correlate by {mean([found.alike(*ab) for ab in combinations(range(count), 2)]):.2f}")
    lines.append(", ".join([*numbers, f"{flat} of {count * len(one.places)} are flat"]))
    for what, classes in (("no room for", one.more), ("no test image of", one.none)):
        if classes:
            lines.append(f"{what} {', '.join(data.tasks[task][k] for k in classes)}")
    return [textwrap.shorten(line, 110, placeholder=" …") for line in lines]


def pixels_of(images: Tensor, data: Data, branch: str) -> np.ndarray:
    """Images of a branch as they look, `b h w c` in [0, 1]."""
    centre, deviation = (torch.tensor(x)[:, None, None] for x in data.scales.get(branch, ((0.5,) * 3, (0.5,) * 3)))
    return (images * deviation + centre).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def draw_gradcam(methods: Sequence[Method], found: Mapping[str, Evidence], path: Path) -> None:
    """Branches one below the other, a row a class: the image, and over it in grey the map of each method."""
    data, columns = methods[0].data, 1 + len(methods)
    tall = {branch: CELL * data.shapes[branch][1] / data.shapes[branch][2] for branch in found}
    above = {branch: heading(branch, one, data) for branch, one in found.items()}
    heads = {branch: LINE * len(lines) + TITLES for branch, lines in above.items()}
    height = sum(heads[branch] + len(one.one.places) * (tall[branch] + GAP) for branch, one in found.items()) + 0.1
    width = max(LEFT + columns * (CELL + GAP) + 0.1, 6.5)
    figure, top = Figure(figsize=(width, height)), height
    for branch, one in found.items():
        figure.text(0.1 / width, (top - 0.12) / height, "\n".join(above[branch]), size=8.5, va="top")
        top -= heads[branch]
        pixels = pixels_of(methods[0].taken(one.one.places)[0][branch], data, branch)
        for row in range(len(pixels)):
            top -= tall[branch] + GAP
            boxes = [((LEFT + k * (CELL + GAP)) / width, top / height) for k in range(columns)]
            axes = [figure.add_axes((x, y, CELL / width, tall[branch] / height)) for x, y in boxes]
            draw_row(axes, pixels[row], one, row, data.tasks[task_of(data, branch)])
            if row == 0:
                for place, title in zip(axes, ["image", *(method.title for method in methods)], strict=True):
                    place.set_title(textwrap.fill(title, 14), size=9.5, pad=3)
    figure.savefig(path, dpi=120)


def draw_row(axes: Sequence[Axes], image: np.ndarray, found: Evidence, row: int, names: Sequence[str]) -> None:
    """An image and its maps; red, with the class that was told, where a method tells it wrong."""
    for place in axes:
        place.set(xticks=[], yticks=[])
    axes[0].imshow(image, aspect="auto")
    name = textwrap.fill(names[found.one.classes[row]].replace("_", " "), 16)
    axes[0].set_ylabel(name, size=9, rotation=0, ha="right", va="center", labelpad=5)
    for a, place in enumerate(axes[1:]):
        place.imshow(image.mean(2), cmap="gray", vmin=-0.3, vmax=1.3, aspect="auto")
        heats = found.maps[a, row]
        place.imshow(heats, cmap="inferno", alpha=0.55, vmin=0, vmax=1, interpolation="bilinear", aspect="auto")
        if is_flat(heats):
            place.text(0.5, 0.9, "flat", size=6.5, color="white", ha="center", va="center", transform=place.transAxes)
        if not found.one.right[a, row]:
            place.spines[:].set(color=WRONG, linewidth=2.5)
            said = textwrap.shorten(f"told {names[found.one.told[a, row]]}".replace("_", " "), 22, placeholder="…")
            box = {"facecolor": WRONG, "edgecolor": "none", "pad": 1.5}
            place.text(0.5, 0.03, said, size=6.5, color="white", ha="center", va="bottom", transform=place.transAxes, bbox=box)
