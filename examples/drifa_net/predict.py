"""What trained runs say of new samples: a CSV with probabilities and uncertainty.

From the repository's root:

    python -m examples.drifa_net.predict outputs/drifa_net/fuse-seed0 --data new.csv
    python -m examples.drifa_net.predict outputs/drifa_net/fuse-seed* --data new/           # an ensemble

The data has what the run was trained on, but for labels, groups and split: a table its columns of images and records, folders
or archives in the same order. Images are resized, records encoded and pixels scaled as in training. For each task the CSV has
the class, the probability of each class, and uncertainty in nats: the total, the entropy of the mean of all passes, is the
aleatoric, which is in the data, plus the epistemic, about which passes differ. Passes are Monte Carlo dropout in each run.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.progress import track

from drifa_attn import ensemble
from examples.arguments import Parser, check_files, integer, output, source
from examples.drifa_net.data import IGNORE, Columns, Data, Pairs
from examples.drifa_net.networks import named, restored, scaled
from examples.drifa_net.prepared import view_of
from examples.drifa_net.records import read_record
from examples.drifa_net.samples import Samples, alone, joined
from examples.drifa_net.sources import Collection, read
from examples.drifa_net.store import decoded
from examples.drifa_net.table import is_table, samples_of
from examples.drifa_net.tabular import encoded

KINDS = ("total", "aleatoric", "epistemic")

Schema = Mapping[str, Any]  # the "inputs" of a run's report


def parser() -> Parser:
    """The command's options."""
    whole = Parser("python -m examples.drifa_net.predict", __doc__)
    add = whole.add_argument
    add("runs", nargs="+", type=source, help="folders of finished runs on the same data; several are an ensemble")
    add("--data", nargs="+", type=source, required=True, help="folders, .npz, a table, as in training but for labels")
    add("--output", type=Path, help="the CSV (default: predictions.csv in the first run's folder)")
    add("--samples", type=integer(2), default=30, help="Monte Carlo passes of each run (default: %(default)s)")
    add("--batch-size", type=integer(1), default=64, help="(default: %(default)s)")
    add("--cache", type=output, default="outputs/cache", help="folder of decoded images (default: %(default)s)")
    return whole


def schema_of(records: Sequence[Mapping[str, Any]], folders: Sequence[Path]) -> Schema:
    """What the runs take; a `ValueError` unless they take the same."""
    schemas = [record["data"].get("inputs") for record in records]
    for folder, schema in zip(folders, schemas, strict=True):
        if schema is None:
            raise ValueError(f"{folder} does not say what it takes: it was trained by an older version. Train it again.")
        if schema != schemas[0]:
            raise ValueError(f"{folder} was trained on other data than {folders[0]}: give runs of the same data.")
    return schemas[0]


def samples_for(schema: Schema, paths: Sequence[Path]) -> Samples:
    """The samples of these sources by the run's branches; a `ValueError` if they do not fit it."""
    branches = schema["branches"]
    from_table = [name for name, said in branches.items() if said["kind"] == "record" or said["column"]]
    others = [name for name in branches if name not in from_table]
    tables, folders = [path for path in paths if is_table(path)], [path for path in paths if not is_table(path)]
    if len(folders) != len(others) or len(tables) != bool(from_table):
        wanted = [f"a folder or .npz of {name}" for name in others]
        wanted += [f"a table of {', '.join(from_table)}"] if from_table else []
        raise ValueError(f"the run takes {' and '.join(wanted)}, got {', '.join(map(str, paths))}: give these by --data.")
    several = []
    for name, path in zip(others, folders, strict=True):
        one = alone(read(path))
        (own,) = one.branches
        several.append(one.chosen(slice(None), branches={name: one.branches[own]}, rows={name: one.rows[own]}))
    if tables:
        known = schema["columns"]
        columns = Columns(known["sample"], tuple(known["images"] or ()), (), tuple(known["record"] or ()))
        several.append(samples_of(tables[0], columns, several, trained=True)[0])
    return several[0] if len(several) == 1 else joined(several)


