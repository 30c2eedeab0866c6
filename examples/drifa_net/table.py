"""A table of one's own: a row a sample, with columns of image paths, labels, numbers and words, a group and a split."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from examples.drifa_net.samples import Samples, part_name
from examples.drifa_net.sources import UNLABELLED, Collection
from examples.drifa_net.sources.collection import SUFFIXES, VOLUMES, is_volume, stem_of
from examples.drifa_net.sources.folder import PARTS
from examples.drifa_net.sources.volumes import check_volumes

READERS = {".csv": ",;\t", ".tsv": "\t", ".tab": "\t", ".parquet": "", ".pq": ""}  # what may separate cells, if it is text
NAMES = {
    "sample": ("sample", "sample_id", "image_id", "id"),
    "labels": ("label", "class", "target", "diagnosis", "dx"),
    "group": ("group", "patient", "patient_id", "subject", "subject_id", "case_id", "lesion_id", "slide"),
    "split": ("split",),
}
CATEGORIES = 30  # different words in a column that a record takes by itself, at most
CLASSES = 1000


@dataclass(frozen=True)
class Columns:
    """Which column of a table is what; None to find out. `images`, `labels` and `record` are several, () for none."""

    sample: str | None = None
    images: tuple[str, ...] | None = None
    labels: tuple[str, ...] | None = None
    record: tuple[str, ...] | None = None
    group: str | None = None
    split: str | None = None

    def named(self) -> set[str]:
        """All columns that are anything."""
        several = sum((tuple(value or ()) for value in (self.images, self.labels, self.record)), ())
        return {*several, *(name for name in (self.sample, self.group, self.split) if name)}


def is_table(path: Path) -> bool:
    """Whether a file is read as a table."""
    return path.suffix.lower() in READERS and not path.is_dir()


def read_frame(path: Path) -> pd.DataFrame:
    """The cells of a table: words, and numbers where a whole column is numbers; empty ones are NaN."""
    separators = READERS[path.suffix.lower()]
    try:
        if not separators:
            frame = pd.read_parquet(path)
        else:
            with path.open(encoding="utf-8-sig") as lines:
                header = lines.readline()
            separator = max(separators, key=header.count)
            frame = pd.read_csv(path, sep=separator, dtype=str, encoding="utf-8-sig", skipinitialspace=True)
    except Exception as error:  # of many kinds, by pandas and pyarrow
        raise ValueError(f"{path} is no table that can be read: {error}") from error
    frame.columns = [str(name).strip() for name in frame.columns]
    if not len(frame) or frame.columns.duplicated().any():
        raise ValueError(f"{path} needs rows, and columns of different names, got {len(frame)} rows of {list(frame.columns)}.")
    return frame


def as_words(column: pd.Series) -> pd.Series:
    """A column as words, whole numbers without a point; missing cells stay missing."""
    numbers = pd.to_numeric(column, errors="coerce")
    if column.dtype.kind == "f" and (numbers.dropna() % 1 == 0).all():
        column = numbers.astype("Int64")
    words = column.astype("string").str.strip()
    return words.mask(words == "").astype(object).where(words.notna() & (words != ""), None)


def as_numbers(column: pd.Series) -> pd.Series | None:
    """A column as numbers, if all of its cells that are not empty are finite numbers."""
    if column.dtype.kind == "b":
        return column.astype(float)
    numbers = pd.to_numeric(column, errors="coerce").astype(float)
    known = column.notna()
    return numbers if known.any() and np.isfinite(numbers[known].to_numpy(float)).all() else None


def found_columns(frame: pd.DataFrame, columns: Columns, path: Path, keys: set[str]) -> tuple[Columns, list[str]]:
    """All columns, those that were not named found by their names and cells, and what is left out and why.

    `keys` are the names of samples in folders that go with the table.
    """
    check_named(frame, columns, path)
    lower = {name.lower(): name for name in frame.columns}

    def known(what: str) -> str | None:
        return next((lower[name] for name in NAMES[what] if name in lower and lower[name] not in columns.named()), None)

    if columns.sample is None:
        columns = replace(columns, sample=best_key(frame, keys) if keys else known("sample"))
    if columns.images is None:
        paths = [name for name in frame.columns if name not in columns.named() and has_paths(frame[name])]
        columns = replace(columns, images=tuple(paths))
    for what in ("split", "group"):
        if getattr(columns, what) is None:
            columns = replace(columns, **{what: known(what)})
    if columns.labels is None:
        labels = [name for name in frame.columns if name.lower().startswith("label_") and name not in columns.named()]
        columns = replace(columns, labels=tuple(labels or filter(None, [known("labels")])))
    unused = {name: "not named" for name in frame.columns if name not in columns.named()}
    if columns.record is None:
        unused = {name: why_not(frame, name, columns) for name in unused}
        columns = replace(columns, record=tuple(name for name, why in unused.items() if not why))
        unused = {name: why for name, why in unused.items() if why}
    return columns, [f"{name} ({why})" for name, why in unused.items()]


def check_named(frame: pd.DataFrame, columns: Columns, path: Path) -> None:
    """Raise a `ValueError` unless the named columns are there, and each is one thing."""
    names = [*(columns.images or ()), *(columns.labels or ()), *(columns.record or ())]
    names += [name for name in (columns.group, columns.split) if name]
    for name in [*names, *filter(None, [columns.sample])]:
        if name not in frame.columns:
            raise ValueError(f"{path} has no column {name!r}; it has {', '.join(frame.columns)}.")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{path}: the column {twice[0]!r} is named for two things: name it once.")


def best_key(frame: pd.DataFrame, keys: set[str]) -> str | None:
    """The column whose cells most often name a sample of the folders; None if none does."""
    shares = {name: as_words(frame[name]).map(stem).isin(keys).sum() for name in frame.columns}
    best = max(shares, key=lambda name: shares[name])
    return best if shares[best] else None


def stem(cell: Any) -> Any:
    """The name of a sample in a cell that may be the path of its image."""
    if not isinstance(cell, str):
        return cell
    return stem_of(Path(cell)) if cell.lower().endswith((*VOLUMES, *SUFFIXES)) else cell


def has_paths(column: pd.Series) -> bool:
    """Whether all cells that are not empty end like files of images or volumes."""
    cells = as_words(column).dropna()
    return len(cells) > 0 and all(cell.lower().endswith((*SUFFIXES, *VOLUMES)) for cell in cells)


def why_not(frame: pd.DataFrame, name: str, columns: Columns) -> str:
    """Why a column is no part of a record by itself; nothing if it is one."""
    words = as_words(frame[name])
    values = words.dropna()
    if values.nunique() < 2:
        return "the same in every row"
    for label in columns.labels or ():
        tells = as_words(frame[label]).groupby(words).nunique()
        if values.nunique() <= 2 * as_words(frame[label]).nunique() and (tells <= 1).all() and len(frame) > 4 * len(tells):
            return f"it tells {label}"
    if as_numbers(frame[name]) is not None:
        whole = (as_numbers(frame[name]).dropna() % 1 == 0).all()
        return "another number in every row" if whole and values.is_unique and len(values) > CATEGORIES else ""
    if values.nunique() > min(CATEGORIES, max(2, len(values) // 2)):
        return f"{values.nunique()} different words"
    return ""


def samples_of(
    path: Path, columns: Columns, folders: Sequence[Samples] = (), *, trained: bool = False
) -> tuple[Samples, Columns]:
    """The rows of a table, and which of its columns are what: those of a run that was `trained`, else all that are found."""
    frame = read_frame(path)
    keys = set().union(*(one.keys.tolist() for one in folders))
    if trained:
        check_named(frame, columns, path)
        unused: list[str] = []
    else:
        columns, unused = found_columns(frame, columns, path, keys)
    if folders and columns.sample is None:
        raise ValueError(
            f"{path}: no column names the images of {', '.join(one.name for one in folders)} (as {folders[0].keys[0]!r}): name "
            "one by --sample, or mend its cells."
        )
    named = as_words(frame[columns.sample]).map(stem) if columns.sample else pd.Series(frame.index.astype(str), dtype=object)
    if (absent := named.isna()).any():
        raise ValueError(f"{path}: line {2 + int(absent.to_numpy().argmax())} has no {columns.sample!r}: mend it.")
    taken = [name for one in folders for name in one.branches]
    branches: dict[str, Collection | pd.DataFrame] = {}
    rows: dict[str, np.ndarray] = {}
    for name in columns.images or ():
        part = part_name(name, [*taken, *branches])
        branches[part], rows[part] = pictures_of(frame[name], name, path)
    if columns.record:
        part = part_name("record", [*taken, *branches])
        branches[part] = frame[list(columns.record)]
        rows[part] = np.where(frame[list(columns.record)].isna().all(axis=1), -1, np.arange(len(frame)))
    tasks, targets = {}, {}
    for name in columns.labels or ():
        part = part_name(name, [*tasks])
        tasks[part], targets[part] = classes_of(frame[name], name, path)
    groups = None if columns.group is None else as_words(frame[columns.group])
    if groups is not None:  # a row without a group is one
        groups = np.array([f"row {i}" if group is None else group for i, group in enumerate(groups)], object)
    split = None if columns.split is None else split_of(frame[columns.split], columns.split, path)
    notes = (described(columns), *([f"left out: {', '.join(unused)}"] if unused else []))
    name = part_name(path.stem)
    samples = Samples(name, path, named.to_numpy(object), branches, rows, tasks, targets, groups, split, notes, "row by row")
    return samples, columns


def described(columns: Columns) -> str:
    """What the columns are, in a line."""
    parts = {name: getattr(columns, name) for name in ("sample", "images", "labels", "record", "group", "split")}
    lines = [f"{name} {', '.join(value) if isinstance(value, tuple) else value}" for name, value in parts.items() if value]
    return f"columns: {'; '.join(lines)}"


def pictures_of(column: pd.Series, name: str, table: Path) -> tuple[Collection, np.ndarray]:
    """The images or volumes of a column of paths, from the table's folder, and which of them each row has."""
    cells = as_words(column)
    rows = np.full(len(cells), -1)
    known = np.flatnonzero(cells.notna())
    paths = [table.parent / cells.iloc[i] for i in known]
    if missing := [path for path in paths if not path.exists()]:
        raise ValueError(
            f"{len(missing)} of {len(paths)} files in column {name!r} of {table} are missing, the first {missing[0]}: paths "
            "are read from the table's folder."
        )
    if any(map(is_volume, paths)):
        check_volumes(paths)
    rows[known] = np.arange(len(known))
    if not paths:
        raise ValueError(f"column {name!r} of {table} is empty: leave it out.")
    return Collection(name, table, paths, np.full(len(paths), UNLABELLED), ()), rows


