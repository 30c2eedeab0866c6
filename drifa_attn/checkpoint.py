"""A file with only what `wrap` added: written beside any number of copies of one pretrained network, put on a fresh one."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .inject import Site, attach, detach, placed
from .plan import check_backbone, rehearse
from .sites import Survey
from .wrap import Network, classifier_names, wrapped_hooks

FORMAT, VERSION = "drifa_attn", 1
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def chosen_state(model: nn.Module, classifier: Sequence[str], batch_norm: bool) -> dict[str, Tensor]:
    """What a file holds of a network's state dict: attention and, if asked for, more; a tensor with two names once."""
    added = {id(tensor) for hook in wrapped_hooks(model) for tensor in hook.attention.state_dict(keep_vars=True).values()}
    chosen: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        is_classifier = any(name.startswith(f"{module}.") for module in classifier)
        is_statistic = batch_norm and name.rpartition(".")[2] in STATISTICS
        if id(tensor) in added or is_classifier or is_statistic:
            chosen.setdefault(id(tensor), (name, tensor.detach()))
    return dict(chosen.values())


def save_attention(
    model: nn.Module, path: str | Path, *, classifier: bool | str | Sequence[str] = False, batch_norm: bool = False
) -> None:
    """Write the attention of a wrapped network, and nothing else unless asked, as safetensors with the plan as metadata.

    Args:
        model: the wrapped network (not its DDP or compiled wrapper).
        path: of the file.
        classifier: True adds the classifier a timm network states; or name the modules to add.
        batch_norm: True adds the running statistics of every batch norm, which training moves even when weights are frozen.

    Raises: ValueError: the network is not wrapped, or has no such classifier.
    """
    from safetensors.torch import save_file  # a dependency of timm; not needed to import the package

    found = wrapped_hooks(model)
    if hasattr(model, "_orig_mod") or isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(f"save_attention got a {type(model).__name__}: give it the network inside, .module or ._orig_mod.")
    ((reduction, init), *others) = {(hook.attention.reduction, hook.attention.init) for hook in found}
    if others:
        raise ValueError(f"{type(model).__name__} has parts that were wrapped differently: save the attention of each part.")
    names = classifier_names(model, classifier)
    plan = {
        "version": VERSION,
        "network": type(model).__name__,
        "reduction": reduction,
        "init": init,
        "classifier": names,
        "batch_norm": batch_norm,
        "sites": [asdict(site) for site, _ in placed(model)],
    }
    tensors = {name: tensor.contiguous() for name, tensor in chosen_state(model, names, batch_norm).items()}
    save_file(tensors, path, {FORMAT: json.dumps(plan)})


def load_attention(backbone: Network, path: str | Path, *, example_input: Any = None) -> Network:
    """Rebuild the attention of a file on a fresh network of the same architecture, in place, and load its weights.

    Whatever else the file holds (classifier, batch-norm statistics) is loaded too.

    Args:
        backbone: the network, not wrapped.
        path: of a file by `save_attention`.
        example_input: as `plan` takes it, where the network needs one.

    Raises: ValueError: no such file's content, a wrapped network, or one that differs from the saved one; the message names
        the first difference, and the network is untouched.
    """
    from safetensors import safe_open

    check_backbone(backbone)
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
    sites = [Site(**entry | {"path": tuple(entry["path"]), "shape": tuple(entry["shape"])}) for entry in plan["sites"]]
    survey = Survey(backbone, example_input)
    for site in sites:
        check_site(survey, site)
    attach(backbone, sites, reduction=plan["reduction"], init=plan["init"], avoid=set(rehearse(survey, sites)))
    state = {name: (tensor, tensor.clone()) for name, tensor in backbone.state_dict().items() if name in tensors}
    try:
        check_state(
            backbone,
            tensors,
            chosen_state(backbone, classifier_names(backbone, plan["classifier"] or False), plan["batch_norm"]),
        )
        backbone.load_state_dict(tensors, strict=False)
    except Exception:
        for tensor, before in state.values():
            tensor.copy_(before)
        detach(backbone)
        raise
    return backbone


def check_site(survey: Survey, site: Site) -> None:
    """Raise a `ValueError` unless the network has this feature where the file says, with its channels, layout and prefix."""
    if site.module not in survey.modules:
        raise ValueError(f"the file has attention at {site.name!r}, a module that {survey.title} does not have.")
    found, reasons = survey.sites(site.module, [site.channels], site.layout)
    here = next((other for other in found if other.path == site.path), None)
    if here is None:
        raise ValueError(f"the file has attention at {site.name!r}, where {survey.title} can take none: {'; '.join(reasons)}.")
    for key in ("channels", "prefix"):
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
