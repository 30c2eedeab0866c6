"""The tensors of an output of any kind, and whether two outputs hold the same bits."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


def leaves(output: Any, path: str = "") -> dict[str, Tensor]:
    """Every tensor of an output with its place: of tuples, lists, mappings, dataclasses and objects with attributes."""
    if isinstance(output, Tensor):
        return {path or "output": output}
    if isinstance(output, Mapping):
        pairs = [(str(key), value) for key, value in output.items()]
    elif isinstance(output, tuple | list):
        pairs = [(str(i), value) for i, value in enumerate(output)]
    elif is_dataclass(output):
        pairs = [(field.name, getattr(output, field.name)) for field in fields(output)]
    elif hasattr(output, "__dict__") and not callable(output):
        pairs = list(vars(output).items())
    else:
        pairs = []
    found: dict[str, Tensor] = {}
    for key, value in pairs:
        found |= leaves(value, f"{path}.{key}" if path else key)
    return found


def difference(one: Any, other: Any) -> str:
    """In what two outputs differ, by one bit or more; empty when they are equal."""
    ours, theirs = leaves(one), leaves(other)
    if not theirs:
        return "the output holds no tensor"
    if list(ours) != list(theirs):
        return f"the outputs hold {list(ours)} and {list(theirs)}"
    for path, a in ours.items():
        b = theirs[path]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return f"{path} is {a.dtype} {tuple(a.shape)}, not {b.dtype} {tuple(b.shape)}"
        if not is_same(a, b):
            return f"{path} differs by up to {largest(a, b):.3g}"
    return ""


def is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape and dtype are equal bit for bit, zeros with a sign and NaN too."""
    return torch.equal(*(tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in (a, b)))


def largest(a: Tensor, b: Tensor) -> float:
    """The largest distance of two tensors of one shape."""
    return (a.double() - b.double()).abs().max().item()


def is_close(one: Any, other: Any, tolerance: float = 1e-4) -> bool:
    """Whether two outputs agree, but for rounding."""
    ours, theirs = leaves(one), leaves(other)
    if not ours or list(ours) != list(theirs):
        return False
    return all(
        a.shape == theirs[path].shape
        and torch.allclose(
            a.double(), theirs[path].double(), rtol=tolerance, atol=tolerance * scale(theirs[path]), equal_nan=True
        )
        for path, a in ours.items()
    )


def scale(tensor: Tensor) -> float:
    """The size of the numbers of a tensor."""
    finite = tensor.detach().double().nan_to_num(0, 0, 0)
    return finite.abs().max().item() if finite.numel() else 0.0
