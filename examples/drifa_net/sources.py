"""Four public collections of medical images in the form their publishers ship them, archives, and scikit-learn's digits.

Each kind, what it is, where to get it, its licence as far as known (what the page says counts), and what its folder holds:

- `ham10000`: lesions of the skin; Harvard Dataverse, doi:10.7910/DVN/DBW86T; CC BY-NC 4.0;
  `HAM10000_metadata.csv`, `HAM10000_images_part_1/*.jpg`, `HAM10000_images_part_2/*.jpg`.
- `sipakmed`: cells of pap smears; cs.uoi.gr/~marina/sipakmed.html; for experiments if its paper is cited, no formal licence;
  `im_<class>/.../CROPPED/<slide>_<cell>.bmp`.
- `brain_mri`: tumours of the brain, collected by M. Nickparvar; kaggle.com/datasets/masoudnickparvar/brain-tumor-mri-dataset;
  CC0 1.0; `Training/<class>/*.jpg`, `Testing/<class>/*.jpg`.
- `iq_othnccd`: CT slices of the lung; Mendeley Data, doi:10.17632/bhmdr45bh2; CC BY 4.0;
  `Bengin cases/`, `Malignant cases/`, `Normal cases/`.
- `npz`: an archive of one's own: `images` (n, h, w) or (n, h, w, 3) of uint8, `labels` (n), `classes`, and perhaps `split` (n;
  0 train, 1 validation, 2 test) and `lesion_id`, `slide` or `group` (n), whose images stay together. Slides are numbered
  within their class, as SIPaKMeD's are.

Nothing is downloaded: read each one's conditions before use. The folder may be the one an archive unpacked to, with the
collection inside as its only folder. HAM10000's images are grouped by lesion, SIPaKMeD's by slide. The other two say nothing of
patients, so slices of one may be in several splits, and results on them are optimistic.
"""

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png"}
GROUP_KEYS = ("lesion_id", "slide", "group")


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


def ham10000(root: Path) -> Collection:
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


def sipakmed(root: Path) -> Collection:
    """SIPaKMeD: the cropped cells of each class, the slide before the underscore of a cell's name."""
    files, slides = {}, []
    for folder in sorted(path for path in root.glob("im_*") if path.is_dir()):
        label = folder.name.removeprefix("im_")
        files[label] = sorted(folder.rglob("CROPPED/*.bmp"))
        for path in files[label]:
            slide = re.fullmatch(r"(\d+)_\d+", path.stem)
            if slide is None:
                raise ValueError(
                    f"sipakmed: {path} is not named <slide>_<cell>.bmp, so its slide is unknown: rename or delete it."
                )
            slides.append(f"{label}/{slide[1]}")
    return by_class("sipakmed", root, files, groups=np.array(slides))


def brain_mri(root: Path) -> Collection:
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


def iq_othnccd(root: Path) -> Collection:
    """IQ-OTH/NCCD: a folder a class; its own spelling of "benign" is kept in the path alone."""
    folders = {"benign": "Bengin cases", "malignant": "Malignant cases", "normal": "Normal cases"}
    for folder in folders.values():
        if not (root / folder).is_dir():
            raise FileNotFoundError(f"iq_othnccd: {root / folder}/ is missing: unpack the whole archive.")
    notes = ("patients are not known: slices of one may be in several splits",)
    return by_class("iq_othnccd", root, {label: pictures(root / folder) for label, folder in folders.items()}, notes=notes)


