"""The file itself: safetensors, with the plan of the attention as JSON in its metadata."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT, VERSION = "drifa_attn", 4


def write(path: str | Path, plan: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a plan and tensors."""
    from safetensors.torch import save_file  # a dependency of timm; importing the package does not need it

    for name, tensor in tensors.items():
        if tensor.is_complex():
            raise ValueError(f"save_attention cannot write {name!r}, {tensor.dtype}: safetensors holds no complex numbers.")
    written = json.dumps({"version": VERSION, **plan})
    is_sharded = any(hasattr(tensor, "full_tensor") for tensor in tensors.values())
    whole = {name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for name, tensor in tensors.items()}
    if not is_sharded or torch.distributed.get_rank() == 0:  # to gather takes every process, to write takes one
        save_file({name: tensor.contiguous() for name, tensor in whole.items()}, path, {FORMAT: written})


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The plan and the tensors of a file; a `ValueError` if it is damaged, or of another kind or version."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a dict
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or was cut short ({error}): save or copy it again.") from error
    if FORMAT not in metadata:
        raise ValueError(f"{path} was not written by save_attention: it has no {FORMAT!r} metadata.")
    try:
        plan = json.loads(metadata[FORMAT])
        version = plan["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} has a plan that cannot be read ({type(error).__name__}: {error}): save it again.") from error
    if version != VERSION:
        raise ValueError(f"{path} is of version {version}, this drifa_attn reads version {VERSION}: use the one that wrote it.")
    lists = isinstance(plan.get("classifier"), list) and isinstance(plan.get("batch_norm"), list)
    if not lists or not ({"sites", "attention"} <= set(plan) or "fused" in plan):
        raise ValueError(f"{path} has a plan without sites or branches: it was changed after save_attention wrote it.")
    return plan, tensors
