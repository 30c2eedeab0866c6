"""The heads of a network in what it gives: found by their names, or picked, each with its kind."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from drifa_attn.checks import Kind, kinds_of

Heads = str | int | Sequence[str | int] | Callable[[Any], Any] | None
ONLY = object()  # the head of a model that gives one tensor


def entries(output: Any) -> dict[Any, Any] | None:
    """What an output holds, by its keys, or None; fields of a dataclass that are None are left out, as Hugging Face does."""
    if isinstance(output, Mapping):
        return dict(output)
    if is_dataclass(output) and not isinstance(output, type):
        named = {field.name: getattr(output, field.name) for field in fields(output)}
        return {name: value for name, value in named.items() if value is not None}
    if isinstance(output, tuple) and hasattr(output, "_asdict"):
        return output._asdict()
    return dict(enumerate(output)) if isinstance(output, list | tuple) else None


def check_heads(owner: str, heads: Any) -> None:
    """Raise a `TypeError` unless this picks heads."""
    several = isinstance(heads, Sequence) and not isinstance(heads, str)
    for key in heads if several else [heads]:
        if isinstance(key, bool) or not (isinstance(key, str | int) or (not several and (key is None or callable(key)))):
            raise TypeError(f"{owner} expected heads as a name, an index, a list of these or a callable, got {heads!r:.80}.")
    if several and (not heads or len(set(heads)) < len(heads)):
        raise ValueError(f"{owner} expected heads as a list with each head once, got {heads!r:.80}.")


def one_head(name: str, output: Any, key: str | int) -> Any:
    """The entry of an output with this name, or at this index."""
    found = entries(output) or {}
    if key in found:
        return found[key]
    if isinstance(key, int) and isinstance(output, list | tuple) and -len(output) <= key < len(output):
        return output[key]
    holds = f"the output holds {list(found)}" if found else f"the output is a {type(output).__name__}"
    raise ValueError(f"{name} found no head {key!r}: {holds}.")


def picked(name: str, output: Any, heads: Heads) -> dict[Any, Any]:
    """The logits of every head that is asked for, by its key; of one alone that stands in no dict, by `ONLY`."""
    if callable(heads):
        output, heads = heads(output), None
    if isinstance(heads, str | int):
        return {ONLY: one_head(name, output, heads)}
    if heads is not None:
        return {key: one_head(name, output, key) for key in heads}
    found = entries(output)
    if found == {}:
        raise ValueError(f"{name} expected logits from the model, got none: {output!r:.80}.")
    return {ONLY: output} if found is None else found


def kinds_given(owner: str, kinds: Kind | Mapping[Any, Kind], heads: Heads, found: Mapping[Any, Any]) -> dict[Any, Kind]:
    """The kind of every head that was found; a head that is picked by one name has that name here too."""
    if ONLY not in found:
        return kinds_of(owner, kinds, found)
    if isinstance(kinds, str):
        return {ONLY: kinds}
    if not isinstance(heads, str | int):
        raise ValueError(f'{owner} got kinds for {list(kinds)}, but the model gives one head without a name: kinds="...".')
    return {ONLY: kinds_of(owner, kinds, [heads])[heads]}


def check_head(name: str, key: Any, output: Any, kind: Kind) -> None:
    """Raise unless a head gives what its kind says."""
    where = name if key is ONLY else f"{name} head {key!r}"
    axes = "b k …" if kind == "classes" else "b …"
    if not isinstance(output, Tensor) or not output.is_floating_point():
        got = output.dtype if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(
            f"{where} expected one floating-point tensor ({axes}) per head from the model, got {got}: "
            "where its output holds more than logits, heads= picks them."
        )
    shape = tuple(output.shape)
    if kind == "classes" and (len(shape) == 1 or (len(shape) > 1 and shape[1] == 1)):
        asked = '"regression"' if key is ONLY else f'{{{key!r}: "regression"}}'
        raise ValueError(
            f"{where} gives one number for a sample, {shape}, which is no classes: kinds={asked} for a value, or "
            '"multilabel" for a logit that a sigmoid reads.'
        )
    if len(shape) < (2 if kind == "classes" else 1) or (kind == "classes" and not shape[1]):
        raise ValueError(f"{where} expected {kind} ({axes}) from the model, k >= 2, got {shape}.")
