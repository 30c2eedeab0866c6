"""Training, validation and test images of a collection: groups stay together, and no image is in two of them."""

import warnings

import numpy as np
from PIL import Image
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from examples.drifa_net.sources import Collection

SPLITS = ("train", "validation", "test")
TEST_FOLDS = 5  # one of them is for testing
VALIDATION_FOLDS = 8  # of the rest; one of them is for validation
THUMBNAIL = 32
SAME = 2  # of 255: images whose grey thumbnails differ nowhere by more show the same


def divide(collection: Collection, seed: int) -> np.ndarray:
    """The split of each image: 0 train, 1 validation, 2 test; the publisher's stays, and gets a validation if it has none."""
    for number, label in enumerate(collection.classes):
        places = np.flatnonzero(collection.labels == number)
        if len(places) < len(SPLITS):
            raise ValueError(
                f"{collection.name}: class {label!r} of {collection.source} has but {len(places)} of at least {len(SPLITS)} "
                f"images ({', '.join(map(collection.where, places)) or 'none'}): add some, or take the class out."
            )
    split = np.zeros(len(collection), np.int64) if collection.split is None else collection.split.astype(np.int64)
    if collection.split is not None and not {0, 2} <= set(split.tolist()):
        raise ValueError(f"{collection.name}: the split of {collection.source} needs images of 0 (train) and 2 (test).")
    if collection.split is None:
        draw(collection, split, 2, TEST_FOLDS, seed)
    if not (split == 1).any():
        draw(collection, split, 1, VALIDATION_FOLDS, seed)
    return split


def draw(collection: Collection, split: np.ndarray, part: int, folds: int, seed: int) -> None:
    """Move one of so many stratified folds of the training images to a part: the first with all classes on both sides."""
    training = np.flatnonzero(split == 0)
    labels = collection.labels[training]
    groups = None if collection.groups is None else collection.groups[training]
    everything, grouped = len(collection.classes), groups is not None
    kind = StratifiedGroupKFold if grouped else StratifiedKFold
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of classes smaller than the number of folds: the loop below looks at them
            for kept, moved in kind(folds, shuffle=True, random_state=seed).split(training, labels, groups):
                if len(np.unique(labels[kept])) == everything == len(np.unique(labels[moved])):
                    split[training[moved]] = part
                    return
            reason = "no fold has all classes on both sides"
    except ValueError as error:  # scikit-learn's, of fewer images than folds
        reason = str(error)
    count, fewest = min(zip(np.bincount(labels, minlength=everything), collection.classes, strict=True))
    raise ValueError(
        f"{collection.name}: {collection.source} cannot give one of {folds} parts to {SPLITS[part]} ({reason}); its smallest "
        f"class here, {fewest!r}, has {count} images: add some{' of other groups' if grouped else ''}, or take the class out."
    )


def drop_duplicates(collection: Collection, split: np.ndarray) -> dict[str, int]:
    """Mark as −1 what shows the same as an image of an earlier split, or earlier in its own; their numbers. It decodes all."""
    thumbnails = np.stack([thumbnail(collection, i) for i in range(len(collection))])
    dropped = {}
    for part in (1, 2):
        before, images = np.flatnonzero((split >= 0) & (split < part)), np.flatnonzero(split == part)
        known = same_as(thumbnails[images], thumbnails[before])
        known |= same_as(thumbnails[images], thumbnails[images], earlier=True)
        split[images[known]] = -1
        dropped[SPLITS[part]] = int(known.sum())
    return dropped


def thumbnail(collection: Collection, i: int) -> np.ndarray:
    """Image i in small and grey, as a vector."""
    image = collection.open(i, "L", at_least=2 * THUMBNAIL)
    return np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX), np.float32).ravel() - 127.5


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


def check_classes(collection: Collection, split: np.ndarray) -> None:
    """Raise a `ValueError` unless each split has images of each class."""
    for part, key in enumerate(SPLITS):
        absent = set(range(len(collection.classes))) - set(collection.labels[split == part].tolist())
        if absent:
            raise ValueError(
                f"{collection.name}: the {key} split of {collection.source} has no image of class "
                f"{collection.classes[min(absent)]!r} once duplicates are dropped: add images, or take the class out."
            )
