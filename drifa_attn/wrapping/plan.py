"""`plan`: what `wrap` would do to a network, without doing it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import nn

from drifa_attn.attention import ATTENTIONS, Init, Spec, cost
from drifa_attn.checks import check_init, check_module, count
from drifa_attn.layout import Layout
from drifa_attn.network.survey import survey

from .inject import STEPS, Refinement, Slot
from .masking import MaskFrom, fitting
from .selection import WAYS, At, check_at, checked_layouts, matching, placed_at
from .table import plan_html, plan_text

Attention = str | Callable[..., nn.Module]
PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


@dataclass(frozen=True, kw_only=True)
class PlannedSite(Slot):
    """A site, and what attention adds there: its parameters, and its FLOPs for one sample (two for a multiply-add)."""

    params: int
    flops: int


@dataclass(frozen=True)
class Plan:
    """Where attention goes in a network and what it costs; `print` and notebooks show it as a table.

    Attributes:
        network: the class of the network.
        at: as given to `plan`.
        spec: the attention, by its name and options.
        sites: the places, in calling order, with the parameters and FLOPs of each.
        skipped: names that were looked at and left out, with the reason.
        notes: what else the user should know.
        params: of the network itself.
        flops: of the network itself, for one sample.
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

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return plan_html(self)


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
    mask_from: MaskFrom | None = None,
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
        mask_from: of "mfa", for networks that know which positions are real, such as those of padded sentences: a callable
            (args, kwargs) of the network's forward -> a boolean mask `b n`, True where a position is real, or None. It is
            called once per forward. A site that has the mask's positions, without its prefix tokens, uses it; a note names the
            others. It holds while the forward of the whole network runs, not where gradient checkpointing computes parts again.

    Returns: the `Plan`; `print` it.
    Raises: TypeError, ValueError: no network; a parallel, compiled or already wrapped one; a network that cannot be traced; an
        `at` that matches nothing; or no place that attention can refine (the message lists what was looked at).
    Differs: the paper builds its own network and has no injection.
    """
    check_backbone(model)
    check_at(at)
    given = attention, attention_options or {}
    spec = paper_spec(at, variant, reduction, init, given) if variant else checked_spec(*given, reduction, init)
    named = [] if at in WAYS else matching(model, at)
    found = survey(model, example_input, layouts=checked_layouts(layouts or {}))
    slots, skipped, notes = placed_at(found, at, named, variant=variant, layouts=layouts or {})
    if mask_from is not None:
        masked, unused = fitting(found, slots, spec, mask_from, example_input)
        slots, notes = [replace(slot, is_masked=slot.name in masked) for slot in slots], [*notes, *unused]
    return Plan(
        network=found.title,
        at='"paper"' if variant else getattr(at, "__name__", repr(at)),
        spec=spec,
        sites=tuple(priced(slot, spec) for slot in slots),
        skipped=tuple(skipped),
        notes=(*found.notes, *notes),
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
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise ValueError(
            f"drifa_attn got a {type(model).__name__} with sharded weights: {change} the network first, then shard."
        )
    for name, module in model.named_modules():
        where = f" at {name!r}" if name else ""
        if "quantized" in type(module).__module__:
            raise ValueError(f"drifa_attn got a quantised {type(module).__name__}{where}: {change} the network, then quantise.")
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise ValueError(f"drifa_attn got a compiled network{where}: {change} it first, then compile it.")
        if parts := getattr(module, "drifa_parts", None):
            raise ValueError(f"drifa_attn got a fused network{where} ({type(module).__name__}): {change} {parts}.")


def check_backbone(model: Any) -> None:
    """Raise unless `model` is a network that attention can be put into."""
    check_network(model)
    if any(isinstance(step, Refinement) for module in model.modules() for step in vars(module).get(STEPS, ())):
        raise ValueError(f"{type(model).__name__} is wrapped already: drifa_attn.unwrap(model) first.")


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


def priced(slot: Slot, spec: Spec) -> PlannedSite:
    """The slot with its cost."""
    params, flops = cost(spec, slot)
    kept = {field.name: getattr(slot, field.name) for field in fields(slot)}
    return PlannedSite(**kept, params=params, flops=flops * slot.folded)
