"""Checks of arguments, each with a message that says who expected what, what came, and what to do."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Init = Literal["paper", "identity"]


def check_count(owner: str, name: str, value: Any) -> None:
    """Raise a `ValueError` unless `value` is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{owner} expected {name} to be an integer >= 1, got {value!r}.")


def check_init(owner: str, init: str) -> None:
    """Raise a `ValueError` unless `init` is one of the two starts."""
    if init not in ("paper", "identity"):
        raise ValueError(f'{owner} expected init "paper" or "identity", got {init!r}.')


def per_modality(owner: str, name: str, value: Any, modalities: int) -> tuple[Any, ...]:
    """One value for each modality: a sequence as it is, anything else repeated."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return (value,) * modalities
    if len(value) != modalities:
        raise ValueError(f"{owner} expected {name} once or once per modality ({modalities}), got {len(value)}: {value!r}.")
    return tuple(value)


def check_modalities(owner: str, xs: Sequence[Tensor], modalities: int) -> None:
    """Raise unless `xs` is a sequence with one tensor per modality, all of one batch size."""
    if isinstance(xs, Tensor) or not isinstance(xs, Sequence):
        raise TypeError(f"{owner} expected a list of {modalities} tensors, one per modality, got {type(xs).__name__}.")
    if len(xs) != modalities or not xs:
        raise ValueError(
            f"{owner} expected {modalities or 'some'} modalities, got {len(xs)}: "
            "name absent ones in `present`, do not leave them out."
        )
    for x in xs:
        if not isinstance(x, Tensor):
            raise TypeError(f"{owner} expected a tensor, got {type(x).__name__}: name absent modalities in `present`.")
    if not torch.jit.is_tracing() and any(x.shape[0] != xs[0].shape[0] for x in xs):
        raise ValueError(f"{owner} expected one batch size for all modalities, got {[x.shape[0] for x in xs]}.")


def check_present(owner: str, present: Tensor | None, xs: Sequence[Tensor]) -> None:
    """Raise unless `present` is None or a boolean `b m` on the device of the features."""
    if present is None:
        return
    if not isinstance(present, Tensor) or present.dtype != torch.bool:
        got = present.dtype if isinstance(present, Tensor) else type(present).__name__
        raise TypeError(f"{owner} expected present to be a boolean tensor (b m), got {got}: convert it with .bool().")
    if not torch.jit.is_tracing() and present.shape != (xs[0].shape[0], len(xs)):
        expected = (xs[0].shape[0], len(xs))
        raise ValueError(f"{owner} expected present of shape (b, m) = {expected}, got {tuple(present.shape)}.")
    if present.device != xs[0].device:
        raise ValueError(f"{owner} expected present on {xs[0].device}, where the features are, got {present.device}.")