def npz(path: Path) -> Collection:
    """An archive of decoded images."""
    try:
        with path.open("rb") as file:
            archive = np.load(file)
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, AttributeError, BadZipFile) as error:
        raise ValueError(f"npz: {path} is no archive of plain arrays ({error}): write it with numpy.savez.") from error

    def need(true: bool, what: str) -> None:
        if not true:
            raise ValueError(f"npz: {path} {what}.")

    for name in ("images", "labels", "classes"):
        need(name in arrays, f"has no array {name!r}, only {sorted(arrays)}: it needs images, labels and classes")
    images, labels, classes = (arrays[name] for name in ("images", "labels", "classes"))
    shape = images.shape
    right = images.dtype == np.uint8 and (images.ndim == 3 or (images.ndim == 4 and shape[3] == 3)) and 0 not in shape
    need(right, f"needs images (n, h, w) or (n, h, w, 3) of uint8, got {shape} of {images.dtype}")
    need(labels.dtype.kind in "iu" and labels.shape == shape[:1], f"needs an integer label for each of its {shape[0]} images")
    need(classes.ndim == 1, f"needs classes to list their names, got {classes!r}")
    need(0 <= labels.min() <= labels.max() < len(classes), f"has labels beyond its {len(classes)} classes")
    key = next((name for name in GROUP_KEYS if name in arrays), None)
    groups, split = arrays.get(key or ""), arrays.get("split")
    need(groups is None or groups.shape == labels.shape, f"needs one {key!r} an image")
    if groups is not None and key == "slide":
        groups = np.array([f"{classes[label]}/{slide}" for label, slide in zip(labels, groups, strict=True)])
    if split is not None:
        need(split.shape == labels.shape and set(np.unique(split)) <= {0, 1, 2}, "needs split 0, 1 or 2 for each image")
    return Collection(path.stem, path, images, labels.astype(np.int64), tuple(map(str, classes)), groups, split)


def halves() -> tuple[Collection, Collection, np.ndarray]:
    """Left and right halves of scikit-learn's 1797 scanned digits of 8x8, two real views of one thing; even (0) or odd (1)."""
    pixels, digits = load_digits(return_X_y=True)
    pixels = np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    classes = tuple(map(str, range(10)))
    left, right = (
        Collection(name, None, np.ascontiguousarray(half), digits, classes)
        for name, half in (("left", pixels[:, :, :4]), ("right", pixels[:, :, 4:]))
    )
    return left, right, digits % 2


READERS: dict[str, Callable[[Path], Collection]] = {
    "ham10000": ham10000,
    "sipakmed": sipakmed,
    "brain_mri": brain_mri,
    "iq_othnccd": iq_othnccd,
    "npz": npz,
}
MARKS: dict[str, Callable[[Path], Iterable[Path]]] = {
    "ham10000": lambda root: [*root.glob("HAM10000_metadata*"), *root.glob("HAM10000_images_part_*")],
    "sipakmed": lambda root: root.glob("im_*"),
    "brain_mri": lambda root: [path for path in (root / "Training", root / "Testing") if path.is_dir()],
    "iq_othnccd": lambda root: root.glob("* cases"),
}


def read(path: str | Path, kind: str | None = None) -> Collection:
    """The collection in a folder or archive.

    Args:
        path: the folder, or one around it; or an .npz.
        kind: a key of `READERS`; None for the one whose marks the folder bears.

    Raises: FileNotFoundError, ValueError: nothing there, a part of it missing, or a file that is not what it should be.
    """
    path = Path(path)
    if kind is not None and kind not in READERS:
        raise ValueError(f"read expected kind to be one of {', '.join(READERS)}, got {kind!r}.")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: name the folder of a collection or an .npz archive.")
    if kind == "npz" or (kind is None and path.is_file()):
        return npz(path)
    if not path.is_dir():
        raise ValueError(f"{path} is no folder: {kind} is read from the folder its archives unpack to.")
    root, found = path, matching(path)
    while not found and len(inside := [entry for entry in root.iterdir() if not entry.name.startswith(".")]) == 1:
        if not (root := inside[0]).is_dir():
            break
        found = matching(root)
    if kind is None and len(found) != 1:
        what = f"looks like {' and '.join(found)}: name its kind" if found else f"holds no collection ({', '.join(MARKS)})"
        raise ValueError(f"{path} {what}; see the table at the top of examples/drifa_net/sources.py.")
    collection = READERS[kind or found[0]](root if found else path)
    if len(collection.classes) < 2:
        got = ", ".join(collection.classes) or "none"
        raise ValueError(f"{collection.name}: {root} needs images of at least two classes, got {got}: unpack the others.")
    return collection


def matching(root: Path) -> list[str]:
    """The kinds whose marks a folder bears."""
    return [kind for kind, marks in MARKS.items() if any(True for _ in marks(root))] if root.is_dir() else []
