"""Labelled images with a split, as the networks take them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.datasets import ImageFolder

from examples.drifa_net.sources import npz

PARTS = ("train", "validation", "test")


@dataclass
class Part:
    """Images `b 3 h w` in [-1, 1], as EfficientNet-Lite takes them, and their classes `b`."""

    images: Tensor
    labels: Tensor

    def __getitem__(self, rows: Tensor) -> "Part":
        return Part(self.images[rows], self.labels[rows])

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class Collection:
    """A named collection: three parts and the names of the classes."""

    name: str
    classes: list[str]
    parts: dict[str, Part]


def digits() -> Collection:
    """scikit-learn's 1797 scanned digits, 8x8 pixels, enlarged to 32x32: what `--quick` runs on."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8).expand(-1, 3, -1, -1) / 8 - 1
    images, classes = interpolate(images, size=32, mode="bilinear"), torch.from_numpy(labels)
    train, rest = train_test_split(torch.arange(len(classes)).numpy(), train_size=0.4, stratify=labels, random_state=0)
    validation, test = train_test_split(rest, train_size=0.4, stratify=labels[rest], random_state=0)
    parts = {name: Part(images[rows], classes[rows]) for name, rows in zip(PARTS, (train, validation, test), strict=True)}
    return Collection("digits", [str(digit) for digit in range(10)], parts)


def archive(path: Path) -> Collection:
    """A NumPy archive: `images` (uint8, b h w 3 or b h w), `labels`, `classes` and `split` (0 train, 1 validation, 2 test)."""
    found = npz.read(path)
    if found.split is None:
        raise ValueError(f"{path} has no array 'split': it says 0, 1 or 2 (train, validation, test) for each image.")
    pixels, labels, split = (torch.from_numpy(np.asarray(array)) for array in (found.images, found.labels, found.split))
    pixels = pixels[..., None].expand(-1, -1, -1, 3) if pixels.ndim == 3 else pixels
    images = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    parts = {name: Part(images[split == i], labels[split == i]) for i, name in enumerate(PARTS)}
    return Collection(found.name, list(found.classes), parts)


def folders(path: Path, size: int) -> Collection:
    """A folder with train, validation and test, each with a folder of images per class; resized to `size` squared."""
    found = {name: ImageFolder(str(path / name)) for name in PARTS}
    classes = found["train"].classes
    for name, folder in found.items():
        if folder.classes != classes:
            raise ValueError(f"{path / name} has the classes {folder.classes}, train has {classes}.")
    parts = {}
    for name, folder in found.items():
        images = [np.asarray(image.convert("RGB").resize((size, size))) for image, _ in folder]
        parts[name] = Part(
            torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1, torch.tensor(folder.targets)
        )
    return Collection(path.name, classes, parts)


def read(path: Path | None, size: int) -> Collection:
    """The collection at a path; without one, the digits."""
    if path is None:
        return digits()
    return folders(path, size) if path.is_dir() else archive(path)


def check(collection: Collection, images: int, batch: int) -> None:
    """Raise a `ValueError` unless there are so many training images, a batch at least, and each part has every class."""
    there = len(collection.parts["train"])
    if not batch <= images <= there:
        raise ValueError(f"--images {images}: {collection.name} has {there} to train on, and a batch needs {batch}.")
    for name, part in collection.parts.items():
        missing = set(range(len(collection.classes))) - set(part.labels.tolist())
        if missing:
            raise ValueError(f"the {name} images of {collection.name} have none of class {collection.classes[min(missing)]!r}.")
    if len(collection.classes) < 2:
        raise ValueError(f"{collection.name} has one class alone: it needs at least two.")
