"""Figures 4 and 5, drawn from a finished run.

From the repository's root:

    python -m examples.drifa_net.figures outputs/drifa_net/fuse-seed0

`gradcam.png`: where each branch's evidence for the class is, with all gates off and on, of test images that are told right.
`features.png`: t-SNE of what the heads read, with all gates off (unfused) and on (fused). `gates.png`: how open every gate is.
Gates off means the same trained weights without the attention, which were trained with it: it shows what the attention does in
this network, not what a network trained without would do. That is `--model concat`, which has no gates.
"""

import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from einops import rearrange
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from rich.console import Console
from rich.progress import track
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn

import drifa_attn
from examples.arguments import Parser, check_files, output, source
from examples.drifa_net.data import IGNORE, Data
from examples.drifa_net.networks import Inputs, Labels, Named, attentions, is_image, named, restored
from examples.drifa_net.reading import reloaded

ENOUGH = 49  # positions that a Grad-CAM should have at least, as of the last stage at 224 pixels
BINS = 60
NEIGHBOURS = 5
CPU = torch.device("cpu")


class Focus(nn.Module):
    """A network as a function of one branch's images alone, for one task: what Grad-CAM takes."""

    def __init__(self, net: nn.Module, inputs: Inputs, present: Tensor | None, branch: str, task: str) -> None:
        super().__init__()
        self.net, self.inputs, self.present, self.branch, self.task = net, inputs, present, branch, task

    def forward(self, x: Tensor) -> Tensor:
        """The logits of the task."""
        return self.net({**self.inputs, self.branch: x}, self.present)[self.task]


def batches(data: Data, size: int = 256) -> Iterator[tuple[Inputs, Tensor | None, Labels]]:
    """The test images by branch, who is present, and their classes by task."""
    for batch in data.loader(data.test, size):
        yield named(batch, data, CPU)


def pictured(data: Data) -> list[str]:
    """The branches that see images."""
    return [branch for branch, shape in data.shapes.items() if is_image(shape)]


def task_of(data: Data, branch: str) -> str:
    """The task of a branch: its own where there is one, else the first."""
    return branch if branch in data.tasks else next(iter(data.tasks))


