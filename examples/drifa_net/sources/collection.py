"""Labelled images: what every reader of a collection gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png"}


@dataclass(frozen=True)
class Collection:
    """Labelled images, decoded when they are asked for.

    `images` are paths or an array `n h w` or `n h w 3`, `labels` `n` number `classes`, `groups` `n` are what must stay in one
    split, `split` `n` is 0, 1 or 2 where the publisher has drawn one, `notes` say what a reader should know.
    """

    name: str
    source: Path | None
    images: Sequence[Path] | np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    groups: np.ndarray | None = None
    split: np.ndarray | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, i: int) -> str:
        """The place of image i, as an error names it."""
        return str(self.images[i]) if not isinstance(self.images, np.ndarray) else f"image {i} of {self.source or self.name}"

    def open(self, i: int, mode: str, at_least: int | None = None) -> Image.Image:
        """Image i, fully decoded in a mode ("RGB", "L"); a JPEG may come at a fraction of its size, `at_least` so large."""
        if isinstance(self.images, np.ndarray):
            return Image.fromarray(self.images[i]).convert(mode)
        try:
            with Image.open(self.images[i]) as image:
                if at_least:
                    image.draft(mode, (at_least, at_least))
                return image.convert(mode)
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(
                f"{self.where(i)} is no readable image ({error}): unpack it again, or delete it and its line in a table."
            ) from error

    def image(self, i: int, size: tuple[int, int]) -> Tensor:
        """Image i as `3 h w` uint8."""
        height, width = size
        image = self.open(i, "RGB")
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)  # smoothed where it shrinks
        return rearrange(torch.from_numpy(np.array(image)), "h w c -> c h w").contiguous()


def by_class(name: str, root: Path, files: dict[str, list[Path]], **options: Any) -> Collection:
    """A collection of the image files of each class; `options` are of the files class by class."""
    empty = [label for label, paths in files.items() if not paths]
    if empty:
        raise ValueError(
            f"{name}: class {empty[0]!r} of {root} holds no image ({', '.join(sorted(SUFFIXES))}): unpack it again."
        )
    labels = np.repeat(np.arange(len(files)), [len(paths) for paths in files.values()])
    return Collection(name, root, sum(files.values(), []), labels, tuple(files), **options)


def pictures(folder: Path) -> list[Path]:
    """The image files of a folder, in order."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
