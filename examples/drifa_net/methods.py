"""Trained networks that a figure compares, each a column: several runs on the same images, or one with its gates off and on."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import drifa_attn
from examples.drifa_net.data import Data
from examples.drifa_net.networks import Inputs, Labels, attentions, named, restored, scaled
from examples.drifa_net.reading import COLUMNS, reloaded
from examples.drifa_net.records import read_record

TITLES = {"mifa": "DRIFA", "gloria": "GLoRIA", "mutual_attention": "MTF/MA", "caf": "CAF", "mttu": "MTTU"}  # the paper's names
SAME = ("data", "seed", "pair", "size", "leaks", "window", *COLUMNS)  # what runs of one figure have in common
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Method:
    """A network in eval mode, its name above a column, and the data as it takes it; `off` is without its attention."""

    title: str
    net: nn.Module
    data: Data
    off: bool = False

    def way(self) -> AbstractContextManager:
        """The context in which the network is this method."""
        return drifa_attn.disabled(self.net) if self.off else nullcontext()

    def batches(self, size: int = 256) -> Iterator[tuple[Inputs, Tensor | None, Labels]]:
        """The test samples in their order: inputs by branch, who is present, classes by task."""
        for batch in self.data.loader(self.data.test, size):
            yield named(batch, self.data, CPU)

    def taken(self, places: Sequence[int]) -> tuple[Inputs, Tensor | None]:
        """Test samples by their places."""
        (batch,) = self.data.loader(self.data.test, [list(places)])
        return named(batch, self.data, CPU)[:2]


def title_of(configuration: Mapping[str, Any]) -> str:
    """What a run is called: its fusion by the paper's name, or its model."""
    if configuration["model"] != "fuse":
        return {"drifa_net": "DRIFA-Net"}.get(configuration["model"], configuration["model"])
    fusion = configuration.get("fusion", "mifa")
    return TITLES.get(fusion, fusion)


def check_alike(folders: Sequence[Path], records: Sequence[Mapping[str, Any]]) -> None:
    """Raise a `ValueError` unless the runs are of different methods, and of the same data, split, seed and size."""
    first, titles = records[0]["configuration"], [title_of(record["configuration"]) for record in records]
    for folder, record in zip(folders[1:], records[1:], strict=True):
        for name in SAME:
            ours, others = record["configuration"].get(name), first.get(name)
            if ours != others:
                raise ValueError(
                    f"{folder} has {name} {ours!r}, {folders[0]} has {others!r}: a figure compares runs on the same images, "
                    f"split and seed. Train them with the same --{'seeds' if name == 'seed' else name}."
                )
        if record["data"] != records[0]["data"]:
            raise ValueError(f"{folder} saw another split or size of the data than {folders[0]}: train them on the same data.")
    if twice := next((title for title in titles if titles.count(title) > 1), None):
        raise ValueError(f"{titles.count(twice)} of the runs are of {twice}: give one run for each method.")


def methods_of(folders: Sequence[Path], paths: Sequence[Path], cache: Path | None) -> list[Method]:
    """The methods of these finished runs; of a single one with gates, itself without and with them.

    Raises: ValueError: no finished run, runs that do not go together, or other data.
    """
    records = [read_record(folder / "run.json") for folder in folders]
    check_alike(folders, records)
    _, data = reloaded(folders[0], paths, cache)
    methods = []
    for folder, record in zip(folders, records, strict=True):
        own = scaled(replace(data, scales={}), record["configuration"])
        methods.append(Method(title_of(record["configuration"]), restored(folder, record, own), own))
    if len(methods) == 1 and attentions(methods[0].net):
        return [replace(methods[0], title="gates off", off=True), replace(methods[0], title="gates on")]
    return methods