def stage_of(net: nn.Module, branch: str, image: Tensor) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The last stage of a branch that has enough positions, and what makes `b c h w` of its output."""
    if isinstance(net, Named):
        stages = net.net.branches[net.names.index(branch)]["stages"]
        halved = [math.prod(-(-n // 4 // (1, 1, 2, 2, 4, 4, 8, 8)[k]) for n in image.shape[-2:]) for k in range(len(stages))]
        return stages[max((k for k, n in enumerate(halved) if n >= ENOUGH), default=0)], lambda x: x
    backbone = net.branches[branch]
    if not net.stages:
        sites = list(drifa_attn.plan(backbone, example_input=image).sites)
    else:
        sites = [stage[branch] for stage in net.stages if branch in stage]
    site = next((site for site in reversed(sites) if site.positions >= ENOUGH), max(sites, key=lambda one: one.positions))
    return backbone.get_submodule(site.module), lambda x: as_map(
        x, site.layout, site.num_prefix_tokens, image.shape[-2] / image.shape[-1]
    )


def as_map(x: Tensor, layout: str, prefix: int, aspect: float) -> Tensor:
    """Features of any layout as `b c h w`: channels first, tokens without their prefix in rows and columns of this aspect."""
    if x.ndim == 3:
        tokens = x[:, prefix:] if layout == "b ... c" else x.transpose(1, 2)
        rows = round(math.sqrt(tokens.shape[1] * aspect))
        return rearrange(tokens, "b (h w) c -> b c h w", h=rows)
    return x if layout == "b c ..." else rearrange(x, "b h w c -> b c h w")


class Chosen(NamedTuple):
    """Test images of a branch that are told right, one a class: inputs, who is present, classes; and classes without one."""

    inputs: Inputs
    present: Tensor | None
    classes: Tensor
    never: list[int]  # of which no test image is told right
    more: list[int]  # which are told right, but left out


def chosen(net: nn.Module, data: Data, branch: str, most: int = 4) -> Chosen:
    """The first test image of a branch that is told right of each of the first few classes."""
    found: dict[int, tuple[Inputs, Tensor]] = {}
    known: set[int] = set()
    task, place = task_of(data, branch), data.branches.index(branch)
    for inputs, present, labels in batches(data):
        with torch.no_grad():
            right = net(inputs, present)[task].argmax(1) == labels[task]
        there = torch.ones(len(right), len(inputs), dtype=torch.bool) if present is None else present
        known |= set(labels[task][there[:, place]].tolist()) - {IGNORE}
        for i in (right & there[:, place]).nonzero()[:, 0].tolist():
            one = {name: x[i : i + 1] for name, x in inputs.items()}
            found.setdefault(int(labels[task][i]), (one, there[i : i + 1]))
    classes = sorted(found)[:most]
    if not classes:
        raise ValueError(f"no test image of {task} is told right: train longer before drawing where the evidence is.")
    inputs = {name: torch.cat([found[c][0][name] for c in classes]) for name in data.branches}
    present = torch.cat([found[c][1] for c in classes])
    never, more = sorted(known - set(found)), sorted(found)[most:]
    return Chosen(inputs, None if present.all() else present, torch.tensor(classes), never, more)


def heat(net: nn.Module, inputs: Inputs, present: Tensor | None, branch: str, task: str, classes: Tensor) -> np.ndarray:
    """The Grad-CAM of each image for its class, `b h w` in [0, 1]."""
    layer, transform = stage_of(net, branch, inputs[branch])
    with GradCAM(model=Focus(net, inputs, present, branch, task), target_layers=[layer], reshape_transform=transform) as cam:
        return cam(input_tensor=inputs[branch], targets=[ClassifierOutputTarget(int(c)) for c in classes])


def draw_gradcam(net: nn.Module, data: Data, path: Path) -> None:
    """Images, and their Grad-CAMs without and with attention, in a grid: a row a way, and a column an image of a branch."""
    rows = ["image", "gates off", "gates on"] if attentions(net) else ["image", "no attention"]
    found = {branch: chosen(net, data, branch) for branch in pictured(data)}
    shares = [data.shapes[branch][2] / data.shapes[branch][1] for branch, one in found.items() for _ in one.classes]
    figure = Figure(figsize=(1.75 * sum(shares) + 0.4 * len(found) + 0.4, 1.8 * len(rows) + 1), layout="compressed")
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - 0.7 / figure.get_figheight()))  # above it the headings
    panels, start = figure.subplots(len(rows), len(shares), squeeze=False, width_ratios=shares), 0
    for branch, one in found.items():
        task, columns = task_of(data, branch), panels[:, start : start + len(one.classes)]
        maps = []
        for row in rows[1:]:
            with drifa_attn.disabled(net) if row == "gates off" else nullcontext():
                maps.append(heat(net, one.inputs, one.present, branch, task, one.classes))
        draw_examples(columns, pixels_of(one.inputs[branch], data, branch), maps)
        for axes, k in zip(columns[0], one.classes.tolist(), strict=True):
            axes.set_title(data.tasks[task][k], size=11)
        for axes, row in zip(columns[:, 0], rows, strict=True):
            axes.set_ylabel(row, size=11)
        place = {"xy": (0, 1), "xytext": (0, 24), "xycoords": "axes fraction", "textcoords": "offset points"}
        text = columns[0, 0].annotate(heading(branch, one, data, task), size=9, va="bottom", annotation_clip=False, **place)
        text.set_in_layout(False)
        start += len(one.classes)
    figure.savefig(path, dpi=130)


def heading(branch: str, one: Chosen, data: Data, task: str) -> str:
    """What stands above a branch's images, with the classes that have none."""
    lines = [f"{branch}: evidence for {task} (black: none)"]
    for what, classes in (("never told right", one.never), ("told right too", one.more)):
        if classes:
            names = [data.tasks[task][k] for k in classes]
            lines.append(textwrap.shorten(f"{what}: {', '.join(names)}", 22 * len(one.classes), placeholder=" …"))
    return "\n".join(lines)


