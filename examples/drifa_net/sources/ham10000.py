"""HAM10000: lesions of the skin, grouped by lesion."""

from pathlib import Path

import numpy as np
import pandas as pd

from examples.drifa_net.sources.collection import Collection, pictures_below, visible

TABLE, IMAGES = "ham10000_metadata", "ham10000_images_part_"
TABLES = ("", ".csv", ".tab", ".tsv", ".txt")  # what the table's name may end in
COLUMNS = ("lesion_id", "image_id", "dx")


def marks(root: Path) -> list[Path]:
    """What in a folder tells this collection."""
    return [path for path in visible(root) if path.name.lower().startswith((TABLE, IMAGES))]


def read(root: Path) -> Collection:
    """HAM10000: its table names each image's diagnosis and lesion; the images lie in any folders below."""
    tables = [path for path in visible(root) if path.is_file() and path.name.lower() in {TABLE + end for end in TABLES}]
    if not tables:
        raise FileNotFoundError(
            f"ham10000: {root}/HAM10000_metadata (.csv, .tab or neither) is missing: download it beside the image folders."
        )
    frame = read_table(tables[0])
    files = {path.stem: path for path in pictures_below(root)}
    missing = [name for name in frame["image_id"] if name not in files]
    if missing:
        raise FileNotFoundError(
            f"ham10000: {len(missing)} of {len(frame)} images of {tables[0]} are not in any folder of {root}, the first "
            f"{missing[0]}.jpg: unpack both parts there."
        )
    unlabelled = len(files) - len(frame)
    notes = (f"{unlabelled} images that {tables[0].name} does not name are left out",) if unlabelled else ()
    classes, labels = np.unique(frame["dx"].to_numpy(str), return_inverse=True)
    images, groups = [files[name] for name in frame["image_id"]], frame["lesion_id"].to_numpy(str)
    return Collection("ham10000", root, images, labels, tuple(map(str, classes)), groups, notes=notes, turns=True)


def read_table(table: Path) -> pd.DataFrame:
    """The table, commas or tabs between its cells; a `ValueError` unless each row names what is needed and its own image."""
    with table.open(encoding="utf-8-sig", errors="replace") as lines:
        separator = "\t" if "\t" in lines.readline() else ","
    try:
        frame = pd.read_csv(table, sep=separator, dtype=str, encoding="utf-8-sig")
    except ValueError:  # pandas' errors of a file without columns, of rows of unequal length, and of bytes that are no text
        frame = pd.DataFrame()
    if not set(COLUMNS) <= set(frame.columns) or not len(frame):
        raise ValueError(f"ham10000: {table} needs the columns {', '.join(COLUMNS)}, got {', '.join(frame.columns) or 'none'}.")
    for line, row in enumerate(frame[list(COLUMNS)].isna().to_numpy(), 2):
        if row.any():
            absent = " or ".join(np.array(COLUMNS)[row])
            raise ValueError(f"ham10000: line {line} of {table} has no {absent}: mend it.")
    twice = frame["image_id"][frame["image_id"].duplicated()]
    if len(twice):
        raise ValueError(f"ham10000: {table} names {twice.iloc[0]} more than once: delete all but one of its lines.")
    return frame
