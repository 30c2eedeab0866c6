"""`plan`: what `wrap` would do to a network, without doing it."""

import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import nn

from drifa_attn.attention import ATTENTIONS, Init, Spec, cost
from drifa_attn.checks import check_init, check_mapping, check_module, count
from drifa_attn.layout import Layout, check_layout
from drifa_attn.network.blocks import blocks, convolutions
from drifa_attn.network.stages import stages
from drifa_attn.network.survey import Survey, survey

from .inject import STEPS, Refinement, Slot
from .rehearse import rehearse
from .table import plan_text

Attention = str | Callable[..., nn.Module]
At = str | Sequence[str] | Callable[[str, nn.Module], bool]
WAYS = ("stage", "block", "conv")
PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


@dataclass(frozen=True, kw_only=True)
class PlannedSite(Slot):
    """A site, and what attention adds there: its parameters, and its FLOPs for one sample (two for a multiply-add)."""

    params: int
    flops: int


@dataclass(frozen=True)
class Plan:
    """Where attention goes in a network and what it costs; `print` shows it as a table.

    Attributes:
        network: the class of the network.
        at: as given to `plan`.
        spec: the attention, by its name and options.
        sites: the places, in calling order, with the parameters and FLOPs of each.
        skipped: names that were looked at and left out, with the reason.
        notes: what else the user should know.
        params, flops: of the network itself, FLOPs for one sample.
    """

    network: str
    at: str
    spec: Spec
    sites: tuple[PlannedSite, ...]
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    params: int
    flops: int

    def __str__(self) -> str:
        return plan_text(self)


def plan(
    model: nn.Module,
    at: At = "stage",
    *,
    attention: Attention = "mfa",
    attention_options: Mapping[str, Any] | None = None,
    variant: Literal["paper"] | None = None,
    reduction: int | None = 16,
    init: Init = "identity",
    example_input: Any = None,
    layouts: Mapping[str, Layout] | None = None,
) -> Plan:
    """Say where `wrap` would put attention in a network and what it would cost; the network is not touched.

    A copy of the network runs on the meta device: it takes no memory, and no number is computed.

    Args:
        model: any network: timm's, torchvision's, your own.
        at: "stage" (the end of every stage), "block" (every residual block), "conv" (every convolution in a block that a norm
            follows), a regex for whole module names, a list of module names, or a predicate `(name, module) -> bool`.
        attention: "mfa" (the paper's), a name that `timm.layers.get_attn` knows ("se", "ese", "eca", "cbam", "gc", ...), or a
            callable (channels, **options) -> a module that maps `b c h w` to the same shape. Any of them starts where outputs
            do not change by one bit; see `attention.Foreign` for how others than "mfa" do.
        attention_options: what another attention than "mfa" takes, `{"rd_ratio": 1 / 8}`.
        variant: "paper" is the RRA form: MFA after the convolutions inside each residual block, projections left out, and
            after the block, dense, with paper init. It sets `at`, `reduction` and `init` itself.
        reduction: of "mfa". The width of attention is `max(channels // reduction, 8)`; None is the paper's full width, with
            8c² + 9c + 1 parameters per site: at every block of a ResNet-50 +630 % parameters and +404 % FLOPs.
        init: of "mfa", "identity" (outputs do not change by one bit until training moves them) or "paper". After `wrap`, and
            before training, `calibrate` fits an identity start to real features.
        example_input: a tensor, a tuple of arguments or a dict of keyword arguments; only shapes and dtypes are read. None
            tries the size the network states (`pretrained_cfg`, `img_size`), then 224.
        layouts: the layout at sites where it cannot be told, `{name: "b c ..." or "b ... c"}`.

    Returns: the `Plan`; `print` it.
    Raises: TypeError, ValueError: no network; a parallel, compiled or already wrapped one; a network that cannot be traced; an
        `at` that matches nothing; or no place that attention can refine (the message lists what was looked at).
    Differs: the paper builds its own network and has no injection.
    """
    check_backbone(model)
    check_at(at)
    given = attention, attention_options or {}
    spec = paper_spec(at, variant, reduction, init, given) if variant else checked_spec(*given, reduction, init)
    named = None if at in WAYS else matching(model, at)
    found = survey(model, example_input, layouts=checked_layouts(layouts or {}))
    chosen = named or selection(found, at, variant)
    check_selected(layouts or {}, chosen)
    sites, skipped = [], []
    for name in chosen:
        here, reasons = looked_at(found, name, is_named=isinstance(at, Sequence) and not isinstance(at, str))
        sites += here
        skipped += [(name, reason) for reason in reasons]
    if not sites:
        raise ValueError(nothing_found(found, at, skipped))
    order = {name: call.order for name, call in found.first.calls.items()}
    slots, doubled = apart(rehearse(found, sites), is_named=isinstance(at, Sequence) and not isinstance(at, str))
    return Plan(
        network=found.title,
        at='"paper"' if variant else getattr(at, "__name__", repr(at)),
        spec=spec,
        sites=tuple(priced(slot, spec) for slot in sorted(slots, key=lambda slot: order[slot.module])),
        skipped=(*skipped, *doubled),
        notes=found.notes,
        params=sum(p.numel() for p in model.parameters()),
        flops=found.first.flops // max(found.first.batch, 1),
    )


