"""The inputs that a copy of a network runs with: the example, or shapes that the network may take."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from drifa_attn.trees import map_tensors, tensors_in

from .copies import CONVOLUTIONS

Inputs = tuple[tuple, dict[str, Any]]  # arguments and keyword arguments
LARGER = (16, 128, 256)  # added to the last axes for the second trace: at least twice the largest stride in use


def candidates(model: nn.Module, example_input: Any) -> list[Inputs]:
    """The inputs to try: the example alone, or without one the shapes that the network may take."""
    if example_input is not None:
        return [as_call(example_input)]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    shapes = dict.fromkeys(default_shapes(model))
    return [((torch.empty(2, *shape, dtype=dtype, device="meta"),), {}) for shape in shapes]


def as_call(example_input: Any) -> Inputs:
    """Arguments and keyword arguments of an example input: a plain tuple and a mapping are those, all else is one argument."""
    kwargs = dict(example_input) if isinstance(example_input, Mapping) else {}
    args = () if kwargs else example_input if type(example_input) is tuple else (example_input,)
    if not tensors_in((args, kwargs)):
        raise TypeError(
            f"example_input expected a tensor, a tuple of arguments or a dict of keyword arguments, got {example_input!r:.80}."
        )
    return args, kwargs


def batch_of(inputs: Inputs) -> int:
    """How many samples inputs hold: the first axis of the first tensor that has one, or the length of a list of images."""
    for one in (*inputs[0], *inputs[1].values()):
        if is_images(one):
            return len(one)
        if lengths := [tensor.shape[0] for _, tensor in tensors_in(one) if tensor.ndim]:
            return lengths[0]
    return 0


def is_images(value: Any) -> bool:
    """Whether an argument is a list of images `c h w` of one or three channels, one a sample, as detectors take them."""
    images = value if isinstance(value, list) else []
    return bool(images) and all(isinstance(one, Tensor) and one.ndim == 3 and one.shape[0] in (1, 3) for one in images)


def on_meta(inputs: Inputs) -> Inputs:
    """The same inputs without values."""
    return map_tensors(inputs, lambda tensor: tensor.to("meta"))


def on_cpu(inputs: Inputs, samples: int = 2) -> Inputs:
    """The first samples of inputs, on the CPU; without values of their own, random numbers or zeros of their dtype."""
    batch, generator = batch_of(inputs), torch.Generator().manual_seed(0)
    single = {id(tensor) for one in (*inputs[0], *inputs[1].values()) if is_images(one) for tensor in one}

    def value(tensor: Tensor) -> Tensor:
        dtype = torch.float32 if tensor.dtype is torch.float16 else tensor.dtype
        is_batch = tensor.ndim and tensor.shape[0] == batch and id(tensor) not in single
        shape = (min(batch, samples), *tensor.shape[1:]) if is_batch else tensor.shape
        if not tensor.is_meta:
            return (tensor if shape == tensor.shape else tensor[: shape[0]]).detach().to("cpu", dtype, copy=True)
        if tensor.is_floating_point():
            return torch.randn(shape, generator=generator).to(dtype)
        return torch.zeros(shape, dtype=dtype)

    return map_tensors(inputs, value)


def resized(tensor: Tensor, batch: int, axes: int) -> Tensor:
    """An input with one more sample and, where it is floating-point, more positions on so many of its last axes.

    Axes 0 and 1 stay as they are. What is added repeats the values that are there.
    """
    shape = list(tensor.shape)
    if shape and shape[0] == batch:
        shape[0] += 1
    axes = min(axes, len(shape) - 2)
    if tensor.is_floating_point() and axes > 0:
        shape[-axes:] = [size + step for size, step in zip(shape[-axes:], LARGER[-axes:], strict=True)]
    if tensor.is_meta:
        return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    for axis, size in enumerate(shape):
        if size != tensor.shape[axis]:
            tensor = tensor.index_select(axis, torch.arange(size, device=tensor.device) % tensor.shape[axis])
    return tensor


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
