"""Figure 5: t-SNE of what the heads read, a column a method."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn

from examples.drifa_net.data import IGNORE, Data
from examples.drifa_net.methods import Method
from examples.drifa_net.networks import Named

NEIGHBOURS = 5
MOST = 1000  # samples of a task
PANEL = 3.5  # inches


def head_of(net: nn.Module, data: Data, task: str) -> nn.Module:
    """The last layer of a task."""
    return net.net.heads[list(data.tasks).index(task)] if isinstance(net, Named) else net.heads[task]


@torch.no_grad()
def features(method: Method) -> dict[str, tuple[Tensor, Tensor]]:
    """What the head of each task reads of its labelled test samples, `n c`, and their classes."""
    tasks, read = method.data.tasks, {}
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {task: [] for task in tasks}
    hooks = []
    for task in tasks:
        head = head_of(method.net, method.data, task)
        hooks.append(head.register_forward_pre_hook(lambda _, given, task=task: read.update({task: given[0]})))
    try:
        with method.way():
            for inputs, present, labels in method.batches():
                method.net(inputs, present)
                for task, several in parts.items():
                    kept = labels[task] != IGNORE
                    several.append((read[task][kept], labels[task][kept]))
    finally:
        for hook in hooks:
            hook.remove()
    joined = {task: tuple(torch.cat(column) for column in zip(*several, strict=True)) for task, several in parts.items()}
    return {task: (x[:MOST], y[:MOST]) for task, (x, y) in joined.items()}


def vote(x: np.ndarray, y: np.ndarray, neighbours: int = NEIGHBOURS) -> float:
    """Per cent of the samples, every class counting the same, whose nearest others vote for their class."""
    near = NearestNeighbors(n_neighbors=neighbours + 1).fit(x).kneighbors(x, return_distance=False)[:, 1:]
    right = np.array([np.bincount(y[row]).argmax() == label for row, label in zip(near, y, strict=True)])
    return 100 * float(np.mean([right[y == label].mean() for label in np.unique(y)]))


def check_neighbours(data: Data) -> None:
    """Raise a `ValueError` unless every task has test samples enough."""
    for task, targets in zip(data.tasks, data.test.targets.T, strict=True):
        if (targets != IGNORE).sum() <= NEIGHBOURS:
            raise ValueError(f"{task} has too few test images for its {NEIGHBOURS} nearest neighbours: it needs more.")


def draw_features(methods: Sequence[Method], path: Path) -> None:
    """A row a task, a colour a class."""
    data, columns = methods[0].data, len(methods)
    figure = Figure(figsize=(PANEL * columns + 1.9, (PANEL + 0.2) * len(data.tasks) + 0.4), layout="constrained")
    panels = figure.subplots(len(data.tasks), columns, squeeze=False)
    most = 0
    for column, method in zip(panels.T, methods, strict=True):
        for axes, (task, (x, y)) in zip(column, features(method).items(), strict=True):
            most = max(most, len(y))
            x = ((x - x.mean(0)) / x.std(0).clamp(min=1e-6)).numpy()
            place = TSNE(perplexity=min(30.0, (len(x) - 1) / 3), init="pca", random_state=0).fit_transform(x)
            colours = matplotlib.colormaps["tab10" if len(data.tasks[task]) <= 10 else "tab20"].colors
            for k, name in enumerate(data.tasks[task]):
                shown = place[y.numpy() == k].T
                axes.scatter(*shown, s=9, color=colours[k % len(colours)], label=name.replace("_", " "), linewidth=0, alpha=0.8)
            axes.set(xticks=[], yticks=[])
            axes.set_title(f"{method.title}\n{NEIGHBOURS} neighbours vote right: {vote(x, y.numpy()):.1f} %", size=10)
            axes.spines[:].set_color("#cccccc")
    for row, task in zip(panels, data.tasks, strict=True):
        row[0].set_ylabel(task, size=11)
        rows = math.ceil(len(data.tasks[task]) / 20)
        row[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2, fontsize=8, ncols=max(rows, 1))
    figure.suptitle(f"t-SNE of what the heads read of {most} test samples or fewer", size=11)
    figure.savefig(path, dpi=110)
