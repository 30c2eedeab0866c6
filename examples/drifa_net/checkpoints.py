"""The files of a run: written whole or not at all, and read back if they are of the same run."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from examples.drifa_net.records import read_record

FREE = ("save_every", "workers", "log")  # options that do not touch the result
CHECKPOINT = ("configuration", "learner", "optimizer", "scaler", "place", "history", "best", "seconds")


def replace(path: Path, write: Any) -> None:
    """Let `write` fill a file beside it, then put that in its place: nobody ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(path.name + ".half")
    write(half)
    os.replace(half, path)


def left(folder: Path, configuration: Mapping[str, Any]) -> list[Any]:
    """The record that a run left in its folder, else its checkpoint, else nothing; a `ValueError` if it is another run's."""
    finished, path = folder / "run.json", folder / "checkpoint.pt"
    record, state = None, None
    if finished.exists():
        record = read_record(finished)
        check_same(configuration, record["configuration"], finished)
    elif path.exists():
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = {name: state[name] for name in CHECKPOINT}
        except Exception as error:  # of many kinds, by torch, pickle and zip
            raise ValueError(f"{path} is damaged ({type(error).__name__}): delete it to begin again.") from error
        check_same(configuration, state["configuration"], path)
    return [record, state]


def check_same(configuration: Mapping[str, Any], other: Mapping[str, Any], path: Path) -> None:
    """Raise a `ValueError` with the first difference unless a file belongs to this configuration."""
    for name, value in configuration.items():
        if name not in FREE and (name not in other or other[name] != value):
            raise ValueError(
                f"{path} is of a run with {name}={other.get(name)!r}, this one has {name}={value!r}: "
                "give the same options, or another --output."
            )
