"""Dropout: put into a network that has none, and switched on alone at test time.

It is a step that a module carries behind its forward, as attention is. It has no weight, and changes neither a key of the
network nor its class.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from drifa_attn.checks import check_module, number
from drifa_attn.layout import Layout
from drifa_attn.network.survey import survey
from drifa_attn.trees import Path, replace_tensor
from drifa_attn.wrapping.inject import carry, detach, release, steps_of
from drifa_attn.wrapping.plan import check_network
from drifa_attn.wrapping.selection import WAYS, At, check_at, checked_layouts, matching, placed_at
from drifa_attn.wrapping.wrap import Network

# Functions that drop at the rate they are called with where `training`, or `train`, says so.
FUNCTIONS: set[Callable] = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}
FUNCTIONS |= {F.multi_head_attention_forward}
BUILTINS: set[Callable] = {torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout}


@dataclass(frozen=True)
class DropoutStep:
    """A step that drops whole channels of one tensor of a module's output, in training and in `mc_dropout`."""

    p: float
    path: Path
    layout: Layout

    def __call__(self, module: nn.Module, output: Any) -> Any:
        drop = partial(drop_channels, p=self.p, layout=self.layout, training=module.training)
        return replace_tensor(output, self.path, drop)


def drop_channels(x: Tensor, *, p: float, layout: Layout, training: bool) -> Tensor:
    """Zero each channel of each sample with probability p, at all its positions, and scale the others by 1 / (1 − p)."""
    if layout == "b c ...":
        return torch.feature_dropout(x, p=p, train=training)
    return torch.feature_dropout(x.movedim(-1, 1), p=p, train=training).movedim(1, -1)


def dropouts(model: nn.Module) -> Iterator[tuple[nn.Module, DropoutStep]]:
    """What `add_dropout` put into a network: the modules that carry it, and the steps."""
    for module in model.modules():
        for step in steps_of(module, DropoutStep):
            yield module, step


def add_dropout(
    model: Network,
    p: float,
    at: At = "stage",
    *,
    example_input: Any = None,
    layouts: Mapping[str, Layout] | None = None,
) -> Network:
    """Put dropout into a network that has none, where `wrap` would put attention, in place, and return the same network.

        result = drifa_attn.mc_dropout(drifa_attn.add_dropout(model, 0.1), x)

    Whole channels of a sample are dropped, at all positions and class tokens. Dropping single elements has little effect:
    neighbours are correlated, and a head averages over positions. Dropout is on in training mode and in `mc_dropout`; in eval
    mode the network is as before, bit for bit. No weight and no key is added. At one site dropout comes before attention,
    whichever was put there first. Of a fused network, give it to the backbones, before `fuse` or after. A network trained
    without dropout should be fine-tuned with it before its spread is trusted.

    Args:
        model: any network, wrapped or not.
        p: the probability of a channel to be dropped, 0 < p < 1.
        at: as `plan` takes it.
        example_input: as `plan` takes it.
        layouts: as `plan` takes it.

    Raises: ValueError, TypeError: as `plan`, a rate out of its range, or a network that `add_dropout` was used on already. The
        network is then untouched.
    Source: DRIFA-Net has dropout after its blocks (Fig. 1A). Differs: there single elements are dropped.
    """
    check_network(model, "add dropout to")
    p = number("add_dropout", "a probability p", p, "in (0, 1)", lambda x: 0 < x < 1)
    if next(dropouts(model), None):
        raise ValueError(f"{type(model).__name__} has been given dropout already: drifa_attn.remove_dropout(model) first.")
    check_at(at)
    found = survey(model, example_input, prepare=detach, layouts=checked_layouts(layouts or {}))  # attention is no obstacle
    slots, _, _ = placed_at(found, at, [] if at in WAYS else matching(found.clone, at), layouts=layouts or {})
    for slot in slots:
        carry(model.get_submodule(slot.carrier), DropoutStep(float(p), slot.path, slot.layout), first=True)
    return model


def remove_dropout(model: Network) -> Network:
    """Take out of a network, in place, what `add_dropout` put in; its own dropout stays.

    Raises: ValueError: the network holds none.
    """
    check_module("remove_dropout", model)
    found = list(dropouts(model))
    if not found:
        raise ValueError(f"{type(model).__name__} holds no dropout that add_dropout put there.")
    for module, step in found:
        release(module, step)
    return model


def is_dropout(module: nn.Module) -> bool:
    """Whether a module's own mode switches dropout: it is a dropout, or it gives its rate to fused attention (timm)."""
    return isinstance(module, _DropoutNd) or hasattr(module, "attn_drop")


class DropoutMode(TorchFunctionMode):
    """Turns functional dropout on wherever it is called, also in a module that is in eval mode."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in FUNCTIONS:
            kwargs = {**kwargs, "training": True}
        elif function in BUILTINS:
            args, kwargs = args[:2], {**kwargs, "train": True}
        return function(*args, **kwargs)