def classes_of(column: pd.Series, name: str, table: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """The classes of a column of labels, numbers in their order and words in theirs, and the number of each row's."""
    words = as_words(column)
    values = sorted(words.dropna().unique(), key=lambda word: (0, float(word), word) if is_number(word) else (1, 0.0, word))
    if not 2 <= len(values) <= CLASSES or len(values) > max(2, words.notna().sum() / 2):
        raise ValueError(
            f"column {name!r} of {table} has {len(values)} different labels in {words.notna().sum()} rows: it needs two "
            "or more classes of several rows each. Name another by --labels."
        )
    numbers = {value: i for i, value in enumerate(values)}
    return tuple(values), np.array([numbers.get(word, UNLABELLED) for word in words], np.int64)


def is_number(word: str) -> bool:
    """Whether a word is a number."""
    try:
        float(word)
    except ValueError:
        return False
    return True


def split_of(column: pd.Series, name: str, table: Path) -> np.ndarray:
    """The split of each row: 0, 1 or 2, from words as train, val and test."""
    numbers = {**PARTS, "0": 0, "1": 1, "2": 2}
    words = as_words(column).map(lambda word: word.lower() if isinstance(word, str) else word)
    if odd := [i for i, word in enumerate(words) if word not in numbers]:
        raise ValueError(
            f"column {name!r} of {table} has {words.iloc[odd[0]]!r} in line {odd[0] + 2}: it needs train, validation or test."
        )
    return words.map(numbers).to_numpy(np.int64)
