"""Checks of arguments, each with a message that says who expected what, what came, and what to do."""

from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor, nn

Init = Literal["paper", "identity"]
Kind = Literal["classes", "multilabel", "regression"]
KINDS = ("classes", "multilabel", "regression")


def check_module(owner: str, model: Any) -> None:
    """Raise a `TypeError` unless `model` is a network."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{owner} expected an nn.Module, got {type(model).__name__}: build the network first.")


def count(owner: str, name: str, value: Any) -> int:
    """`value` as an integer, NumPy's too; a `ValueError` unless it is one of at least 1."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{owner} expected {name} to be an integer >= 1, got {value!r}.")
    return int(value)


def number(owner: str, name: str, value: Any, where: str, holds: Callable[[float], bool]) -> float:
    """`value` as a float, NumPy's numbers too; a `ValueError` unless it is a number that `holds`, as `where` says in words."""
    if not isinstance(value, Real) or isinstance(value, bool) or not holds(float(value)):
        raise ValueError(f"{owner} expected {name} {where}, got {value!r}.")
    return float(value)


def check_mapping(owner: str, name: str, value: Any, content: str) -> None:
    """Raise a `TypeError` unless `value` is a dict or None."""
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"{owner} expected {name} as a dict {content}, got {type(value).__name__}.")


def check_init(owner: str, init: str) -> None:
    """Raise a `ValueError` unless `init` is one of the two starts."""
    if init not in ("paper", "identity"):
        raise ValueError(f'{owner} expected init "paper" or "identity", got {init!r}.')


def check_kinds(owner: str, kinds: Any) -> None:
    """Raise unless this is the kind of all heads, or a dict with the kinds of some."""
    if not isinstance(kinds, str | Mapping):
        raise TypeError(f"{owner} expected kinds as one of {KINDS}, or a dict of them by name, got {kinds!r:.80}.")
    for kind in kinds.values() if isinstance(kinds, Mapping) else [kinds]:
        if kind not in KINDS:
            raise ValueError(f"{owner} expected each of kinds to be one of {KINDS}, got {kind!r}.")


def kinds_of(owner: str, kinds: Kind | Mapping[Any, Kind], names: Collection[Any]) -> dict[Any, Kind]:
    """The kind of every head by its name: one kind is that of all, and a head that a dict leaves out has classes."""
    if isinstance(kinds, str):
        return dict.fromkeys(names, kinds)
    if unknown := [name for name in kinds if name not in names]:
        raise ValueError(f"{owner} got kinds for {unknown}, but there are {list(names)}.")
    return {name: kinds.get(name, "classes") for name in names}


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
