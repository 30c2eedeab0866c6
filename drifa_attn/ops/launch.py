"""When and how the Triton kernels run: what they support, and their launch configurations as data.

This file imports no triton, so that it can say why triton cannot be used. The configurations were chosen from what the
compiler makes of them (`make kernels` prints registers, spills and shared memory for each), not from timings: at 8.0 and 9.0 no
forward launch spills or uses a stack. Rows are looked up by kernel, bytes of an operand and compute capability.
"""

import functools
import importlib.metadata
import os
from typing import NamedTuple

import torch
from torch import Tensor

MINIMUM_TRITON = (3, 6)  # interpreted with this one and with 3.8; the configurations were compiled with 3.8
WIDEST_CHAIN = 128  # beyond it the weights of one chain no longer fit beside its maps
WIDEST = 4096  # what was compiled; nothing in the layer-wise kernels depends on it


class Chain(NamedTuple):
    """A kernel that carries a tile of positions through all layers: `positions` a tile, `tiles` a program."""

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


def interpreting() -> bool:
    """Whether triton, if imported now, runs kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def capability(x: Tensor) -> int:
    """The compute capability of the device of `x`, as 90 for 9.0; the interpreter counts as 9.0."""
    if x.device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def tf32_allowed() -> bool:
    """Whether float32 matrix products may use tensor cores, by PyTorch's own switch."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch >= 2.9; reading the old switch fails where the new one was used
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32


@functools.cache  # looking a version up takes longer than a small kernel
def triton_missing() -> str | None:
    """Why triton cannot be used, or None."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "triton is not installed"
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_TRITON:
        return f"triton is {version}, the kernels need >= {'.'.join(map(str, MINIMUM_TRITON))}"
    return None


def supports_gate(x: Tensor) -> str | None:
    """Why the Triton gate cannot take `x` (`b c n`), or None."""
    missing = triton_missing()
    if missing:
        return missing
    if x.device.type != "cuda" and not (interpreting() and x.device.type == "cpu"):
        return f"x is on {x.device}, the kernels run on CUDA"
    if x.device.type == "cuda" and capability(x) < 80:
        return f"compute capability {capability(x) / 10} is below 8.0"
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"x is {x.dtype}, the kernels take float16, bfloat16 and float32"
    if 0 in x.shape:
        return f"x is empty: {tuple(x.shape)}"
    if sum(abs(stride) * (size - 1) for stride, size in zip(x.stride()[1:], x.shape[1:], strict=True)) >= 2**31:
        return "one sample of x spans 2^31 elements or more"
    return None


def supports(x: Tensor, width: int) -> str | None:
    """Why the Triton statistics cannot take `x` (`b c n`) at a width of `width` channels, or None."""
    reason = supports_gate(x)
    if reason:
        return reason
    if x.shape[2] == 1:
        return "n = 1: a vector has nothing to pool"
    if width < 16:
        return f"width {width} is below 16, the least tensor cores multiply"
    if max(width, x.shape[1]) > WIDEST:
        return f"{max(width, x.shape[1])} channels are more than the {WIDEST} the kernels were compiled for"
    if x.dtype == torch.float32 and not interpreting() and not tf32_allowed():
        return "float32 without TF32 has no tensor cores; torch.backends.cuda.matmul.allow_tf32 = True allows them"
    return None


def power_of_two(size: int, least: int = 16) -> int:
    """The power of two that holds `size`, `least` at least."""
    return max(least, 1 << (size - 1).bit_length())


# (padded width, bytes of an operand) -> configuration, from capability 9.0 and from 8.0 on.
CHAIN = {
    90: {
        (16, 2): Chain(128, 4, 4),
        (32, 2): Chain(128, 4, 4),
        (64, 2): Chain(64, 4, 4),
        (128, 2): Chain(64, 2, 8),
        (16, 4): Chain(64, 4, 4),
        (32, 4): Chain(64, 4, 4),
        (64, 4): Chain(32, 4, 4),
        (128, 4): Chain(32, 2, 8),
    },
    80: {
        (16, 2): Chain(128, 4, 4),
        (32, 2): Chain(64, 4, 4),
        (64, 2): Chain(32, 4, 4),
        (128, 2): Chain(32, 1, 8),
        (16, 4): Chain(64, 4, 4),
        (32, 4): Chain(32, 4, 4),
        (64, 4): Chain(32, 1, 8),
        (128, 4): Chain(16, 1, 8),
    },
}
# Padded width -> configuration, for gradients multiplied in 2 bytes; in 4, and at 64 on 8.0, spills are heavy. At 64 on 9.0
# some remain (a stack of up to 224 bytes): half the tile leaves few of them, but reads all weights twice as often.
CHAIN_BACK = {
    90: {16: Chain(64, 1, 4), 32: Chain(64, 1, 8), 64: Chain(32, 1, 4)},
    80: {16: Chain(64, 1, 4), 32: Chain(64, 1, 8)},
}
PROGRAMS = 264  # that the chain's backward is cut into: two a multiprocessor of an H100, one number so that sums never differ
# bytes of an operand -> configuration
PRODUCT = {
    90: {2: Product(128, 64, 8, 3), 4: Product(128, 32, 8, 3)},
    80: {2: Product(128, 32, 8, 3), 4: Product(128, 32, 8, 3)},
}
POSITIONS = 128  # a tile of a product, whatever its operands, so that all products of a pass cut a sample alike


def row(table: dict, x: Tensor) -> dict:
    """The rows of `table` for the device of `x`."""
    return table[90 if capability(x) >= 90 else 80]


def positions(n: int) -> int:
    """The positions of a product's tile: a small map gets a small one."""
    return min(POSITIONS, power_of_two(n))


