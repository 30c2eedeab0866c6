"""Signs that a network is causal: that what it gives at a position follows from the positions before it alone.

Attention pools over all positions, so behind it this holds no longer. That is worth a note; it is no error.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from drifa_attn.trees import tensors_in

from .record import Survey

COMPARING = (nn.TransformerEncoder, nn.TransformerDecoder)  # they cut triangles to compare the masks they are given with
MOST = 2**24  # entries of a mask that is looked at


def is_triangle(mask: Tensor) -> bool:
    """Whether a tensor is a causal mask `... n n`: one value on and below the diagonal, another one above it."""
    if mask.ndim < 2 or mask.shape[-1] != mask.shape[-2] or not 4 <= mask.numel() <= MOST or mask.shape[-1] < 2 or mask.is_meta:
        return False
    low, high = mask[..., -1, 0], mask[..., 0, -1]
    lower = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
    return bool((low != high).all() and torch.where(lower, mask == low[..., None, None], mask == high[..., None, None]).all())


def signs(record: Survey, buffers: Mapping[str, Tensor], example: Any) -> Iterator[str]:
    """What says that a network is causal: modules that the trace shows, or that say so, or hold a mask; a mask it is given."""
    holders = {name.rpartition(".")[0] for name, buffer in buffers.items() if is_triangle(buffer)}
    for name in record.first.calls:
        module = record.modules[name]
        shown = name in record.first.causal and not isinstance(module, COMPARING)
        if shown or name in holders or getattr(module, "is_causal", False) is True:
            yield name or record.title
    if any(is_triangle(tensor) for _, tensor in tensors_in(example)):
        yield "a mask of the example input"


def causal_notes(record: Survey, buffers: Mapping[str, Tensor], example: Any) -> tuple[str, ...]:
    """What the user should know of a causal network; () for most networks."""
    found = list(signs(record, buffers, example))
    if not found:
        return ()
    shown = ", ".join(found[:2]) + (f" and {len(found) - 2} more" if len(found) > 2 else "")
    pools = "attention pools over all positions, so later inputs will change what it gives at earlier ones"
    return (f"it looks causal ({shown}): {pools}",)
