"""Modalities of the same samples, as the comparison takes them: what is read, and who trains, chooses and tests."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from examples.drifa_net.data import IGNORE
from examples.drifa_net.sources import npz
from examples.missing_modalities import read as read_views

from .branches import Branch, first_half

PARTS = ("train", "validation", "test")
NUMBERS, CATEGORIES = ("age",), ("sex", "localization")  # of a clinical record
VALIDATION, TEST = 0.2, 0.25  # shares where an archive does not say: of all samples, and of the others


@dataclass
class View:
    """One modality of all samples.

    Attributes:
        values: `n s ...`, s versions of each sample, such as an image and its mirror image; the first is the sample itself.
        branch: what reads it.
        scaled: whether it is to be standardised by the samples that are trained on.
    """

    values: Tensor
    branch: Branch
    scaled: bool = False


@dataclass
class Part:
    """Some samples: the row of each in every view that they have, and its class, or IGNORE, in every task."""

    rows: dict[str, Tensor]
    labels: dict[str, Tensor]

    def __getitem__(self, chosen: Tensor) -> "Part":
        return Part(
            {view: rows[chosen] for view, rows in self.rows.items()}, {task: x[chosen] for task, x in self.labels.items()}
        )

    def __len__(self) -> int:
        return len(next(iter(self.labels.values())))


@dataclass
class Collection:
    """Modalities and tasks; `divide` gives the parts of a seed, of which validation and test never share a sample.

    Where the parts of all seeds are the same, seeds differ in the training samples that they draw.
    """

    name: str
    what: str  # it is, in a sentence
    tasks: dict[str, tuple[str, ...]]
    views: dict[str, View]
    divide: Callable[[int], dict[str, Part]] = field(repr=False)


def paired(rows: Tensor, views: Sequence[str], task: str, labels: Tensor) -> Part:
    """These samples, of which every view has the same row."""
    return Part(dict.fromkeys(views, rows), {task: labels[rows]})


def divided(labels: Tensor, views: Sequence[str], task: str, tested: tuple[Tensor, Sequence[str]] | None = None) -> Callable:
    """How samples without a split are divided, stratified by class.

    Validation is a fifth of them, the same for all seeds, and the rest is divided into training and test anew by each seed.
    Where there are samples to test on, and the views that they have, a fifth of the others is drawn anew by each seed instead.
    """
    some = torch.arange(len(labels)) if tested is None else torch.arange(int(tested[0][0]))

    def split(rows: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
        first, second = train_test_split(rows.numpy(), test_size=share, stratify=labels[rows], random_state=seed)
        return torch.from_numpy(first), torch.from_numpy(second)

    def divide(seed: int) -> dict[str, Part]:
        if tested is None:
            rest, validation = split(some, VALIDATION, 0)
            train, test = split(rest, TEST, seed)
            return {
                name: paired(rows, views, task, labels) for name, rows in zip(PARTS, (train, validation, test), strict=True)
            }
        train, validation = split(some, VALIDATION, seed)
        held = {"validation": validation, "test": tested[0]}
        return {"train": paired(train, views, task, labels)} | {
            name: paired(rows, tested[1], task, labels) for name, rows in held.items()
        }

    return divide


def digits() -> Collection:
    """scikit-learn's 1797 scanned digits in two halves of 8x4 pixels: what `--quick` runs on."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 1, 8, 8) / 8 - 1
    halves = {"left": images[..., :4], "right": images[..., 4:]}
    views = {name: View(half.contiguous(), Branch("map", (1, 8, 4))) for name, half in halves.items()}
    what = "Scanned digits of scikit-learn; the left and the right half of each are its two modalities."
    divide = divided(torch.from_numpy(labels), list(views), "digit")
    return Collection("digits", what, {"digit": tuple(map(str, range(10)))}, views, divide)


def vectors(path: Path, names: Sequence[str] | None) -> Collection:
    """An archive of views: `labels` and a view `n features` a name, or `train_…` and `test_…` of each."""
    samples, test = read_views(path, names)
    labels = torch.from_numpy(samples.labels if test is None else np.concatenate([samples.labels, test.labels]))
    views = {}
    for name, view in samples.views.items():
        rows = [view] if test is None else [view, test.views.get(name, np.full((len(test.labels), view.shape[1]), np.nan, "f"))]
        views[name] = View(torch.from_numpy(np.concatenate(rows))[:, None], Branch("vector", view.shape[1:]), scaled=True)
    tested = None
    if test is not None:
        tested = torch.arange(len(samples.labels), len(labels)), list(test.views)
    what = (
        f"Views {', '.join(f'{name} ({view.branch.shape[0]} features)' for name, view in views.items())} of the same samples."
    )
    if tested and (absent := [name for name in views if name not in tested[1]]):
        what += f" The test samples have no {' and no '.join(absent)}: rates are chosen without it too."
    tasks = {"class": tuple(map(str, range(int(labels.max()) + 1)))}
    return Collection(path.stem, what, tasks, views, divided(labels, list(views), "class", tested))


