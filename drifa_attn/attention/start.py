"""How the layers of this room start: the width that attention works at, and the first weights."""

from torch import nn

from drifa_attn.checks import check_count

SMALLEST_WIDTH = 8


def reduced_width(owner: str, channels: int, reduction: int | None) -> int:
    """The width that attention works at: `channels` without a reduction, `max(channels // reduction, 8)` with one."""
    if reduction is None:
        return channels
    check_count(owner, "reduction", reduction)
    return max(channels // reduction, SMALLEST_WIDTH)


def glorot_(module: nn.Module) -> None:
    """The paper's initialisation of one linear map or convolution: Glorot-uniform weight, zero bias."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
