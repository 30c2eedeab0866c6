"""Where the weights of an attention can live: tried on the copy of a network, with probes that have no weights.

A module that calls its children itself, as a `Sequential` does, would run an attention that is its child as one of its steps.
So the copy runs once with a probe in the place of every attention. If an owner runs its probe, another owner is tried.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from drifa_attn.layout import as_place
from drifa_attn.network.blocks import CONTAINERS
from drifa_attn.network.features import remembers
from drifa_attn.network.inputs import resized
from drifa_attn.network.modes import own_randomness
from drifa_attn.network.record import Survey
from drifa_attn.network.site import Site
from drifa_attn.trees import map_tensors, tensors_in

from .inject import Slot


class RunByOwnerError(Exception):
    """A module ran the probe that is its child."""


class Probe(nn.Module):
    """Stands where the weights of an attention would be, and must not be run."""

    def __init__(self, owner: str) -> None:
        super().__init__()
        self.owner = owner

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise RunByOwnerError(self.owner)


def rehearse(survey: Survey, sites: Sequence[Site], *, repeated: bool = False) -> list[Slot]:
    """Where the attention of every site goes; a `ValueError` unless each would run in a forward, once if not `repeated`."""
    avoid: set[str] = set()
    while True:
        slots = [slot_of(survey.clone, site, avoid) for site in sites]
        try:
            fired = fire(survey, slots)
        except RunByOwnerError as error:
            avoid.add(str(error))
            continue
        expected = sorted(site.name for site in sites)
        if (sorted(set(fired)) if repeated else sorted(fired)) != expected:
            raise ValueError(f"{survey.title}: attention would run at {sorted(fired)}, not once at {expected}.")
        return slots


def fire(survey: Survey, slots: Sequence[Slot]) -> list[str]:
    """The names of the sites in the order in which a forward of the copy, with probes in it, reaches them."""
    fired: list[str] = []
    args, kwargs = survey.inputs
    probes: list[tuple[nn.Module, str]] = []
    handles = []
    for slot in slots:
        owner, name = survey.clone.get_submodule(slot.owner), f"probe_{len(probes)}"
        owner.add_module(name, Probe(slot.owner))
        probes.append((owner, name))
        carrier = survey.clone.get_submodule(slot.carrier)
        handles.append(carrier.register_forward_hook(partial(note, fired, slot.name)))
    try:
        with torch.no_grad(), own_randomness():
            survey.clone(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for owner, name in probes:
            delattr(owner, name)
    return fired


def missing_in_training(survey: Survey, slots: Sequence[Slot]) -> tuple[dict[str, str], str]:
    """The sites that a forward in training mode does not have, each with the reason; and why no such forward works, if so.

    A detector's head may give boxes in eval mode and raw maps in training: the place of a tensor in it is of one mode alone.
    """
    reasons: dict[str, str] = {}
    args, kwargs = map_tensors(survey.inputs, partial(resized, batch=survey.first.batch, axes=0))
    handles = [
        survey.clone.get_submodule(slot.carrier).register_forward_hook(partial(look, reasons, slot), prepend=True)
        for slot in slots
    ]
    try:
        with torch.no_grad(), own_randomness():
            survey.clone.train()(*args, **kwargs)
    except Exception as error:  # noqa: BLE001 - a network may fail in training for want of labels
        return reasons, f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.100}"
    finally:
        survey.clone.eval()
        for handle in handles:
            handle.remove()
    return reasons, ""


def look(reasons: dict[str, str], slot: Slot, module: nn.Module, args: tuple, output: Any) -> None:
    """A forward hook that writes down why an output lacks the tensor of a site."""
    tensor = dict(tensors_in(output)).get(slot.path)
    axis = 1 if slot.layout == "b c ..." else -1
    if tensor is None:
        reasons[slot.name] = "in training mode the module's output has no tensor there"
    elif tensor.ndim != len(slot.shape) + 1 or tensor.shape[axis] != slot.channels:
        reasons[slot.name] = f"in training mode the module gives {tuple(tensor.shape)} there"


def note(fired: list[str], name: str, *_: Any) -> None:
    """A forward hook that writes down a name."""
    fired.append(name)


def slot_of(model: nn.Module, site: Site, avoid: set[str]) -> Slot:
    """A site with its carrier and its owner."""
    carrier = carrier_of(model, site.module)
    owner = owner_of(model, carrier, avoid)
    return Slot(module=site.module, path=site.path, folded=site.folded, carrier=carrier, owner=owner, **as_place(site))


def carrier_of(model: nn.Module, name: str) -> str:
    """The module whose output is this module's output in any case: the last step of plain `Sequential`s, unless shared.

    A batch norm at the end is left alone where there is something around it: others replace batch norms, and what they carry.
    So is a module that forgets in a copy what it carries.
    """
    module = model.get_submodule(name)
    while isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and len(module):
        step, last = list(module._modules)[-1], module[-1]
        if sum(other is last for _, other in model.named_modules(remove_duplicate=False)) != 1:
            break
        if isinstance(last, _BatchNorm) or not remembers(last):
            break
        name, module = f"{name}.{step}" if name else step, last
    return name


def owner_of(model: nn.Module, carrier: str, avoid: set[str]) -> str:
    """The module whose child the attention becomes: the carrier, else the first one within it that does not run its children.

    Modules with children come first: single layers are the ones that other tools replace.
    """
    module = model.get_submodule(carrier)
    within = [(name, inner) for name, inner in module.named_modules() if name]
    parents = [name for name, inner in within if next(inner.children(), None) is not None]
    leaves = [name for name, inner in within if next(inner.children(), None) is None]
    leaves.sort(key=lambda name: isinstance(module.get_submodule(name), _BatchNorm))
    for name in ["", *parents, *leaves]:
        owner = f"{carrier}.{name}".strip(".")
        holder = model.get_submodule(owner)
        if owner not in avoid and not isinstance(holder, CONTAINERS) and remembers(holder):
            return owner
    raise ValueError(f"no module at or within {carrier!r} can hold the attention's weights: all are containers.")
