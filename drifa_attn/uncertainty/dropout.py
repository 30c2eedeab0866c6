"""Dropout: put into a network that has none, and switched on by itself at test time.

What is put in is a forward hook, as attention is: it has no weight, and changes neither a key of the network nor its class.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from drifa_attn.layout import Layout
from drifa_attn.network.trace import meta_clone
from drifa_attn.trees import replace_tensor
from drifa_attn.wrapping.inject import Site, detach
from drifa_attn.wrapping.plan import At, check_network, plan
from drifa_attn.wrapping.wrap import Network

# Functions that drop at the rate they are called with where `training`, or `train`, says so.
FUNCTIONS: set[Callable] = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}
FUNCTIONS |= {F.multi_head_attention_forward}
BUILTINS: set[Callable] = {torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout}


class DropoutHook:
    """A forward hook that drops whole channels of one tensor of a module's output, in training and in `mc_dropout`."""

    def __init__(self, site: Site, p: float) -> None:
        self.site = site
        self.p = p
        self.handle: RemovableHandle | None = None  # unpickling it keeps torch from giving this hook's number to another

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        drop = partial(drop_channels, p=self.p, layout=self.site.layout, training=module.training)
        return replace_tensor(output, self.site.path, drop)


def drop_channels(x: Tensor, *, p: float, layout: Layout, training: bool) -> Tensor:
    """Zero each channel of each sample with probability p, at all its positions, and scale the others by 1 / (1 − p)."""
    if layout == "b c ...":
        return torch.feature_dropout(x, p=p, train=training)
    return torch.feature_dropout(x.movedim(-1, 1), p=p, train=training).movedim(1, -1)


def dropouts(model: nn.Module) -> Iterator[tuple[nn.Module, int, DropoutHook]]:
    """What `add_dropout` put into a network: the module, the hook's number there, the hook."""
    for module in model.modules():
        for key, hook in module._forward_hooks.items():
            if isinstance(hook, DropoutHook):
                yield module, key, hook


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

    Whole channels of a sample are dropped, at all positions and class tokens: single elements would say little, for their
    neighbours are alike and a head averages over positions. Dropout is on in training mode and in `mc_dropout`; in eval mode
    the network is as before, to the last bit. No weight and no key is added. Whether `wrap` came before or comes after, at one
    site dropout precedes attention. Of a fused network, give it to the backbones, before `fuse` or after. A network trained
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
    if not isinstance(p, int | float) or not 0 < p < 1:
        raise ValueError(f"add_dropout expected a probability p in (0, 1), got {p!r}.")
    if next(dropouts(model), None):
        raise ValueError(f"{type(model).__name__} has been given dropout already: drifa_attn.remove_dropout(model) first.")
    bare = meta_clone(model)
    detach(bare)  # attention is no obstacle
    for site in plan(bare, at, example_input=example_input, layouts=layouts).sites:
        hook = DropoutHook(site, float(p))
        hook.handle = model.get_submodule(site.carrier).register_forward_hook(hook, prepend=True)
    return model


def remove_dropout(model: Network) -> Network:
    """Take out of a network, in place, what `add_dropout` put in; its own dropout stays.

    Raises: ValueError: there is none.
    """
    found = list(dropouts(model))
    if not found:
        raise ValueError(f"{type(model).__name__} holds no dropout of add_dropout.")
    for module, key, _ in found:
        del module._forward_hooks[key]
    return model


@contextmanager
def evaluating(model: nn.Module, *, dropout: bool) -> Iterator[None]:
    """Within this context a network is in eval mode, but for its dropout where wanted; afterwards every mode is back.

    Flags alone are set: a network may do more in a `train` of its own than can be taken back.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = dropout and is_dropout(module)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def is_dropout(module: nn.Module) -> bool:
    """Whether a module's own mode decides on dropout: it is one, or it hands the rate of one to fused attention (timm)."""
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
