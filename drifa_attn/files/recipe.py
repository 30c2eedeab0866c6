"""How a network got its attention, as a file says it, and the same attention put into a fresh network by it."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor, nn

from drifa_attn.attention import Spec
from drifa_attn.fusion import Fused, fuse
from drifa_attn.fusion.branches import surveyed
from drifa_attn.layout import as_place
from drifa_attn.network.copies import meta_clone, real_clone
from drifa_attn.network.record import Survey
from drifa_attn.network.site import Site
from drifa_attn.network.survey import survey
from drifa_attn.wrapping.inject import Slot, attach, detach, masks, placed, slotted, spec_of
from drifa_attn.wrapping.masking import MaskFrom
from drifa_attn.wrapping.rehearse import rehearse

from .state import check_state, chosen_state
from .structure import structure

Factory = Callable[..., nn.Module]


def wrapped_recipe(model: nn.Module) -> dict[str, Any]:
    """How a network was wrapped; without sites, its attention is part of its own code."""
    found = list(placed(model))
    specs = [spec for _, one in found if (spec := spec_of(one))] or [Spec("")]
    if any(spec != specs[0] for spec in specs):
        raise ValueError(f"{type(model).__name__} has parts that were wrapped differently: save the attention of each part.")
    attention = {"name": specs[0].name, "options": dict(specs[0].options)}
    mask_from, masked = masks(model)
    name = getattr(mask_from, "__qualname__", type(mask_from).__qualname__)  # a callable is not written, only that there is one
    mask = {"mask": {"mask_from": name, "sites": masked}} if masked else {}
    slots = list(slotted(model))
    known = {"structure": structure(model, slots), "homes": [[slot.carrier, slot.owner] for slot in slots]}
    return {"attention": attention, "sites": [asdict(site) for site, _ in found], "known": known, **mask}


def fused_recipe(net: Fused) -> dict[str, Any]:
    """How a network was fused, and its branches were wrapped."""
    if not isinstance(net.recipe["fusion"], str):
        raise ValueError(
            f"save_attention writes fusions by their name, and {net.recipe['fusion'].__name__} has none: add it to "
            "drifa_attn.fusion.FUSIONS and name it in fuse(..., fusion=...), or save net.state_dict()."
        )
    return {
        "tasks": {task: head.out_features for task, head in net.heads.items()},  # type: ignore[union-attr]
        "stages": [{modality: asdict(site) for modality, site in sites.items()} for sites in net.stages],
        "options": net.recipe | {"dropout": net.dropout.p, "modality_dropout": net.modality_dropout},
        "branches": {
            modality: wrapped_recipe(branch) if next(placed(branch), None) else None
            for modality, branch in net.branches.items()
        },
    }


def wrap_again(
    network: nn.Module,
    recipe: Mapping[str, Any],
    example_input: Any,
    factory: Factory | None,
    mask_from: MaskFrom | None = None,
) -> None:
    """Put attention into a network, without its weights, where and as a file says; `factory` and `mask_from` are the user's."""
    sites, masked = [site_of(entry) for entry in recipe["sites"]], checked_masked(recipe, mask_from)
    if not sites:
        return
    chosen = known_slots(network, sites, recipe.get("known")) or surveyed_slots(network, sites, example_input)
    spec = Spec(**recipe["attention"], factory=factory)
    if factory is not None and ":" not in spec.name:
        raise ValueError(f"the file holds the attention {spec.name!r}, which needs no callable: leave attention= out.")
    attach(network, [replace(slot, is_masked=slot.name in masked) for slot in chosen], spec, mask_from)


def surveyed_slots(network: nn.Module, sites: list[Site], example_input: Any) -> list[Slot]:
    """Where the attention of these sites goes; a `ValueError` unless the network has each of them."""
    found = survey(network, example_input, prepare=detach, **hints(sites))
    for site in sites:
        check_site(found, site)
    return rehearse(found, sites, repeated=True)


def known_slots(network: nn.Module, sites: list[Site], known: Any) -> list[Slot]:
    """Where the attention of these sites was in the saved network, if this one is made as that was; else nothing."""
    homes = known.get("homes") if isinstance(known, Mapping) else None
    if (
        not isinstance(homes, list)
        or len(homes) != len(sites)
        or any(not isinstance(home, list) or len(home) != 2 for home in homes)
    ):
        return []
    slots = [
        Slot(module=site.module, path=site.path, folded=site.folded, carrier=carrier, owner=owner, **as_place(site))
        for site, (carrier, owner) in zip(sites, homes, strict=True)
    ]
    return slots if known.get("structure") == structure(network, slots) else []


