"""A backbone made ready to be a branch: its classifier taken off, cut at its stages, and compared with itself."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from drifa_attn.network.features import trailing_linear
from drifa_attn.network.glue import NotCuttableError
from drifa_attn.network.inputs import Inputs, as_call, on_cpu
from drifa_attn.network.lockstep import Part, check_parts, cut
from drifa_attn.network.modes import own_randomness
from drifa_attn.network.record import Survey
from drifa_attn.network.survey import survey
from drifa_attn.trees import map_tensors
from drifa_attn.wrapping.inject import detach


def without_classifier(backbone: nn.Module, modality: str, named: str | None) -> nn.Module:
    """The backbone with its classifier taken off, in place: the module that is named, or by its `reset_classifier`.

    Where `named` is None its output stays as it is; where it is "" nothing is said of it.
    """
    if named is None:
        return backbone
    if not named:
        if hasattr(backbone, "reset_classifier"):
            backbone.reset_classifier(0)  # type: ignore[operator]
        return backbone
    if named not in dict(backbone.named_modules()):
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


def check_output(modality: str, backbone: nn.Module, found: Survey, classifier: str | None) -> None:
    """Raise where a linear layer gives the output and nobody said whether it is a classifier."""
    end = trailing_linear(found)
    if classifier == "" and end is not None and not hasattr(backbone, "reset_classifier"):
        width = next(iter(found.first.calls[end].outputs.values())).shape[-1]
        raise ValueError(
            f"backbone {modality!r} ({type(backbone).__name__}) ends in the linear layer {end!r}, whose {width} values would "
            f"be its features: classifiers={{{modality!r}: {end!r}}} takes it off, classifiers={{{modality!r}: None}} keeps it."
        )


def advanced(
    modality: str, backbone: nn.Module, found: Survey, stages: Sequence[str], classifier: str | None, example_input: Any
) -> dict[bool, list[Part]]:
    """The parts of a backbone for both modes, tried on a copy of it."""
    try:
        with torch.no_grad(), own_randomness():
            parts = {training: cut(found.clone.train(training), stages, found.inputs) for training in (False, True)}
        compare(modality, backbone, parts, stages, found.inputs, classifier=classifier, example_input=example_input)
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
    inputs: Inputs,
    *,
    classifier: str | None,
    example_input: Any,
) -> None:
    """Raise a `NotCuttableError` unless the parts give what a copy of the backbone gives, on the example where there is one."""
    if any(p.is_meta for p in backbone.parameters()):
        return
    trial = without_classifier(copy.deepcopy(backbone).cpu(), modality, classifier)
    trial = trial.float() if any(p.dtype is torch.float16 for p in trial.parameters()) else trial
    dtype = next((p.dtype for p in trial.parameters() if p.is_floating_point()), torch.get_default_dtype())
    values = on_cpu(inputs if example_input is None else as_call(example_input))
    values = map_tensors(values, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
    check_parts(trial, parts, stages, values)
