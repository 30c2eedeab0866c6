"""Who is present: the inputs of a fused network, modalities that are missing, and modality dropout."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from drifa_attn.checks import check_present
from drifa_attn.trees import tensors_in


def checked_inputs(inputs: Any, names: Sequence[str], present: Tensor | None) -> dict[str, Any]:
    """The inputs of the modalities that are there; an error unless they are of one batch size, and `present` fits them."""
    if not isinstance(inputs, Mapping):
        raise TypeError(f"Fused expected a dict of inputs by modality, got {type(inputs).__name__}.")
    given = {name: x for name, x in inputs.items() if x is not None}
    if not given or any(name not in names for name in inputs):
        raise ValueError(f"Fused expected inputs of some of the modalities {list(names)}, got {list(inputs)}.")
    sizes: dict[str, int] = {}
    for name, x in given.items():
        for path, tensor in tensors_in(x):
            sizes[name + "".join(f"[{key}]" for key in path)] = tensor.shape[0] if tensor.ndim else 0
        if not isinstance(x, (Tensor, tuple, Mapping)) or not tensors_in(x):
            raise TypeError(
                f"Fused expected a tensor of modality {name!r}, or a tuple or dict of tensors, got {type(x).__name__}: leave a "
                "modality that the whole batch lacks out of the dict."
            )
    batch, *others = sizes.values()
    if any(size != batch for size in others):
        raise ValueError(f"Fused expected one batch size for all modalities, got {sizes}: name absent samples in `present`.")
    check_present("Fused", present, [first_tensor(given)] * len(names))
    return given


def first_tensor(inputs: Mapping[str, Any]) -> Tensor:
    """The first tensor of the first modality."""
    return tensors_in(next(iter(inputs.values())))[0][1]


def presence(inputs: Mapping[str, Any], names: Sequence[str], present: Tensor | None, dropped: float) -> Tensor | None:
    """Who is present, `b m`, after a share of the present modalities is taken away; None if all are present.

    A sample keeps at least one of the modalities that it has.
    """
    sample = first_tensor(inputs)
    if len(inputs) < len(names) or (dropped and present is None):
        given = torch.tensor([name in inputs for name in names], device=sample.device)
        present = given.expand(sample.shape[0], -1) if present is None else present & given
    if dropped and present is not None:
        kept = present & (torch.rand(present.shape, device=present.device) >= dropped)
        present = torch.where(kept.any(1, keepdim=True), kept, present)
    return present


def cleared(x: Tensor, has: Tensor | None) -> Tensor:
    """The input with zeros for the samples that lack this modality, so that what they hold, NaN or no index, has no effect."""
    if has is None:
        return x
    return torch.where(has.reshape(-1, *[1] * (x.ndim - 1)), x, 0)


def present_rows(has: Tensor | None) -> Tensor | None:
    """The samples that have a modality, by number; None where all have it, and in graphs, whose shapes may not depend on it."""
    if has is None or torch.compiler.is_compiling() or torch.jit.is_tracing() or has.is_meta or bool(has.all()):
        return None
    return has.nonzero()[:, 0]
