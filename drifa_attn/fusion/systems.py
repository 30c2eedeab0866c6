"""The fusions that `fuse` knows by name, one line each."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from .aff import AFF
from .caf import CoAttention
from .concat import Concatenated
from .cross_attention import CrossAttention
from .gated import Gated
from .gloria import GLoRIA
from .hyperbranch import HyperBranch
from .iaff import IAFF
from .lmf import LowRank
from .mifa import MIFARefiner
from .mmtm import MMTM
from .mttu import MTTU
from .mutual_attention import MutualAttention
from .protocol import Places, Readout, Refiner, Untouched
from .sum import Summed

System = tuple[type[Refiner] | None, type[Readout]]

FUSIONS: dict[str, System] = {
    "mifa": (MIFARefiner, Concatenated),
    "concat": (None, Concatenated),
    "sum": (None, Summed),
    "gated": (None, Gated),
    "lmf": (None, LowRank),
    "mmtm": (MMTM, Concatenated),
    "cross_attention": (CrossAttention, Concatenated),
    "mutual_attention": (MutualAttention, Concatenated),
    "caf": (CoAttention, HyperBranch),
    "mttu": (None, MTTU),
    "gloria": (None, GLoRIA),
    "aff": (None, AFF),
    "iaff": (None, IAFF),
}
GIVEN = ("self", "places", "outputs", "stages", "device", "dtype")  # what `fuse` itself passes


def system(fusion: str | type[Refiner] | type[Readout]) -> System:
    """The refiner and the readout of a fusion, by its name or by a class of one's own."""
    if isinstance(fusion, str):
        if fusion not in FUSIONS:
            raise ValueError(f"fuse expected fusion to be one of {', '.join(FUSIONS)} or a class, got {fusion!r}.")
        return FUSIONS[fusion]
    if isinstance(fusion, type) and issubclass(fusion, Refiner):
        return fusion, Concatenated
    if isinstance(fusion, type) and issubclass(fusion, Readout):
        return None, fusion
    raise TypeError(f"fuse expected fusion to be a name, a Refiner or a Readout class, got {fusion!r}.")


def check_options(fusion: Any, options: Mapping[str, Any]) -> None:
    """Raise a `TypeError` unless the refiner of a fusion, or the readout of one without a refiner, takes these options."""
    refiner, readout = system(fusion)
    known = inspect.signature((refiner or readout).__init__).parameters  # type: ignore[misc]
    if any(one.kind is one.VAR_KEYWORD for one in known.values()):
        return
    taken = [name for name in known if name not in GIVEN]
    for name in options:
        if name not in taken:
            shown = fusion if isinstance(fusion, str) else fusion.__name__
            raise TypeError(f"fusion {shown!r} takes the options {', '.join(taken) or 'none'}, got {name!r}.")


def built(
    fusion: str | type[Refiner] | type[Readout],
    outputs: Places,
    stages: Sequence[Places],
    options: Mapping[str, Any],
    factory: Mapping[str, Any],
) -> tuple[list[Refiner], Readout]:
    """A refiner for every stage, or none at all, and a readout; options are the refiner's where there is one.

    Raises: ValueError: a refiner that acts at none of the stages; or an option out of its range. TypeError: an unknown option.
    """
    refiner, readout = system(fusion)
    check_options(fusion, options)
    end = readout(outputs, stages, **({} if refiner else options), **factory)  # type: ignore[call-arg,arg-type]
    if refiner is None:
        return [], end
    reasons = [refiner.left_alone(stages, k, **options) for k in range(len(stages))]
    if None not in reasons:
        raise ValueError(
            f"{refiner.__name__} acts at none of the {len(stages)} stages: {'; '.join(dict.fromkeys(map(str, reasons)))}. "  # type: ignore[arg-type]
            'Name other stages in at=, change fusion_options={...}, or take fusion="concat".'
        )
    made: list[Refiner] = []
    for places, reason in zip(stages, reasons, strict=True):
        made.append(refiner(places, **options, **factory) if reason is None else Untouched(reason))  # type: ignore[call-arg,arg-type]
    return made, end
