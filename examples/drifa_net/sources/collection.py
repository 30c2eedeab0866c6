"""Labelled images: what every reader of a collection gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
VOLUMES = (".nii.gz", ".nii", ".dcm")
UNLABELLED = -100  # the label of an image that has none


@dataclass(frozen=True)
class Collection:
    """Labelled images, decoded when they are asked for.

    `images` are paths, of volumes perhaps, or an array `n h w` or `n h w 3`, `labels` `n` number `classes`, `groups` `n`
    are what must stay in one split, `split` `n` is 0, 1 or 2 where the publisher has drawn one, `notes` say what a reader
    should know, `names` `n` name the samples in an archive, and `turns` says whether the pictures have no up and no left,
    so that flips and quarter turns show what might have been.
    """

    name: str
    source: Path | None
    images: Sequence[Path] | np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    groups: np.ndarray | None = None
    split: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    names: np.ndarray | None = None
    turns: bool = False

    @property
    def keys(self) -> np.ndarray | None:
        """What names each sample: an archive's own names, else the stems of files, with their folder where they need it."""
        if isinstance(self.images, np.ndarray):
            return self.names
        stems = [stem_of(path) for path in self.images]
        if len(set(stems)) == len(stems):
            return np.array(stems, object)
        return np.array([f"{path.parent.name}/{stem_of(path)}" for path in self.images], object)

    @property
    def deep(self) -> bool:
        """Whether these are volumes."""
        return not isinstance(self.images, np.ndarray) and len(self.images) > 0 and is_volume(self.images[0])

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, i: int) -> str:
        """The place of image i, as an error names it."""
        return str(self.images[i]) if not isinstance(self.images, np.ndarray) else f"image {i} of {self.source or self.name}"

    def open(self, i: int, at_least: int | None = None) -> Image.Image:
        """Image i, fully decoded, in colours; a JPEG may come at a fraction of its size, `at_least` so large."""
        if isinstance(self.images, np.ndarray):
            return Image.fromarray(self.images[i]).convert("RGB")
        try:
            with Image.open(self.images[i]) as image:
                if at_least:
                    image.draft("RGB", (at_least, at_least))
                return in_colours(image)
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(
                f"{self.where(i)} is no readable image ({error}): unpack it again, or delete it and its line in a table."
            ) from error


def is_volume(path: Path) -> bool:
    """Whether a path is of a volume: a NIfTI file, or DICOM, whose series is a folder."""
    return path.name.lower().endswith(VOLUMES) or path.is_dir()


def check_one_kind(paths: Sequence[Path]) -> None:
    """Raise a `ValueError` if some of these are volumes and others are not."""
    deep = [is_volume(path) for path in paths]
    if any(deep) and not all(deep):
        volume, image = paths[deep.index(True)], paths[deep.index(False)]
        raise ValueError(f"{volume} is a volume and {image} is an image: a branch reads one of both. Divide them.")


def stem_of(path: Path) -> str:
    """The name of a sample from the path of its image or volume."""
    endings = [ending for ending in (*VOLUMES, *SUFFIXES) if path.name.lower().endswith(ending)]
    return path.name[: -len(endings[0])] if endings else path.name


def in_colours(image: Image.Image) -> Image.Image:
    """An image in three channels of 8 bits; one of more bits is stretched from its lowest to its highest value."""
    if image.mode.startswith(("I", "F")):
        values = np.nan_to_num(np.asarray(image, np.float64))
        low, high = values.min(), values.max()
        image = Image.fromarray(np.round(255 * (values - low) / ((high - low) or 1)).astype(np.uint8))
    return image.convert("RGB")


def by_class(name: str, root: Path, files: dict[str, list[Path]], **options: Any) -> Collection:
    """A collection of the image files of each class; `options` are of the files class by class."""
    empty = [label for label, paths in files.items() if not paths]
    if empty:
        raise ValueError(
            f"{name}: class {empty[0]!r} of {root} holds no image ({', '.join(sorted(SUFFIXES))}): unpack it again."
        )
    check_one_kind(sum(files.values(), []))
    labels = np.repeat(np.arange(len(files)), [len(paths) for paths in files.values()])
    return Collection(name, root, sum(files.values(), []), labels, tuple(files), **options)


def visible(folder: Path) -> list[Path]:
    """What is in a folder, in order, without what programs hide there."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith((".", "__")))


def pictures(folder: Path) -> list[Path]:
    """The image files of a folder, in order."""
    return [path for path in visible(folder) if path.suffix.lower() in SUFFIXES and path.is_file()]


def pictures_below(folder: Path) -> list[Path]:
    """The image files of a folder and of all folders in it, in order."""
    found = pictures(folder)
    for inner in visible(folder):
        found += pictures_below(inner) if inner.is_dir() else []
    return sorted(found)


def volumes_below(folder: Path) -> list[Path]:
    """The volumes of a folder and of all folders in it, in order: NIfTI files, and folders with a DICOM series."""
    inside = visible(folder)
    if any(path.suffix.lower() == ".dcm" and path.is_file() for path in inside):
        return [folder]
    found = [path for path in inside if path.name.lower().endswith(VOLUMES) and path.is_file()]
    return sorted([*found, *(path for inner in inside if inner.is_dir() for path in volumes_below(inner))])
