"""`wrap` puts attention, DRIFA's or any other, into any network in one line; `unwrap` takes it out."""

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from drifa_attn.attention import Init
from drifa_attn.checks import check_module
from drifa_attn.layout import Layout
from drifa_attn.randomness import seed_from

from .inject import attach, detach, placed
from .masking import MaskFrom
from .plan import At, Attention, plan

Network = TypeVar("Network", bound=nn.Module)


def wrap(
    model: Network,
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
    generator: torch.Generator | None = None,
) -> Network:
    """Put attention into a network, in place, and return the same network.

        model = drifa_attn.wrap(timm.create_model("resnet50", pretrained=True))
        drifa_attn.calibrate(model, images)     # recommended before training

    With `init="identity"` its outputs do not change by one bit until training moves them. Its class, the names of its weights,
    its methods and its mode stay; the attention follows its device and dtype. `plan` says first what `wrap` would do.

    The weights of the attention are random, and drawing them moves no global random state, of the CPU or of a device: a wrapped
    and an unwrapped run see the same shuffles.

    Args: in full at `plan`; in short:
        model: any network: timm's, torchvision's, your own.
        at: "stage", "block", "conv", a regex for whole module names, a list of names, or a predicate `(name, module) -> bool`.
        attention: "mfa", a name of timm ("se", "eca", "cbam", ...), or a callable (channels, **options) -> module.
        attention_options: what another attention than "mfa" takes.
        variant: "paper" puts MFA where the paper's block, RRA, has it; it sets `at`, `reduction` and `init` itself.
        reduction: of "mfa": it works at the width `max(channels // reduction, 8)`; None is the paper's full width.
        init: of "mfa": "identity", which changes no bit until training, or "paper".
        example_input: a tensor, a tuple of arguments or a dict of keyword arguments; None tries its own size, then 224.
        layouts: {module name: "b c ..." or "b ... c"} where the layout cannot be told.
        mask_from: of "mfa": (args, kwargs) of the network's forward -> a mask `b n`, True where a position is real, or None.
        generator: what the weights follow. None: the global random state as it is, which `torch.manual_seed` sets, and the
            network's own weights with it, so that two networks start with two attentions. Copies of one network that are
            wrapped in one state start alike: as members of an ensemble they want a generator.

    Raises: as `plan`. When it raises, the network is untouched.
    Differs: the paper builds its own network; `variant="paper"` gives its block, RRA, inside this one.
    """
    chosen = plan(
        model,
        at,
        attention=attention,
        attention_options=attention_options,
        variant=variant,
        reduction=reduction,
        init=init,
        example_input=example_input,
        layouts=layouts,
        mask_from=mask_from,
    )
    attach(model, chosen.sites, chosen.spec, mask_from, seed=seed_from("wrap", generator))
    return model


def unwrap(model: Network) -> Network:
    """Take what `wrap` put into a network out of it, in place: it is the original again, key set and all.

    Attention that is part of a network's own code, and the fusion of a fused network, stay: `disabled` switches them off.

    Raises: ValueError: `wrap` put nothing into this network.
    """
    check_module("unwrap", model)
    if next(placed(model), None) is None:
        raise ValueError(
            f"{type(model).__name__} holds no attention that wrap put there: drifa_attn.wrap(model) first, or "
            "drifa_attn.disabled(model) to switch off attention that is part of its own code."
        )
    detach(model)
    return model
