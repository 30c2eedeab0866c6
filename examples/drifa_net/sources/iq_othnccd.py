"""IQ-OTH/NCCD: CT slices of the lung, grouped by blocks of file numbers."""

import re
from pathlib import Path

import numpy as np

from examples.drifa_net.sources.collection import Collection, by_class, pictures, visible

FOLDERS = {
    "benign": ("bengin cases", "benign cases"),  # as published, and as it is spelt
    "malignant": ("malignant cases",),
    "normal": ("normal cases",),
}
BLOCK = 10  # neighbouring file numbers that are taken for slices of one patient


def folder_of(root: Path, names: tuple[str, ...]) -> Path | None:
    """The folder of a class, under any of its names."""
    return next((path for path in visible(root) if path.is_dir() and path.name.lower() in names), None)


def marks(root: Path) -> list[Path]:
    """What in a folder tells this collection."""
    return [folder for names in FOLDERS.values() if (folder := folder_of(root, names)) is not None]


def read(root: Path) -> Collection:
    """IQ-OTH/NCCD: a folder a class, its slices numbered in the order of the patients; what is beside is left out."""
    folders = {label: folder_of(root, names) for label, names in FOLDERS.items()}
    if missing := [label for label, folder in folders.items() if folder is None]:
        raise FileNotFoundError(f"iq_othnccd: {root}/{missing[0].title()} cases/ is missing: unpack the whole archive.")
    files = {label: pictures(folder) for label, folder in folders.items()}
    blocks = [f"{label}/{number_of(path) // BLOCK}" for label, paths in files.items() for path in paths]
    notes = [f"patients are not known: blocks of {BLOCK} neighbouring file numbers stay together"]
    if beside := [path.name for path in visible(root) if path.is_dir() and path not in folders.values()]:
        notes.append(f"left out: {', '.join(beside)}")
    return by_class("iq_othnccd", root, files, groups=np.array(blocks), notes=tuple(notes))


def number_of(path: Path) -> int:
    """The number in a slice's name, from 0."""
    found = re.findall(r"\d+", path.stem)
    if not found:
        raise ValueError(f"iq_othnccd: {path} has no number in its name, so its neighbours are unknown: rename or delete it.")
    return int(found[-1]) - 1
