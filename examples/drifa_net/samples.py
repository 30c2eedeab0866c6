"""Samples that several branches see: which image or record of each branch is one sample, and what it is labelled."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from examples.drifa_net.sources import UNLABELLED, Collection, halves


@dataclass(frozen=True)
class Samples:
    """n samples. `rows` `n` says for each branch which image of its collection, or line of its table, a sample has; −1: none.

    `tasks` name classes, `targets` `n` number them, UNLABELLED where a sample has no label. `groups` and `split` are `n`, as a
    `Collection` has them, `keys` `n` name the samples, and `paired` says how branches came together.
    """

    name: str
    source: Path | None
    keys: np.ndarray
    branches: dict[str, Collection | pd.DataFrame]
    rows: dict[str, np.ndarray]
    tasks: dict[str, tuple[str, ...]]
    targets: dict[str, np.ndarray]
    groups: np.ndarray | None = None
    split: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    paired: str = ""

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of the first task, by which samples are stratified."""
        return next(iter(self.tasks.values()))

    @property
    def labels(self) -> np.ndarray:
        """The class of each sample in the first task; where that is not known, its most frequent one."""
        labels = next(iter(self.targets.values()))
        known = labels[labels != UNLABELLED]
        return np.where(labels == UNLABELLED, np.bincount(known).argmax() if len(known) else 0, labels)

    def where(self, i: int) -> str:
        """The place of sample i, as an error names it."""
        for name, rows in self.rows.items():
            branch = self.branches[name]
            if isinstance(branch, Collection) and rows[i] >= 0:
                return branch.where(rows[i])
        return f"{self.keys[i]} of {self.source}"

    def chosen(self, kept: np.ndarray, **changes: object) -> "Samples":
        """Some of these samples."""
        fields = dict(vars(self))
        for name in ("keys", "groups", "split"):
            fields[name] = None if fields[name] is None else fields[name][kept]
        for name in ("rows", "targets"):
            fields[name] = {key: array[kept] for key, array in fields[name].items()}
        return Samples(**{**fields, **changes})


def part_name(text: str, taken: Sequence[str] = ()) -> str:
    """A name that a part of a network can have: no dot, nothing that torch uses itself, and not taken."""
    name = text.strip().replace(".", "_").replace(" ", "_") or "branch"
    if hasattr(nn.ModuleDict, name) or hasattr(nn.ModuleDict(), name):
        name += "_"
    number = 1 + sum(name == other or other.startswith(f"{name}-") and other[len(name) + 1 :].isdecimal() for other in taken)
    return f"{name}-{number}" if number > 1 else name


def alone(collection: Collection, taken: Sequence[str] = ()) -> Samples:
    """A collection as one branch and, if it has classes, one task."""
    name = part_name(collection.name, taken)
    keys = np.array([str(i) for i in range(len(collection))], object) if collection.keys is None else collection.keys
    rows = {name: np.arange(len(collection))}
    tasks = {name: collection.classes} if collection.classes else {}
    targets = {name: collection.labels.astype(np.int64)} if tasks else {}
    groups, split, notes = collection.groups, collection.split, collection.notes
    return Samples(collection.name, collection.source, keys, {name: collection}, rows, tasks, targets, groups, split, notes)


def digits() -> Samples:
    """Scikit-learn's digits: left and right halves of each, told apart as digits and as even or odd."""
    left, right, parity = halves()
    branches = {view.name: view for view in (left, right)}
    tasks, targets = {"digit": left.classes, "parity": ("even", "odd")}, {"digit": left.labels, "parity": parity}
    keys, rows = np.arange(len(left)).astype(str).astype(object), dict.fromkeys(branches, np.arange(len(left)))
    return Samples("digits", None, keys, {**branches}, rows, tasks, targets, paired="two views of each sample")


def check_keys(several: Sequence[Samples]) -> None:
    """Raise a `ValueError` unless each source names its samples, each once, and shares some with another."""
    for one in several:
        for branch in one.branches.values():
            if isinstance(branch, Collection) and branch.keys is None:
                raise ValueError(
                    f"{one.name}: nothing says which samples {one.source} holds, so it cannot be paired: add an array 'sample' "
                    "with a name for each, or give --pair chance if the sources are of different samples."
                )
        if len(set(one.keys)) < len(one.keys):
            twice = next(key for key in one.keys if (one.keys == key).sum() > 1)
            raise ValueError(f"{one.name}: {one.source} has {str(twice)!r} more than once, so its samples cannot be paired.")
    for one in several:
        if not set(one.keys) & set().union(*(other.keys.tolist() for other in several if other is not one)):
            examples = ", ".join(f"{str(other.keys[0])!r} in {other.name}" for other in several)
            raise ValueError(
                f"{one.name} has no sample in common with another source (the first are {examples}): name files alike, give a "
                "column of their names by --sample, or give --pair chance if they are of different samples."
            )