def check_network(model: Any, change: str = "wrap") -> None:
    """Raise unless `model` is a network that something can be put into; messages say what, "wrap" it."""
    check_module("drifa_attn", model)
    if isinstance(model, PARALLEL) or type(model).__name__ == "FullyShardedDataParallel":
        raise ValueError(f"drifa_attn got a {type(model).__name__}: {change} the network first, then make it parallel.")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(f"drifa_attn got a {type(model).__name__}: {change} the network first, then trace or script it.")
    for name, module in model.named_modules():
        where = f" at {name!r}" if name else ""
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise ValueError(f"drifa_attn got a compiled network{where}: {change} it first, then compile it.")
        if parts := getattr(module, "drifa_parts", None):
            raise ValueError(f"drifa_attn got a fused network{where} ({type(module).__name__}): {change} {parts}.")


def check_backbone(model: Any) -> None:
    """Raise unless `model` is a network that attention can be put into."""
    check_network(model)
    if any(isinstance(step, Refinement) for module in model.modules() for step in vars(module).get(STEPS, ())):
        raise ValueError(f"{type(model).__name__} is wrapped already: drifa_attn.unwrap(model) first.")


def check_at(at: Any) -> None:
    """Raise unless this is a way to choose modules."""
    if isinstance(at, type) or not (isinstance(at, str) or callable(at) or isinstance(at, Sequence)):
        raise TypeError(f"at expected a string, a list of module names or a predicate, got {at!r}.")


def checked_spec(attention: Attention, options: Mapping[str, Any], reduction: int | None, init: Init) -> Spec:
    """The attention that these arguments of `plan` ask for."""
    check_init("wrap", init)
    if reduction is not None:
        reduction = count("wrap", "reduction", reduction)
    if not isinstance(attention, str):
        if not callable(attention):
            raise TypeError(f"attention expected a name or a callable (channels) -> nn.Module, got {attention!r}.")
        name = getattr(attention, "__qualname__", type(attention).__qualname__)
        spec = Spec(f"{getattr(attention, '__module__', '')}:{name}", dict(options), attention)
    elif attention in ATTENTIONS:
        if options:
            raise ValueError(f"attention={attention!r} takes reduction and init, not attention_options: got {dict(options)}.")
        return Spec(attention, {"reduction": reduction, "init": init})
    else:
        spec = Spec(attention, dict(options))
    if (reduction, init) != (16, "identity"):
        raise ValueError(f"reduction and init are of attention='mfa'; {spec.name!r} takes attention_options={{...}}.")
    return spec


