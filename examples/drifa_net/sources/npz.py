"""An archive of one's own."""

from pathlib import Path

import numpy as np

from examples.drifa_net.sources.collection import Collection

GROUP_KEYS = ("lesion_id", "slide", "group")


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an archive by their names; a `ValueError` if it is damaged, or no archive of plain arrays."""
    try:
        with path.open("rb") as file:
            archive = np.load(file)
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # of many kinds, by NumPy, zip and zlib
        raise ValueError(f"{path} is no npz archive of plain arrays, or is damaged: write it with numpy.savez.") from error


def read(path: Path) -> Collection:
    """An archive of decoded images."""
    arrays = arrays_of(path)

    def need(true: bool, what: str) -> None:
        if not true:
            raise ValueError(f"npz: {path} {what}.")

    for name in ("images", "labels", "classes"):
        need(name in arrays, f"has no array {name!r}, only {sorted(arrays)}: it needs images, labels and classes")
    images, labels, classes = (arrays[name] for name in ("images", "labels", "classes"))
    shape = images.shape
    right = images.dtype == np.uint8 and (images.ndim == 3 or (images.ndim == 4 and shape[3] == 3)) and 0 not in shape
    need(right, f"needs images (n, h, w) or (n, h, w, 3) of uint8, got {shape} of {images.dtype}")
    need(labels.dtype.kind in "iu" and labels.shape == shape[:1], f"needs an integer label for each of its {shape[0]} images")
    need(classes.ndim == 1, f"needs classes to list their names, got {classes!r}")
    need(0 <= labels.min() <= labels.max() < len(classes), f"has labels beyond its {len(classes)} classes")
    names = tuple(map(str, classes))
    need(len(set(names)) == len(names) > 1, f"needs at least two classes of different names, got {', '.join(names) or 'none'}")
    key = next((name for name in GROUP_KEYS if name in arrays), None)
    groups, split = arrays.get(key or ""), arrays.get("split")
    need(groups is None or groups.shape == labels.shape, f"needs one {key!r} an image")
    if groups is not None and key == "slide":
        groups = np.array([f"{classes[label]}/{slide}" for label, slide in zip(labels, groups, strict=True)])
    if split is not None:
        need(split.shape == labels.shape and set(np.unique(split)) <= {0, 1, 2}, "needs split 0, 1 or 2 for each image")
    samples = arrays.get("sample")
    need(samples is None or samples.shape == labels.shape, "needs one 'sample' an image")
    samples = None if samples is None else samples.astype(str)
    return Collection(path.stem, path, images, labels.astype(np.int64), names, groups, split, names=samples)
