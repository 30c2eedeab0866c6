"""`wrap`: DRIFA's attention in any network, in one line, and the ways to switch it off, take it out and look at it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from drifa_attn.attention.mfa import MFA
from drifa_attn.checks import Init
from drifa_attn.layout import Layout

from .inject import AttentionHook, Fusion, attach, detach, fusions, hooks, placed
from .plan import At, plan

Network = TypeVar("Network", bound=nn.Module)


def wrap(
    model: Network,
    at: At = "stage",
    *,
    variant: Literal["paper"] | None = None,
    reduction: int | None = 16,
    init: Init = "identity",
    example_input: Any = None,
    layouts: Mapping[str, Layout] | None = None,
) -> Network:
    """Put DRIFA's attention into a network, in place, and return the same network.

        model = drifa_attn.wrap(timm.create_model("resnet50", pretrained=True))

    With `init="identity"` its outputs do not change by one bit until training moves them. Its class, the names of its weights,
    its methods and its mode stay; the attention follows its device and dtype. `plan` says first what `wrap` would do.

    Args, Raises: as `plan`. When it raises, the network is untouched.
    Differs: the paper builds its own network; `variant="paper"` gives its block, RRA, inside this one.
    """
    chosen = plan(model, at, variant=variant, reduction=reduction, init=init, example_input=example_input, layouts=layouts)
    attach(model, chosen.sites, reduction=chosen.reduction, init=chosen.init, avoid=set(chosen.avoid))
    return model


def wrapped_hooks(model: nn.Module) -> list[AttentionHook]:
    """The attention hooks of a network; a `ValueError` if it has none."""
    found = list(hooks(model))
    if not found:
        raise ValueError(f"{type(model).__name__} holds no attention: drifa_attn.wrap(model) first.")
    return found


def attentions(model: nn.Module) -> list[AttentionHook | Fusion]:
    """Whatever refines features in a wrapped or fused network; a `ValueError` if there is nothing."""
    fused = [fusion for _, fusion in fusions(model)]
    return [*fused, *(hooks(model) if fused else wrapped_hooks(model))]


def unwrap(model: Network) -> Network:
    """Take the attention out of a network, in place: the original, key set and all.

    Raises: ValueError: the network is not wrapped, or a fused one, whose branches are unwrapped one by one.
    """
    if next(fusions(model), None) is not None:
        raise ValueError(
            f"unwrap got a fused network ({type(model).__name__}): its backbones are net.branches[name], unwrap those; "
            "drifa_attn.disabled(net) switches the fusions off."
        )
    wrapped_hooks(model)
    detach(model)
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within this context the network is the original one; afterwards, also after an error, the attention is back.

    Of a fused network both go, its fusions and the attention inside its branches: every branch is its own backbone then.

    Raises: ValueError: the network is neither wrapped nor fused.
    """
    found = attentions(model)
    before = [attention.enabled for attention in found]
    for attention in found:
        attention.enabled = False
    try:
        yield
    finally:
        for attention, enabled in zip(found, before, strict=True):
            attention.enabled = enabled


def attention_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What `wrap` or `fuse` added, for an optimizer: `torch.optim.AdamW(drifa_attn.attention_parameters(model))`.

    The heads of a fused network are its classifier, not attention: `net.heads.parameters()`.

    Raises: ValueError: the network is neither wrapped nor fused.
    """
    modules = [found if isinstance(found, Fusion) else found.attention for found in attentions(model)]
    return [parameter for module in modules for parameter in module.parameters()]


def classifier_names(model: nn.Module, classifier: bool | str | Sequence[str]) -> list[str]:
    """The modules that make up a network's classifier: as named, or as a timm network states them for True."""
    if classifier is False:
        return []
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") if classifier is True else classifier
    if not named:
        raise ValueError(f"{type(model).__name__} does not state its classifier: name it, e.g. classifier='fc'.")
    names = [named] if isinstance(named, str) else list(named)
    known = {name for name, _ in model.named_modules()}
    for name in names:
        if name not in known:
            raise ValueError(f"{type(model).__name__} has no module {name!r} to take as its classifier.")
    return names


def freeze_backbone(model: Network, *, classifier: bool | str | Sequence[str] = True) -> Network:
    """Let only the attention, and the classifier, take gradients; returns the network.

    Batch norms go on collecting statistics in training mode, as everywhere in PyTorch.

    Args:
        model: a wrapped or fused network.
        classifier: True for the one a timm network states, or the heads of a fused one; a module's name or several; or False
            to freeze it too.

    Raises: ValueError: the network is neither wrapped nor fused, or has no such classifier.
    """
    trained = {id(parameter) for parameter in attention_parameters(model)}
    for name in classifier_names(model, classifier):
        trained |= {id(parameter) for parameter in model.get_submodule(name).parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return model


def attention_maps(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """The gate of every site for these inputs, `{site: b c}`, each in (0, 1), float32 at least.

    A fused network has one more for every stage and modality, "fusions.0.smear" for the first; a modality that the whole
    batch lacks has none. One forward pass in eval mode without gradients, also where the attention is disabled; the network's
    own state comes back afterwards.

    Args: what the network itself takes, `attention_maps(model, x)`, `attention_maps(net, inputs, present)`.
    Raises: ValueError: the network is neither wrapped nor fused.
    """
    maps: dict[str, Tensor] = {}
    modes = {module: module.training for module in model.modules()}
    handles = []
    found = attentions(model)
    enabled = [attention.enabled for attention in found]

    def keep(name: str, attention: MFA, inputs: tuple[Tensor]) -> None:
        maps[name] = attention.attention(*inputs)

    def keep_each(name: str, fusion: Fusion, inputs: tuple[list[Tensor], Tensor | None]) -> None:
        xs, present = inputs
        for i, (modality, gate) in enumerate(zip(fusion.names, fusion.attention(xs, present), strict=True)):
            if present is None or present[:, i].any():
                maps[f"{name}.{modality}"] = gate

    for site, hook in placed(model):
        handles.append(hook.attention.register_forward_pre_hook(partial(keep, site.name)))
    for name, fusion in fusions(model):
        handles.append(fusion.register_forward_pre_hook(partial(keep_each, name)))
    for attention in found:
        attention.enabled = True
    try:
        model.eval()
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for attention, before in zip(found, enabled, strict=True):
            attention.enabled = before
        for module, mode in modes.items():
            module.training = mode
    return maps