def product(x: Tensor, rows: int) -> Product:
    """The configuration of a product that reads `x` and has `rows` output channels: narrow ones get narrow tiles."""
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
    """`chosen` for a map of `n` positions: a small one gets small tiles, and no more of them than it has."""
    tile = min(chosen.positions, power_of_two(n))
    return chosen._replace(positions=tile, tiles=min(chosen.tiles, power_of_two(-(-n // tile), 1)))


def chain(x: Tensor, padded: int, itemsize: int) -> Chain:
    """The configuration of the chain over `x` at a padded width, its widest operands of `itemsize` bytes."""
    return fitted(row(CHAIN, x)[padded, itemsize], x.shape[2])


def chain_back(x: Tensor, padded: int) -> Chain | None:
    """The configuration of the chain's backward over `x`; None where layer by layer is the way."""
    chosen = row(CHAIN_BACK, x).get(padded) if x.dtype == torch.bfloat16 or interpreting() else None
    if chosen and padded == 64 and (x.shape[1] % 16 or x.shape[2] % 16):  # rows not aligned take a register an element;
        chosen = chosen._replace(positions=chosen.positions // 2)  # by shape, so that sums are the same in every layout
    return None if chosen is None else fitted(chosen, x.shape[2])


def pools(x: Tensor, width: int) -> Chain:
    """The configuration of MIFA's poolings of `x`."""
    return fitted(row(POOLS, x)[min(128, power_of_two(width)), x.element_size()], x.shape[2])


class Tile(NamedTuple):
    """A pointwise kernel: blocks of `rows` channels by `positions`, `tiles` of them a program where it sums."""

    rows: int
    positions: int
    tiles: int
    warps: int


def gate(x: Tensor) -> Tile:
    """The tile of the gate: 4096 elements, long where the memory of `x` is contiguous. 8 accesses of 128 bits a thread."""
    _, c, n = x.shape
    if x.stride(1) == 1:
        rows = min(128, power_of_two(c))
        return Tile(rows, 4096 // rows, 4, 4)
    columns = min(256, power_of_two(n))
    return Tile(4096 // columns, columns, 4, 4 if n % 8 == 0 else 8)  # rows that are not aligned take a register an element
