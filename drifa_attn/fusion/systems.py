"""The fusions that `fuse` knows by name, one line each."""

from .mifa import MIFARefiner
from .protocol import Readout, Refiner
from .readout import Concatenated

FUSIONS: dict[str, tuple[type[Refiner] | None, type[Readout]]] = {
    "mifa": (MIFARefiner, Concatenated),
}


def system(fusion: str | type[Refiner] | type[Readout]) -> tuple[type[Refiner] | None, type[Readout]]:
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
