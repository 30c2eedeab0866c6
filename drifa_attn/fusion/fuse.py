"""`fuse`: several backbones of any family in lockstep, refined after every stage, with one head per task (Fig. 1A)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from drifa_attn.checks import check_mapping, count, number
from drifa_attn.randomness import forked, seed_from
from drifa_attn.wrapping.plan import PARALLEL

from .branches import advanced, surveyed, without_classifier
from .fused import Fused
from .pairs import Pairs, branch_outputs, paired
from .protocol import Readout, Refiner
from .systems import system


def fuse(
    backbones: Mapping[str, nn.Module],
    tasks: Mapping[str, int],
    *,
    at: Pairs = "stage",
    fusion: str | type[Refiner] | type[Readout] = "mifa",
    fusion_options: Mapping[str, Any] | None = None,
    dropout: float = 0.0,
    modality_dropout: float = 0.0,
    classifiers: Mapping[str, str] | None = None,
    example_inputs: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Fused:
    """Fuse backbones of any family, one per modality, stage by stage, and give the whole one head per task (Fig. 1A).

        net = drifa_attn.fuse({"dermoscopy": resnet, "smear": swin}, tasks={"lesion": 7, "cell": 5})
        logits = net({"dermoscopy": x, "smear": y})

    Each backbone is cut at its stages and compared with itself, in eval and training mode, before it is used; its classifier is
    taken off (by `reset_classifier(0)` where it has that, as timm's networks have). With MIFA's default start and all
    modalities present, the features of each branch equal those of its own backbone bit for bit until training moves them.

    Args:
        backbones: {modality: network}, at least one; used in place, wrapped or not; only the classifier is taken off.
        tasks: {task: how many outputs its head has}, at least one: classes, or with `kinds` of `TaskLoss` labels or values.
        at: "stage" pairs stages by reduction where the networks share at least two, else by fraction of depth; "block" pairs
            blocks by fraction of depth, and stages in a network without blocks; or a list with one {modality: module name} per
            stage, in calling order.
        fusion: the name of a fusion, "mifa", or a `Refiner` or `Readout` class of one's own.
        fusion_options: what its refiners take, for "mifa" `reduction` (16), `dim` and `init` ("identity"); see `MIFA`.
        dropout: before the heads, in [0, 1).
        modality_dropout: in training, the probability that a present modality is dropped, in [0, 1).
        classifiers: {modality: module name} to take off where a backbone has no `reset_classifier`; others keep their output.
        example_inputs: {modality: tensor} where a network does not say what it takes.
        generator: what the new weights follow, as `wrap` takes it. No global random state is moved.

    Raises: ValueError, TypeError: an argument out of its range, or a backbone that cannot be advanced, with the reason. The
        backbones are then untouched.
    Differs: the paper fuses two networks of its own.
    """
    check_mapping("fuse", "classifiers", classifiers, "{modality: module name}")
    check_mapping("fuse", "example_inputs", example_inputs, "{modality: tensor}")
    classifiers, example_inputs = dict(classifiers or {}), dict(example_inputs or {})
    check_backbones(backbones)
    tasks = checked_tasks(tasks)
    dropout, modality_dropout = rate("dropout", dropout), rate("modality_dropout", modality_dropout)
    check_known(backbones, classifiers=classifiers, example_inputs=example_inputs)
    refiner, readout = system(fusion)
    with forked(seed_from("fuse", generator), *backbones.values()):
        found = {name: surveyed(name, one, classifiers.get(name), example_inputs.get(name)) for name, one in backbones.items()}
        stages, outputs, parts = paired(found, at), branch_outputs(found), {}
        for name, backbone in backbones.items():
            names = [sites[name].module for sites in stages if name in sites]
            parts[name] = advanced(name, backbone, found[name], names, classifiers.get(name), example_inputs.get(name))
        places = [list(sites.values()) for sites in stages]
        options, factory = dict(fusion_options or {}), factory_kwargs(backbones)
        refiners = [refiner(where, **options, **factory) for where in places] if refiner else []
        net = Fused(
            {name: nn.Identity() for name in backbones},
            refiners,
            readout(list(outputs.values()), places, **({} if refiner else options), **factory),
            tasks,
            stages=stages,
            outputs=outputs,
            parts=parts,
            dropout=dropout,
            modality_dropout=modality_dropout,
            recipe={"fusion": fusion, "fusion_options": options, "classifiers": classifiers},
            **factory,
        )
        for name, backbone in backbones.items():  # the backbones change last, when nothing can fail any more
            net.branches[name] = without_classifier(backbone, name, classifiers.get(name))
        return net


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


def check_known(backbones: Mapping[str, nn.Module], **given: Mapping[str, Any]) -> None:
    """Raise unless each of these dicts names modalities of the backbones alone."""
    for what, by_name in given.items():
        if unknown := [name for name in by_name if name not in backbones]:
            raise ValueError(f"fuse got {what} for {unknown}, but its modalities are {list(backbones)}.")
