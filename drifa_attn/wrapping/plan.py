"""`plan`: what `wrap` would do to a network, without doing it."""

import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from drifa_attn.attention.mfa import MFA
from drifa_attn.checks import Init, check_count, check_init
from drifa_attn.layout import Layout, check_layout
from drifa_attn.network.survey import Survey
from drifa_attn.network.trace import FlopCount

from .inject import Site, attach, build, detach, fusions, hooks

At = str | Sequence[str] | Callable[[str, nn.Module], bool]
WAYS = ("stage", "block", "conv")
PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


@dataclass(frozen=True)
class Plan:
    """Where attention goes in a network and what it costs; `print` shows it as a table.

    Attributes:
        network: the class of the network.
        at, reduction, init: as given to `plan`; the paper's variant states its own.
        sites: the places, in calling order, with the parameters and FLOPs (two a multiply-add, one sample) of each.
        skipped: names that were looked at and left out, with the reason.
        params, flops: of the network itself.
        avoid: modules that run their children themselves and therefore hold no attention's weights.
    """

    network: str
    at: str
    reduction: int | None
    init: Init
    sites: tuple[Site, ...]
    skipped: tuple[tuple[str, str], ...]
    params: int
    flops: int
    avoid: frozenset[str] = frozenset()

    def __str__(self) -> str:
        header = ("site", "features", "layout", "channels", "params", "FLOPs")
        rows = [
            (s.name, "×".join(map(str, s.shape)), tidy(s), str(s.channels), count(s.params), count(s.flops)) for s in self.sites
        ]
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        lines = [f'{self.network}, at={self.at}, reduction={self.reduction}, init="{self.init}"']
        for row in [header, *rows]:
            cells = [cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
            lines.append("  " + "  ".join(cells).rstrip())
        params, flops = sum(s.params for s in self.sites), sum(s.flops for s in self.sites)
        lines.append(
            f"{len(self.sites)} sites add {count(params)} parameters ({share(params, self.params)} of {count(self.params)}) "
            f"and {count(flops)} FLOPs a sample ({share(flops, self.flops)} of {count(self.flops)})"
        )
        lines += [f"skipped {name}: {reason}" for name, reason in self.skipped]
        return "\n".join(lines)


def tidy(site: Site) -> str:
    """The layout of a site as the table shows it."""
    return f"{site.layout}, prefix {site.num_prefix_tokens}" if site.num_prefix_tokens else site.layout


def count(number: float) -> str:
    """A number with a unit: 25.56 M."""
    for unit in ("", " k", " M", " G"):
        if abs(number) < 1000:
            return f"{number:.0f}" if not unit else f"{number:.2f}{unit}"
        number /= 1000
    return f"{number:.2f} T"


def share(part: float, whole: float) -> str:
    """A part in per cent of the whole."""
    return f"+{100 * part / whole:.1f} %" if whole else "all"


def check_network(model: Any, change: str = "wrap") -> None:
    """Raise unless `model` is a network that something can be put into; messages say what, "wrap" it."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"drifa_attn expected an nn.Module, got {type(model).__name__}.")
    if isinstance(model, PARALLEL) or type(model).__name__ == "FullyShardedDataParallel":
        raise ValueError(f"drifa_attn got a {type(model).__name__}: {change} the network first, then make it parallel.")
    compiled = (name for name, m in model.named_modules() if hasattr(m, "_orig_mod") or m._compiled_call_impl is not None)
    if (name := next(compiled, None)) is not None:
        where = f" at {name!r}" if name else ""
        raise ValueError(f"drifa_attn got a compiled network{where}: {change} it first, then compile it.")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(f"drifa_attn got a {type(model).__name__}: {change} the network first, then trace or script it.")
    if next(fusions(model), None) is not None:
        raise ValueError(f"drifa_attn got a fused network ({type(model).__name__}): {change} its branches, net.branches[name].")


def check_backbone(model: Any) -> None:
    """Raise unless `model` is a network that attention can be put into."""
    check_network(model)
    if next(hooks(model), None) is not None:
        raise ValueError(f"{type(model).__name__} is wrapped already: drifa_attn.unwrap(model) first.")


def matching(model: nn.Module, at: At) -> list[str]:
    """The names of the modules that a regex, a list of names or a predicate selects."""
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(at, str):
        try:
            pattern = re.compile(at)
        except re.error as error:
            raise ValueError(f"at={at!r} is no regex ({error}).") from error
        found = [name for name in names if pattern.fullmatch(name)]
        if not found:
            raise ValueError(
                f"at={at!r} matched 0 of {len(names)} modules of {type(model).__name__}: "
                f'use "stage", "block", "conv" or a regex for whole names{near(at, names)}.'
            )
        return found
    if callable(at):
        found = [name for name, module in model.named_modules() if name and at(name, module)]
        if not found:
            raise ValueError(f"the predicate at= selected 0 of {len(names)} modules of {type(model).__name__}.")
        return found
    unknown = [name for name in at if name not in names]
    if unknown or not at:
        raise ValueError(
            f"at= names no module of {type(model).__name__}: {unknown}{near(str(unknown[0]) if unknown else '', names)}."
        )
    return list(at)


def near(name: str, names: list[str]) -> str:
    """A hint at names that are spelled alike."""
    alike = difflib.get_close_matches(name, names, 5, 0.4) or names[:5]
    return f", for example {', '.join(alike)}" if alike else ""


@cache
def cost(channels: int, layout: Layout, prefix: int, shape: tuple[int, ...], reduction: int | None) -> tuple[int, int]:
    """Parameters and FLOPs for one sample of the attention at a feature, counted on the meta device."""
    site = Site("", "", (), channels, layout, prefix, shape)
    attention = build(site, reduction=reduction, init="identity", device="meta")
    with torch.no_grad(), FlopCount() as counter:
        attention(torch.empty(1, *shape, device="meta"))
    return sum(p.numel() for p in attention.parameters()), counter.total


class RunByOwnerError(Exception):
    """Raised in a rehearsal when a module runs an attention that is its child by itself, as containers do."""


def refuse(owner: str, *_: Any) -> None:
    """A pre-hook of an attention: only its own hook may run it, and that calls `forward` directly."""
    raise RunByOwnerError(owner)


def fire(fired: list[str], name: str, attention: MFA, x: Tensor) -> Tensor:
    """Stands in for an attention in a rehearsal and notes that its hook ran."""
    fired.append(name)
    return attention.forward(x)


def rehearse(survey: Survey, sites: Sequence[Site]) -> frozenset[str]:
    """Wrap and run the copy: every site must fire once. Returns the modules that may hold no attention's weights."""
    avoid: set[str] = set()
    args, kwargs = survey.inputs
    while True:
        with torch.device("meta"):  # for networks without weights, whose device nothing else tells
            attached = attach(survey.clone, sites, reduction=16, init="identity", avoid=avoid)
        names = {id(module): name for name, module in survey.clone.named_modules()}
        attentions = [hook.attention for hook in attached]
        fired: list[str] = []
        for hook, attention in zip(attached, attentions, strict=True):
            attention.register_forward_pre_hook(partial(refuse, names[id(attention)].rpartition(".")[0]))
            hook.attention = partial(fire, fired, hook.site.name, attention)  # type: ignore[assignment]
        try:
            with torch.no_grad():
                survey.clone(*args, **kwargs)
        except RunByOwnerError as error:
            avoid.add(str(error))
            continue
        finally:
            for hook, attention in zip(attached, attentions, strict=True):
                hook.attention = attention
            detach(survey.clone)
        if sorted(fired) != sorted(site.name for site in sites):
            raise ValueError(f"{survey.title}: attention would fire at {sorted(fired)}, not once at {[s.name for s in sites]}.")
        return frozenset(avoid)


def plan(
    model: nn.Module,
    at: At = "stage",
    *,
    variant: Literal["paper"] | None = None,
    reduction: int | None = 16,
    init: Init = "identity",
    example_input: Any = None,
    layouts: Mapping[str, Layout] | None = None,
) -> Plan:
    """Say where `wrap` would put attention in a network and what it would cost; the network is not touched.

    The network's copy runs on the meta device: no memory, no number computed.

    Args:
        model: any network: timm's, torchvision's, your own.
        at: "stage" (the end of every stage), "block" (every residual block), "conv" (every normed convolution in a block), a
            regex for whole module names, a list of module names, or a predicate `(name, module) -> bool`.
        variant: "paper" is the RRA form, MFA after the convolutions inside each residual block (projections left out) and
            after the block, dense, paper init; it sets `at`, `reduction` and `init` itself.
        reduction: the width of attention is `max(channels // reduction, 8)`; None is the paper's full width, 8c² + 9c + 1
            parameters a site: at every block of a ResNet-50 that is +630 % parameters and +404 % FLOPs.
        init: "identity" (outputs unchanged to the last bit until trained) or "paper".
        example_input: a tensor, a tuple of arguments or a dict of keyword arguments; only shapes and dtypes are read. None
            tries the size the network states (`pretrained_cfg`, `img_size`), then 224.
        layouts: the layout at sites where it cannot be told, `{name: "b c ..." or "b ... c"}`.

    Returns: the `Plan`; `print` it.
    Raises: TypeError, ValueError: no network, a parallel, compiled or already wrapped one, a network that cannot be traced,
        an `at` that matches nothing, or nothing found that attention can refine (the message lists what was looked at).
    Differs: the paper builds its own network and has no injection.
    """
    check_backbone(model)
    check_arguments(at, variant, reduction, init)
    if variant:
        reduction, init = None, "paper"
    by_name = None if at in WAYS else matching(model, at)
    survey = Survey(model, example_input)
    named = selection(survey, at, variant) if by_name is None else dict.fromkeys(by_name, ())
    layouts = checked_layouts(layouts or {}, named)
    sites: list[Site] = []
    skipped: list[tuple[str, str]] = []
    for name, channels in named.items():
        found, reasons = survey.sites(name, channels, layouts.get(name))
        if not found and by_name is not None and not isinstance(at, str) and not callable(at):
            raise ValueError(f"{survey.title}: no attention can go at {name!r}: {'; '.join(reasons)}.")
        sites += [priced(site, reduction, init) for site in found]
        skipped += [(name, reason) for reason in reasons]
    if not sites:
        looked = [f"{name}: {reason}" for name, reason in skipped] or survey.outline() or ["no module: the network has none"]
        raise ValueError(
            f"{survey.title} has nothing that attention can go into with at={at!r}. Looked at:\n  "
            + "\n  ".join(looked)
            + '\nName modules yourself, at=["..."]; networks without convolutions or residual blocks have no such sites.'
        )
    return Plan(
        network=survey.title,
        at='"paper"' if variant else getattr(at, "__name__", repr(at)),
        reduction=reduction,
        init=init,
        sites=tuple(sorted(sites, key=lambda site: survey.first.calls[site.module].order)),
        skipped=tuple(skipped),
        params=sum(p.numel() for p in model.parameters()),
        flops=survey.first.flops // max(survey.first.batch, 1),
        avoid=rehearse(survey, sites),
    )


def check_arguments(at: At, variant: str | None, reduction: int | None, init: str) -> None:
    """Raise unless these are arguments of `plan`."""
    check_init("wrap", init)
    if reduction is not None:
        check_count("wrap", "reduction", reduction)
    if variant not in (None, "paper"):
        raise ValueError(f'variant expected None or "paper", got {variant!r}.')
    if variant and (at, reduction, init) != ("stage", 16, "identity"):
        raise ValueError('variant="paper" sets at, reduction and init itself: leave them out.')
    if not (isinstance(at, str) or callable(at) or isinstance(at, Sequence)):
        raise TypeError(f"at expected a string, a list of module names or a predicate, got {at!r}.")


def checked_layouts(layouts: Mapping[str, Layout], named: Mapping[str, Any]) -> Mapping[str, Layout]:
    """These layouts, each known and of a module that was selected."""
    for name, layout in layouts.items():
        check_layout(f"layouts[{name!r}]", layout, 0)
        if name not in named:
            raise ValueError(f"layouts names {name!r}, which at= does not select; it selects {', '.join(named)}.")
    return layouts


def selection(survey: Survey, at: At, variant: str | None) -> Mapping[str, Collection[int]]:
    """The modules that a way to choose them means, with their channels where the network states them."""
    if variant:
        return dict.fromkeys((*survey.convolutions(shortcuts=False), *survey.blocks()), ())
    if at == "stage":
        return survey.stages()
    return dict.fromkeys(survey.blocks() if at == "block" else survey.convolutions(shortcuts=True), ())


def priced(site: Site, reduction: int | None, init: Init) -> Site:
    """The site with its cost."""
    params, flops = cost(site.channels, site.layout, site.num_prefix_tokens, site.shape, reduction)
    return replace(site, params=params - (site.channels if init == "paper" else 0), flops=flops)  # the paper has no strength
