"""HAM10000: lesions of the skin, grouped by lesion."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np

from examples.drifa_net.sources.collection import Collection


def marks(root: Path) -> list[Path]:
    """What in a folder tells this collection."""
    return [*root.glob("HAM10000_metadata*"), *root.glob("HAM10000_images_part_*")]


def read(root: Path) -> Collection:
    """HAM10000: its table names each image's diagnosis and lesion; the images lie in any folders below."""
    table = root / "HAM10000_metadata.csv"
    if not table.is_file():
        raise FileNotFoundError(f"ham10000: {table} is missing: download HAM10000_metadata beside the image folders.")
    with table.open(newline="", encoding="utf-8-sig") as lines:
        rows = list(csv.DictReader(lines))
    columns = ("lesion_id", "image_id", "dx")
    if not rows or not set(columns) <= set(rows[0]):
        raise ValueError(
            f"ham10000: {table} needs the columns {', '.join(columns)}, got {', '.join(rows[0]) if rows else 'none'}."
        )
    for line, row in enumerate(rows, 2):
        if not all(row[column] for column in columns):
            raise ValueError(
                f"ham10000: line {line} of {table} has no {' or '.join(c for c in columns if not row[c])}: mend it."
            )
    files = {path.stem: path for path in root.glob("*/*.jpg")} | {path.stem: path for path in root.glob("*.jpg")}
    missing = [row["image_id"] for row in rows if row["image_id"] not in files]
    if missing:
        raise FileNotFoundError(
            f"ham10000: {len(missing)} of {len(rows)} images of {table} are not in {root}/HAM10000_images_part_*/, "
            f"the first {missing[0]}.jpg: unpack both parts there."
        )
    twice = [image for image, times in Counter(row["image_id"] for row in rows).items() if times > 1]
    if twice:
        raise ValueError(f"ham10000: {table} names {twice[0]} more than once: delete all but one of its lines.")
    unlabelled = len(files) - len(rows)
    notes = (f"{unlabelled} images that {table.name} does not name are left out",) if unlabelled else ()
    classes, labels = np.unique([row["dx"] for row in rows], return_inverse=True)
    groups = np.array([row["lesion_id"] for row in rows])
    images = [files[row["image_id"]] for row in rows]
    return Collection("ham10000", root, images, labels, tuple(map(str, classes)), groups, notes=notes)
