"""What a run leaves in its folder, and its record, read back."""

import json
from pathlib import Path
from typing import Any

METRICS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro-F1",
    "auroc": "AUROC",
    "ece": "ECE",
}
CONFIGURATION = ("model", "data", "seed", "lr", "epochs", "batch_size", "width", "reduction", "backbones")
SOURCES = "sources.json"  # where the data was, on this machine; no part of the record
FILES = ("run.json", "model.safetensors", "checkpoint.pt", SOURCES)


def run_folder(output: Path, model: str, seed: int) -> Path:
    """The folder of one run."""
    return output / f"{model}-seed{seed}"


def read_record(path: Path) -> dict[str, Any]:
    """The record of a finished run, `run.json` in its folder; a `ValueError` if there is none, or it is damaged."""
    if not path.is_file():
        raise ValueError(f"{path.parent} holds no {path.name}: name the folder of a finished run, as OUTPUT/drifa_net-seed0.")
    try:
        record = json.loads(path.read_text())
        touch(record)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): delete it, and train again.") from error
    return record


def touch(record: Any) -> None:
    """Read all that is ever read of a record; raises whatever Python raises if it is not there."""
    for name in CONFIGURATION:
        record["configuration"][name]
    for values in record["test"].values():
        for name in ("samples", *METRICS):
            values[name] + 0
    for task in record["history"][0]["validation"]:
        for epoch in record["history"]:
            epoch["validation"][task]["nll"] + 0
    record["parameters"] + 0
    record["data"]
