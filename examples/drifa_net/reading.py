"""How a run reads its data: from the options of its command, and again from what it left."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.arguments import integer, output, source
from examples.drifa_net.data import PAIRINGS, TURNS, Columns, Data, load
from examples.drifa_net.networks import scaled
from examples.drifa_net.records import SOURCES, read_record

COLUMNS = ("sample", "images", "labels", "record", "group", "split")
SEVERAL = ("images", "labels", "record")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what the data is."""
    add = parser.add_argument
    add("--data", nargs="+", type=source, default=[], help="folders, .npz, a table (.csv, .parquet); none: digits")
    add("--pair", choices=PAIRINGS, default="sample", help="sources by the names of samples, or of different ones by chance")
    add("--size", type=integer(1), help="height and width of images, depth of volumes (default: the data's own)")
    add("--leaks", choices=("refuse", "drop"), default="refuse", help="of a given split (default: %(default)s)")
    add("--flips", choices=TURNS, help="flip and turn training images (default: as fits a known collection, else none)")
    add(
        "--window",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="of volumes, black to white (default: percentiles of each)",
    )
    add("--cache", type=output, default="outputs/cache", help="folder of decoded images (default: %(default)s)")
    table = parser.add_argument_group("columns of a table, found by their names and cells if not given")
    table.add_argument("--sample", help="names of samples, as of the images in a folder beside the table")
    table.add_argument("--images", nargs="*", help="paths of images or volumes, a branch a column")
    table.add_argument("--labels", nargs="+", help="classes, a task a column")
    table.add_argument("--record", nargs="*", help="numbers and words, together one branch; no name: none")
    table.add_argument("--group", help="what must stay in one split, as the patient")
    table.add_argument("--split", help="train, validation or test")


def reading(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `load` that follow from a run's options or its configuration; older runs have but a size."""
    given = {name: options.get(name) for name in COLUMNS}
    columns = Columns(**{n: tuple(v) if n in SEVERAL and v is not None else v for n, v in given.items()})
    found = {name: options[name] for name in ("pair", "size", "leaks", "flips", "window") if name in options}
    return {**found, "columns": columns, "balanced": options.get("balance") == "sampling"}


def reloaded(folder: Path, paths: Sequence[Path], cache: Path | None) -> tuple[dict[str, Any], Data]:
    """The record of a finished run and its data, read again from where it was or, if it has moved, from these paths.

    Raises: ValueError: no finished run, or other data; names are compared before anything is read.
    """
    record = read_record(folder / "run.json")
    configuration = record["configuration"]
    paths = list(paths) or sources(folder)
    names = [path.name for path in paths] or ["digits"]
    if names != configuration["data"]:
        raise ValueError(f"{folder} was trained on other data, {configuration['data']}, not {names}: give those by --data.")
    data = load(paths, **reading(configuration), cache=cache)
    if record["data"] != json.loads(json.dumps(data.report)):
        raise ValueError(f"{folder} was trained on other data: {', '.join(names)} has changed since.")
    return record, scaled(data, configuration)


def sources(folder: Path) -> list[Path]:
    """Where the data of a run was; a `ValueError` if that is not known, or not there any more."""
    path = folder / SOURCES
    try:
        found = [Path(text) for text in json.loads(path.read_text())["data"]] if path.exists() else []
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): say where the data is by --data.") from error
    if missing := [one for one in found if not one.exists()]:
        raise ValueError(f"{missing[0]}, which {folder} was trained on, is not there any more: say where it is by --data.")
    return found
