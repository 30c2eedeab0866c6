"""The history of a run as it grows, for those who want to watch it: accelerate's trackers, and one that writes a CSV.

What a checkpoint knows is logged again when a run goes on, in the place of what was logged before.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate.tracking import GeneralTracker, TensorBoardTracker, on_main_process

from examples.drifa_net.checkpoints import replace

LOGS = ("csv", "tensorboard")


class CSVTracker(GeneralTracker):
    """A tracker that keeps a table, a row an epoch, in one file that is always whole."""

    name, requires_logging_directory = "csv", True

    @on_main_process
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.rows = path, []

    @property
    def tracker(self) -> Path:
        """The file."""
        return self.path

    @on_main_process
    def log(self, values: Mapping[str, Any], step: int | None = None, **_: Any) -> None:
        """Write the row of an epoch."""
        self.rows.append({"epoch": step, **values})
        table = pd.DataFrame(self.rows)
        replace(self.path, lambda half: table.to_csv(half, index=False))


def check_logs(names: Sequence[str]) -> None:
    """Raise an `ImportError` unless everything that these need is there."""
    if "tensorboard" in names and importlib.util.find_spec("tensorboard") is None:
        raise ImportError("--log tensorboard needs the package tensorboard: pip install tensorboard, or give --log csv.")


def trackers(names: Sequence[str], folder: Path) -> list[GeneralTracker]:
    """The trackers of a run, in its folder."""
    kinds = {
        "csv": lambda: CSVTracker(folder / "log.csv"),
        "tensorboard": lambda: TensorBoardTracker("tensorboard", str(folder), purge_step=0),
    }
    several = [kinds[name]() for name in names]
    for one in several:
        getattr(one, "start", lambda: None)()  # what accelerate did in __init__ before it had this
    return several


def log(several: Sequence[GeneralTracker], epoch: Mapping[str, Any]) -> None:
    """Let every tracker have an entry of a run's history."""
    values = {f"{task}/{name}": value for task, found in epoch["validation"].items() for name, value in found.items()}
    for one in several:
        one.log({"loss": epoch["loss"], **values}, step=epoch["epoch"])