def check_kind(branch: Collection, kind: str, name: str) -> None:
    """Raise a `ValueError` unless a branch has what the run was trained with, images or volumes."""
    if branch.deep != (kind == "volume"):
        raise ValueError(f"the run takes {kind}s for {name}, got {'volumes' if branch.deep else 'images'}: give {kind}s.")


def data_for(schema: Schema, samples: Samples, cache: Path, *, progress: bool) -> Data:
    """The samples as a network of the run takes them, in their order within a `Pairs`."""
    views, shapes = [], {}
    for name, said in schema["branches"].items():
        branch, rows = samples.branches[name], samples.rows[name]
        if isinstance(branch, Collection):
            check_kind(branch, said["kind"], name)
            window = tuple(said["window"]) if said.get("window") else None
            sight = decoded(branch, tuple(said["size"]), cache, window=window, progress=progress)
            shapes[name] = sight.shape
        else:
            sight = encoded(branch, said["encoding"], samples.name)
            shapes[name] = (sight.shape[1],)
        views.append(view_of(sight, rows))
    tasks = {task: tuple(classes) for task, classes in schema["tasks"].items()}
    pairs = Pairs(views, [np.full(len(samples), IGNORE)] * len(tasks), seed=0, paired=True)
    return Data(tuple(shapes), tasks, pairs, pairs, pairs, {}, shapes)


def predicted(members: Sequence[tuple[torch.nn.Module, Data]], passes: int, batch: int, console: Console) -> pd.DataFrame:
    """The columns of every task, a row a sample in the order of the data."""
    generator, parts = torch.Generator().manual_seed(0), []
    nets, data = [net for net, _ in members], members[0][1]
    batches = track(data.loader(data.test, batch), description="predicting", console=console)
    for given in batches:
        found = ensemble(nets, named(given, data, torch.device("cpu"))[:2], passes, generator=generator)
        columns: dict[str, Any] = {}
        for task, classes in data.tasks.items():
            one = found[task]
            columns[task] = [classes[k] for k in one.probs.argmax(1)]
            columns |= {f"{task}: {name}": one.probs[:, k].tolist() for k, name in enumerate(classes)}
            columns |= {f"{task} {kind} uncertainty": getattr(one, kind).tolist() for kind in KINDS}
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True).iloc[np.argsort(data.test.order[:, 0])].reset_index(drop=True)


def seen(samples: Samples) -> Samples:
    """The samples that have any modality; a `ValueError` if none has."""
    kept = np.flatnonzero(np.stack([rows >= 0 for rows in samples.rows.values()]).any(0))
    if not len(kept):
        raise ValueError(f"{samples.name}: no sample has an image or a record.")
    return samples.chosen(kept)


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Read, predict, write; returns what the CSV holds."""
    whole = parser()
    options = whole.parse_args(argv)
    path = options.output or options.runs[0] / "predictions.csv"
    console = Console(highlight=False, soft_wrap=True)
    with whole.explained():
        check_files(path.parent, [path.name])
        records = [read_record(folder / "run.json") for folder in options.runs]
        schema = schema_of(records, options.runs)
        everything = samples_for(schema, options.data)
        samples = seen(everything)
        data = data_for(schema, samples, options.cache, progress=True)
        members = []
        for folder, record in zip(options.runs, records, strict=True):
            own = scaled(data, record["configuration"])
            if members and own.scales != members[0][1].scales:
                raise ValueError(f"{folder} expects other pixels than {options.runs[0]}: predict with one at a time.")
            members.append((restored(folder, record, own), own))
    console.print(f"{len(samples)} samples, paired {samples.paired or 'as they are'}", markup=False)
    if len(samples) < len(everything):
        console.print(f"{len(everything) - len(samples)} samples have neither image nor record and are left out.")
    for name, rows in samples.rows.items():
        if (missing := int((rows < 0).sum())) and len(samples.rows) > 1:
            console.print(f"{missing} samples have no {name}: it is absent there.", markup=False)
    table = predicted(members, options.samples, options.batch_size, console)
    table.insert(0, "sample", samples.keys)
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)
    console.print(str(path), markup=False)
    return table


if __name__ == "__main__":
    main()
