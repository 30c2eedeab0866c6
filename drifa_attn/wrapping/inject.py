"""How attention gets into a network that does not know of it: a forward hook on the site, a child module for the weights.

A hook changes neither the class of a module nor the name of any of its weights, as a wrapper module would; it is an object of
a module-level class, so networks that carry it copy, pickle, compile and export. The weights live in a child, so that
`state_dict`, `to`, `parameters` and DDP see them: of the site itself, unless it is a container, whose own forward would run
the child as one of its steps; then of the nearest module around it that is none, or else within it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from drifa_attn.attention.mfa import MFA
from drifa_attn.attention.mifa import MIFA
from drifa_attn.checks import Init
from drifa_attn.layout import Layout
from drifa_attn.trees import Path, replace_tensor

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
CHILD = "drifa_attn"


@dataclass(frozen=True)
class Site:
    """One feature that attention refines: a tensor in the output of a module, and how to read it.

    Attributes:
        module: the module's name in the network.
        carrier: the module that carries the hook: of a plain `nn.Sequential` its last step, for timm's gradient checkpointing
            runs the steps without the `Sequential`.
        path: where in its output the tensor is; empty when the output is the tensor.
        channels, layout, num_prefix_tokens: as `MFA` takes them.
        shape: of the tensor for one sample, the batch axis left out.
        params, flops: what attention adds here, FLOPs for one sample.
    """

    module: str
    carrier: str
    path: Path
    channels: int
    layout: Layout
    num_prefix_tokens: int
    shape: tuple[int, ...]
    params: int = 0
    flops: int = 0

    @property
    def name(self) -> str:
        """The module's name, with the tensor's place in its output where that is not the whole."""
        return self.module + "".join(f"[{key}]" for key in self.path)

    @property
    def positions(self) -> int:
        """How many positions it has, prefix tokens left out."""
        spatial = self.shape[1:] if self.layout == "b c ..." else self.shape[:-1]
        return math.prod(spatial) - self.num_prefix_tokens


class AttentionHook:
    """A forward hook that passes one tensor of a module's output through its attention."""

    def __init__(self, site: Site, attention: MFA) -> None:
        self.site = site
        self.attention = attention
        self.enabled = True
        self.handle: RemovableHandle | None = None  # unpickling it keeps torch from giving this hook's number to another

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.enabled:
            return output
        return replace_tensor(output, self.site.path, self.attention)


class Fusion(MIFA):
    """The MIFA of one stage of a fused network, with the names of the modalities that meet there, and a switch.

    Differs: none from `MIFA` while it is enabled; otherwise every feature passes unchanged.
    """

    def __init__(self, modalities: Sequence[str], channels: Sequence[int], **options: Any) -> None:
        super().__init__(channels, len(modalities), **options)
        self.names = list(modalities)
        self.enabled = True

    def forward(self, xs: Sequence[Tensor], present: Tensor | None = None) -> list[Tensor]:
        """The features xs, gated if this is enabled."""
        return super().forward(xs, present) if self.enabled else list(xs)


def fusions(model: nn.Module) -> Iterator[tuple[str, Fusion]]:
    """Every fusion of a network with its name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Fusion))


def hooks(model: nn.Module) -> Iterator[AttentionHook]:
    """Every attention hook of a network, or of a DDP or compiled wrapper around it, in the order of its modules."""
    return (hook for _, hook in placed(model))


def placed(model: nn.Module) -> Iterator[tuple[Site, AttentionHook]]:
    """Every attention hook with its site under the names of this network, which may hold the wrapped one as a part."""
    for name, module in model.named_modules():
        for hook in module._forward_hooks.values():
            if isinstance(hook, AttentionHook):
                around = name.removesuffix(hook.site.carrier)
                yield replace(hook.site, module=around + hook.site.module, carrier=name), hook


def carrier_of(model: nn.Module, name: str) -> str:
    """The module whose output is this module's output in any case: the last step of plain `Sequential`s, unless shared."""
    module = model.get_submodule(name)
    while isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and len(module):
        step, last = list(module._modules)[-1], module[-1]
        if sum(other is last for _, other in model.named_modules(remove_duplicate=False)) != 1:
            break
        name, module = f"{name}.{step}" if name else step, last
    return name


def owner_of(model: nn.Module, name: str, avoid: set[str]) -> str:
    """The module whose child the weights of this site become."""
    parts = name.split(".") if name else []
    around = [".".join(parts[:i]) for i in range(len(parts), -1, -1)]
    prefix = f"{name}." if name else ""
    within = [prefix + inner for inner, _ in model.get_submodule(name).named_modules() if inner]
    for candidate in (*around, *within):
        if candidate not in avoid and not isinstance(model.get_submodule(candidate), CONTAINERS):
            return candidate
    raise ValueError(f"no module at, around or within {name!r} can hold the attention's weights: all are containers.")


def kind_of(model: nn.Module, name: str) -> dict[str, Any]:
    """Device and dtype of the weights at, or else nearest around, a module."""
    parts = name.split(".") if name else []
    for i in range(len(parts), -1, -1):
        for parameter in model.get_submodule(".".join(parts[:i])).parameters():
            if parameter.is_floating_point():
                return {"device": parameter.device, "dtype": parameter.dtype}
    return {"device": None, "dtype": None}


def build(site: Site, *, reduction: int | None, init: Init, **kind: Any) -> MFA:
    """The attention of a site."""
    return MFA(
        site.channels, reduction=reduction, init=init, layout=site.layout, num_prefix_tokens=site.num_prefix_tokens, **kind
    )


def attach(
    model: nn.Module, sites: Sequence[Site], *, reduction: int | None, init: Init, avoid: set[str] | None = None
) -> list[AttentionHook]:
    """Put attention at every site of a network; build all of it before changing anything."""
    built = []
    for site in sites:
        owner = owner_of(model, site.carrier, avoid or set())
        attention = build(site, reduction=reduction, init=init, **kind_of(model, site.carrier))
        built.append((owner, attention.train(model.get_submodule(site.carrier).training), site))
    attached = []
    for owner, attention, site in built:
        module = model.get_submodule(owner)
        words = [CHILD, *(str(key) for key in site.path)]
        if owner != site.carrier:  # it is around or within it
            words.insert(1, site.carrier.removeprefix(f"{owner}.").replace(".", "_"))
        child = "_".join(words)
        while hasattr(module, child):
            child += "_"
        module.add_module(child, attention)
        hook = AttentionHook(site, attention)
        hook.handle = model.get_submodule(site.carrier).register_forward_hook(hook)
        attached.append(hook)
    return attached


def detach(model: nn.Module) -> None:
    """Take every attention hook and its weights out of a network."""
    attentions = {id(hook.attention) for hook in hooks(model)}
    for module in list(model.modules()):
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, AttentionHook):
                del module._forward_hooks[key]
        for name, child in list(module.named_children()):
            if id(child) in attentions:
                delattr(module, name)
