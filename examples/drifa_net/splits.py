"""Training, validation and test images of a collection: groups stay together, and no image is in two of them."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from examples.drifa_net.samples import Samples

SPLITS = ("train", "validation", "test")
TEST_FOLDS = 5  # one of them is for testing
VALIDATION_FOLDS = 8  # of the rest; one of them is for validation
SAME = 2  # of 255: images whose grey thumbnails differ nowhere by more show the same


def divide(samples: Samples, seed: int) -> np.ndarray:
    """The split of each image: 0 train, 1 validation, 2 test; the publisher's stays, and gets a validation if it has none."""
    for number, label in enumerate(samples.classes):
        places = np.flatnonzero(samples.labels == number)
        if len(places) < len(SPLITS):
            raise ValueError(
                f"{samples.name}: class {label!r} of {samples.source} has but {len(places)} of at least {len(SPLITS)} "
                f"images ({', '.join(map(samples.where, places)) or 'none'}): add some, or take the class out."
            )
    split = np.zeros(len(samples), np.int64) if samples.split is None else samples.split.astype(np.int64)
    if samples.split is not None and not {0, 2} <= set(split.tolist()):
        raise ValueError(f"{samples.name}: the split of {samples.source} needs images of 0 (train) and 2 (test).")
    if samples.split is None:
        draw(samples, split, 2, TEST_FOLDS, seed)
    if not (split == 1).any():
        draw(samples, split, 1, VALIDATION_FOLDS, seed)
    return split


def draw(samples: Samples, split: np.ndarray, part: int, folds: int, seed: int) -> None:
    """Move one of so many stratified folds of the training images to a part: the first with all classes on both sides."""
    training = np.flatnonzero(split == 0)
    labels = samples.labels[training]
    groups = None if samples.groups is None else samples.groups[training]
    everything, grouped = len(samples.classes), groups is not None
    kind = StratifiedGroupKFold if grouped else StratifiedKFold
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of classes smaller than the number of folds: the loop below looks at them
            for count in range(folds, folds // 2, -1) if grouped else [folds]:  # few groups may need a larger part
                for kept, moved in kind(count, shuffle=True, random_state=seed).split(training, labels, groups):
                    if len(np.unique(labels[kept])) == everything == len(np.unique(labels[moved])):
                        split[training[moved]] = part
                        return
        reason = "no fold has all classes on both sides"
    except ValueError as error:  # scikit-learn's, of fewer images than folds
        reason = str(error)
    count, fewest = min(zip(np.bincount(labels, minlength=everything), samples.classes, strict=True))
    raise ValueError(
        f"{samples.name}: {samples.source} cannot give one of {folds} parts to {SPLITS[part]} ({reason}); its smallest "
        f"class here, {fewest!r}, has {count} images: add some{' of other groups' if grouped else ''}, or take the class out."
    )


def drop_duplicates(views: Sequence[tuple[np.ndarray, np.ndarray]], split: np.ndarray) -> dict[str, dict[str, list[int]]]:
    """Mark as −1 what shows the same as an image of an earlier split, or earlier in its own.

    Args:
        views: of each branch of images, the samples that have one and their thumbnails `n t`.
        split: of each sample, 0, 1, 2, or −1 for none; changed.

    Returns: of validation and test, the samples that were dropped for an image in an earlier split ("leaked"), and others.
    """
    dropped = {}
    vectors = [(samples, thumbnails.astype(np.float32) - 127.5) for samples, thumbnails in views]
    for part in (1, 2):
        leaked, again = np.zeros(len(split), bool), np.zeros(len(split), np.int64)
        for samples, thumbnails in vectors:
            parts = split[samples]
            before, here = np.flatnonzero((parts >= 0) & (parts < part)), np.flatnonzero(parts == part)
            leaked[samples[here[same_as(thumbnails[here], thumbnails[before])]]] = True
            again[samples[here[same_as(thumbnails[here], thumbnails[here], earlier=True)]]] += 1
        again = (again > 0) & (again == len(vectors))  # of samples with several images, all of them
        split[leaked | again] = -1
        found = {"leaked": np.flatnonzero(leaked).tolist(), "repeated": np.flatnonzero(again & ~leaked).tolist()}
        dropped[SPLITS[part]] = found
    return dropped


def same_as(ours: np.ndarray, others: np.ndarray, *, earlier: bool = False) -> np.ndarray:
    """Which of our thumbnails differ nowhere by more than SAME from one of the others (or from an earlier one of ours)."""
    found = np.zeros(len(ours), bool)
    limit = ours.shape[1] * SAME**2 + 1e3  # of the squared distance that a product of matrices gives, with its rounding
    norms = (others**2).sum(1)
    for start in range(0, len(ours), 256):
        rows = ours[start : start + 256]
        distance = (rows**2).sum(1)[:, None] + norms - 2 * rows @ others.T
        for row, other in np.argwhere(distance <= limit):
            if not earlier or other < start + row:
                found[start + row] |= np.abs(rows[row] - others[other]).max() <= SAME
    return found


def drop_groups(groups: np.ndarray, split: np.ndarray) -> list[int]:
    """Mark as −1 the samples of validation and test whose group is in an earlier split too; their numbers."""
    first: dict[Any, int] = {}
    for part in range(len(SPLITS)):
        for group in set(groups[split == part].tolist()):
            first.setdefault(group, part)
    leaked = [
        i for i, (group, part) in enumerate(zip(groups.tolist(), split.tolist(), strict=True)) if part > first.get(group, 3)
    ]
    split[leaked] = -1
    return leaked


def check_leaks(samples: Samples, leaks: dict[str, list[int]], groups: list[int]) -> None:
    """Raise a `ValueError` that names and counts what a given split has in two parts, if it has anything."""
    said = []
    if groups:
        names = list(dict.fromkeys(str(samples.groups[i]) for i in groups))
        said.append(f"{len(names)} groups ({len(groups)} samples) in more than one part: {listed(names)}")
    for part, found in leaks.items():
        if found:
            names = [samples.where(i) for i in found]
            said.append(f"{len(found)} {part} images that show the same as one of an earlier part: {listed(names)}")
    if said:
        raise ValueError(f"{samples.name}: its split has {'; '.join(said)}. Mend it, or drop them by --leaks drop.")


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first few of these."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def check_classes(samples: Samples, split: np.ndarray) -> list[str]:
    """Raise a `ValueError` unless training has images of each class; what validation or test lacks is said."""
    notes = []
    for part, key in enumerate(SPLITS):
        for task, labels in samples.targets.items():
            found, classes = set(labels[split == part].tolist()), samples.tasks[task]
            absent = [label for number, label in enumerate(classes) if number not in found]
            if absent and (part == 0 or len(absent) == len(classes)):
                raise ValueError(
                    f"{samples.name}: the {key} split of {samples.source} has no image of class {absent[0]!r} of {task} once "
                    "duplicates are dropped: add images, or take the class out."
                )
            if absent:
                notes.append(f"{task}: {key} has no {listed(absent)}: metrics leave out what is absent")
    return notes
