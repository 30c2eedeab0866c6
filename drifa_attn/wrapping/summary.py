"""`summary`: what attention a network holds now, in one table."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from .active import attentions
from .table import count, share, table


@dataclass(frozen=True)
class Attended:
    """One layer of attention.

    Attributes:
        name: where it is; kind: its class.
        params: its weights; trained: those that want a gradient.
        calibrated: whether `calibrate` has measured its statistics; None for a layer that has none.
        start: whether it still passes features on bit for bit; None for a layer that has no such start.
        enabled: whether it runs.
    """

    name: str
    kind: str
    params: int
    trained: int
    calibrated: bool | None
    start: bool | None
    enabled: bool


@dataclass(frozen=True)
class Summary:
    """The attention of a network; `print` shows it as a table.

    Attributes:
        network: the class of the network.
        layers: its attention that has weights, in the order of its modules.
        params: all weights of the network, with those of the attention; trained: those that want a gradient.
    """

    network: str
    layers: tuple[Attended, ...]
    params: int
    trained: int

    def __str__(self) -> str:
        added = sum(layer.params for layer in self.layers)
        title = (
            f"{self.network}: {len(self.layers)} attention layers of {count(added)} weights "
            f"({share(added, self.params - added)} of {count(self.params - added)}); "
            f"{count(self.trained)} of {count(self.params)} weights are trained"
        )
        header = ("attention", "kind", "weights", "trained", "calibrated", "start", "enabled")
        return "\n".join([title, *table(header, [row(layer) for layer in self.layers], left=2)])


def row(layer: Attended) -> tuple[str, ...]:
    """A layer as words."""
    said = {True: "yes", False: "no", None: "–"}
    start = {True: "at it", False: "left", None: "–"}[layer.start]
    name = layer.name or "the network itself"
    cells = count(layer.params), count(layer.trained), said[layer.calibrated], start, said[layer.enabled]
    return name, layer.kind, *cells


def summary(model: nn.Module) -> Summary:
    """Say what attention a network holds: where, of how many weights, trained or not, calibrated or not, moved or not.

    Args:
        model: a network that holds attention, wrapped, fused or built with it.

    Returns: the `Summary`; `print` it.
    Raises: TypeError: no network. ValueError: the network holds no attention.
    Differs: the paper builds its own network and has no such table.
    """
    layers = tuple(layer for layer in (attended(*item) for item in attentions(model).items()) if layer.params)
    weights = list(model.parameters())
    return Summary(type(model).__name__, layers, sum(p.numel() for p in weights), wanting(weights))


def attended(name: str, layer: Any) -> Attended:
    """What there is to say of one layer."""
    weights = list(layer.parameters())
    try:
        start = None if getattr(layer, "init", "identity") == "paper" else layer.is_start()
    except NotImplementedError:
        start = None
    measured = getattr(layer, "global_spread", None)
    calibrated = None if measured is None else bool((measured != 1).any() or layer.global_center.any())
    params = sum(p.numel() for p in weights)
    return Attended(name, type(layer).__name__, params, wanting(weights), calibrated, start, layer.enabled)


def wanting(weights: list[nn.Parameter]) -> int:
    """How many numbers of these weights want a gradient."""
    return sum(p.numel() for p in weights if p.requires_grad)
