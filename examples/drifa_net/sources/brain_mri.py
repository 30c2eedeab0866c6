"""Brain MRI of M. Nickparvar: tumours of the brain, in the publisher's split."""

from pathlib import Path

import numpy as np

from examples.drifa_net.sources.collection import Collection, by_class, pictures, visible

PARTS = {"training": ("training", "train"), "testing": ("testing", "test")}
CLASSES = ("glioma", "meningioma", "notumor", "no_tumor", "pituitary")


def part(root: Path, names: tuple[str, ...]) -> Path | None:
    """The folder of a part, under any of its names."""
    return next((path for path in visible(root) if path.is_dir() and path.name.lower() in names), None)


def classes_of(folder: Path) -> dict[str, Path]:
    """The class folders of a part by their names in lower case."""
    return {path.name.lower(): path for path in visible(folder) if path.is_dir()}


def marks(root: Path) -> list[Path]:
    """What in a folder tells this collection: a part with a class of it."""
    parts = [found for names in PARTS.values() if (found := part(root, names)) is not None]
    return [folder for folder in parts if any(name.startswith(CLASSES) for name in classes_of(folder))]


def read(root: Path) -> Collection:
    """Nickparvar's brain MRI: a folder a class below `Training`, and the same ones below `Testing`, which is the test set."""
    folders = {name: part(root, names) for name, names in PARTS.items()}
    if missing := [name for name, folder in folders.items() if folder is None]:
        raise FileNotFoundError(f"brain_mri: {root / missing[0].title()}/ is missing: unpack the whole archive.")
    training, testing = (classes_of(folder) for folder in folders.values())
    if training.keys() != testing.keys() or not training:
        odd = sorted(training.keys() ^ testing.keys())
        raise ValueError(f"brain_mri: {root}/Training and /Testing need the same class folders, only one has {odd or 'any'}.")
    files, split = {}, []
    for label in sorted(training):
        parts = [pictures(found[label]) for found in (training, testing)]
        files[label] = parts[0] + parts[1]
        split += [0] * len(parts[0]) + [2] * len(parts[1])
    notes = ("patients are not known: slices of one may be in several splits",)
    return by_class("brain_mri", root, files, split=np.array(split), notes=notes)
