"""What attention a network holds, however it got there, and the verbs for it: switch it off, look at its gates."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from drifa_attn.attention import Refines
from drifa_attn.checks import check_module
from drifa_attn.network.modes import eagerly, eval_mode

from .inject import PLACED, placed


def attentions(model: nn.Module) -> dict[str, Any]:
    """Every layer of a network that refines features, by its name there; a `ValueError` if there is none."""
    check_module("drifa_attn", model)
    found: dict[str, Any] = {}
    within: set[int] = set()  # what such a layer holds is its own affair
    for name, module in model.named_modules():
        if isinstance(module, Refines) and id(module) not in within:
            found[name] = module
            within |= {id(inner) for inner in module.modules()}  # type: ignore[attr-defined]
    check_run(model)
    if not found:
        raise ValueError(
            f"{type(model).__name__} holds no attention: drifa_attn.wrap(model) puts it there, drifa_attn.fuse builds with it."
        )
    return found


def check_run(model: nn.Module) -> None:
    """Raise where attention that `wrap` put into a network is still in it, and what ran it is gone."""
    run = {id(inner) for _, attention in placed(model) for inner in attention.modules()}
    for name, module in model.named_modules():
        if PLACED in vars(module) and id(module) not in run:
            raise ValueError(
                f"{type(model).__name__} holds the attention {name!r}, which nothing runs any more: the module that carried it "
                "was replaced, as SyncBatchNorm and frozen batch norms replace batch norms. Convert first, then wrap."
            )


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within this context all attention passes features on untouched; afterwards, also after an error, it is back.

    A wrapped network is the original one then, and every branch of a fused network is its own backbone; its readout goes on.
    What counts is each layer's attribute `enabled`. A copy or pickle that is made within the context attends, as the network
    does outside it; replicas of `nn.DataParallel`, which live for one forward, do not.

    Raises: ValueError: the network holds no attention.
    """
    found = list(attentions(model).values())
    for attention in found:
        attention.pause()
    try:
        yield
    finally:
        for attention in found:
            attention.resume()


def attention_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The weights of all attention, for an optimizer: `torch.optim.AdamW(drifa_attn.attention_parameters(model))`.

    Those of a fused network are its refiners' and its readout's. Its heads are its classifier, not attention:
    `net.heads.parameters()`.

    Raises: ValueError: the network holds no attention.
    """
    held = nn.ModuleList(attentions(model).values())  # each parameter once
    return list(held.parameters())


def labels(model: nn.Module) -> dict[str, Any]:
    """Every layer that refines features, by the name users know: of its site where `wrap` put it, else its own."""
    found = attentions(model)
    sites = {id(inner): site.name for site, attention in placed(model) for inner in attention.modules()}
    return {sites.get(id(attention), name): attention for name, attention in found.items()}


def gates(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The gate of every attention for these inputs, `{name: b c}`, each in (0, 1), float32 at least.

    Of a fusion that attends by positions they are its attention matrices or its weights at every position; its class says
    which. What has no gates, such as a readout that concatenates, is left out.

    The name is that of the site, "layer1", or of the layer where attention is part of the network's own code. A layer that
    refines several modalities gives one gate for each, "refiners.0.smear" in a fused network; a modality that the whole batch
    lacks has none. A site that runs several times in one forward, as in a tower that is shared, gives a list. One forward pass
    runs in eval mode without gradients, uncompiled, also where attention is disabled; the network's own state comes back
    afterwards.

    Args: what the network itself takes, `gates(model, x)`, `gates(net, inputs, present)`.
    Raises: ValueError: the network holds no attention, none that has gates, or one that does not multiply features.
    """
    return observed(model, "gates", args, kwargs)


def gains(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The gain of every attention for these inputs, `{name: b c}`: the factors that the features are multiplied by.

    For the paper's attention the gain is `gate · alpha`. It is one wherever attention has left its features alone, and its
    deviation over inputs says how much the attention attends: `gains(model, x)["layer1"].std(0).mean()`.

    Args, Raises: as `gates`.
    """
    return observed(model, "gains", args, kwargs)


def observed(model: nn.Module, what: str, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a method of every attention says of the features that it is given in one forward pass."""
    found: dict[str, list[Tensor]] = {}
    with ExitStack() as stack:
        for name, attention in showing(model, what).items():
            enabled = attention.enabled
            attention.enabled = True
            stack.callback(setattr, attention, "enabled", enabled)
            handle = attention.register_forward_pre_hook(partial(keep, found, name, what), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(eval_mode(model))
        stack.enter_context(eagerly())
        stack.enter_context(torch.no_grad())
        model(*args, **kwargs)
    return {name: each[0] if len(each) == 1 else each for name, each in found.items()}


def showing(model: nn.Module, what: str) -> dict[str, Any]:
    """Every layer that has gates, or gains, by the name users know; a `ValueError` if there is none."""
    held = labels(model)
    found = {name: layer for name, layer in held.items() if getattr(type(layer), what) is not getattr(Refines, what)}
    if not found:
        kinds = ", ".join(sorted({type(layer).__name__ for layer in held.values()}))
        raise ValueError(f"{type(model).__name__} holds no attention that has {what}, only {kinds}.")
    return found


def keep(found: dict[str, list[Tensor]], name: str, what: str, attention: Any, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """A pre-hook of an attention that keeps what it says."""
    gate = getattr(attention, what)(*args, **kwargs)
    if isinstance(gate, Tensor):
        found.setdefault(name, []).append(gate)
        return
    if isinstance(gate, Mapping):
        for key, one in gate.items():
            found.setdefault(f"{name}.{key}", []).append(one)
        return
    present = kwargs.get("present", args[-1] if len(args) > 1 else None)
    for i, (modality, one) in enumerate(zip(modalities(attention, gate), gate, strict=True)):
        if present is None or present[:, i].any():
            found.setdefault(f"{name}.{modality}", []).append(one)


def modalities(attention: Any, gate: Sequence[Tensor]) -> Sequence[Any]:
    """The names of the modalities that a layer refines; their numbers where it has no names for them."""
    return getattr(attention, "names", None) or range(len(gate))