def checked_masked(recipe: Mapping[str, Any], mask_from: MaskFrom | None) -> list[str]:
    """The names of the sites that use a mask; a `ValueError` unless `mask_from` is given where they need it, and only there."""
    mask = recipe.get("mask")
    if mask is None:
        if mask_from is not None:
            raise ValueError("the file holds attention that uses no mask: leave mask_from= out.")
        return []
    if not callable(mask_from):
        raise ValueError(
            f"the file holds attention that was wrapped with mask_from={mask['mask_from']}, a callable, which a file cannot "
            f"hold, got {mask_from!r}: pass it again, load_attention(..., mask_from=...)."
        )
    return mask["sites"]


def fuse_again(
    backbones: Mapping[str, nn.Module],
    recipe: Mapping[str, Any],
    inputs: Mapping[str, Tensor],
    *,
    factory: Factory | None,
    tensors: Mapping[str, Tensor],
    modules: list[str],
    norms: list[str],
) -> Fused:
    """Fuse networks as a file says; first their copies without memory, where any difference shows before one is touched."""
    if set(backbones) != set(recipe["branches"]):
        raise ValueError(f"the file holds a network of the modalities {list(recipe['branches'])}, got {list(backbones)}.")
    found = {name: checked_branch(backbones[name], name, recipe, inputs.get(name)) for name in recipe["branches"]}
    clones = {name: (real_clone if found[name].is_real else meta_clone)(backbones[name]) for name in recipe["branches"]}
    rehearsal = fused_once(clones, recipe, inputs, factory)
    check_state(rehearsal, tensors, chosen_state(rehearsal, modules, norms))
    return fused_once({modality: backbones[modality] for modality in recipe["branches"]}, recipe, inputs, factory)


def checked_branch(backbone: nn.Module, modality: str, recipe: Mapping[str, Any], example_input: Any) -> Survey:
    """The survey of a backbone; a `ValueError` unless it has the features that its branch in the file had."""
    entries = [entry[modality] for entry in recipe["stages"] if modality in entry]
    sites = [site_of(entry) for entry in [*entries, *(recipe["branches"][modality] or {"sites": []})["sites"]]]
    classifier = recipe["options"]["classifiers"].get(modality, "")
    found = surveyed(modality, backbone, classifier, example_input, **hints(sites))
    found.title += f" of branch {modality!r}"
    for site in sites:
        check_site(found, site)
    return found


def fused_once(
    backbones: Mapping[str, nn.Module], recipe: Mapping[str, Any], inputs: Mapping[str, Tensor], factory: Factory | None
) -> Fused:
    """Wrap and fuse networks as a file says; if that fails they are unwrapped again."""
    try:
        for modality, wrapped in recipe["branches"].items():
            if wrapped:
                wrap_again(backbones[modality], wrapped, inputs.get(modality), factory)
        at = [{modality: entry["module"] for modality, entry in sites.items()} for sites in recipe["stages"]]
        return fuse(backbones, recipe["tasks"], at=at or "stage", example_inputs=inputs, **recipe["options"])
    except Exception:
        for backbone in backbones.values():
            detach(backbone)
        raise


def site_of(entry: Mapping[str, Any]) -> Site:
    """A site as a file holds it."""
    return Site(**{**entry, "path": tuple(entry["path"]), "shape": tuple(entry["shape"])})


def hints(sites: list[Site]) -> dict[str, Any]:
    """What the sites of a file tell a survey about where channels are."""
    return {"layouts": {s.module: s.layout for s in sites}, "channels": {s.module: [s.channels] for s in sites}}


def check_site(found: Survey, site: Site) -> None:
    """Raise a `ValueError` unless the network has this feature where the file says, with its channels and prefix tokens."""
    if site.module not in found.modules:
        raise ValueError(f"the file has attention at {site.name!r}, a module that {found.title} does not have.")
    seen = found.found.get(site.module)
    here = next((other for other in [*seen.sites, *seen.repeated] if other.path == site.path), None) if seen else None
    if here is None:
        reasons = "; ".join(seen.reasons) if seen else "it is not called"
        raise ValueError(f"the file has attention at {site.name!r}, where {found.title} can take none: {reasons}.")
    for key in ("channels", "num_prefix_tokens"):
        if getattr(here, key) != getattr(site, key):
            raise ValueError(
                f"the file's attention at {site.name!r} has {key}={getattr(site, key)}, "
                f"{found.title} has {key}={getattr(here, key)} there."
            )
