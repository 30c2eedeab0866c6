"""Checks of what DRIFA-Net is given, with messages that say what was expected, what came, and what to do."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def check_count(name: str, value: Any) -> None:
    """Raise a `ValueError` unless `value` is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"DrifaNet expected {name} to be an integer >= 1, got {value!r}.")


def per_branch(name: str, value: Any, branches: int) -> tuple[int, ...]:
    """One number for each branch: a sequence as it is, a number repeated; each at least 1."""
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,) * branches
    if len(values) != branches:
        raise ValueError(f"DrifaNet expected {name} once or once per branch ({branches}), got {len(values)}: {value!r}.")
    for one in values:
        check_count(name, one)
    return values


def check_heads(heads: Any) -> None:
    """Raise a `ValueError` unless this lists the classes of each task."""
    if isinstance(heads, str) or not isinstance(heads, Sequence) or not heads:
        raise ValueError(f"DrifaNet expected heads to list the classes of each task, e.g. (5, 7), got {heads!r}.")
    for classes in heads:
        check_count("heads", classes)


def check_images(images: Any, channels: Sequence[int]) -> None:
    """Raise unless these are images `b c h w`, one for each branch with its channels, all of one batch size."""
    if isinstance(images, Tensor) or not isinstance(images, Sequence):
        raise TypeError(f"DrifaNet expected a list of {len(channels)} tensors, one per branch, got {type(images).__name__}.")
    if len(images) != len(channels):
        raise ValueError(
            f"DrifaNet expected {len(channels)} modalities, got {len(images)}: name absent ones in `present`, do not leave "
            "them out."
        )
    for x, c in zip(images, channels, strict=True):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"DrifaNet expected floating-point tensors, got {got}: name absent modalities in `present`.")
        if x.ndim != 4 or x.shape[1] != c:
            raise ValueError(f'DrifaNet expected images "b c h w" with c={c}, got {tuple(x.shape)}.')
    if any(len(x) != len(images[0]) for x in images):
        raise ValueError(f"DrifaNet expected one batch size for all modalities, got {[len(x) for x in images]}.")


def check_present(present: Tensor | None, images: Sequence[Tensor]) -> None:
    """Raise unless `present` is None or a boolean `b m` on the device of the images."""
    if present is None:
        return
    if not isinstance(present, Tensor) or present.dtype != torch.bool:
        got = present.dtype if isinstance(present, Tensor) else type(present).__name__
        raise TypeError(f"DrifaNet expected present to be a boolean tensor (b m), got {got}: convert it with .bool().")
    expected = (len(images[0]), len(images))
    if tuple(present.shape) != expected:
        raise ValueError(f"DrifaNet expected present of shape (b, m) = {expected}, got {tuple(present.shape)}.")
    if present.device != images[0].device:
        raise ValueError(f"DrifaNet expected present on {images[0].device}, where the images are, got {present.device}.")
