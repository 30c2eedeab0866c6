"""Images and volumes decoded once: resized, kept in files that are memory-mapped, found again by what is in their file.

A cache is a folder for each size (and window of volumes) with pairs of files of up to 256 images: `KEY.rows.npy`, the pixels
and a thumbnail of each, and `KEY.keys.npy`, a hash of each image's file. The second is written last, and both appear whole or
not at all: a kill loses what was being decoded and harms nothing, several runs may write at once, and moved, renamed or
repeated files are not decoded again. It may be deleted at any time.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.progress import track
from torch import Tensor

from examples.drifa_net.sources import Collection
from examples.drifa_net.sources.collection import visible
from examples.drifa_net.sources.volumes import Window, resized

THUMBNAIL = 32
CHUNK = 256  # images that one file holds
FORM = 1  # of the files; another number would not read these


class Rows:
    """Resized images `n (3 h w)` or volumes `n (d h w)` with thumbnails, memory-mapped or held; it travels as its paths."""

    def __init__(self, parts: Sequence[Path | np.ndarray], places: np.ndarray, shape: tuple[int, ...]) -> None:
        self.parts, self.places, self.shape = list(parts), places, shape  # of each image the part and the row in it
        self.opened: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.places)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "opened": {}}

    def row(self, i: int) -> np.ndarray:
        """Pixels and thumbnail of image i."""
        part, place = self.places[i].tolist()
        if part not in self.opened:
            given = self.parts[part]
            self.opened[part] = given if isinstance(given, np.ndarray) else np.load(given, mmap_mode="r")
        return self.opened[part][place]

    def image(self, i: int) -> Tensor:
        """Image i as `3 h w`, volume i as `1 d h w`, uint8."""
        return torch.from_numpy(np.array(self.row(i)[: -(THUMBNAIL**2)])).view(self.shape)

    def thumbnails(self) -> np.ndarray:
        """All images in small and grey, `n t` uint8."""
        return np.stack([np.array(self.row(i)[-(THUMBNAIL**2) :]) for i in range(len(self))])


def decoded(
    collection: Collection, size: tuple[int, ...], cache: Path | None, *, window: Window | None = None, progress: bool = False
) -> Rows:
    """Every image or volume of a collection at this size, from the cache as far as it is there; an archive needs none."""
    count, shape = len(collection), (1 if collection.deep else 3, *size)
    window = window if collection.deep else None
    if cache is None or isinstance(collection.images, np.ndarray):
        shown = progress and not isinstance(collection.images, np.ndarray)
        rows = np.stack([row for _, row in made(collection, range(count), size, window, progress=shown)])
        return Rows([rows], np.stack([np.zeros(count, np.int64), np.arange(count)], 1), shape)
    scale = f"-{window[0]:g}_{window[1]:g}" if window else ""
    folder = cache / f"{'x'.join(map(str, size))}-{FORM}{scale}"
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        keys = list(threads.map(key_of, collection.images))
    known = kept(folder)
    absent = [i for i in dict(zip(reversed(keys), reversed(range(count)), strict=True)).values() if keys[i] not in known]
    chunk: list[tuple[int, np.ndarray]] = []
    for i, row in made(collection, sorted(absent), size, window, progress=progress):
        chunk.append((i, row))
        if len(chunk) == CHUNK:
            keep(folder, [keys[i] for i, _ in chunk], [row for _, row in chunk])
            chunk = []
    if chunk:
        keep(folder, [keys[i] for i, _ in chunk], [row for _, row in chunk])
    if absent:
        known = kept(folder)
    parts = sorted({path for path, _ in known.values()})
    numbers = {path: k for k, path in enumerate(parts)}
    places = [(numbers[known[key][0]], known[key][1]) for key in keys]
    return Rows(parts, np.array(places, np.int64).reshape(count, 2), shape)


def key_of(path: Path) -> bytes:
    """A hash of what a file, or the files of a series, hold."""
    if path.is_dir():
        return hashlib.blake2b(b"".join(key_of(one) for one in visible(path) if one.is_file()), digest_size=16).digest()
    return hashlib.blake2b(path.read_bytes(), digest_size=16).digest()


def made(
    collection: Collection, wanted: Sequence[int], size: tuple[int, ...], window: Window | None, *, progress: bool
) -> Iterator[Any]:
    """The numbers and rows of these images, decoded by as many threads as there are processors, in order."""
    make = (lambda one, i: volume_row(one, i, size, window)) if collection.deep else (lambda one, i: made_row(one, i, size))
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        steps = range(0, len(wanted), CHUNK)
        for start in track(steps, f"decoding {collection.name}, {len(wanted)} images", disable=not progress or not wanted):
            numbers = wanted[start : start + CHUNK]
            yield from zip(numbers, threads.map(lambda i: make(collection, i), numbers), strict=True)


def volume_row(collection: Collection, i: int, size: tuple[int, ...], window: Window | None) -> np.ndarray:
    """Volume i at this size `d h w`, then a thumbnail of eight slices, in one vector."""
    whole = resized(collection.images[i], size, window)
    small = F.adaptive_avg_pool3d(torch.from_numpy(whole).float()[None, None], (8, THUMBNAIL // 2, THUMBNAIL // 4))
    return np.concatenate([whole.ravel(), small.round().to(torch.uint8).numpy().ravel()])


def made_row(collection: Collection, i: int, size: tuple[int, ...]) -> np.ndarray:
    """Image i at this size `3 h w`, then its thumbnail, in one vector."""
    whole = collection.open(i, at_least=2 * max(*size, THUMBNAIL))
    small = whole.convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    if whole.size != (size[1], size[0]):
        whole = whole.resize((size[1], size[0]), Image.Resampling.BILINEAR)  # smoothed where it shrinks
    return np.concatenate([np.asarray(whole).transpose(2, 0, 1).ravel(), np.asarray(small).ravel()])


def kept(folder: Path) -> dict[bytes, tuple[Path, int]]:
    """Where each image of a cache is, by the hash of its file; what is damaged counts as missing."""
    found: dict[bytes, tuple[Path, int]] = {}
    for path in sorted(folder.glob("*.keys.npy")):
        rows = path.with_name(path.name.replace(".keys.", ".rows."))
        try:
            keys = np.load(path)
            if len(np.load(rows, mmap_mode="r")) != len(keys):
                continue
        except (OSError, ValueError, EOFError):
            continue
        found |= {key.tobytes(): (rows, place) for place, key in enumerate(keys)}
    return found


def keep(folder: Path, keys: Sequence[bytes], rows: Sequence[np.ndarray]) -> None:
    """Write a chunk: the rows first, then the keys that make them found."""
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.blake2b(b"".join(keys), digest_size=16).hexdigest()
    for kind, array in (("rows", np.stack(rows)), ("keys", np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1))):
        half = folder / f"{name}.{kind}.{os.getpid()}.half"
        with half.open("wb") as file:
            np.save(file, array)
        os.replace(half, folder / f"{name}.{kind}.npy")
