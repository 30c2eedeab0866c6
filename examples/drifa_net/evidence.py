"""Where each method's evidence for the class of an image is, by Grad-CAM, and how far the maps of methods are alike."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from einops import rearrange
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from rich.table import Table
from torch import Tensor, nn

import drifa_attn
from examples.drifa_net.data import IGNORE, Data
from examples.drifa_net.methods import Method
from examples.drifa_net.networks import Inputs, Named, is_image

ENOUGH = 49  # positions that a Grad-CAM should have at least, as of the last stage at 224 pixels
CLASSES = 10  # of a branch that have room


class Focus(nn.Module):
    """A network as a function of one branch's images alone, for one task: what Grad-CAM takes."""

    def __init__(self, net: nn.Module, inputs: Inputs, present: Tensor | None, branch: str, task: str) -> None:
        super().__init__()
        self.net, self.inputs, self.present, self.branch, self.task = net, inputs, present, branch, task

    def forward(self, x: Tensor) -> Tensor:
        """The logits of the task."""
        return self.net({**self.inputs, self.branch: x}, self.present)[self.task]


def pictured(data: Data) -> list[str]:
    """The branches that see images."""
    return [branch for branch, shape in data.shapes.items() if is_image(shape)]


def task_of(data: Data, branch: str) -> str:
    """The task of a branch: its own where there is one, else the first."""
    return branch if branch in data.tasks else next(iter(data.tasks))


