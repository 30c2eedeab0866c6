"""The answers of an `Uncertainty`, one for each sample with a known label: how sure, whether right, how uncertain."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drifa_attn.uncertainty.result import Uncertainty

from .style import COLOURS

MEASURES = ("total", "aleatoric", "epistemic")


class Answers(NamedTuple):
    """What the pictures read, each a vector with one number for each answer: in (0, 1], True or False, in nats by measure."""

    confidence: Tensor
    right: Tensor
    measures: dict[str, Tensor]


def answers_of(owner: str, results: Any, labels: Any) -> dict[str, Answers]:
    """The answers of one result, under an empty name, or of several by their names.

    Raises: TypeError: no `Uncertainty`. ValueError: no result, more than there are colours, or labels that do not fit.
    """
    several = results if isinstance(results, Mapping) else {"": results}
    for name, result in several.items():
        if not isinstance(result, Uncertainty):
            of = f" for {name!r}" if name else ""
            raise TypeError(
                f"{owner} expected an Uncertainty of mc_dropout or ensemble{of}, or a dict of them by name, got "
                f"{type(result).__name__}: labels of values are neither right nor wrong."
            )
    if not 1 <= len(several) <= len(COLOURS):
        raise ValueError(f"{owner} expected 1 to {len(COLOURS)} results, got {len(several)}.")
    return {str(name): answered(owner, result, labels) for name, result in several.items()}


def answered(owner: str, result: Uncertainty, labels: Any) -> Answers:
    """The answers of one result to the samples whose label is known."""
    probs, given = result.probs.detach().cpu(), torch.as_tensor(labels).cpu()
    shape = result.total.shape
    if given.shape != shape:
        raise ValueError(f"{owner} expected labels of shape {tuple(shape)}, as the result's total, got {tuple(given.shape)}.")
    if probs.shape == shape:  # labels, of which each is there or not
        known = ~given.isnan() if given.is_floating_point() else given != -100
        check_range(owner, given[known], 2)
        answer, confidence = probs > 0.5, torch.maximum(probs, 1 - probs)
    else:
        known = given != -100
        check_range(owner, given[known], probs.shape[1])
        confidence, answer = probs.max(1)
    if not known.any():
        raise ValueError(f"{owner} got no sample with a known label: -100, of labels NaN, stands for an unknown one.")
    measures = {name: getattr(result, name).detach().cpu()[known] for name in MEASURES}
    return Answers(confidence[known], answer[known] == given[known], measures)


def check_range(owner: str, labels: Tensor, classes: int) -> None:
    """Raise a `ValueError` unless labels are whole numbers from 0 on."""
    wrong = labels[(labels < 0) | (labels >= classes) | (labels != labels.floor() if labels.is_floating_point() else False)]
    if len(wrong):
        raise ValueError(f"{owner} expected labels from 0 to {classes - 1}, got {wrong[0].item()}.")
