"""Samples made ready for training: decoded, split, cleaned of leaks, and said what was done."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from examples.drifa_net.augmentation import Augmentation, augmentation_of
from examples.drifa_net.pairs import Images, Vectors
from examples.drifa_net.samples import Samples, check_tasks, labelled
from examples.drifa_net.sources import Collection
from examples.drifa_net.sources.volumes import Window, said_of
from examples.drifa_net.splits import SPLITS, check_classes, check_leaks, divide, drop_duplicates, drop_groups
from examples.drifa_net.store import Rows, decoded
from examples.drifa_net.table import is_table
from examples.drifa_net.tabular import encoded, fitted

SIZE = 128
VOLUME = 64  # each way


@dataclass(frozen=True)
class Prepared:
    """What samples become: of each split what every branch sees and every task's labels, and what a run says of it."""

    views: dict[str, list[Images | Vectors]]
    targets: dict[str, list[np.ndarray]]
    shapes: dict[str, tuple[int, ...]]
    augmentation: list[Augmentation | None]
    report: dict[str, Any]
    inputs: dict[str, Any]
    dropped: list[str]


def prepare(
    samples: Samples,
    shape: tuple[int, int] | None,
    seed: int,
    *,
    turns: bool | None,
    drop: bool,
    cache: Path | None,
    window: Window | None,
    progress: bool,
) -> Prepared:
    """Decode, split and check samples; see `load`."""
    check_tasks(samples)
    samples = labelled(samples)
    rows = {
        name: decoded(branch, size_of(branch, shape), cache, window=window, progress=progress)
        for name, branch in samples.branches.items()
        if isinstance(branch, Collection)
    }
    split = divide(samples, seed)
    counts, dropped = clean(samples, split, rows, drop=drop)
    notes = (*samples.notes, *check_classes(samples, split))
    shapes, inputs, sights, moves = {}, {}, {}, []
    for name, branch in samples.branches.items():
        if isinstance(branch, Collection):
            sights[name], shapes[name] = rows[name], rows[name].shape
            column = branch.name if branch.source and is_table(branch.source) else None
            inputs[name] = {"kind": "image", "size": list(shapes[name][1:]), "column": column}
            if branch.deep:
                inputs[name] |= {"kind": "volume", "window": list(window) if window else None}
            moves.append(augmentation_of(branch.turns if turns is None else turns))
            continue
        training = samples.rows[name][split == 0]
        encoding = fitted(branch, samples.name, training[training >= 0])
        sights[name] = encoded(branch, encoding, samples.name)
        shapes[name] = (sights[name].shape[1],)
        inputs[name] = {"kind": "record", "encoding": encoding}
        moves.append(None)
    chosen = {key: np.flatnonzero(split == part) for part, key in enumerate(SPLITS)}
    views = {key: [view_of(sights[name], samples.rows[name][kept]) for name in sights] for key, kept in chosen.items()}
    targets = {key: [labels[kept] for labels in samples.targets.values()] for key, kept in chosen.items()}
    deep = [name for name, branch in samples.branches.items() if isinstance(branch, Collection) and branch.deep]
    said = {name: [said_of(window)] if name in deep else [] for name in samples.branches}
    said[next(iter(said))][:0] = notes
    report = described(samples, split, shapes, counts, said)
    return Prepared(views, targets, shapes, moves, report, inputs, dropped)


def size_of(collection: Collection, asked: tuple[int, int] | None) -> tuple[int, ...]:
    """The size of images or volumes: what was asked for, else an archive's own, else the usual one."""
    if collection.deep:
        return (asked[0] if asked else VOLUME,) * 3
    if asked:
        return asked
    return tuple(collection.images.shape[1:3]) if isinstance(collection.images, np.ndarray) else (SIZE, SIZE)


def view_of(sight: Any, chosen: np.ndarray) -> Images | Vectors:
    """These samples of a branch."""
    return Images(sight, chosen) if isinstance(sight, Rows) else Vectors(sight, chosen)


def clean(samples: Samples, split: np.ndarray, rows: dict[str, Rows], *, drop: bool) -> tuple[dict[str, int], list[str]]:
    """Mark as −1 what leaks from one split into another; how many duplicates were dropped, and the names of all dropped.

    Raises: ValueError: a given split that leaks, unless it is to be dropped.
    """
    if samples.source is None:  # the digits, whose halves are alike by their nature
        return {}, []
    given = set() if samples.split is None else set(samples.split.tolist())
    leaked = [] if samples.groups is None else drop_groups(samples.groups, split)
    views = []
    for name, own in rows.items():
        known = np.flatnonzero(samples.rows[name] >= 0)
        views.append((known, own.thumbnails()[samples.rows[name][known]]))
    found = drop_duplicates(views, split)
    if given and not drop:
        check_leaks(samples, {key: found[key]["leaked"] for key in found if SPLITS.index(key) in given}, leaked)
    everything = [*leaked, *(i for parts in found.values() for numbers in parts.values() for i in numbers)]
    counts = {key: sum(map(len, parts.values())) for key, parts in found.items()}
    return counts, [samples.where(i) for i in everything]


def described(
    samples: Samples,
    split: np.ndarray,
    shapes: dict[str, tuple[int, ...]],
    dropped: dict[str, int],
    notes: Mapping[str, list[str]],
) -> dict[str, Any]:
    """What a run's JSON says of each branch, with the notes on it."""
    drawn = "by class" if samples.groups is None else "by class and group"
    kept = drawn if samples.split is None else "as given" if 1 in samples.split else "as given, validation drawn"
    labels, report = next(iter(samples.targets.values())), {}
    for name, branch in samples.branches.items():
        counts = {}
        for part, key in enumerate(SPLITS):
            here = labels[(split == part) & (samples.rows[name] >= 0)]
            counts[key] = {label: int((here == k).sum()) for k, label in enumerate(samples.classes)}
        missing = int(((split >= 0) & (samples.rows[name] < 0)).sum())
        said = [f"{missing} samples have none"] if missing else []
        source = None if isinstance(branch, pd.DataFrame) else branch.source
        report[name] = {
            "source": (source or samples.source).name if source or samples.source else "scikit-learn",
            "size": list(shapes[name][1:] or shapes[name]),
            "split": kept,
            "images": counts,
            "duplicates": dropped,
            "notes": [*notes[name], *said],
        }
    return report
