"""A file with only what `wrap` or `fuse` added, beside any number of copies of pretrained networks, put on fresh ones."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, overload

from torch import Tensor, nn

from drifa_attn.fusion.fuse import Fused, fuse, without_classifier
from drifa_attn.network.survey import Survey
from drifa_attn.network.trace import meta_clone
from drifa_attn.wrapping.inject import Fusion, Site, attach, detach, fusions, hooks, placed
from drifa_attn.wrapping.plan import check_backbone, rehearse
from drifa_attn.wrapping.wrap import Network, attentions, classifier_names, wrapped_hooks

FORMAT, VERSION = "drifa_attn", 1
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def chosen_state(model: nn.Module, modules: Sequence[str], batch_norm: bool) -> dict[str, Tensor]:
    """What a file holds of a network's state dict: attention and, if asked for, more; a tensor with two names once."""
    added = {id(tensor) for part in added_parts(model) for tensor in part.state_dict(keep_vars=True).values()}
    chosen: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        is_asked_for = any(name.startswith(f"{module}.") for module in modules)
        is_statistic = batch_norm and name.rpartition(".")[2] in STATISTICS
        if id(tensor) in added or is_asked_for or is_statistic:
            chosen.setdefault(id(tensor), (name, tensor.detach()))
    return dict(chosen.values())


def added_parts(model: nn.Module) -> list[nn.Module]:
    """What `wrap` and `fuse` added: the attention, and the heads of a fused network."""
    heads = [model.heads] if isinstance(model, Fused) else []
    return heads + [found if isinstance(found, Fusion) else found.attention for found in attentions(model)]


def wrapped_plan(model: nn.Module) -> dict[str, Any]:
    """How a network was wrapped, as a file says it."""
    ((reduction, init), *others) = {(hook.attention.reduction, hook.attention.init) for hook in wrapped_hooks(model)}
    if others:
        raise ValueError(f"{type(model).__name__} has parts that were wrapped differently: save the attention of each part.")
    return {"reduction": reduction, "init": init, "sites": [asdict(site) for site, _ in placed(model)]}


def fused_plan(net: Fused) -> dict[str, Any]:
    """How a network was fused, and its branches wrapped, as a file says it."""
    return {
        "tasks": {task: head.out_features for task, head in net.heads.items()},  # type: ignore[union-attr]
        "stages": [{modality: asdict(site) for modality, site in sites.items()} for sites in net.stages],
        "options": net.options | {"dropout": net.dropout.p, "modality_dropout": net.modality_dropout},
        "branches": {
            modality: wrapped_plan(branch) if next(hooks(branch), None) else None for modality, branch in net.branches.items()
        },
    }


def save_attention(
    model: nn.Module, path: str | Path, *, classifier: bool | str | Sequence[str] = False, batch_norm: bool = False
) -> None:
    """Write the attention of a wrapped or fused network, and nothing else unless asked, as safetensors with its plan.

    Of a fused network a file holds the fusions, the heads, and the attention inside its branches.

    Args:
        model: the wrapped or fused network (not its DDP or compiled wrapper).
        path: of the file.
        classifier: True adds the classifier a timm network states; or name the modules to add, such as a branch of a fused
            network that was trained from its start, "branches.record".
        batch_norm: True adds the running statistics of every batch norm, which training moves even when weights are frozen.

    Raises: ValueError: the network is neither wrapped nor fused, or has no such classifier.
    """
    from safetensors.torch import save_file  # a dependency of timm; not needed to import the package

    attentions(model)
    if hasattr(model, "_orig_mod") or isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(f"save_attention got a {type(model).__name__}: give it the network inside, .module or ._orig_mod.")
    if not isinstance(model, Fused) and next(fusions(model), None):
        raise ValueError(f"{type(model).__name__} has a fused network inside: save the attention of that.")
    names = classifier_names(model, classifier)
    plan = {"version": VERSION, "network": type(model).__name__, "classifier": names, "batch_norm": batch_norm}
    plan |= {"fused": fused_plan(model)} if isinstance(model, Fused) else wrapped_plan(model)
    tensors = {name: tensor.contiguous() for name, tensor in chosen_state(model, names, batch_norm).items()}
    save_file(tensors, path, {FORMAT: json.dumps(plan)})


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The plan and the tensors of a file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    if FORMAT not in metadata:
        raise ValueError(f"{path} was not written by save_attention: it has no {FORMAT!r} metadata.")
    plan = json.loads(metadata[FORMAT])
    if plan["version"] != VERSION:
        raise ValueError(
            f"{path} is of version {plan['version']}, this drifa_attn reads version {VERSION}: use the one that wrote it."
        )
    return plan, tensors


@overload
def load_attention(backbone: Network, path: str | Path, *, example_input: Any = None) -> Network: ...


@overload
def load_attention(
    backbone: Mapping[str, nn.Module], path: str | Path, *, example_input: Mapping[str, Tensor] | None = None
) -> Fused: ...