def stage_of(net: nn.Module, branch: str, image: Tensor) -> tuple[str, nn.Module, Callable[[Tensor], Tensor]]:
    """The last stage of a branch that has enough positions: its name, itself, and what makes `b c h w` of its output."""
    if isinstance(net, Named):
        stages = net.net.branches[net.names.index(branch)]["stages"]
        halved = [math.prod(-(-n // 4 // (1, 1, 2, 2, 4, 4, 8, 8)[k]) for n in image.shape[-2:]) for k in range(len(stages))]
        last = max((k for k, n in enumerate(halved) if n >= ENOUGH), default=0)
        return f"stage {last}", stages[last], lambda x: x
    backbone = net.branches[branch]
    if not net.stages:
        sites = list(drifa_attn.plan(backbone, example_input=image).sites)
    else:
        sites = [stage[branch] for stage in net.stages if branch in stage]
    site = next((site for site in reversed(sites) if site.positions >= ENOUGH), max(sites, key=lambda one: one.positions))
    aspect = image.shape[-2] / image.shape[-1]
    return site.module, backbone.get_submodule(site.module), lambda x: as_map(x, site.layout, site.num_prefix_tokens, aspect)


def as_map(x: Tensor, layout: str, prefix: int, aspect: float) -> Tensor:
    """Features of any layout as `b c h w`: channels first, tokens without their prefix in rows and columns of this aspect."""
    if x.ndim == 3:
        tokens = x[:, prefix:] if layout == "b ... c" else x.transpose(1, 2)
        rows = round(math.sqrt(tokens.shape[1] * aspect))
        return rearrange(tokens, "b (h w) c -> b c h w", h=rows)
    return x if layout == "b c ..." else rearrange(x, "b h w c -> b c h w")


@dataclass(frozen=True)
class Chosen:
    """A test image of each class of a branch: their places in the test split, their classes, and what each method tells.

    `more` are classes for which there is no room, `none` those of which the test split has no image.
    """

    places: list[int]
    classes: list[int]
    told: np.ndarray  # methods, images
    more: list[int]
    none: list[int]

    @property
    def right(self) -> np.ndarray:
        """Which images each method tells right: `methods images`."""
        return self.told == np.array(self.classes)


@torch.no_grad()
def told_by(method: Method) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The class that a method tells of each test sample, by task, and which branches each sample has: `n m`."""
    answers: dict[str, list[Tensor]] = {task: [] for task in method.data.tasks}
    there = []
    with method.way():
        for inputs, present, _ in method.batches():
            for task, logits in method.net(inputs, present).items():
                answers[task].append(logits.argmax(1))
            count = len(next(iter(inputs.values())))
            there.append(torch.ones(count, len(inputs), dtype=torch.bool) if present is None else present)
    return {task: torch.cat(parts).numpy() for task, parts in answers.items()}, torch.cat(there).numpy()


def chosen(data: Data, branch: str, answers: Sequence[Mapping[str, np.ndarray]], there: np.ndarray) -> Chosen:
    """Of every class the first of those test images of a branch that most methods tell right."""
    task = task_of(data, branch)
    labels = data.test.targets[:, list(data.tasks).index(task)].numpy()
    labels = np.where(there[:, data.branches.index(branch)], labels, IGNORE)
    told = np.stack([answer[task] for answer in answers])
    right = (told == labels).sum(0)
    known = [k for k in range(len(data.tasks[task])) if (labels == k).any()]
    if not known:
        raise ValueError(f"no test sample with a label of {task} has {branch}: there is no image to draw its evidence in.")
    places = [int(np.where(labels == k, right, -1).argmax()) for k in known[:CLASSES]]
    none = [k for k in range(len(data.tasks[task])) if k not in known]
    return Chosen(places, known[:CLASSES], told[:, places], known[CLASSES:], none)


def heat(method: Method, branch: str, one: Chosen) -> tuple[np.ndarray, str]:
    """The Grad-CAM of each image for its own class, `k h w`, each from 0 to 1, and the stage and positions it is from."""
    inputs, present = method.taken(one.places)
    name, layer, transform = stage_of(method.net, branch, inputs[branch])
    shapes: list[tuple[int, ...]] = []

    def noted(x: Tensor) -> Tensor:
        shapes.append(tuple(transform(x).shape[-2:]))
        return transform(x)

    focus = Focus(method.net, inputs, present, branch, task_of(method.data, branch))
    with method.way(), GradCAM(model=focus, target_layers=[layer], reshape_transform=noted) as cam:
        maps = cam(input_tensor=inputs[branch], targets=[ClassifierOutputTarget(k) for k in one.classes])
    return maps, f"{name}, {shapes[0][0]}x{shapes[0][1]} positions"


@dataclass(frozen=True)
class Evidence:
    """The heat maps of a branch, `methods images h w`, and the stage of each method that they are from."""

    one: Chosen
    maps: np.ndarray
    stages: list[str]

    def alike(self, a: int, b: int) -> float:
        """The mean correlation of the maps of two methods on the same images; flat ones have none."""
        return mean([correlation(*pair) for pair in zip(self.maps[a], self.maps[b], strict=True)])

    def unmoved(self, a: int) -> float:
        """The mean correlation of the maps of one method on different images."""
        return mean([correlation(x, y) for x, y in combinations(self.maps[a], 2)])

    def flat(self, a: int) -> int:
        """How many maps of a method are the same everywhere, zero: nothing in the stage speaks for the class."""
        return sum(is_flat(x) for x in self.maps[a])


def is_flat(x: np.ndarray) -> bool:
    """Whether a map has one value everywhere."""
    return float(np.ptp(x)) < 1e-6


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's, over pixels; NaN if a map is flat."""
    return math.nan if is_flat(x) or is_flat(y) else float(np.corrcoef(x.ravel(), y.ravel())[0, 1])


def mean(values: Sequence[float]) -> float:
    """The mean of those that are no NaN; NaN if none is."""
    kept = [value for value in values if not math.isnan(value)]
    return sum(kept) / len(kept) if kept else math.nan


def evidence(methods: Sequence[Method]) -> dict[str, Evidence]:
    """The heat maps of every branch that sees images."""
    answers, theres = zip(*map(told_by, methods), strict=True)
    data, found = methods[0].data, {}
    for branch in pictured(data):
        one = chosen(data, branch, answers, theres[0])
        maps, stages = zip(*(heat(method, branch, one) for method in methods), strict=True)
        found[branch] = Evidence(one, np.stack(maps), list(stages))
    return found


def described(branch: str, found: Evidence, methods: Sequence[Method]) -> Table:
    """What the maps of a branch are worth, in numbers."""
    stages = "; ".join(dict.fromkeys(found.stages))
    table = Table("", "told right", "flat", "other images", *(method.title for method in methods))
    table.title = f"{branch}, {stages}: correlation of a method's maps with its own of other images, and with others'"
    for a, method in enumerate(methods):
        with_others = ["" if a == b else f"{found.alike(a, b):.2f}" for b in range(len(methods))]
        count = len(found.one.places)
        told = f"{found.one.right[a].sum()} of {count}", f"{found.flat(a)} of {count}"
        table.add_row(method.title, *told, f"{found.unmoved(a):.2f}", *with_others)
    return table
