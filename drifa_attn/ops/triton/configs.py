"""The launch configurations of the Triton kernels, as tables, and the functions that look them up.

The configurations were chosen from what the compiler makes of them (`make kernels` prints registers, spills and shared memory
for each), not from timings: at 9.0 no forward launch spills or uses a stack, and at 8.0 four of 173 do, of 16 bytes a thread at
most. Rows are found by kernel, bytes of an operand and compute capability.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from drifa_attn.ops.choose import WIDEST_EXACT, capability, interpreting

WIDEST_CHAIN = 128  # wider, the weights of one chain do not fit beside its maps


class Chain(NamedTuple):
    """A kernel that computes all layers of a tile: `positions` per tile, `tiles` per program."""

    positions: int
    tiles: int
    warps: int
    depth: int = 32  # input channels of the squeeze product at a time
    stages: int = 2


class Product(NamedTuple):
    """A kernel that is one matrix product: tiles of `rows` channels by `positions`, `depth` channels at a time."""

    rows: int
    depth: int
    warps: int
    stages: int


def power_of_two(size: int, least: int = 16) -> int:
    """The smallest power of two that is at least `size` and at least `least`."""
    return max(least, 1 << (size - 1).bit_length())


# (padded width, bytes of an operand) -> configuration, from capability 9.0 and from 8.0 on.
CHAIN = {
    90: {
        (16, 2): Chain(128, 4, 4),
        (32, 2): Chain(128, 4, 4),
        (64, 2): Chain(64, 4, 4, 16),
        (128, 2): Chain(64, 2, 8),
        (16, 4): Chain(64, 4, 4),
        (32, 4): Chain(64, 4, 4),
        (64, 4): Chain(32, 4, 4),
        (128, 4): Chain(32, 2, 8),
    },
    80: {
        (16, 2): Chain(128, 4, 4),
        (32, 2): Chain(64, 2, 4),
        (64, 2): Chain(32, 2, 4),
        (128, 2): Chain(32, 1, 8),
        (16, 4): Chain(64, 4, 4),
        (32, 4): Chain(32, 4, 4),
        (64, 4): Chain(32, 1, 8),
        (128, 4): Chain(16, 1, 8),
    },
}
# Padded width -> configuration, for gradients that are multiplied in 2 bytes. In 4 bytes, and at width 64 on 8.0, spills are
# heavy. At 64 on 9.0 some remain (a stack of about 250 bytes), at 32 few (40): half the tile leaves few, but reads all weights
# twice as often.
CHAIN_BACK = {
    90: {16: Chain(64, 1, 4), 32: Chain(64, 1, 8), 64: Chain(32, 1, 4)},
    80: {16: Chain(64, 1, 4), 32: Chain(64, 1, 8)},
}
PROGRAMS = 264  # of the backward pass of the chain: two per multiprocessor of an H100; one number, so that sums never differ
SPLITS = 64  # of a batch at most, in the gradient of a squeeze
# bytes of an operand -> configuration
PRODUCT = {
    90: {2: Product(128, 64, 8, 3), 4: Product(128, 32, 8, 3)},
    80: {2: Product(128, 32, 8, 3), 4: Product(128, 32, 8, 3)},
}
POSITIONS = 128  # of a tile of a product, for all operands, so that all products of a pass cut a sample in the same way


def row(table: dict, x: Tensor) -> dict:
    """The rows of `table` for the device of `x`."""
    return table[90 if capability(x.device) >= 90 else 80]


def positions(n: int) -> int:
    """The positions of a product's tile: a small map gets a small tile."""
    return min(POSITIONS, power_of_two(n))


def product(x: Tensor, rows: int) -> Product:
    """The configuration of a product that reads `x` and has `rows` output channels: few channels get narrow tiles."""
    chosen = row(PRODUCT, x)[x.element_size()]
    rows = min(chosen.rows, power_of_two(rows))
    small = rows * positions(x.shape[2]) <= 64 * 128
    return chosen._replace(rows=rows, warps=4 if small else chosen.warps)


# padded width, up to which all channels are one block, and bytes of an operand -> configuration
POOLS = {
    90: {
        (16, 2): Chain(128, 4, 4),
        (32, 2): Chain(64, 4, 4),
        (64, 2): Chain(32, 8, 4),
        (128, 2): Chain(32, 8, 8, 32, 3),
        (16, 4): Chain(64, 4, 4),
        (32, 4): Chain(64, 4, 4),
        (64, 4): Chain(32, 8, 4),
        (128, 4): Chain(32, 8, 8, 32, 3),
    },
    80: {
        (16, 2): Chain(128, 4, 4),
        (32, 2): Chain(64, 4, 4),
        (64, 2): Chain(32, 8, 4),
        (128, 2): Chain(16, 8, 8, 32, 3),
        (16, 4): Chain(64, 4, 4),
        (32, 4): Chain(64, 4, 4),
        (64, 4): Chain(32, 8, 8),
        (128, 4): Chain(16, 8, 8, 32, 3),
    },
}


def fitted(chosen: Chain, n: int) -> Chain:
    """`chosen` for a map of `n` positions: a small map gets small tiles, and no more tiles than it needs."""
    tile = min(chosen.positions, power_of_two(n))
    return chosen._replace(positions=tile, tiles=min(chosen.tiles, power_of_two(-(-n // tile), 1)))


def chain(x: Tensor, padded: int, itemsize: int) -> Chain:
    """The configuration of the chain over `x` at a padded width, if its widest operands have `itemsize` bytes."""
    chosen = row(CHAIN, x)[padded, itemsize]
    if itemsize == 4 and padded <= WIDEST_EXACT:  # without tensor cores a tile of 64 spills; one rule, whatever TF32 says
        chosen = chosen._replace(positions=min(chosen.positions, 32))
    return fitted(chosen, x.shape[2])


def chain_back(x: Tensor, padded: int) -> Chain | None:
    """The configuration of the backward pass of the chain over `x`; None if the layer-wise kernels must run."""
    chosen = row(CHAIN_BACK, x).get(padded) if x.dtype == torch.bfloat16 or interpreting() else None
    if chosen and padded == 64 and (x.shape[1] % 16 or x.shape[2] % 16):  # unaligned rows need one register per element;
        chosen = chosen._replace(positions=chosen.positions // 2)  # by shape, so that sums are the same in every layout
    return None if chosen is None else fitted(chosen, x.shape[2])


def pools(x: Tensor, width: int) -> Chain:
    """The configuration of the poolings of `x` for MIFA."""
    return fitted(row(POOLS, x)[min(128, power_of_two(width)), x.element_size()], x.shape[2])


class Tile(NamedTuple):
    """A pointwise kernel: blocks of `rows` channels by `positions`; if it sums, a program has `tiles` blocks."""

    rows: int
    positions: int
    tiles: int
    warps: int


def gate(x: Tensor) -> Tile:
    """The tile of the gate: 4096 elements, 8 accesses of 128 bits per thread, long on the axis where `x` is contiguous."""
    _, c, n = x.shape
    if x.stride(1) == 1:
        rows = min(128, power_of_two(c))
        return Tile(rows, 4096 // rows, 4, 4)
    columns = min(256, power_of_two(n))
    return Tile(4096 // columns, columns, 4, 4 if n % 8 == 0 else 8)  # unaligned rows need one register per element