def record(path: Path, arrays: dict[str, np.ndarray], train: np.ndarray) -> Tensor:
    """The clinical record of each sample, `n 1 features`: numbers standardised, unknown ones marked; one of each category."""
    columns = []
    for name in (*NUMBERS, *CATEGORIES):
        if name not in arrays or arrays[name].shape != train.shape:
            raise ValueError(f"{path} has no {name!r} for each image: a record needs {', '.join((*NUMBERS, *CATEGORIES))}.")
        values = arrays[name]
        if name in NUMBERS:
            known = np.isfinite(values.astype(float))
            some = values[known & train].astype(float)
            scaled = np.where(known, (values - some.mean()) / (some.std() + 1e-6), 0)
            columns += [scaled[:, None], ~known[:, None]]
        else:
            columns.append(values[:, None] == np.unique(values))
    return torch.from_numpy(np.concatenate(columns, 1).astype(np.float32))[:, None]


def fixed(found: npz.Collection, path: Path) -> dict[str, Tensor]:
    """The rows of each part of an archive of images."""
    if found.split is None:
        raise ValueError(f"{path} has no array 'split': it says 0, 1 or 2 (train, validation, test) for each image.")
    return {name: torch.from_numpy(np.flatnonzero(found.split == part)) for part, name in enumerate(PARTS)}


def frozen(found: npz.Collection) -> View:
    """The images of an archive, as the second half of the pretrained network reads them."""
    pixels = torch.from_numpy(np.asarray(found.images))
    pixels = pixels[..., None].expand(-1, -1, -1, 3) if pixels.ndim == 3 else pixels
    values = first_half(pixels)
    return View(values, Branch("frozen", tuple(values.shape[2:])))


def images_and_records(path: Path) -> Collection:
    """An archive of images (`images`, `labels`, `classes`, `split`) with `age`, `sex` and `localization` of each."""
    found, arrays = npz.read(path), npz.arrays_of(path)
    parts = fixed(found, path)
    values = record(path, arrays, found.split == 0)
    views = {"image": frozen(found), "record": View(values, Branch("vector", (values.shape[2],)))}
    labels = torch.from_numpy(found.labels)
    divide = {name: paired(rows, list(views), "class", labels) for name, rows in parts.items()}
    what = f"An image and a record ({', '.join((*NUMBERS, *CATEGORIES))}; {values.shape[2]} numbers) of each sample."
    return Collection(path.stem, what, {"class": tuple(found.classes)}, views, lambda seed: divide)


def pairs(paths: Sequence[Path]) -> Collection:
    """Archives of images of different patients, each a task: paired by chance, so that no view knows of another's task.

    In training every seed pairs anew, and an epoch is as long as the smallest. Elsewhere each image counts once: where a
    collection runs out before the longest, its images are partners once more, and their labels IGNORE.
    """
    found = {path.stem: npz.read(path) for path in paths}
    if len(found) < len(paths):
        raise ValueError(f"--data has two archives of one name, {', '.join(path.name for path in paths)}: rename one.")
    parts = {name: fixed(one, path) for (name, one), path in zip(found.items(), paths, strict=True)}
    labels = {name: torch.from_numpy(one.labels) for name, one in found.items()}

    def divide(seed: int) -> dict[str, Part]:
        made = {}
        for part in PARTS:
            chance = torch.Generator().manual_seed(seed if part == "train" else 0)
            rows = {name: own[part][torch.randperm(len(own[part]), generator=chance)] for name, own in parts.items()}
            length = (min if part == "train" else max)(map(len, rows.values()))
            again = {name: torch.arange(length) % len(own) for name, own in rows.items()}
            classes = {
                name: torch.where(torch.arange(length) < len(own), labels[name][own[again[name]]], IGNORE)
                for name, own in rows.items()
            }
            made[part] = Part({name: own[again[name]] for name, own in rows.items()}, classes)
        return made

    what = f"Images of {' and '.join(found)}, of different patients and paired by chance; each has a task of its own."
    tasks = {name: tuple(one.classes) for name, one in found.items()}
    return Collection("+".join(found), what, tasks, {name: frozen(one) for name, one in found.items()}, divide)


def read(paths: Sequence[Path], names: Sequence[str] | None = None) -> Collection:
    """The collection in these archives; without one, the digits. `names` are the views to use of an archive of views."""
    for path in paths:
        if path.is_dir():
            raise ValueError(f"{path} is a folder: the comparison reads npz archives.")
    has_images = [("images" in npz.arrays_of(path)) for path in paths]
    if names and (len(paths) != 1 or any(has_images)):
        raise ValueError("--views is for one archive of views.")
    if not paths:
        return digits()
    if len(paths) > 1:
        return pairs(paths)
    return images_and_records(paths[0]) if has_images[0] else vectors(paths[0], names)


def check(collection: Collection, batch: int) -> None:
    """Raise a `ValueError` unless a batch can be trained on, and each part has every class of each task."""
    parts = collection.divide(0)
    if len(parts["train"]) < batch:
        raise ValueError(f"{collection.name} has {len(parts['train'])} samples to train on, and a batch needs {batch}.")
    for name, part in parts.items():
        for task, classes in collection.tasks.items():
            missing = set(range(len(classes))) - set(part.labels[task].tolist())
            if missing:
                raise ValueError(f"the {name} samples of {collection.name} have none of class {classes[min(missing)]!r}.")
