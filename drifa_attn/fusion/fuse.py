"""`fuse`: several backbones of any family in lockstep, refined after every stage, with one head per task (Fig. 1A)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from drifa_attn.checks import check_mapping, count, number
from drifa_attn.layout import Layout
from drifa_attn.randomness import forked, seed_from
from drifa_attn.wrapping.inject import masks
from drifa_attn.wrapping.norms import remember
from drifa_attn.wrapping.plan import PARALLEL
from drifa_attn.wrapping.selection import checked_layouts

from .branches import advanced, check_output, surveyed, without_classifier
from .fused import Fused
from .pairs import Pairs, branch_outputs, paired
from .protocol import Readout, Refiner
from .systems import built, system


def fuse(
    backbones: Mapping[str, nn.Module],
    tasks: Mapping[str, int],
    *,
    at: Pairs = "stage",
    fusion: str | type[Refiner] | type[Readout] = "mifa",
    fusion_options: Mapping[str, Any] | None = None,
    dropout: float = 0.0,
    modality_dropout: float = 0.0,
    classifiers: Mapping[str, str | None] | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    layouts: Mapping[str, Mapping[str, Layout]] | None = None,
    generator: torch.Generator | None = None,
) -> Fused:
    """Fuse backbones of any family, one per modality, stage by stage, and give the whole one head per task (Fig. 1A).

        net = drifa_attn.fuse({"dermoscopy": resnet, "smear": swin}, tasks={"lesion": 7, "cell": 5})
        logits = net({"dermoscopy": x, "smear": y})

    Each backbone is cut at its stages and compared with itself, in eval and training mode, before it is used; its classifier is
    taken off (by `reset_classifier(0)` where it has that, as timm's networks have). At the start, with all
    modalities present, the features of each branch equal those of its own backbone bit for bit until training moves them.

    Args:
        backbones: {modality: network}, at least one; used in place, wrapped or not; only the classifier is taken off.
        tasks: {task: how many outputs its head has}, at least one: classes, or with `kinds` of `TaskLoss` labels or values.
        at: "stage" pairs stages by reduction where the networks share at least two, else by fraction of depth; "block" pairs
            blocks by fraction of depth, and stages in a network without blocks; or a list with one {modality: module name} per
            stage, in calling order.
        fusion: "mifa", "concat", "sum", "gated", "lmf", "mmtm", "cross_attention", "mutual_attention", "caf", "mttu", "gloria",
            "aff", "iaff", or a `Refiner` or `Readout` class of one's own. `fusion.FUSIONS` holds their classes, which say what
            they compute.
        fusion_options: what its refiners take, or its readout where it has none: for "mifa" `reduction` (16), `dim` and `init`
            ("identity"), see `MIFA`.
        dropout: before the heads, in [0, 1).
        modality_dropout: in training, the probability that a present modality is dropped, in [0, 1).
        classifiers: {modality: module name} to take off where a backbone has no `reset_classifier`, or {modality: None} to keep
            its output as it is. A backbone that ends in a linear layer must have one of the two.
        example_inputs: {modality: input} where a network does not say what it takes: a tensor, a tuple of arguments, or a dict
            of keyword arguments, such as token ids and their mask. Batches then hold the same for this modality.
        layouts: {modality: {module name: "b c ..." or "b ... c"}} where the layout of a feature cannot be told; the name "" is
            the network's own output.
        generator: what the new weights follow, as `wrap` takes it. No global random state is moved.

    Raises: ValueError, TypeError: an argument out of its range, or a backbone that cannot be advanced, with the reason. The
        backbones are then untouched.
    Differs: the paper fuses two networks of its own.
    """
    check_mapping("fuse", "classifiers", classifiers, "{modality: module name}")
    check_mapping("fuse", "example_inputs", example_inputs, "{modality: input}")
    check_mapping("fuse", "layouts", layouts, "{modality: {module name: layout}}")
    classifiers, example_inputs, layouts = dict(classifiers or {}), dict(example_inputs or {}), dict(layouts or {})
    check_backbones(backbones)
    tasks = checked_tasks(tasks)
    dropout, modality_dropout = rate("dropout", dropout), rate("modality_dropout", modality_dropout)
    check_known(backbones, classifiers=classifiers, example_inputs=example_inputs, layouts=layouts)
    check_classifiers(classifiers)
    ends = {name: classifiers.get(name, "") for name in backbones}
    system(fusion)  # told before anything is traced
    recipe = {"fusion": fusion, "fusion_options": dict(fusion_options or {}), "classifiers": classifiers, "layouts": layouts}
    with forked(seed_from("fuse", generator), *backbones.values()), torch.inference_mode(False):
        net = assembled(backbones, tasks, at, ends, example_inputs, recipe=recipe, rates=(dropout, modality_dropout))
    for name, backbone in backbones.items():  # the backbones change last, when nothing can fail any more
        net.branches[name] = without_classifier(backbone, name, ends[name])
    remember(net)
    return net


def assembled(
    backbones: Mapping[str, nn.Module],
    tasks: Mapping[str, int],
    at: Pairs,
    ends: Mapping[str, str | None],
    examples: Mapping[str, Any],
    *,
    recipe: Mapping[str, Any],
    rates: tuple[float, float],
) -> Fused:
    """The fused network with nothing yet in the places of its branches; the backbones are read alone."""
    found, parts = {}, {}
    for name, backbone in backbones.items():
        known = checked_layouts(recipe["layouts"].get(name, {}))
        found[name] = surveyed(name, backbone, ends[name], examples.get(name), layouts=known)
        check_output(name, backbone, found[name], ends[name])
    stages, outputs, factory = paired(found, at), branch_outputs(found), factory_kwargs(backbones)
    places = [list(sites.values()) for sites in stages]
    refiners, readout = built(recipe["fusion"], list(outputs.values()), places, recipe["fusion_options"], factory)
    if not refiners and not readout.keeps:
        stages = []  # every backbone runs to its end
    for name, backbone in backbones.items():
        names = [sites[name].module for sites in stages if name in sites]
        parts[name] = advanced(name, backbone, found[name], names, ends[name], examples.get(name))
    return Fused(
        {name: nn.Identity() for name in backbones},
        refiners,
        readout,
        tasks,
        stages=stages,
        outputs=outputs,
        parts=parts,
        dropout=rates[0],
        modality_dropout=rates[1],
        recipe=recipe,
        flops=sum(one.first.flops // max(one.first.batch, 1) for one in found.values()),
        **factory,
    )


def factory_kwargs(backbones: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Device and dtype of the first weight of the backbones."""
    weights = (p for backbone in backbones.values() for p in backbone.parameters() if p.is_floating_point())
    weight = next(weights, torch.empty(0))
    return {"device": weight.device, "dtype": weight.dtype}


def check_backbones(backbones: Any) -> None:
    """Raise unless these are networks by modality that can be fused."""
    check_names("backbones", backbones)
    for name, backbone in backbones.items():
        if not isinstance(backbone, nn.Module):
            raise TypeError(f"fuse expected a network as backbone {name!r}, got {type(backbone).__name__}.")
        if isinstance(backbone, PARALLEL) or hasattr(backbone, "_orig_mod") or backbone._compiled_call_impl is not None:
            raise ValueError(
                f"fuse got a parallel or compiled backbone {name!r}: fuse first, then make the whole parallel or compile it."
            )
        if masks(backbone)[1]:
            raise ValueError(
                f"fuse got a backbone {name!r} that was wrapped with mask_from=: a fused network runs its parts one after "
                "another, where that mask is not known. Wrap it without mask_from."
            )
    if len({id(backbone) for backbone in backbones.values()}) < len(backbones):
        raise ValueError("fuse got one network under several names: copy.deepcopy it, or give each modality its own.")


def checked_tasks(tasks: Any) -> dict[str, int]:
    """These numbers of outputs by task."""
    check_names("tasks", tasks)
    return {task: count("fuse", f"tasks[{task!r}]", outputs) for task, outputs in tasks.items()}


def check_names(what: str, mapping: Any) -> None:
    """Raise unless this is a dict whose keys can be names of modules."""
    if not isinstance(mapping, Mapping) or not mapping:
        raise TypeError(f"fuse expected {what} as a dict with at least one entry, got {mapping!r:.80}.")
    for name in mapping:
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"fuse expected the names of {what} to be strings without dots, got {name!r}.")
        if hasattr(nn.ModuleDict, name) or hasattr(nn.ModuleDict(), name):
            raise ValueError(f"fuse got {name!r} among the names of {what}, which torch.nn.ModuleDict uses itself: rename it.")


def rate(what: str, given: Any) -> float:
    """A probability below one."""
    return number("fuse", what, given, "in [0, 1)", lambda x: 0 <= x < 1)


def check_classifiers(classifiers: Mapping[str, Any]) -> None:
    """Raise unless each of these is the name of a module, or None."""
    for name, given in classifiers.items():
        if given is not None and (not isinstance(given, str) or not given):
            raise ValueError(f"fuse expected classifiers[{name!r}] to be the name of a module or None, got {given!r}.")


def check_known(backbones: Mapping[str, nn.Module], **given: Mapping[str, Any]) -> None:
    """Raise unless each of these dicts names modalities of the backbones alone."""
    for what, by_name in given.items():
        if unknown := [name for name in by_name if name not in backbones]:
            raise ValueError(f"fuse got {what} for {unknown}, but its modalities are {list(backbones)}.")
