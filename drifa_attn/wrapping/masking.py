"""The mask that a network knows, handed to the attention within it: found once per forward, for each thread apart.

While the network runs, `Masking` holds the mask of this call. The attention at the sites that it fits asks for it.
"""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from drifa_attn.attention import ATTENTIONS, Spec
from drifa_attn.layout import Layout
from drifa_attn.network.inputs import as_call, batch_of
from drifa_attn.network.record import Survey
from drifa_attn.network.site import Site

MaskFrom = Callable[[tuple, dict[str, Any]], Tensor | None]
NONE_RUNS = object()  # stands for the mask where no forward of the network runs in this thread


class Masking:
    """What finds the mask of a network's call, and the mask of the call that runs now.

    Attributes:
        mask_from: (args, kwargs) of the network's forward -> a boolean mask, True where a position is real, or None.
    """

    def __init__(self, mask_from: MaskFrom) -> None:
        self.mask_from = mask_from
        self.running = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {"mask_from": self.mask_from}  # a copy runs on its own

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def enter(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Hold the mask of a call that starts; the result is for `leave`."""
        mask = checked(self.mask_from(args, kwargs))
        before = getattr(self.running, "mask", NONE_RUNS)
        self.running.mask = mask
        return before

    def leave(self, before: Any) -> None:
        """Hold again what was held before a call."""
        self.running.mask = before

    def mask_of(self, label: str, x: Tensor, layout: Layout, num_prefix_tokens: int) -> Tensor | None:
        """The mask of the call that runs, for features x at a site; an error unless it fits them."""
        mask: Any = getattr(self.running, "mask", NONE_RUNS)
        if mask is NONE_RUNS:
            raise ValueError(
                f"the attention at {label!r} expected the mask of mask_from=, which is known only while the forward of the "
                "whole network runs: call the network itself, not a part of it, and switch gradient checkpointing off."
            )
        if mask is not None and not torch.jit.is_tracing() and not fits(mask, x.shape, layout, num_prefix_tokens):
            behind = f" behind {num_prefix_tokens} prefix tokens" if num_prefix_tokens else ""
            raise ValueError(
                f"the attention at {label!r} expected a mask for features {tuple(x.shape)}{behind}, mask_from gave "
                f"{tuple(mask.shape)}: it fitted this site when the network was wrapped."
            )
        return mask


def checked(mask: Any) -> Tensor | None:
    """What `mask_from` gave, if it is a mask."""
    if mask is None or (isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.ndim > 1):
        return mask
    got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
    raise TypeError(f"mask_from expected to give a boolean tensor (b n), True at real positions, or None; it gave {got}.")


def fits(mask: Tensor, shape: Sequence[int], layout: Layout, num_prefix_tokens: int) -> bool:
    """Whether a mask is one of the positions of features of this shape: `b n`, or `b` and their sizes."""
    axes = tuple(shape[2:] if layout == "b c ..." else shape[1:-1])
    flat = math.prod(axes) - num_prefix_tokens
    return mask.shape[0] == shape[0] and mask.shape[1:] in ((flat,), axes if not num_prefix_tokens else (flat,))


def fitting(
    found: Survey, sites: Sequence[Site], spec: Spec, mask_from: MaskFrom, example_input: Any
) -> tuple[set[str], list[str]]:
    """The names of the sites that the mask fits, and what the user should know of the others.

    The mask is that of the example input.

    Raises: ValueError, TypeError: an attention that takes no mask, no mask for the example, or one that fits no site.
    """
    if not callable(mask_from):
        raise TypeError(f"mask_from expected a callable (args, kwargs) -> boolean tensor (b n) or None, got {mask_from!r}.")
    if spec.name not in ATTENTIONS:
        raise ValueError(f"mask_from is of attention='mfa': the attention {spec.name!r} takes no mask. Leave mask_from out.")
    args, kwargs = found.inputs if example_input is None else as_call(example_input)
    try:
        mask = mask_from(args, kwargs)
    except Exception as error:
        raise ValueError(
            f"mask_from failed on the example input ({type(error).__name__}: {error}): pass an example_input= that it can read."
        ) from error
    if checked(mask) is None or mask is None:
        raise ValueError("mask_from gave None for the example input: pass an example_input= that has a mask.")
    batch = batch_of((args, kwargs))
    named = {site.name for site in sites if fits(mask, (batch, *site.shape), site.layout, site.num_prefix_tokens)}
    others = ", ".join(f"{site.name} ({described(site)})" for site in sites if site.name not in named)
    if not named:
        raise ValueError(f"mask_from gave a mask {tuple(mask.shape)} for the example input, which fits no site: {others}.")
    return named, [f"the mask {tuple(mask.shape)} of mask_from does not fit, and is not used, at {others}"] if others else []


def described(site: Site) -> str:
    """The positions of a site in words."""
    behind = f" behind {site.num_prefix_tokens} prefix tokens" if site.num_prefix_tokens else ""
    return f"{site.positions} positions{behind}"
