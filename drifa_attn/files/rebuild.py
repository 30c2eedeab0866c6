"""Attention put into a fresh network where, and as, the weights of a checkpoint of the whole network say.

A key such as "layer1.2.drifa_attn.alpha" names the module that owns an attention. Which feature that attention refines is the
one for which `wrap` would give the weights to this owner; the shapes of the weights say how wide it is and of which kind.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from drifa_attn.attention import Spec, build
from drifa_attn.attention.start import reduced_width
from drifa_attn.network.record import Survey
from drifa_attn.network.survey import survey
from drifa_attn.wrapping.inject import Slot, attach
from drifa_attn.wrapping.masking import MaskFrom, fitting
from drifa_attn.wrapping.plan import Attention, checked_spec
from drifa_attn.wrapping.rehearse import carrier_of, rehearse
from drifa_attn.wrapping.selection import WAYS, At, check_at, matching, placed_at

from .whole import HELD, NONE

AGAIN = "Call wrap as it was called, then model.load_state_dict(...); a file of save_attention says what no shape tells."
PAPER = {"alpha", "global_scale", "local_scale", "hifa.conv1.weight", "clia.conv1.weight"}


class Weights(NamedTuple):
    """The weights of one attention in a checkpoint: the module that owns it, its name there, and its tensors."""

    owner: str
    child: str
    tensors: dict[str, Tensor]

    @property
    def name(self) -> str:
        return f"{self.owner}.{self.child}"

    @property
    def channels(self) -> int:
        """Of the features that it refines."""
        vector = self.tensors.get("alpha", self.tensors.get("strength"))
        return -1 if vector is None else vector.shape[0]


def rebuild(
    network: nn.Module,
    state: Mapping[str, Tensor],
    *,
    at: At | None,
    attention: Attention | None,
    example_input: Any,
    mask_from: MaskFrom | None,
) -> None:
    """Put the attention of a checkpoint into a network, without its weights.

    Raises: ValueError: the checkpoint does not say enough, or the network is another one. It is then untouched.
    """
    held = attention_weights(network, state)
    spec = spec_from(held, attention)
    found = survey(network, example_input)
    candidates = likely_slots(found, held) if at is None else stated_slots(network, found, held, at)
    slots = matched(found, held, candidates)
    for one, slot in slots:
        check_shapes(one, slot, spec)
    chosen = [slot for _, slot in slots]
    if mask_from is not None:
        named, _ = fitting(found, chosen, spec, mask_from, example_input)
        chosen = [replace(slot, is_masked=slot.name in named) for slot in chosen]
    attach(network, chosen, spec, mask_from)


def attention_weights(network: nn.Module, state: Mapping[str, Tensor]) -> list[Weights]:
    """The weights of every attention in the state of a network, by owner; of an owner with several names under the first."""
    modules = dict(network.named_modules(remove_duplicate=False))
    first = {id(module): name for name, module in network.named_modules()}
    found: dict[tuple[str, str], Weights] = {}
    for key, tensor in state.items():
        for match in HELD.finditer(key):
            owner, child, rest = key[: match.start()], match[1], key[match.end() + 1 :]
            if owner in modules and hasattr(modules[owner], child):
                continue  # a module of the network itself is called so
            if owner not in modules:
                raise ValueError(
                    f"the checkpoint has attention in {owner!r}, a module that {type(network).__name__} does not have."
                )
            name = first[id(modules[owner])]
            found.setdefault((name, child), Weights(name, child, {})).tensors[rest] = tensor
            break
    if not found:
        raise ValueError(NONE)
    order = {name: i for i, name in enumerate(modules)}
    return sorted(found.values(), key=lambda one: (order[one.owner], len(one.child), one.child))


def spec_from(held: Sequence[Weights], attention: Attention | None) -> Spec:
    """The attention that these weights are of; what is not the paper's is what the user says."""
    others = [one for one in held if not set(one.tensors) >= PAPER]
    if not others:
        if attention not in (None, "mfa"):
            raise ValueError("the checkpoint holds the paper's attention, which its shapes describe: leave attention= out.")
        return paper_spec(held)
    if len(others) < len(held):
        raise ValueError(f"the checkpoint holds the paper's attention, and another one in {others[0].name!r}. {AGAIN}")
    if attention is None:
        raise ValueError(
            f"the checkpoint holds another attention than the paper's in {others[0].name!r}, whose name no shape tells: pass "
            "attention=, a name or a callable as wrap takes it (functools.partial for its options), or use save_attention."
        )
    return checked_spec(attention, {}, 16, "identity")