def paper_spec(at: At, variant: str, reduction: int | None, init: Init, given: tuple[Attention, Mapping]) -> Spec:
    """The attention of the paper's own form."""
    if variant != "paper":
        raise ValueError(f'variant expected None or "paper", got {variant!r}.')
    if (at, reduction, init, *given) != ("stage", 16, "identity", "mfa", {}):
        raise ValueError('variant="paper" sets at, attention, reduction and init itself: leave them out.')
    return Spec("mfa", {"reduction": None, "init": "paper"})


def matching(model: nn.Module, at: At) -> list[str]:
    """The names of the modules that a regex, a list of names or a predicate selects."""
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(at, str):
        return matching_pattern(model, at, names)
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
    return list(dict.fromkeys(at))


def matching_pattern(model: nn.Module, at: str, names: list[str]) -> list[str]:
    """The names that a regex matches as a whole."""
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


def near(name: str, names: list[str]) -> str:
    """Suggests similar names."""
    alike = difflib.get_close_matches(name, names, 5, 0.4) or names[:5]
    return f", for example {', '.join(alike)}" if alike else ""


def checked_layouts(layouts: Mapping[str, Layout]) -> Mapping[str, Layout]:
    """These layouts, each a known one."""
    check_mapping("wrap", "layouts", layouts, "{module name: layout}")
    for name, layout in layouts.items():
        check_layout(f"layouts[{name!r}]", layout, 0)
    return layouts


def check_selected(layouts: Mapping[str, Layout], chosen: Collection[str]) -> None:
    """Raise unless each of the layouts belongs to a module that was selected."""
    for name in layouts:
        if name not in chosen:
            raise ValueError(f"layouts names {name!r}, which at= does not select; it selects {', '.join(chosen)}.")


def selection(found: Survey, at: At, variant: str | None) -> list[str]:
    """The modules that a way to choose them means."""
    if variant:
        return list(dict.fromkeys((*convolutions(found, shortcuts=False), *blocks(found))))
    if at == "stage":
        return stages(found)
    return blocks(found) if at == "block" else convolutions(found, shortcuts=True)


def looked_at(found: Survey, name: str, *, is_named: bool) -> tuple[list[Any], list[str]]:
    """The sites of a module and the reasons against its other outputs; a name that the user wrote must have a site."""
    here = found.found.get(name)
    sites, reasons = (here.sites, here.reasons) if here else ([], ["it is not called"])
    if is_named and not sites:
        raise ValueError(f"{found.title}: no attention can go at {name!r}: {'; '.join(reasons)}.")
    return sites, reasons


def apart(slots: Sequence[Slot], *, is_named: bool) -> tuple[list[Slot], list[tuple[str, str]]]:
    """The slots with one for each tensor, and the reasons against the others; names that the user wrote must not collide."""
    taken: dict[tuple, Slot] = {}
    doubled = []
    for slot in sorted(slots, key=lambda slot: len(slot.module)):  # the outermost module keeps the tensor
        first = taken.setdefault((slot.carrier, slot.path), slot)
        if first is slot:
            continue
        if is_named:
            raise ValueError(f"at= names {first.name!r} and {slot.name!r}, which give the same tensor: name one of them.")
        doubled.append((slot.name, f"it gives the same tensor as {first.name}"))
    return list(taken.values()), doubled


def nothing_found(found: Survey, at: At, skipped: Sequence[tuple[str, str]]) -> str:
    """The message for a network where attention has no place: what was looked at, and why it was left out."""
    outline = [f"{name} ({type(module).__name__})" for name, module in found.modules.items() if name][:20]
    looked = [f"{name}: {reason}" for name, reason in skipped] or outline or ["the network has no submodules"]
    places = "\n  ".join(looked)
    return (
        f'{found.title} has no place for attention with at={at!r}. Looked at:\n  {places}\nName modules yourself, at=["..."].'
    )


def priced(slot: Slot, spec: Spec) -> PlannedSite:
    """The slot with its cost."""
    params, flops = cost(spec, slot)
    return PlannedSite(**{field.name: getattr(slot, field.name) for field in fields(slot)}, params=params, flops=flops)
