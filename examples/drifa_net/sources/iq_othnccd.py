"""IQ-OTH/NCCD: CT slices of the lung."""

from pathlib import Path

from examples.drifa_net.sources.collection import Collection, by_class, pictures


def marks(root: Path) -> list[Path]:
    """What in a folder tells this collection."""
    return list(root.glob("* cases"))


def read(root: Path) -> Collection:
    """IQ-OTH/NCCD: a folder a class; its own spelling of "benign" is kept in the path alone."""
    folders = {"benign": "Bengin cases", "malignant": "Malignant cases", "normal": "Normal cases"}
    for folder in folders.values():
        if not (root / folder).is_dir():
            raise FileNotFoundError(f"iq_othnccd: {root / folder}/ is missing: unpack the whole archive.")
    notes = ("patients are not known: slices of one may be in several splits",)
    return by_class("iq_othnccd", root, {label: pictures(root / folder) for label, folder in folders.items()}, notes=notes)
