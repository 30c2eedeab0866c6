"""Networks of timm: the smallest architecture of each family, as `benchmarks/coverage.md` lists them."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import timm
import torch
from torch import nn

from benchmarks.wild.case import Case, images

COVERAGE = Path(__file__).parents[2] / "coverage.md"
MOST = 60e6  # weights
SIZES = (160, 192, 224)


def cases() -> Iterator[Case]:
    """Every family that has a network of a bearable size."""
    known = set(timm.list_models())
    for line in COVERAGE.read_text().splitlines():
        name = line.split("|")[2].strip() if line.count("|") > 7 else ""
        if name not in known:
            continue
        with torch.device("meta"):
            model = timm.create_model(name).eval()
            size = taken(model)
        if sum(parameter.numel() for parameter in model.parameters()) <= MOST:
            yield Case(
                library="timm", name=name, build=partial(timm.create_model, name), inputs=images(*size[1:], channels=size[0])
            )


@torch.no_grad()
def taken(model: nn.Module) -> tuple[int, ...]:
    """The smallest size of an image that a network without memory takes, of a few, or its own."""
    channels, *own = model.pretrained_cfg["input_size"]  # type: ignore[index]
    for size in SIZES:
        try:
            model(torch.zeros(2, channels, size, size, device="meta"))
        except Exception:  # noqa: BLE001, S112 - networks of one size refuse others in their own ways
            continue
        return channels, size, size
    return channels, *own
