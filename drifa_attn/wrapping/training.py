"""What to train of a network that holds attention: what is frozen, and which rate and decay each part gets."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from .active import attention_parameters, attentions
from .wrap import Network

Classifier = bool | str | Sequence[str]


def classifier_names(model: nn.Module, classifier: Classifier) -> list[str]:
    """The modules of a network's classifier: those that are named, or for True those that a timm network states."""
    if classifier is False:
        return []
    named = stated_classifier(model) if classifier is True else classifier
    if not named:
        raise ValueError(f"{type(model).__name__} does not state its classifier: name it, e.g. classifier='fc'.")
    if not isinstance(named, str | Sequence):
        raise TypeError(f"classifier expected True, False, or names of modules, got {type(named).__name__}: give its name.")
    names = [named] if isinstance(named, str) else list(named)
    known = {name for name, _ in model.named_modules() if name}
    for name in names:
        if name not in known:
            raise ValueError(f"{type(model).__name__} has no module {name!r} to take as its classifier.")
    return names


def stated_classifier(model: nn.Module) -> str | Sequence[str] | None:
    """The names that a timm network states; None where nothing is stated."""
    return (getattr(model, "pretrained_cfg", None) or {}).get("classifier")


def freeze_backbone(model: Network, *, classifier: Classifier = True) -> Network:
    """Let only the attention and the classifier take gradients; returns the network.

    Batch norms go on collecting statistics in training mode, as everywhere in PyTorch.

    Args:
        model: a network that holds attention.
        classifier: True for the one that a timm network states, or the heads of a fused one; the name of a module, or several;
            or False to freeze it too.

    Raises: ValueError: the network holds no attention, or has no such classifier.
    """
    trained = {id(parameter) for parameter in attention_parameters(model)}
    for name in classifier_names(model, classifier):
        trained |= {id(parameter) for parameter in model.get_submodule(name).parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return model


def parameter_groups(
    model: nn.Module,
    lr: float = 1e-3,
    attention_lr: float = 1e-2,
    *,
    weight_decay: float = 1e-2,
    classifier: Classifier = True,
) -> list[dict[str, Any]]:
    """The parameters that take gradients, in groups for any torch optimizer: attention, head and rest.

        optimizer = torch.optim.AdamW(drifa_attn.parameter_groups(model))

    Attention starts where it does nothing, and needs a higher rate than weights that are pretrained. Vectors (scales, alphas,
    biases, norms) and what a timm network names in `no_weight_decay()` are not decayed.

    Args:
        model: a network that holds attention.
        lr: the rate of head and rest, >= 0.
        attention_lr: the rate of the attention, >= 0; the strength of an attention that is not the paper's gets ten times as
            much, for all else in it waits until the strength has left zero.
        weight_decay: of everything else, >= 0.
        classifier: as `freeze_backbone` takes it; with True, a network that does not state its classifier has no group "head".

    Returns: dicts with "params", "lr", "weight_decay" and a "name": "attention", "strength", "head", "rest", each also as "…
        without decay". Every parameter is in one group; what is frozen is in none, and a group without parameters is left out.
    Raises: ValueError: the network holds no attention, has no such classifier, takes no gradients, or a rate is negative.
    """
    for what, rate in (("lr", lr), ("attention_lr", attention_lr), ("weight_decay", weight_decay)):
        if not rate >= 0:
            raise ValueError(f"parameter_groups expected {what} >= 0, got {rate!r}.")
    rates = {"strength": 10 * attention_lr, "attention": attention_lr, "head": lr, "rest": lr}
    parts = parts_of(model, classifier)
    spared = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = parts.get(id(parameter), "rest")
        decays = parameter.ndim > 1 and name not in spared
        group = part if decays else f"{part} without decay"
        settings = {"name": group, "lr": rates[part], "weight_decay": weight_decay if decays else 0.0}
        groups.setdefault(group, {"params": [], **settings})["params"].append(parameter)
    if not groups:
        raise ValueError(f"{type(model).__name__} has no parameter that takes gradients: parameter.requires_grad_().")
    return list(groups.values())


def parts_of(model: nn.Module, classifier: Classifier) -> dict[int, str]:
    """Which part of a network each parameter of its attention and head belongs to, by `id`."""
    named = classifier is not True or stated_classifier(model)
    head = classifier_names(model, classifier) if named else []
    parts = {id(parameter): "head" for name in head for parameter in model.get_submodule(name).parameters()}
    for attention in attentions(model).values():
        parts |= {id(parameter): attention.part for parameter in attention.parameters()}
        parts |= {id(parameter): "strength" for name, parameter in attention.named_parameters() if name == "strength"}
    return parts
