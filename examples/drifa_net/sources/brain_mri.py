"""Nickparvar's brain MRI: tumours of the brain, in the publisher's split."""

from pathlib import Path

import numpy as np

from examples.drifa_net.sources.collection import Collection, by_class, pictures


def marks(root: Path) -> list[Path]:
    """What in a folder tells this collection."""
    return [path for path in (root / "Training", root / "Testing") if path.is_dir()]


def read(root: Path) -> Collection:
    """Nickparvar's brain MRI: a folder a class below `Training`, and the same ones below `Testing`, which is the test set."""
    for part in ("Training", "Testing"):
        if not (root / part).is_dir():
            raise FileNotFoundError(f"brain_mri: {root / part}/ is missing: unpack the whole archive.")
    training, testing = ({path.name for path in (root / part).iterdir() if path.is_dir()} for part in ("Training", "Testing"))
    if training != testing or not training:
        odd = sorted(training ^ testing)
        raise ValueError(f"brain_mri: {root}/Training and /Testing need the same class folders, only one has {odd or 'any'}.")
    files, split = {}, []
    for label in sorted(training):
        parts = [pictures(root / part / label) for part in ("Training", "Testing")]
        files[label] = parts[0] + parts[1]
        split += [0] * len(parts[0]) + [2] * len(parts[1])
    notes = ("patients are not known: slices of one may be in several splits",)
    return by_class("brain_mri", root, files, split=np.array(split), notes=notes)
