"""Operations by which a position reads the positions before it alone."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PADDED, WIDE, BACK = "padded at its start", "longer than its input", "reads the past"
TRIANGLES = {torch.tril, torch.triu, Tensor.tril, Tensor.triu, Tensor.tril_, Tensor.triu_}
ATTENTIONS = {F.scaled_dot_product_attention, F.multi_head_attention_forward}


def direction(function: Any, args: tuple, kwargs: Mapping[str, Any], before: str) -> str:
    """BACK for an operation by which a position reads those before it alone; else what its result is, or "".

    `before` is what this gave for the operation that made the first argument. Such operations are attention with `is_causal`,
    the cut of a triangle, a convolution of what is padded at its start, and the cut of the end that padding added.
    """
    if function in TRIANGLES or (function in ATTENTIONS and is_causal(function, args, kwargs)):
        return BACK
    if function is F.pad:
        pad = kwargs.get("pad", args[1] if len(args) > 1 else ())
        return PADDED if len(pad) >= 2 and pad[0] > 0 and not any(pad[1:]) else ""
    if function is F.conv1d:
        return BACK if before == PADDED else WIDE
    return BACK if function is Tensor.__getitem__ and before == WIDE and cuts_end(args[1]) else ""


def is_causal(function: Any, args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether attention is told to be causal."""
    return bool(kwargs.get("is_causal") or (function is F.scaled_dot_product_attention and args[5:6] == (True,)))


def cuts_end(index: Any) -> bool:
    """Whether an index is `[..., :-n]`."""
    last = index[-1] if isinstance(index, tuple) and index else None
    return isinstance(last, slice) and last.start is None and isinstance(last.stop, int) and last.stop < 0
