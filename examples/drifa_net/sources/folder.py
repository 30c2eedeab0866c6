"""A folder of one's own: an image folder a class, as torchvision's `ImageFolder` takes it, or images without labels.

Volumes stand for images: NIfTI files, or a folder for each DICOM series.
"""

from pathlib import Path

import numpy as np

from examples.drifa_net.sources.collection import (
    UNLABELLED,
    Collection,
    by_class,
    pictures,
    pictures_below,
    visible,
    volumes_below,
)
from examples.drifa_net.sources.volumes import check_volumes

PARTS = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "test": 2, "testing": 2}


def held(folder: Path) -> list[Path]:
    """The images below a folder, or its volumes; a `ValueError` if it has both."""
    images, volumes = pictures_below(folder), volumes_below(folder)
    if volumes:
        check_volumes([*volumes, *images])
    return volumes or images


def read(root: Path) -> Collection:
    """The images below each folder are a class of that name; folders train, val and test around them are a split."""
    folders = [path for path in visible(root) if path.is_dir() and held(path)]
    if not folders:
        return unlabelled(root)
    if {path.name.lower() for path in folders} <= set(PARTS):
        return split_by_folder(root, folders)
    if loose := pictures(root) or [path for path in volumes_below(root) if path.parent == root and path.is_file()]:
        raise ValueError(
            f"folder: {root} has images beside its class folders, the first {loose[0].name}: put each into the folder of its "
            "class, or all into one folder without classes."
        )
    return by_class(root.resolve().name, root, {path.name: held(path) for path in folders})


def split_by_folder(root: Path, parts: list[Path]) -> Collection:
    """The classes of several parts, and which part each image is in."""
    files: dict[str, list[Path]] = {}
    places: dict[str, list[int]] = {}
    for part in parts:
        for label in (path for path in visible(part) if path.is_dir()):
            found = held(label)
            files.setdefault(label.name, []).extend(found)
            places.setdefault(label.name, []).extend([PARTS[part.name.lower()]] * len(found))
    if not files:
        raise ValueError(f"folder: {root} has no class folders in {', '.join(part.name for part in parts)}.")
    names = sorted(files)
    return by_class(
        root.resolve().name, root, {name: files[name] for name in names}, split=np.array(sum((places[n] for n in names), []))
    )


def unlabelled(root: Path) -> Collection:
    """Images that have no class: those of a table, or those to be told."""
    images = pictures(root) or held(root)
    return Collection(root.resolve().name, root, images, np.full(len(images), UNLABELLED), ())
