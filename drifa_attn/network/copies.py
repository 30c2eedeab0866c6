"""The copy of a network that runs in its place, without memory, and the inputs that it may take."""

import copy
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from drifa_attn.trees import map_tensors, tensors_in

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def meta_clone(model: nn.Module) -> nn.Module:
    """A copy of the network without memory: same modules and attributes, every tensor they hold on the meta device.

    Hooks that are plain functions are left out: they are not copied, and what they write to does not belong to the copy.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for _, tensor in tensors_in(vars(module)):  # parameters, buffers, and whatever else it keeps
            empty = torch.empty_like(tensor, device="meta", requires_grad=False)
            memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    clone = copy.deepcopy(model, memo).eval()
    for module in clone.modules():
        for registered in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in registered.items() if isinstance(hook, FunctionType)]:
                del registered[key]
    return clone


def copied(model: nn.Module, example_input: Any) -> tuple[nn.Module, list[tuple[tuple, dict[str, Any]]]]:
    """A copy without memory, and the inputs to try on it: the example, or shapes that the network may take."""
    title = type(model).__name__
    try:
        clone = meta_clone(model)
    except Exception as error:
        message = f"{title} could not be copied to the meta device ({type(error).__name__}: {error}): {advice(model)}."
        raise ValueError(message) from error
    if example_input is not None:
        return clone, [as_call(example_input)]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    shapes = dict.fromkeys(default_shapes(model))
    return clone, [((torch.empty(2, *shape, dtype=dtype, device="meta"),), {}) for shape in shapes]


def advice(model: nn.Module) -> str:
    """What to do about a network that cannot be copied, by what is in it."""
    for name, module in model.named_modules():
        where = f"{name or 'the network itself'} ({type(module).__name__})"
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers") and any(is_lazy(tensor) for tensor in value.values()):
                return f"{where} is lazy: run the network once, then wrap it"
            if key.startswith("_") or is_copied(value):
                continue
            return f"{where} keeps {key!r}, a {type(value).__name__}, which cannot be copied: take it off while you wrap"
    return "plan it before its first run, or clear what it keeps of one"


def is_copied(value: Any) -> bool:
    """Whether Python can copy a value."""
    try:
        copy.deepcopy(value)
    except Exception:
        return False
    return True


def as_call(example_input: Any) -> tuple[tuple, dict[str, Any]]:
    """Arguments and keyword arguments of an example input, on the meta device."""
    args = example_input if isinstance(example_input, tuple) else () if isinstance(example_input, dict) else (example_input,)
    kwargs = example_input if isinstance(example_input, dict) else {}
    if not any(True for _ in tensors_in((args, kwargs))):
        raise TypeError(
            f"example_input expected a tensor, a tuple of arguments or a dict of keyword arguments, got {example_input!r}."
        )
    return map_tensors((args, kwargs), lambda tensor: tensor.to("meta"))


def default_shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Shapes, without the batch axis, that the network may take as its one input, the likeliest first."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    config = config if isinstance(config, Mapping) else vars(config)
    first = next((m for m in model.modules() if isinstance(m, (*CONVOLUTIONS, nn.Linear))), None)
    sizes = [getattr(m, key) for m in model.modules() for key in ("img_size", "image_size") if hasattr(m, key)]
    squares = [tuple(s) if isinstance(s, tuple | list) else (s, s) for s in sizes if s]
    if config.get("input_size"):
        squares.append(tuple(config["input_size"][1:]))
        yield from ((config["input_size"][0], *square) for square in squares)
    if isinstance(first, nn.Linear):
        yield (first.in_features,)
    elif isinstance(first, nn.Conv3d):
        yield from ((first.in_channels, 16, *square) for square in [*squares, (112, 112), (224, 224)])
    elif isinstance(first, nn.Conv2d):
        yield from ((first.in_channels, *square) for square in [*squares, (224, 224), (512, 512)])
    yield from ((3, *square) for square in [*squares, (224, 224), (512, 512)])