def paper_spec(held: Sequence[Weights]) -> Spec:
    """The reduction and the start of the paper's attention."""
    starts = {"identity" if "global_center" in one.tensors else "paper" for one in held}
    widths = {(one.channels, one.tensors["local_scale"].shape[0]) for one in held}
    reduced = {"squeeze.weight" in one.tensors for one in held}
    if len(starts) > 1 or len(reduced) > 1:
        raise ValueError(f"the checkpoint holds attention of several starts or reductions. {AGAIN}")
    options: list[int | None] = [16, *range(1, max(channels for channels, _ in widths) + 1)] if True in reduced else [None]
    for reduction in options:
        if all(reduced_width("MFA", channels, reduction) == width for channels, width in widths):
            return Spec("mfa", {"reduction": reduction, "init": starts.pop()})
    raise ValueError(f"the checkpoint holds attention of several reductions, (channels, width) {sorted(widths)}. {AGAIN}")


def likely_slots(found: Survey, held: Sequence[Weights]) -> list[Slot]:
    """Every place whose attention would have its weights within one of these owners or around it, one for each tensor."""
    around = {".".join(parts[:i]) for one in held for parts in [one.owner.split(".")] for i in range(1, len(parts) + 1)}
    sites = [
        site
        for name in found.modules
        if name in around and name in found.found and carrier_of(found.clone, name) in around
        for site in (*found.found[name].sites, *found.found[name].repeated)
    ]
    same: dict[tuple, list[Slot]] = {}
    for slot in sorted(rehearse(found, sites, repeated=True), key=lambda slot: len(slot.module)):
        same.setdefault((slot.carrier, slot.path), []).append(slot)
    return [named([one.owner for one in held], slots) for slots in same.values()]


def named(owners: Sequence[str], slots: Sequence[Slot]) -> Slot:
    """Of the names of one tensor, outermost first, the first that holds no other attention beside it: a stage, or a block."""
    for slot in slots:
        within, carried = f"{slot.module}.", f"{slot.carrier}."
        if not any(f"{owner}.".startswith(within) and not f"{owner}.".startswith(carried) for owner in owners):
            return slot
    return slots[-1]


def stated_slots(network: nn.Module, found: Survey, held: Sequence[Weights], at: At) -> list[Slot]:
    """The places where `wrap` puts attention with this `at`, which must be in the same modules as that of the checkpoint."""
    check_at(at)
    slots = placed_at(found, at, [] if at in WAYS else matching(network, at), layouts={})[0]
    owners, others = sorted(slot.owner for slot in slots), sorted(one.owner for one in held)
    if owners != others:
        raise ValueError(f"at={at!r} puts attention into {owners} of {found.title}, the checkpoint has it in {others}.")
    return slots


def matched(found: Survey, held: Sequence[Weights], slots: Sequence[Slot]) -> list[tuple[Weights, Slot]]:
    """Each attention with its place."""
    order = {name: i for i, name in enumerate(found.modules)}
    chosen = []
    for owner in dict.fromkeys(one.owner for one in held):
        here = [one for one in held if one.owner == owner]
        chosen += fitted(found, here, sorted((s for s in slots if s.owner == owner), key=lambda s: order[s.carrier]))
    return chosen


def fitted(found: Survey, here: Sequence[Weights], slots: Sequence[Slot]) -> list[tuple[Weights, Slot]]:
    """The attention of one owner, each with its place, if there is one way alone to place it."""
    names = ", ".join(one.name for one in here)
    channels = [one.channels for one in here]
    ways = [way for way in combinations(slots, len(here)) if [slot.channels for slot in way] == channels]
    if len(ways) > 1:
        several = " or ".join(" and ".join(repr(slot.name) for slot in way) for way in ways)
        raise ValueError(
            f"the checkpoint has attention in {names}, which may be that of {several} in {found.title}: pass at= as wrap took "
            'it, load_attention(..., at="stage").'
        )
    if not ways:
        seen = ", ".join(f"{slot.name} with {slot.channels} channels" for slot in slots) or reasons(found, here[0].owner)
        raise ValueError(
            f"the checkpoint has attention for {channels} channels in {names}, where {found.title} has {seen}. {AGAIN}"
        )
    return list(zip(here, ways[0], strict=True))


def reasons(found: Survey, owner: str) -> str:
    """Why a module has no feature that can be refined."""
    here = found.found.get(owner)
    return f"no place for it ({'; '.join(here.reasons) or 'its weights would be elsewhere' if here else 'it is not called'})"


def check_shapes(held: Weights, slot: Slot, spec: Spec) -> None:
    """Raise a `ValueError` unless weights are those of this attention at this place, by name and shape."""
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in build(spec, slot, device="meta").state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in held.tensors.items()}
    for name in dict.fromkeys([*expected, *shapes]):
        if shapes.get(name) != expected.get(name):
            raise ValueError(
                f"the checkpoint's attention {held.name!r} has {name!r} of {shapes.get(name, 'no shape')}, {spec.name!r} there "
                f"has {expected.get(name, 'none')}: it is of other options, or another tool has changed it. {AGAIN}"
            )
