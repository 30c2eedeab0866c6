"""Networks of timm by their names, without memory or with weights."""

import difflib
from pathlib import Path
from typing import Any

import torch
from torch import nn


def on_meta(name: str, size: int | None = None) -> nn.Module:
    """A network without memory, for images of this size; a `ValueError` if timm has none of this name or size."""
    import timm  # noqa: F401 - not within the device: torchvision imports the compiler, and that of torch 2.6 computes

    try:
        with torch.device("meta"):
            return create(name, size)
    except ValueError as error:
        if "meta tensor" not in str(error):
            raise
        return create(name, size).to("meta")  # timm 1.0.9 computes with tensors while it builds


def create(name: str, size: int | None = None, **options: Any) -> nn.Module:
    """A network by timm; a `ValueError` with similar names if timm has none of this name, or with timm's own reason."""
    import timm

    if not timm.is_model(name):
        similar = ", ".join(difflib.get_close_matches(name, timm.list_models(), 5, 0.5)) or "none"
        raise ValueError(f"timm {timm.__version__} has no network {name!r}; similar names: {similar}.")
    config = timm.get_pretrained_cfg(name)
    if size and config and config.fixed_input_size:
        options["img_size"] = size
    try:
        return timm.create_model(name, **options)
    except Exception as error:  # networks refuse sizes, and downloads fail, in their own ways
        raise ValueError(f"timm cannot build {name}{f' for {size} pixels' if size else ''}: {error}") from error


def load_weights(model: nn.Module, path: Path) -> None:
    """Load the weights of the network itself from a file of torch or safetensors; a `ValueError` if they do not fit."""
    from timm.models import load_checkpoint

    try:
        load_checkpoint(model, str(path), weights_only=True)  # older versions of timm unpickle unless told
    except Exception as error:  # of many kinds, by torch, pickle and safetensors
        raise ValueError(f"{path} does not hold the weights of {type(model).__name__}: {error}") from error


def example(model: nn.Module, size: int | None) -> torch.Tensor | None:
    """An input of a size, without memory; None is the network's own size."""
    channels = getattr(model, "pretrained_cfg", {}).get("input_size", (3,))[0]
    return None if size is None else torch.empty(2, channels, size, size, device="meta")
