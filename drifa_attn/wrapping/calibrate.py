"""`calibrate`: fit the attention of a network to real features, before training starts."""

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from drifa_attn.attention import Refines
from drifa_attn.checks import check_module
from drifa_attn.network.modes import eagerly, eval_mode

from .active import labels
from .plan import PARALLEL
from .wrap import Network


def calibrate(model: Network, batch: Any, present: Tensor | None = None) -> Network:
    """Fit the attention of a network to a batch of real inputs, in place, before training; returns the network.

        drifa_attn.calibrate(drifa_attn.wrap(model), images)

    Every map within the attention is scaled and shifted, one after another, so that over the batch its output has mean zero and
    deviation 1 (`squeeze`) or 1.5 (what a sigmoid reads), channel by channel. Then the mean and the deviation of G and L are
    measured, which standardise them from now on. All gains are exactly one before and after, so the output of the network does
    not change by one bit, and one forward pass calibrates all sites. It runs in eval mode without gradients.

    Without calibration the information is nearly the same for every input, and the gates learn to vary more slowly.

    Args:
        model: a network that holds attention at its identity start, before DDP or FSDP wraps it. Processes may calibrate with
            batches of their own: DDP then broadcasts what process 0 measured.
        batch: at least 16 samples of what the network takes: a tensor, a tuple of arguments, or a dict of keyword arguments;
            for a fused network {modality: tensor}. A batch of training data without augmentation is best.
        present: of a fused network, `b m`, which sample has which modality; only what is present counts.

    Raises: ValueError: no attention, none that can be calibrated, attention that has left its start, whose linear maps another
        tool has changed (quantised, pruned, with adapters or hooks), or that this batch does not reach, fewer than 16 samples,
        features that are not finite, or a parallel network. The network is then untouched.
    Differs: calibration is not in the paper. It folds layer-sequential unit variance (arXiv:1511.06422) into the weights.
    """
    check_whole(model)
    layers = calibrated(model)
    args, kwargs = arguments(model, batch, present)
    state = [tensor for layer in layers.values() for tensor in layer.state_dict(keep_vars=True).values()]
    before = [tensor.detach().clone() for tensor in state]
    reached: set[str] = set()
    try:
        with ExitStack() as stack:
            for name, layer in layers.items():
                handle = layer.register_forward_pre_hook(partial(fit, reached, name), with_kwargs=True)
                stack.callback(handle.remove)
            stack.enter_context(eval_mode(model))
            stack.enter_context(eagerly())
            stack.enter_context(torch.no_grad())
            model(*args, **kwargs)
        check_fitted(layers, reached)
    except BaseException:
        with torch.no_grad():
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
        raise
    return model


def check_whole(model: nn.Module) -> None:
    """Raise unless the network is a whole one, not a parallel or sharded one, and has memory."""
    check_module("calibrate", model)
    kind = type(model).__name__
    if isinstance(model, PARALLEL) or any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise ValueError(f"calibrate got a parallel network ({kind}): calibrate it first, then make it parallel.")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"calibrate got {kind} on the meta device, where no value can be measured: load its weights first.")


def calibrated(model: nn.Module) -> dict[str, Any]:
    """The layers to calibrate, by the name users know; each of them at its start."""
    held = labels(model)
    layers = {name: layer for name, layer in held.items() if type(layer).calibrate is not Refines.calibrate}
    if not layers:
        kinds = sorted({type(layer).__name__ for layer in held.values()})
        raise ValueError(f"{type(model).__name__} holds no attention that can be calibrated, only {', '.join(kinds)}.")
    for name, layer in layers.items():
        if reason := layer.must_call():
            raise ValueError(
                f"calibrate expected plain nn.Linear maps at {name!r}, but {reason}: calibrate first, then change it."
            )
    moved = [name for name, layer in layers.items() if not layer.is_start()]
    if moved:
        raise ValueError(
            f"{type(model).__name__} has left its start at {', '.join(map(repr, moved))}: calibrate before training, with "
            'init="identity".'
        )
    return layers


def arguments(model: nn.Module, batch: Any, present: Tensor | None) -> tuple[tuple, dict[str, Any]]:
    """The batch as the arguments of the network's forward."""
    if isinstance(batch, Mapping) and not hasattr(model, "drifa_parts"):
        return (), dict(batch)
    args = batch if isinstance(batch, tuple) else (batch,)
    return args, {} if present is None else {"present": present}


def fit(reached: set[str], name: str, layer: Any, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """A pre-hook that calibrates a layer when it first runs."""
    if name not in reached:
        reached.add(name)
        layer.calibrate(*args, **kwargs)


def check_fitted(layers: Mapping[str, nn.Module], reached: set[str]) -> None:
    """Raise unless every layer was reached, and by finite features."""
    for name, layer in layers.items():
        if name not in reached:
            raise ValueError(f"calibrate did not reach the attention at {name!r}: pass a batch for which it runs.")
        if not all(tensor.isfinite().all() for tensor in layer.state_dict().values()):
            raise ValueError(f"calibrate met features that are not finite at {name!r}: look at the batch and the weights.")