def pixels_of(images: Tensor, data: Data, branch: str) -> np.ndarray:
    """Images of a branch as they look, `b h w c` in [0, 1]."""
    mean, deviation = (torch.tensor(x)[:, None, None] for x in data.scales.get(branch, ((0.5,) * 3, (0.5,) * 3)))
    return (images * deviation + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def draw_examples(panels: np.ndarray, pixels: np.ndarray, maps: Sequence[np.ndarray]) -> None:
    """Images in the first row, and over each in grey its map in the rows below."""
    for k, image in enumerate(pixels):
        panels[0, k].imshow(image)
        for axes, heats in zip(panels[1:, k], maps, strict=True):
            axes.imshow(image.mean(2), cmap="gray", vmin=-0.3, vmax=1.3)
            axes.imshow(heats[k], cmap="inferno", alpha=0.55, vmin=0, vmax=1, interpolation="bilinear")
        for axes in panels[:, k]:
            axes.set(xticks=[], yticks=[])


@torch.no_grad()
def features(net: nn.Module, data: Data, most: int = 1000) -> dict[str, tuple[Tensor, Tensor]]:
    """What the heads read of the labelled test images of each task, `n c`, and their classes.

    Where branches have tasks of their own, they were paired by chance: then of the task's own branch alone.
    """
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {task: [] for task in data.tasks}
    for inputs, present, labels in batches(data):
        found = net.features(inputs, present)
        for task, several in parts.items():
            kept = labels[task] != IGNORE
            own = [found[task]] if task in found else list(found.values())
            several.append((torch.cat(own, 1)[kept], labels[task][kept]))
    joined = {task: tuple(torch.cat(column) for column in zip(*several, strict=True)) for task, several in parts.items()}
    return {task: (x[:most], y[:most]) for task, (x, y) in joined.items()}


def vote(x: np.ndarray, y: np.ndarray, neighbours: int = NEIGHBOURS) -> float:
    """Per cent of the samples, every class counting the same, whose nearest others vote for their class."""
    near = NearestNeighbors(n_neighbors=neighbours + 1).fit(x).kneighbors(x, return_distance=False)[:, 1:]
    right = np.array([np.bincount(y[row]).argmax() == label for row, label in zip(near, y, strict=True)])
    return 100 * float(np.mean([right[y == label].mean() for label in np.unique(y)]))


def draw_features(net: nn.Module, data: Data, path: Path) -> None:
    """t-SNE of the features of each task, a colour a class, without and with attention."""
    ways = ["gates off: unfused", "gates on: fused"] if attentions(net) else ["no attention"]
    figure = Figure(figsize=(6.6 * len(ways), 5.4 * len(data.tasks)), layout="constrained")
    panels = figure.subplots(len(data.tasks), len(ways), squeeze=False)
    colours = matplotlib.colormaps["tab10"].colors
    for column, way in enumerate(ways):
        with drifa_attn.disabled(net) if "off" in way else nullcontext():
            found = features(net, data)
        for axes, (task, (x, y)) in zip(panels[:, column], found.items(), strict=True):
            x = ((x - x.mean(0)) / x.std(0).clamp(min=1e-6)).numpy()
            perplexity = min(30.0, (len(x) - 1) / 3)
            place = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(x)
            for k, name in enumerate(data.tasks[task]):
                axes.scatter(*place[y.numpy() == k].T, s=10, color=colours[k % 10], label=name, linewidth=0, alpha=0.8)
            axes.set(xticks=[], yticks=[])
            axes.set_title(f"{task}, {way}\n5 nearest neighbours vote right: {vote(x, y.numpy()):.1f} %", size=11)
            axes.spines[:].set_color("#cccccc")
            if column == len(ways) - 1:
                axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2)
    figure.suptitle(f"t-SNE of the features of {len(next(iter(found.values()))[1])} test images or fewer", size=13)
    figure.savefig(path, dpi=130)


def gates(net: nn.Module, data: Data) -> dict[str, tuple[Tensor, Tensor]]:
    """Every gate a of the test images, and the gain that comes of it, `n c` each by the name of its site."""
    parts = [(drifa_attn.gates(net, *given), drifa_attn.gains(net, *given)) for *given, _ in batches(data)]
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


def draw_gates(net: nn.Module, data: Data, path: Path) -> None:
    """A histogram of each site's gates over samples and channels, with what it does to the features."""
    panels = grouped(gates(net, data), data)
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


def check_drawable(net: nn.Module, data: Data) -> None:
    """Raise a `ValueError` unless every picture has something to show."""
    for branch in pictured(data):
        chosen(net, data, branch)
    for task, targets in zip(data.tasks, data.test.targets.T, strict=True):
        if (targets != IGNORE).sum() <= NEIGHBOURS:
            raise ValueError(f"{task} has too few test images for its {NEIGHBOURS} nearest neighbours: it needs more.")


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Draw all three; returns their paths."""
    whole = Parser("python -m examples.drifa_net.figures", __doc__)
    whole.add_argument("run", type=source, help="the folder of a finished run")
    whole.add_argument("--data", nargs="+", type=source, default=[], help="where its data is, if it has moved")
    whole.add_argument("--cache", type=output, default="outputs/cache", help="folder of decoded images (default: %(default)s)")
    whole.add_argument("--output", type=output, help="folder of the pictures (default: the run's)")
    options = whole.parse_args(argv)
    folder = options.output or options.run
    pictures = {"gradcam.png": draw_gradcam, "features.png": draw_features, "gates.png": draw_gates}
    with whole.explained():
        check_files(folder, list(pictures))
        record, data = reloaded(options.run, options.data, options.cache)
        net = restored(options.run, record, data)
        check_drawable(net, data)
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, soft_wrap=True)
    drawn = []
    for name, draw in track(pictures.items(), description="drawing, about a minute", console=console):
        if draw is draw_gates and not attentions(net):
            console.print("No gates.png: this network has none.")
            continue
        if draw is draw_gradcam and not pictured(data):
            console.print("No gradcam.png: no branch sees images.")
            continue
        draw(net, data, folder / name)
        drawn.append(folder / name)
        console.print(str(drawn[-1]))
    return drawn


if __name__ == "__main__":
    main()
