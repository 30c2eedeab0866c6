"""Collections of images as DRIFA-Net takes them: split, cleaned, augmented, one image a branch; `sources/` reads them.

`load` reads one collection a branch and makes one task of each, or, given none, scikit-learn's digits: two views, two tasks.

Splits are the publisher's where there are any. Else a fifth of the images is for testing and an eighth of the others for
validation, stratified by class, with no lesion or slide in two of them. What shows the same as a training image, to within
rounding, is dropped from validation and test, and so is what shows the same as another image there. Augmentation is for
training alone.

Collections have no patients in common, but the network wants an image for each branch: they are paired by chance, again in
every epoch. In validation and test each image is counted once, for its own task. Where a collection runs out before the other,
images of it are drawn again as partners, from the same split, and their labels are not counted again. So no metric sees an
image twice, and none says anything of what one modality tells about a patient of the other.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from examples.drifa_net.augmentation import Augmentation, augment_in, shift
from examples.drifa_net.sources import Collection, halves, read
from examples.drifa_net.splits import SPLITS, check_classes, divide, drop_duplicates

SIZE, DIGITS_SIZE = 128, 32
IGNORE = -100  # the target of an image whose label is counted elsewhere; what `cross_entropy` and `TaskLoss` leave out


class Images(Dataset[Tensor]):
    """Some images of a collection as `3 h w` uint8, decoded on demand and, if `cache`, once (a copy in each worker)."""

    def __init__(self, collection: Collection, chosen: np.ndarray, size: tuple[int, int], *, cache: bool = False) -> None:
        self.collection, self.chosen, self.size = collection, chosen, size
        self.cached: dict[int, Tensor] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i: int) -> Tensor:
        if self.cached is None:
            return self.collection.image(self.chosen[i], self.size)
        if i not in self.cached:
            self.cached[i] = self.collection.image(self.chosen[i], self.size)
        return self.cached[i]


class Pairs(Dataset[tuple[list[Tensor], Tensor]]):
    """One image a branch and one target a task, for one split.

    It has the length of the longest branch and an order of its own, drawn from `seed` and, in training, the epoch: a DataLoader
    takes it with `shuffle=False`, and a run resumed within an epoch skips what it has seen. In training every target counts; an
    epoch has each image of the longest branch once and those of the others as evenly as can be. Otherwise each image's target
    is there once, and IGNORE where the image is a partner only: a batch may have none of a task.

    Args:
        images: the images of each branch.
        labels: of each task, `n` classes: of the branch of that number, or of the sample if `paired`.
        seed: of order, pairing and augmentation, >= 0.
        training: whether epochs differ and images repeat as their targets do.
        paired: whether image i of all branches is one sample.
        augmentation: of `3 h w` in [-1, 1] with a generator of its own for epoch, item and branch; None for none.

    Shape: item i -> images, a list of m `3 h w` float32 in [-1, 1], and targets `k` int64.
    Raises: ValueError: no image in a branch, or as many labels as do not fit.
    """

    def __init__(
        self,
        images: Sequence[Images],
        labels: Sequence[np.ndarray],
        *,
        seed: int,
        training: bool = False,
        paired: bool = False,
        augmentation: Augmentation | None = None,
    ) -> None:
        sizes = [len(branch) for branch in images]
        expected = [sizes[0]] * len(labels) if paired and len(set(sizes)) == 1 else sizes
        if not all(sizes) or [len(task) for task in labels] != expected:
            raise ValueError(
                f"Pairs expected a label for each image, got {[len(t) for t in labels]} labels for {sizes} images."
            )
        self.images, self.labels, self.seed, self.training, self.paired = images, labels, seed, training, paired
        self.augmentation = augmentation
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the order, pairing and augmentation of an epoch (in training), before the loader's workers are started."""
        self.epoch = epoch if self.training else 0
        draw = np.random.default_rng([self.seed, self.epoch])
        sizes, length = [len(branch) for branch in self.images], len(self)
        if self.paired:
            order = np.tile(draw.permutation(length)[:, None], len(sizes))
            targets = np.stack([task[order[:, 0]] for task in self.labels], 1)
        else:
            rounds = [np.concatenate([draw.permutation(n) for _ in range(-(-length // n))])[:length] for n in sizes]
            order, columns = np.stack(rounds, 1), []
            for task, chosen in zip(self.labels, rounds, strict=True):
                counted = self.training | (np.arange(length) < len(task))
                columns.append(np.where(counted, task[chosen], IGNORE))
            targets = np.stack(columns, 1)
        self.order, self.targets = order, torch.from_numpy(targets.astype(np.int64))

    def __len__(self) -> int:
        return max(len(branch) for branch in self.images)

    def __getitem__(self, i: int) -> tuple[list[Tensor], Tensor]:
        images = [branch[j].float() / 127.5 - 1 for branch, j in zip(self.images, self.order[i].tolist(), strict=True)]
        if self.augmentation is not None:
            for b, image in enumerate(images):
                seed = np.random.SeedSequence([self.seed, self.epoch, i % len(self), b]).generate_state(1)[0]
                images[b] = self.augmentation(image, Generator().manual_seed(int(seed)))
        return images, self.targets[i]


@dataclass(frozen=True)
class Data:
    """What a run trains on; printed, it says what was read, how it was split and what was dropped.

    `branches` are names; `tasks` name the classes of each column of the targets; `report` goes into a run's JSON.
    """

    branches: tuple[str, ...]
    tasks: dict[str, tuple[str, ...]]
    train: Pairs
    validation: Pairs
    test: Pairs
    report: dict[str, Any]

    @property
    def heads(self) -> tuple[int, ...]:
        """The classes of each task, as DrifaNet takes them."""
        return tuple(len(classes) for classes in self.tasks.values())

    def __str__(self) -> str:
        lines = []
        for name, branch in self.report["branches"].items():
            counts = ", ".join(f"{split} {sum(classes.values())}" for split, classes in branch["images"].items())
            lines.append(f"{name}: {counts}; {branch['size'][0]}x{branch['size'][1]} px; split {branch['split']}")
            dropped = " and ".join(f"{count} of {split}" for split, count in branch["duplicates"].items() if count)
            lines += [f"  dropped as duplicates: {dropped}"] if dropped else []
            lines += [f"  {note}" for note in branch["notes"]]
        return "\n".join(lines)


def load(
    paths: Sequence[str | Path] = (),
    *,
    kinds: Sequence[str | None] | None = None,
    size: int | None = None,
    seed: int = 0,
    augmentation: bool = True,
    cache: bool = True,
) -> Data:
    """Read a collection for each branch, or the digits in two halves where no path is given.

    Every image is looked at once, in small, to find duplicates and unreadable files; decoding for training is done on demand.

    Args:
        paths: a folder or an .npz for each branch; each is a task.
        kinds: what is there, as keys of `sources.READERS`; None to find out.
        size: height and width of the images, >= 1; None for an archive's own, else 128, and 32 for the digits, whose halves are
            `size` high and half as wide (an even size).
        seed: of splits, pairing and augmentation, >= 0.
        augmentation: whether training images are flipped, turned and shifted (digits: shifted).
        cache: whether images stay decoded, at 3 · size² bytes each.

    Raises: FileNotFoundError, ValueError: something of a collection is missing or not what it should be.
    """
    check_load(paths, kinds, size, seed)
    if not paths:
        return digits(size or DIGITS_SIZE, seed, augmentation, cache)
    branches = collections(paths, kinds or [None] * len(paths))
    report: dict[str, Any] = {"seed": seed, "pairing": "by chance", "branches": {}}
    parts: dict[str, list[tuple[Images, np.ndarray]]] = {split: [] for split in SPLITS}
    for name, collection in branches.items():
        own = collection.images.shape[1:3] if isinstance(collection.images, np.ndarray) else (SIZE, SIZE)
        shape = (size, size) if size else own
        split = divide(collection, seed)
        dropped = drop_duplicates(collection, split)
        check_classes(collection, split)
        report["branches"][name] = describe(collection, split, shape, dropped)
        for part, key in enumerate(SPLITS):
            chosen = np.flatnonzero(split == part)
            parts[key].append((Images(collection, chosen, shape, cache=cache), collection.labels[chosen]))
    pairs = {
        key: Pairs(
            *zip(*parts[key], strict=True), seed=seed, training=key == "train", augmentation=augment_in(key, augmentation)
        )
        for key in SPLITS
    }
    return Data(tuple(branches), {name: c.classes for name, c in branches.items()}, **pairs, report=report)


def check_load(paths: Any, kinds: Sequence[str | None] | None, size: int | None, seed: int) -> None:
    """Raise a `ValueError` unless these are arguments of `load`."""
    for name, value, least in (("size", size, 1), ("seed", seed, 0)):
        if not (name == "size" and value is None) and (type(value) is not int or value < least):
            raise ValueError(f"load expected {name} to be an integer >= {least}, got {value!r}.")
    if isinstance(paths, str | Path):
        raise ValueError(f"load expected a list of paths, one for each branch, got {paths!r}: write [{str(paths)!r}].")
    if kinds is not None and len(kinds) != len(paths):
        raise ValueError(f"load expected a kind or None for each of {len(paths)} paths, got {list(kinds)}.")


def collections(paths: Sequence[str | Path], kinds: Sequence[str | None]) -> dict[str, Collection]:
    """The collections by name; one that is given twice gets a number."""
    branches: dict[str, Collection] = {}
    for path, kind in zip(paths, kinds, strict=True):
        collection = read(path, kind)
        times = sum(other.name == collection.name for other in branches.values())
        branches[f"{collection.name}-{times + 1}" if times else collection.name] = collection
    return branches


def digits(size: int, seed: int, augmentation: bool, cache: bool) -> Data:
    """Scikit-learn's digits: left and right halves of each, told apart as digits and as even or odd."""
    if size % 2:
        raise ValueError(f"load expected an even size for the halves of the digits, got {size}.")
    left, right, parity = halves()
    shape, split, pairs = (size, size // 2), divide(left, seed), {}
    for part, key in enumerate(SPLITS):
        chosen = np.flatnonzero(split == part)
        images = [Images(view, chosen, shape, cache=cache) for view in (left, right)]
        labels = [left.labels[chosen], parity[chosen]]
        moved = shift if augmentation and key == "train" else None
        pairs[key] = Pairs(images, labels, seed=seed, training=key == "train", paired=True, augmentation=moved)
    described = {view.name: describe(view, split, shape, {}) for view in (left, right)}
    report = {"seed": seed, "pairing": "two views of each sample", "branches": described}
    return Data(("left", "right"), {"digit": left.classes, "parity": ("even", "odd")}, **pairs, report=report)


def describe(collection: Collection, split: np.ndarray, shape: tuple[int, int], dropped: dict[str, int]) -> dict[str, Any]:
    """What a run's JSON says of a branch."""
    counts = {
        key: dict(zip(collection.classes, np.bincount(collection.labels[split == part]).tolist(), strict=True))
        for part, key in enumerate(SPLITS)
    }
    drawn = "by class" if collection.groups is None else "by class and group"
    kept = (
        drawn
        if collection.split is None
        else "the publisher's"
        if 1 in collection.split
        else "the publisher's, validation drawn"
    )
    source = "scikit-learn" if collection.source is None else collection.source.name
    notes = list(collection.notes)
    if collection.groups is not None:
        homes = {(group, part) for group, part in zip(collection.groups.tolist(), split.tolist(), strict=True) if part >= 0}
        if leaks := sum(parts > 1 for parts in Counter(group for group, _ in homes).values()):
            notes.append(f"the publisher's split has {leaks} groups in more than one part")
    return {"source": source, "size": list(shape), "split": kept, "images": counts, "duplicates": dropped, "notes": notes}
