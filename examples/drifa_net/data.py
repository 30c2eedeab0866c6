"""What DRIFA-Net is trained on: samples read, split, cleaned, paired and augmented; `sources/` and `table.py` read them.

`load` takes folders of images, archives and one table, or, given none, scikit-learn's digits: two views, two tasks. Several
sources are of the same samples, which have the same name in each: `pair="sample"`. What a sample does not have is absent.

Splits are those that are given. Else a fifth of the samples is for testing and an eighth of the others for validation,
stratified by class, with no group in two of them; what shows the same as a training image, to within rounding, is dropped from
validation and test, and so is what shows the same as another image there. A given split with a group or an image in two parts
is refused, unless `leaks="drop"`. Augmentation is for training alone.

With `pair="chance"` the sources are of different samples, each a branch and a task. The network wants an image for each branch:
they are paired by chance, again in every epoch. In validation and test each image is counted once, for its own task. Where a
collection runs out before the other, images of it are drawn again as partners, from the same split, and their labels are not
counted again. So no metric sees an image twice, and none says anything of what one modality tells about a patient of the other.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from drifa_attn import collate
from examples.drifa_net.pairs import IGNORE, Images, Pairs
from examples.drifa_net.prepared import Prepared, prepare
from examples.drifa_net.samples import Samples, alone, digits, joined
from examples.drifa_net.sources import Collection, read
from examples.drifa_net.sources.volumes import Window
from examples.drifa_net.splits import SPLITS, listed
from examples.drifa_net.table import Columns, is_table, samples_of

__all__ = ["IGNORE", "PAIRINGS", "Columns", "Data", "Images", "Pairs", "load", "read_samples"]

DIGITS_SIZE = 32
PAIRINGS = ("sample", "chance")
LEAKS = ("refuse", "drop")
TURNS = {"none": False, "any": True}


@dataclass(frozen=True)
class Data:
    """What a run trains on; printed, it says what was read, how it was paired and split and what was dropped.

    `branches` are names; `tasks` name the classes of each column of the targets; `shapes` are those of one sample by branch;
    `report` goes into a run's JSON; `dropped` names samples for the terminal alone.
    """

    branches: tuple[str, ...]
    tasks: dict[str, tuple[str, ...]]
    train: Pairs
    validation: Pairs
    test: Pairs
    report: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    dropped: list[str] = field(default_factory=list)
    paths: tuple[str, ...] = ()  # where it was read from
    scales: dict[str, Any] = field(default_factory=dict)  # mean and deviation of images in [0, 1]; none: 0.5 and 0.5

    @property
    def heads(self) -> tuple[int, ...]:
        """The classes of each task, as DrifaNet takes them."""
        return tuple(len(classes) for classes in self.tasks.values())

    def class_weights(self) -> dict[str, list[float]]:
        """The weight of each class of each task, one over how often training has it, one on average over its samples."""
        counts = {task: np.bincount(y[y != IGNORE]) for task, y in zip(self.tasks, self.train.labels, strict=True)}
        return {task: (found.sum() / (len(found) * found)).tolist() for task, found in counts.items()}

    def loader(self, pairs: Pairs, batches: int | Sequence[Sequence[int]], *, workers: int = 0) -> DataLoader:
        """Batches of a split, of so many samples or of these: inputs by branch, who is present `b m`, targets `b k`."""
        join = partial(batch_of, self.shapes)
        if isinstance(batches, int):
            return DataLoader(pairs, batches, collate_fn=join, num_workers=workers)
        return DataLoader(pairs, batch_sampler=batches, collate_fn=join, num_workers=workers)

    def __str__(self) -> str:
        lines = [f"pairing: {self.report['pairing']}"] if len(self.branches) > 1 else []
        for name, branch in self.report["branches"].items():
            counts = ", ".join(f"{split} {sum(classes.values())}" for split, classes in branch["images"].items())
            size = "x".join(map(str, branch["size"])) + (" numbers", " px", " voxels")[len(branch["size"]) - 1]
            lines.append(f"{name}: {counts}; {size}; split {branch['split']}")
            dropped = " and ".join(f"{count} of {split}" for split, count in branch["duplicates"].items() if count)
            lines += [f"  dropped as duplicates: {dropped}"] if dropped else []
            lines += [f"  {note}" for note in branch["notes"]]
        return "\n".join([*lines, *([f"dropped: {listed(self.dropped)}"] if self.dropped else [])])


def batch_of(shapes: dict[str, tuple[int, ...]], items: Sequence[Any]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Items of a `Pairs` as a batch; a branch that none of them has is zeros."""
    samples = [(dict(zip(shapes, images, strict=True)), targets) for images, targets in items]
    inputs, present, targets = collate(samples)
    inputs = {name: torch.zeros(len(items), *shapes[name]) if x is None else x for name, x in inputs.items()}
    return inputs, present, targets


