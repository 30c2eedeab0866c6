"""A backbone made ready to be a branch: its classifier taken off, cut at its stages, and compared with itself."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from drifa_attn.network.glue import NotCuttableError
from drifa_attn.network.lockstep import Part, check_parts, cut
from drifa_attn.network.record import Survey
from drifa_attn.network.survey import survey
from drifa_attn.wrapping.inject import detach


def without_classifier(backbone: nn.Module, modality: str, named: str | None) -> nn.Module:
    """The backbone with its classifier taken off, in place."""
    if named is None:
        if hasattr(backbone, "reset_classifier"):
            backbone.reset_classifier(0)  # type: ignore[operator]
        return backbone
    if named not in dict(backbone.named_modules()) or not named:
        raise ValueError(f"fuse found no module {named!r} in backbone {modality!r} to take off as its classifier.")
    parent, _, child = named.rpartition(".")
    setattr(backbone.get_submodule(parent), child, nn.Identity())
    return backbone


def surveyed(modality: str, backbone: nn.Module, classifier: str | None, example_input: Any, **hints: Any) -> Survey:
    """The survey of a backbone without its classifier and without attention; the backbone itself is untouched."""

    def prepare(clone: nn.Module) -> None:
        without_classifier(clone, modality, classifier)
        detach(clone)

    return survey(backbone, example_input, prepare=prepare, **hints)


def advanced(
    modality: str, backbone: nn.Module, found: Survey, stages: Sequence[str], classifier: str | None, example_input: Any
) -> dict[bool, list[Part]]:
    """The parts of a backbone for both modes, tried on a copy of it."""
    args, kwargs = found.inputs
    if len(args) != 1 or kwargs:
        raise ValueError(
            f"fuse cannot advance backbone {modality!r} ({type(backbone).__name__}): it takes more than one input."
        )
    try:
        with torch.no_grad():
            parts = {training: cut(found.clone.train(training), stages, args[0]) for training in (False, True)}
        compare(modality, backbone, parts, stages, args[0], classifier=classifier, example_input=example_input)
    except NotCuttableError as error:
        raise ValueError(
            f"fuse cannot advance backbone {modality!r} ({type(backbone).__name__}) stage by stage: "
            f"{str(error).partition(chr(10))[0]}. Name other stages in at=, or take another backbone."
        ) from error
    return parts


def compare(
    modality: str,
    backbone: nn.Module,
    parts: Mapping[bool, Sequence[Part]],
    stages: Sequence[str],
    given: Tensor,
    *,
    classifier: str | None,
    example_input: Any,
) -> None:
    """Raise a `NotCuttableError` unless the parts give what a copy of the backbone gives."""
    if any(p.is_meta for p in backbone.parameters()):
        return
    trial = without_classifier(copy.deepcopy(backbone).cpu(), modality, classifier)
    trial = trial.float() if any(p.dtype is torch.float16 for p in trial.parameters()) else trial
    dtype = next((p.dtype for p in trial.parameters() if p.is_floating_point()), torch.get_default_dtype())
    check_parts(trial, parts, stages, sample(given, example_input, dtype))


def sample(given: Tensor, example_input: Any, dtype: torch.dtype) -> Tensor:
    """Values to try a backbone on: noise, or where it reads integers those of the example, else zeros."""
    if given.is_floating_point():
        return torch.randn(given.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    if isinstance(example_input, Tensor) and not example_input.is_meta:
        return example_input.detach().cpu()
    return torch.zeros(given.shape, dtype=given.dtype)
