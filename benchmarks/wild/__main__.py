"""`python -m benchmarks.wild` wraps networks of other libraries for real and writes `benchmarks/wild.md`.

Each network runs in a process of its own, with limits of time and memory. What is done is kept in `outputs/wild.jsonl`, so that
a run which was stopped goes on; delete that file to begin again. With patterns, `python -m benchmarks.wild "transformers/*"`
runs the networks that they match, done or not, and shows what came out. The table holds what is done.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded

import argparse
import importlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from .case import Case
from .compiled import warm
from .isolated import CrashedError, isolated
from .row import Row, examined
from .table import table, verdict

FILES = (
    "transformers",
    "transformers_images",
    "transformers_others",
    "monai",
    "segmentation_models",
    "torchvision",
    "open_clip",
)
FILES += ("vit_pytorch", "pytorchcv", "timm")
REPORT = Path(__file__).parents[1] / "wild.md"
DONE = Path("outputs/wild.jsonl")


def cases() -> Iterator[Case]:
    """Every network, of all libraries."""
    for name in FILES:
        yield from importlib.import_module(f"{__package__}.models.{name}").cases()


def measured(case: Case) -> Row:
    """The row of a network, whatever happens to it."""
    try:
        return isolated(examined, case)
    except CrashedError as error:
        return Row(case.library, case.title, failed=str(error))


def kept() -> dict[str, Row]:
    """The rows that are done, the last of each network."""
    if not DONE.exists():
        return {}
    return {key: Row(**row) for key, row in map(json.loads, DONE.read_text().splitlines())}


def keep(key: str, row: Row) -> None:
    """Write a row to the end of the file of what is done."""
    DONE.parent.mkdir(exist_ok=True)
    with DONE.open("a") as file:
        file.write(json.dumps([key, asdict(row)]) + "\n")


def show(key: str, row: Row) -> None:
    """Say in a few lines what came out of a network."""
    print(f"{row.seconds:6.1f} s  {key}: {len(row.sites)} sites, {verdict(row)}", flush=True)
    for text in filter(None, [row.failed, row.refused, *(f"{number} broken: {why}" for number, why in row.broken.items())]):
        print("          " + text.replace("\n", "\n          "), flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the networks that are not done yet, or those that are asked for, and write the table."""
    parser = argparse.ArgumentParser("python -m benchmarks.wild", description=__doc__)
    parser.add_argument("pattern", nargs="*", help='networks to run, as "MONAI/*"; else all that are not done yet')
    patterns = parser.parse_args(arguments).pattern
    torch.set_num_threads(1)
    known, done = {case.key: case for case in cases()}, kept()
    chosen = [key for key in known if any(fnmatchcase(key, p) for p in patterns)] if patterns else known.keys() - done.keys()
    if patterns and not chosen:
        parser.error(f"no network matches {patterns}; their names begin with {sorted({key.split('/')[0] for key in known})}")
    warm()
    for key in [key for key in known if key in set(chosen)]:
        done[key] = measured(known[key])
        keep(key, done[key])
        show(key, done[key])
    rows = [done[key] for key in known if key in done]
    REPORT.write_text("\n".join(table(rows, waiting=len(known) - len(rows))))


if __name__ == "__main__":
    main()