def load(
    paths: Sequence[str | Path] = (),
    *,
    kinds: Sequence[str | None] | None = None,
    size: int | None = None,
    seed: int = 0,
    pair: str = "sample",
    columns: Columns | None = None,
    leaks: str = "refuse",
    flips: str | None = None,
    window: Sequence[float] | None = None,
    balanced: bool = False,
    augmentation: bool = True,
    cache: Path | None = None,
    progress: bool = False,
) -> Data:
    """Read sources of samples, or the digits in two halves where no path is given.

    Every image is decoded once, resized and kept, in `cache` or in memory; unreadable files and duplicates are found so.

    Args:
        paths: a folder, an .npz or a table each, one table at most.
        kinds: what is there, as keys of `sources.READERS`; None to find out.
        size: height and width of the images, and depth of volumes, >= 1; None for an archive's own, else 128, 64 for volumes,
            and 32 for the digits, whose halves are `size` high and half as wide (an even size).
        seed: of splits, pairing and augmentation, >= 0.
        pair: "sample": sources have the same samples, by their names; "chance": different ones, each a branch and a task.
        columns: which columns of the table are what; None to find out.
        leaks: whether a given split with a group or an image in two parts is refused, or what leaks dropped ("drop").
        flips: of training images: "any" with quarter turns, "none", or None for what is known of a collection (else none).
        window: the values of volumes that become black and white, low < high; None for percentiles of each volume.
        balanced: whether training draws the classes of a task as often as each other.
        augmentation: whether training images are shifted, and perhaps flipped and turned.
        cache: the folder in which decoded images are kept for the next time.
        progress: whether the terminal shows how far decoding is.

    Raises: FileNotFoundError, ValueError: something of a source is missing or not what it should be.
    """
    check_load(paths, kinds, size, seed)
    for name, value, among in (("pair", pair, PAIRINGS), ("leaks", leaks, LEAKS), ("flips", flips, (None, *TURNS))):
        if value not in among:
            raise ValueError(f"load expected {name} to be one of {among}, got {value!r}.")
    several, found = read_samples(paths, kinds or [None] * len(paths), pair, columns or Columns())
    turns, scale = None if flips is None else TURNS[flips], check_window(window, several)
    shape = (size, size) if size else None
    if not paths:
        shape = (size or DIGITS_SIZE, (size or DIGITS_SIZE) // 2)
    how = {"turns": turns, "drop": leaks == "drop", "cache": cache, "window": scale, "progress": progress}
    parts = [prepare(one, shape, seed, **how) for one in several]
    data = assembled(parts, several, found, seed=seed, balanced=balanced, augmentation=augmentation)
    return replace(data, paths=tuple(str(Path(path).resolve()) for path in paths))


def assembled(
    parts: Sequence[Prepared], several: Sequence[Samples], columns: Columns, *, seed: int, balanced: bool, augmentation: bool
) -> Data:
    """The data of one set of samples, or of several that are paired by chance."""
    tasks = {name: classes for one in several for name, classes in one.tasks.items()}
    shapes = {name: shape for part in parts for name, shape in part.shapes.items()}
    moves = [move if augmentation else None for part in parts for move in part.augmentation]
    pairs = {
        key: Pairs(
            [view for part in parts for view in part.views[key]],
            [labels for part in parts for labels in part.targets[key]],
            seed=seed,
            training=key == "train",
            paired=len(parts) == 1,
            balanced=balanced,
            augmentation=moves if key == "train" else None,
        )
        for key in SPLITS
    }
    report = {
        "seed": seed,
        "pairing": "by chance, again in every epoch" if len(parts) > 1 else several[0].paired,
        "branches": {name: said for part in parts for name, said in part.report.items()},
        "inputs": {
            "branches": {name: said for part in parts for name, said in part.inputs.items()},
            "tasks": {name: list(classes) for name, classes in tasks.items()},
            "columns": {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(columns).items()},
        },
    }
    return Data(tuple(shapes), tasks, **pairs, report=report, shapes=shapes, dropped=sum((part.dropped for part in parts), []))


def read_samples(
    paths: Sequence[str | Path], kinds: Sequence[str | None], pair: str, columns: Columns
) -> tuple[list[Samples], Columns]:
    """The samples of all sources, several only where they are paired by chance, and which columns of the table are what."""
    if not paths:
        return [digits()], columns
    tables = [Path(path) for path in paths if is_table(Path(path))]
    if len(tables) > 1:
        raise ValueError(f"{tables[0]} and {tables[1]}: one table is read: join them into one, a row a sample.")
    if not tables and columns != Columns():
        raise ValueError(f"columns are named ({', '.join(sorted(columns.named()))}), but no table is given: give a .csv.")
    if tables and pair == "chance":
        raise ValueError(f"{tables[0]}: the rows of a table pair its samples: leave --pair chance out.")
    several: list[Samples] = []
    for path, kind in zip(paths, kinds, strict=True):
        if Path(path) not in tables:
            several.append(alone(read(path, kind), [name for one in several for name in one.branches]))
    if tables:
        own, columns = samples_of(tables[0], columns, several)
        if own.tasks:  # what the table says of a sample counts, not the folder that its image is in
            several = [one.chosen(slice(None), tasks={}, targets={}) for one in several]
        several.append(own)
    if pair == "sample" and len(several) > 1:
        several = [joined(several)]
    return several, columns


def check_window(window: Sequence[float] | None, several: Sequence[Samples]) -> Window | None:
    """A window as two numbers; a `ValueError` unless low < high, and a source has volumes."""
    if window is None:
        return None
    if len(window) != 2 or not -math.inf < window[0] < window[1] < math.inf:
        raise ValueError(f"load expected window as two numbers, low < high, got {window!r}.")
    branches = [branch for one in several for branch in one.branches.values()]
    if not any(isinstance(branch, Collection) and branch.deep for branch in branches):
        raise ValueError("window is of the values of volumes, but no source has any: leave it out.")
    return float(window[0]), float(window[1])


def check_load(paths: Any, kinds: Sequence[str | None] | None, size: int | None, seed: int) -> None:
    """Raise a `ValueError` unless these are arguments of `load`."""
    for name, value, least in (("size", size, 1), ("seed", seed, 0)):
        if not (name == "size" and value is None) and (type(value) is not int or value < least):
            raise ValueError(f"load expected {name} to be an integer >= {least}, got {value!r}.")
    if isinstance(paths, str | Path):
        raise ValueError(f"load expected a list of paths, one for each branch, got {paths!r}: write [{str(paths)!r}].")
    if kinds is not None and len(kinds) != len(paths):
        raise ValueError(f"load expected a kind or None for each of {len(paths)} paths, got {list(kinds)}.")
    if not paths and size and size % 2:
        raise ValueError(f"load expected an even size for the halves of the digits, got {size}.")