def load_attention(backbone: Any, path: str | Path, *, example_input: Any = None) -> Any:
    """Rebuild the attention of a file on a fresh network of the same architecture, in place, and load its weights.

        model = drifa_attn.load_attention(timm.create_model("resnet50", pretrained=True), path)
        net = drifa_attn.load_attention({"dermoscopy": resnet, "smear": swin}, path)

    Whatever else the file holds (classifier, batch-norm statistics, named modules) is loaded too.

    Args:
        backbone: the network, not wrapped; for a file of a fused network {modality: network}, in any order, with or without
            their classifiers.
        path: of a file by `save_attention`.
        example_input: as `plan` takes it, where the network needs one; {modality: tensor} for a file of a fused network.

    Returns: the network, or a new `Fused` of the networks.
    Raises: TypeError, ValueError: no such file's content, a wrapped network, or one that differs from the saved one; the
        message names the first difference, and the network is untouched.
    """
    backbones = list(backbone.values()) if isinstance(backbone, Mapping) else [backbone]
    for one in backbones:
        check_backbone(one)
    plan, tensors = read(path)
    if ("fused" in plan) != isinstance(backbone, Mapping):
        expected = f"{{modality: network}} of {list(plan['fused']['branches'])}" if "fused" in plan else "one network"
        raise TypeError(f"{path} holds attention for {expected}, got {type(backbone).__name__}.")
    if "fused" not in plan:
        rewrap(backbone, Survey(backbone, example_input), plan)
        load_state(backbone, tensors, plan)
        return backbone
    return load_fused(backbone, plan, tensors, example_input or {})


def rewrap(network: nn.Module, survey: Survey, wrapped: Mapping[str, Any]) -> None:
    """Put attention into a network, without its weights, where and as a file says."""
    sites = [site_of(entry) for entry in wrapped["sites"]]
    for site in sites:
        check_site(survey, site)
    attach(network, sites, reduction=wrapped["reduction"], init=wrapped["init"], avoid=set(rehearse(survey, sites)))


def load_fused(
    backbones: Mapping[str, nn.Module], plan: Mapping[str, Any], tensors: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
) -> Fused:
    """Fuse the networks as a file says and load its weights; first on copies without memory, where any difference shows."""
    fused, modalities = plan["fused"], list(plan["fused"]["branches"])
    if set(backbones) != set(modalities):
        raise ValueError(f"the file holds a network of the modalities {modalities}, got {list(backbones)}.")
    surveys = {}
    for modality in modalities:
        clone = without_classifier(meta_clone(backbones[modality]), modality, fused["options"]["classifiers"].get(modality))
        surveys[modality] = Survey(clone, inputs.get(modality))
        surveys[modality].title += f" of branch {modality!r}"
    for sites in fused["stages"]:
        for modality, entry in sites.items():
            check_site(surveys[modality], site_of(entry))
    rehearsal = fused_again({modality: meta_clone(backbones[modality]) for modality in modalities}, surveys, fused, inputs)
    check_state(rehearsal, tensors, expected_state(rehearsal, plan))
    net = fused_again({modality: backbones[modality] for modality in modalities}, surveys, fused, inputs)
    load_state(net, tensors, plan)
    return net


def fused_again(
    backbones: Mapping[str, nn.Module], surveys: Mapping[str, Survey], fused: Mapping[str, Any], inputs: Mapping[str, Tensor]
) -> Fused:
    """Wrap and fuse networks as a file says; they stay unwrapped if that fails."""
    try:
        for modality, wrapped in fused["branches"].items():
            if wrapped:
                rewrap(backbones[modality], surveys[modality], wrapped)
        at = [{modality: entry["module"] for modality, entry in sites.items()} for sites in fused["stages"]]
        return fuse(backbones, fused["tasks"], at=at, example_inputs=inputs, **fused["options"])
    except Exception:
        for backbone in backbones.values():
            detach(backbone)
        raise


def expected_state(model: nn.Module, plan: Mapping[str, Any]) -> dict[str, Tensor]:
    """The part of a network's state that a file with this plan holds."""
    return chosen_state(model, classifier_names(model, plan["classifier"] or False), plan["batch_norm"])


def load_state(model: nn.Module, tensors: Mapping[str, Tensor], plan: Mapping[str, Any]) -> None:
    """Load a file's tensors into a network with its attention; if that fails, all goes back and the attention out."""
    state = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict().items() if name in tensors}
    try:
        check_state(model, tensors, expected_state(model, plan))
        model.load_state_dict(tensors, strict=False)
    except Exception:
        for tensor, before in state.values():
            tensor.copy_(before)
        detach(model)
        raise


def site_of(entry: Mapping[str, Any]) -> Site:
    """A site as a file holds it."""
    return Site(**{**entry, "path": tuple(entry["path"]), "shape": tuple(entry["shape"])})


def check_site(survey: Survey, site: Site) -> None:
    """Raise a `ValueError` unless the network has this feature where the file says, with its channels, layout and prefix."""
    if site.module not in survey.modules:
        raise ValueError(f"the file has attention at {site.name!r}, a module that {survey.title} does not have.")
    found, reasons = survey.sites(site.module, [site.channels], site.layout)
    here = next((other for other in found if other.path == site.path), None)
    if here is None:
        raise ValueError(f"the file has attention at {site.name!r}, where {survey.title} can take none: {'; '.join(reasons)}.")
    for key in ("channels", "num_prefix_tokens"):
        if getattr(here, key) != getattr(site, key):
            raise ValueError(
                f"the file's attention at {site.name!r} has {key}={getattr(site, key)}, "
                f"{survey.title} has {key}={getattr(here, key)} there."
            )


def check_state(model: nn.Module, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise a `ValueError` unless the file's tensors are those of this part of the network's state, by name and shape."""
    for name in state:
        if name not in tensors:
            raise ValueError(f"the file lacks {name!r}, which {type(model).__name__} has.")
    for name, tensor in tensors.items():
        if name not in state:
            raise ValueError(f"the file holds {name!r}, which {type(model).__name__} does not have, or not as its plan says.")
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"{name!r} is {tuple(tensor.shape)} in the file and {tuple(state[name].shape)} in {type(model).__name__}."
            )
