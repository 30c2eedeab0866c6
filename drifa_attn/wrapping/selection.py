"""Which modules of a network get attention: by a way to choose them, a regex, names, or a predicate; and why others do not."""

import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import nn

from drifa_attn.checks import check_mapping
from drifa_attn.layout import Layout, check_layout
from drifa_attn.network.blocks import blocks, convolutions
from drifa_attn.network.heads import predictions
from drifa_attn.network.record import Survey
from drifa_attn.network.stages import stages

from .inject import Slot
from .rehearse import missing_in_training, rehearse

At = str | Sequence[str] | Callable[[str, nn.Module], bool]
WAYS = ("stage", "block", "conv")


def placed_at(
    found: Survey, at: At, named: Sequence[str], *, variant: str | None = None, layouts: Mapping[str, Layout]
) -> tuple[list[Slot], list[tuple[str, str]], list[str]]:
    """The places for attention in calling order, what was left out and why, and what the user should know.

    `named` are the modules that `at` names; empty where it is a way to choose them.
    """
    is_named = isinstance(at, Sequence) and not isinstance(at, str)
    chosen = list(named) or selection(found, at, variant)
    check_selected(layouts, chosen)
    sites, skipped = [], []
    for name in chosen:
        here, reasons = looked_at(found, name, is_named=is_named)
        sites += here
        skipped += [(name, reason) for reason in reasons]
    if not sites:
        raise ValueError(nothing_found(found, at, skipped))
    slots, doubled = apart(rehearse(found, sites), is_named=is_named)
    slots, missing, notes = in_both_modes(found, slots, is_named=is_named)
    if not slots:
        raise ValueError(nothing_found(found, at, [*skipped, *missing]))
    order = {name: call.order for name, call in found.first.calls.items()}
    return sorted(slots, key=lambda slot: order[slot.module]), [*skipped, *doubled, *missing], notes


def in_both_modes(
    found: Survey, slots: Sequence[Slot], *, is_named: bool
) -> tuple[list[Slot], list[tuple[str, str]], list[str]]:
    """The slots that are there in training mode too, the reasons against the others, and whether that could be tried."""
    reasons, error = missing_in_training(found, slots)
    if is_named and reasons:
        name, reason = next(iter(reasons.items()))
        raise ValueError(f"{found.title}: no attention can go at {name!r}: {reason}.")
    notes = [f"it was not tried in training mode, where it does not run on this input ({error})"] if error else []
    return [slot for slot in slots if slot.name not in reasons], list(reasons.items()), notes


def check_at(at: Any) -> None:
    """Raise unless this is a way to choose modules."""
    if isinstance(at, type) or not (isinstance(at, str) or callable(at) or isinstance(at, Sequence)):
        raise TypeError(f"at expected a string, a list of module names or a predicate, got {at!r}.")


def matching(model: nn.Module, at: At) -> list[str]:
    """The names of the modules that a regex, a list of names or a predicate selects."""
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(at, str):
        return matching_pattern(model, at, names)
    if callable(at):
        found = [name for name, module in model.named_modules() if name and at(name, module)]
        if not found:
            raise ValueError(f"the predicate at= selected 0 of {len(names)} modules of {type(model).__name__}.")
        return found
    unknown = [name for name in at if name not in names]
    if unknown or not at:
        raise ValueError(
            f"at= names no module of {type(model).__name__}: {unknown}{near(str(unknown[0]) if unknown else '', names)}."
        )
    return list(dict.fromkeys(at))


def matching_pattern(model: nn.Module, at: str, names: list[str]) -> list[str]:
    """The names that a regex matches as a whole."""
    try:
        pattern = re.compile(at)
    except re.error as error:
        raise ValueError(f"at={at!r} is no regex ({error}).") from error
    found = [name for name in names if pattern.fullmatch(name)]
    if not found:
        raise ValueError(
            f"at={at!r} matched 0 of {len(names)} modules of {type(model).__name__}: "
            f'use "stage", "block", "conv" or a regex for whole names{near(at, names)}.'
        )
    return found


def near(name: str, names: list[str]) -> str:
    """Suggests similar names."""
    alike = difflib.get_close_matches(name, names, 5, 0.4) or names[:5]
    return f", for example {', '.join(alike)}" if alike else ""


def checked_layouts(layouts: Mapping[str, Layout]) -> Mapping[str, Layout]:
    """These layouts, each a known one."""
    check_mapping("wrap", "layouts", layouts, "{module name: layout}")
    for name, layout in layouts.items():
        check_layout(f"layouts[{name!r}]", layout, 0)
    return layouts


def check_selected(layouts: Mapping[str, Layout], chosen: Collection[str]) -> None:
    """Raise unless each of the layouts belongs to a module that was selected."""
    for name in layouts:
        if name not in chosen:
            raise ValueError(f"layouts names {name!r}, which at= does not select; it selects {', '.join(chosen)}.")


def selection(found: Survey, at: At, variant: str | None) -> list[str]:
    """The modules that a way to choose them means."""
    if variant:
        return list(dict.fromkeys((*convolutions(found, shortcuts=False), *blocks(found))))
    if at == "stage":
        return stages(found)
    return blocks(found) if at == "block" else convolutions(found, shortcuts=True)


def looked_at(found: Survey, name: str, *, is_named: bool) -> tuple[list[Any], list[str]]:
    """The sites of a module and the reasons against its other outputs; a name that the user wrote must have a site."""
    here = found.found.get(name)
    sites, reasons = (here.sites, here.reasons) if here else ([], ["it is not called"])
    if is_named and not sites:
        raise ValueError(f"{found.title}: no attention can go at {name!r}: {'; '.join(reasons)}.")
    return sites, reasons


def apart(slots: Sequence[Slot], *, is_named: bool) -> tuple[list[Slot], list[tuple[str, str]]]:
    """The slots with one for each tensor, and the reasons against the others; names that the user wrote must not collide."""
    taken: dict[tuple, Slot] = {}
    doubled = []
    for slot in sorted(slots, key=lambda slot: len(slot.module)):  # the outermost module keeps the tensor
        first = taken.setdefault((slot.carrier, slot.path), slot)
        if first is slot:
            continue
        if is_named:
            raise ValueError(f"at= names {first.name!r} and {slot.name!r}, which give the same tensor: name one of them.")
        doubled.append((slot.name, f"it gives the same tensor as {first.name}"))
    return list(taken.values()), doubled


def nothing_found(found: Survey, at: At, skipped: Sequence[tuple[str, str]]) -> str:
    """The message for a network where attention has no place: what was looked at, and why it was left out."""
    outline = [
        f"{name} ({type(module).__name__}): {reason_against(found, name)}" for name, module in found.modules.items() if name
    ]
    more = [f"and {len(outline) - 20} more"] if len(outline) > 20 else []
    looked = [f"{name}: {reason}" for name, reason in skipped] or [*outline[:20], *more] or ["the network has no submodules"]
    places = "\n  ".join(looked)
    return (
        f'{found.title} has no place for attention with at={at!r}. Looked at:\n  {places}\nName modules yourself, at=["..."].'
    )


def reason_against(found: Survey, name: str) -> str:
    """Why a way to choose modules passed over this one."""
    here = found.found.get(name)
    if here is None:
        return "it is not called"
    if here.sites:
        return "it could be named" if name not in predictions(found) else "it gives predictions"
    return "; ".join(here.reasons)