def joined(several: Sequence[Samples]) -> Samples:
    """Samples of several sources that have the same key as one sample; what a source does not have is absent.

    Where all sources have the same classes and agree on the samples that they share, they are one task.
    """
    check_keys(several)
    keys = sorted(set().union(*(one.keys.tolist() for one in several)))
    places = [{key: i for i, key in enumerate(one.keys.tolist())} for one in several]
    shared, names = sum(all(key in place for place in places) for key in keys), ", ".join(one.name for one in several)
    found = [np.array([place.get(key, -1) for key in keys]) for place in places]
    rows = {
        name: np.where(at < 0, -1, own[at]) for one, at in zip(several, found, strict=True) for name, own in one.rows.items()
    }
    tasks, targets = tasks_of(several, found)
    alone = "".join(
        f", {int(((at >= 0).sum()) - shared)} besides in {one.name}" for one, at in zip(several, found, strict=True)
    )
    return Samples(
        "+".join(one.name for one in several),
        several[0].source,
        np.array(keys, object),
        {name: branch for one in several for name, branch in one.branches.items()},
        rows,
        tasks,
        targets,
        agreed("group", [(one.groups, at) for one, at in zip(several, found, strict=True)], names),
        agreed("split", [(one.split, at) for one, at in zip(several, found, strict=True)], names),
        tuple(note for one in several for note in one.notes),
        f"by name, as {keys[0]}: {shared} of {len(keys)} samples are in all of {names}{alone}",
    )


def tasks_of(several: Sequence[Samples], found: Sequence[np.ndarray]) -> tuple[dict, dict]:
    """The tasks of joined sources and their labels: one for all sources that agree on it, else each its own."""
    tasks = {task: classes for one in several for task, classes in one.tasks.items()}
    targets = {
        task: np.where(at < 0, UNLABELLED, labels[at])
        for one, at in zip(several, found, strict=True)
        for task, labels in one.targets.items()
    }
    columns = np.stack(list(targets.values()), 1) if targets else np.zeros((0, 0))
    highest = columns.max(1, initial=UNLABELLED)
    agree = ((columns == highest[:, None]) | (columns == UNLABELLED)).all()
    if len(targets) > 1 and all(len(one.tasks) == 1 for one in several) and len(set(tasks.values())) == 1 and agree:
        return {"label": next(iter(tasks.values()))}, {"label": highest}
    return tasks, targets


def agreed(what: str, columns: Sequence[tuple[np.ndarray | None, np.ndarray]], names: str) -> np.ndarray | None:
    """The groups or the split of joined sources: of the first that knows a sample; None if none of them has any."""
    given = [(values, at) for values, at in columns if values is not None]
    if not given:
        return None
    merged = np.full(len(given[0][1]), None, object)
    for values, at in given:
        known = np.where(at < 0, None, values.astype(object)[at])
        if odd := [i for i in range(len(merged)) if None not in (merged[i], known[i]) and merged[i] != known[i]]:
            raise ValueError(f"{names} do not agree on the {what} of {len(odd)} samples: mend one of them, or leave it out.")
        merged = np.where(merged == None, known, merged)  # noqa: E711
    if what == "split":
        if (merged == None).any():  # noqa: E711
            raise ValueError(f"{names}: {sum(value is None for value in merged)} samples have no split: give each one.")
        return merged.astype(np.int64)
    return np.array([f"alone/{i}" if value is None else value for i, value in enumerate(merged)], object)


def labelled(samples: Samples) -> Samples:
    """The samples that have a label of any task, with a note of the others."""
    known = np.zeros(len(samples), bool)
    for labels in samples.targets.values():
        known |= labels != UNLABELLED
    seen = np.zeros(len(samples), bool)
    for rows in samples.rows.values():
        seen |= rows >= 0
    kept = np.flatnonzero(known & seen)
    if len(kept) == len(samples):
        return samples
    what = {"no label": int((~known).sum()), "no modality": int((known & ~seen).sum())}
    notes = tuple(f"{count} samples with {name} are left out" for name, count in what.items() if count)
    return samples.chosen(kept, notes=(*samples.notes, *notes))


def check_tasks(samples: Samples) -> None:
    """Raise a `ValueError` unless there is a task, and each has two classes."""
    if not samples.tasks:
        raise ValueError(
            f"{samples.name}: nothing in {samples.source} says what a sample is: put images into a folder a class, or give a "
            "table with a column of labels, named by --labels."
        )
