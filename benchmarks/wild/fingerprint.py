"""What a network is besides its numbers: the classes, modes, attributes and signatures of all its modules."""

import inspect
from typing import Any

from torch import nn

SIMPLE = (int, float, str, bool, type(None))
# What `wrap` adds to a module that carries attention, and to a batch norm.
CARRIED = {"forward", "drifa_steps", "_replicate_for_data_parallel", "drifa_batches"}
LISTED = ("_parameters", "_buffers", "_modules")

Fingerprint = dict[str, dict[str, Any]]


def fingerprint(model: nn.Module) -> Fingerprint:
    """The description of every module by name."""
    return {name: described(module) for name, module in model.named_modules()}


def described(module: nn.Module) -> dict[str, Any]:
    """A module's class, the values of its simple attributes, the names of the others, and its signature."""
    values = {key: value if isinstance(value, SIMPLE) else kind(value) for key, value in vars(module).items()}
    held = {key: {name: kind(value) for name, value in vars(module)[key].items()} for key in LISTED}
    hooks = {key: len(value) for key, value in vars(module).items() if key.endswith("hooks")}
    return {"class": kind(module), "signature": signature(module), **values, **held, **hooks}


def kind(value: Any) -> str:
    """The class of a value by its full name: parametrised modules have a class of their own each."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def signature(module: nn.Module) -> str:
    """The arguments of a module's forward."""
    try:
        return str(inspect.signature(module.forward))
    except ValueError:
        return ""


def unequal(what: str, expected: Any, found: Any) -> str:
    """A sentence where two values differ, else nothing."""
    if expected == found:
        return ""
    if isinstance(expected, list) and len(expected) > 6:
        lost, new = [v for v in expected if v not in found], [v for v in found if v not in expected]
        return f"{what}: {len(lost)} lost {lost[:4]}, {len(new)} new {new[:4]}" if lost or new else f"{what}: in another order"
    return f"{what}: expected {expected}, found {found}"


def changes(before: Fingerprint, after: Fingerprint) -> str:
    """The first difference of two networks that should be alike."""
    if wrong := unequal("modules", list(before), list(after)):
        return wrong
    for name, old in before.items():
        if wrong := unequal(f"attributes of {name!r}", list(old), list(after[name])):
            return wrong
    return missing(before, after)


def missing(before: Fingerprint, after: Fingerprint) -> str:
    """The first thing that the second network, which may have more, lacks of the first one, or has with another value."""
    for name, old in before.items():
        new = after.get(name)
        if new is None:
            return f"module {name!r} is missing"
        for key, value in old.items():
            if key not in new:
                return f"{name!r} has no {key!r} any more"
            if key in LISTED:
                held = {inner: kind for inner, kind in new[key].items() if inner in value}
                if wrong := unequal(f"{key} of {name!r}", value, held):
                    return wrong
            elif new[key] != value:
                return f"{key!r} of {name!r} was {value!r} and is {new[key]!r}"
        if extra := sorted(set(new) - set(old) - CARRIED):
            return f"{name!r} has new attributes {extra}"
    return ""
