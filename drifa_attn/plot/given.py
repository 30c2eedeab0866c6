"""Checks of what the pictures are given; each names the picture, what it expected and what came."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

What = Literal["gate", "gain"]


def check_what(owner: str, what: Any) -> None:
    """Raise a `ValueError` unless this is a word for what is drawn."""
    if what not in ("gate", "gain"):
        raise ValueError(f'{owner} expected what to be "gate" or "gain", got {what!r}.')


def gates_of(owner: str, gates: Any) -> dict[str, Tensor]:
    """The gates of every site as float32 on the CPU; those of a site that ran several times under a name for each time.

    Raises: TypeError: no dict of tensors. ValueError: an empty one, gates without a batch, or such that are not finite.
    """
    if not isinstance(gates, Mapping):
        raise TypeError(
            f"{owner} expected the dict that drifa_attn.gates or drifa_attn.gains returns, got {type(gates).__name__}."
        )
    found = {}
    for name, given in gates.items():
        several = isinstance(given, list | tuple)
        for k, one in enumerate(given if several else [given], 1):
            found[f"{name}, call {k}" if several else str(name)] = checked(owner, name, one)
    if not found:
        raise ValueError(f"{owner} got no gates: the dict is empty.")
    return found


def checked(owner: str, name: Any, gate: Any) -> Tensor:
    """A gate `b c …` as float32 on the CPU."""
    if not isinstance(gate, Tensor):
        raise TypeError(f"{owner} expected a tensor as the gate of {name!r}, got {type(gate).__name__}.")
    if gate.ndim < 2 or not gate.numel():
        raise ValueError(f"{owner} expected the gate of {name!r} as (b, c), got {tuple(gate.shape)}.")
    gate = gate.detach().float().cpu()
    if not gate.isfinite().all():
        raise ValueError(f"{owner} got a gate of {name!r} that is not finite: look at the inputs and the weights.")
    return gate


def several_samples(owner: str, gates: Mapping[str, Tensor]) -> int:
    """The size of the batch, of which every picture of a deviation needs two."""
    sizes = {name: len(gate) for name, gate in gates.items()}
    if min(sizes.values()) < 2:
        raise ValueError(f"{owner} expected gates of at least 2 samples, got {sizes}: gates of one do not deviate.")
    return next(iter(sizes.values()))


def classes_of(owner: str, name: str, value: Any, samples: int) -> Tensor:
    """One class for each sample, `b` of int64."""
    given = torch.as_tensor(value).cpu()
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise TypeError(f"{owner} expected {name} as integers, one class a sample, got {given.dtype}.")
    if given.shape != (samples,):
        raise ValueError(f"{owner} expected {name} of shape ({samples},), one class a sample, got {tuple(given.shape)}.")
    if (given < 0).any():
        raise ValueError(f"{owner} expected {name} of at least 0, got {int(given.min())}.")
    return given.long()


def check_names(owner: str, names: Sequence[str] | None, highest: int) -> None:
    """Raise unless there is a name for each class up to the highest, or None."""
    if names is None:
        return
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"{owner} expected names as a list, one for each class, got {type(names).__name__}.")
    if len(names) <= highest:
        raise ValueError(f"{owner} expected a name for each class, got {len(names)} names and a class {highest}.")


def named(number: int, names: Sequence[str] | None) -> str:
    """The name of a class; its number where it has none."""
    return str(number) if names is None else str(names[number])
