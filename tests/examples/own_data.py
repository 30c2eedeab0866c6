"""Data of one's own in small: images that show their class, a table of them, and what may be missing."""

import numpy as np
import pandas as pd
from PIL import Image

CLASSES = ("mel", "nv", "bkl")


def shown(label, seed, size=16):
    """Noise in which one channel is brighter: its class."""
    pixels = np.random.default_rng(seed).integers(0, 100, (size, size, 3), np.uint8)
    pixels[:, :, label] += 120
    return Image.fromarray(pixels)


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def rows_of(count=90, missing=True, seed=0):
    """The rows of a table: a path, a diagnosis, a record and a patient each; every tenth has no image, every seventh no age."""
    draw = np.random.default_rng(seed)
    for i in range(count):
        label = i % len(CLASSES)
        yield {
            "sample": f"s{i:03d}",
            "photo": None if missing and i % 10 == 3 else f"photos/s{i:03d}.png",
            "diagnosis": CLASSES[label],
            "age": None if missing and i % 7 == 0 else 40 + 10 * label + int(draw.integers(8)),
            "sex": ["male", "female"][int(draw.integers(2))],
            "patient": f"p{i // 2}",
            "note": f"seen on day {i}",
        }


def write_table(folder, count=90, *, missing=True, seed=0, name="records.csv"):
    """A table and its images; the table's path."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = list(rows_of(count, missing, seed))
    for i, row in enumerate(rows):
        if row["photo"]:
            save(shown(i % len(CLASSES), 1000 * seed + i), folder / row["photo"])
    frame = pd.DataFrame(rows)
    frame.to_parquet(folder / name) if name.endswith("parquet") else frame.to_csv(folder / name, index=False)
    return folder / name


def write_folder(folder, count=60, *, parts=None, seed=0):
    """A folder a class, as `ImageFolder` takes it, perhaps within folders of a split; the folder."""
    for i in range(count):
        part = parts[i % len(parts)] if parts else "."
        save(shown(i % len(CLASSES), 1000 * seed + i), folder / part / CLASSES[i % len(CLASSES)] / f"s{i:03d}.png")
    return folder
