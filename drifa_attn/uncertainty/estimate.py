"""Uncertainty of a prediction from several passes, Fig. 1B: Monte Carlo dropout, ensembles, and both together."""

import gc
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import nn

from drifa_attn.checks import Kind, count

from .heads import Heads
from .passes import Stream
from .question import Question
from .result import Uncertainty


@overload
def mc_dropout(
    model: nn.Module,
    inputs: Any = (),
    passes: int = 30,
    *,
    kwargs: Mapping[str, Any] | None = None,
    heads: str | int | None = None,
    kinds: Literal["classes", "multilabel"] = "classes",
    generator: torch.Generator | None = None,
    chunk: int | None = None,
) -> Uncertainty | Any: ...
@overload
def mc_dropout(
    model: nn.Module,
    inputs: Any = (),
    passes: int = 30,
    *,
    kwargs: Mapping[str, Any] | None = None,
    heads: Heads = None,
    kinds: Kind | Mapping[Any, Kind] = "classes",
    generator: torch.Generator | None = None,
    chunk: int | None = None,
) -> Any: ...
def mc_dropout(
    model: nn.Module,
    inputs: Any = (),
    passes: int = 30,
    *,
    kwargs: Mapping[str, Any] | None = None,
    heads: Heads = None,
    kinds: Kind | Mapping[Any, Kind] = "classes",
    generator: torch.Generator | None = None,
    chunk: int | None = None,
) -> Any:
    """The uncertainty of a network in its own dropout: several passes with dropout on and everything else in eval mode.

        result = drifa_attn.mc_dropout(model, x, generator=torch.Generator().manual_seed(0))

    Dropout is `nn.Dropout` and its kin, `F.dropout` and its kin wherever called with a rate (the heads of many timm networks),
    the dropout of attention weights in `nn.MultiheadAttention` and timm, and what `add_dropout` put in. Batch norm keeps its
    statistics; stochastic depth, patch dropout, modality dropout and the dropout inside an RNN stay off. No gradients.
    Afterwards, also after an error, every module has its own mode again. A compiled network runs uncompiled here. No pass is
    kept: memory does not grow with their number.

    Args:
        model: gives logits `b k …`, classes on axis 1: one tensor, or a dict, list, tuple, dataclass or Hugging Face output of
            them, one per head. Of tokens, `b n k`, move the classes: `heads=lambda output: output.logits.mT`.
        inputs: a tensor, list or dict is the model's one argument, a tuple its positional arguments.
        passes: their number, >= 2.
        kwargs: keyword arguments, `{"input_ids": ids, "attention_mask": mask}`, beside the inputs or without any.
        heads: which entries of the output are heads. None: all. One name or index gives that head's result alone; a list of
            them gives a dict. A callable takes the output, and gives one tensor or a dict of them.
        kinds: what the heads say, one kind for all or `{head: kind}`: "classes" (one of k >= 2, by a softmax), "multilabel" (of
            each logit whether it is so, by a sigmoid; also for a single logit), "regression" (values). Heads that a dict leaves
            out have classes.
        generator: makes the result reproducible and leaves torch's global random state alone; None draws from that.
        chunk: how many samples of the batch go through the model at a time; None: all. Other chunks draw other masks.

    Returns: an `Uncertainty`, for regression a `RegressionUncertainty`. For several heads a dict of them by the heads' keys, 0,
        1, … for a list or tuple; type checkers want `heads=[...]` to know that it is one.
    Raises: ValueError, TypeError: an argument out of its range, an output that is not of its kind, or a model without an active
        dropout.
    Source: Fig. 1B. Differs: classes are read off by argmax, not by a threshold of 0.5.
    """
    passes = count("mc_dropout", "passes", passes)
    check_passes("mc_dropout", passes)
    if not isinstance(model, nn.Module):
        raise TypeError(f"mc_dropout expected an nn.Module, got {type(model).__name__}.")
    question = Question("mc_dropout", inputs, kwargs, heads=heads, kinds=kinds, chunk=chunk)
    question.ask("mc_dropout", model, passes, Stream("mc_dropout", generator))
    return question.answer()


@overload
def ensemble(
    models: Iterable[nn.Module],
    inputs: Any = (),
    passes: int | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    heads: str | int | None = None,
    kinds: Literal["classes", "multilabel"] = "classes",
    generator: torch.Generator | None = None,
    chunk: int | None = None,
) -> Uncertainty | Any: ...
@overload
def ensemble(
    models: Iterable[nn.Module],
    inputs: Any = (),
    passes: int | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    heads: Heads = None,
    kinds: Kind | Mapping[Any, Kind] = "classes",
    generator: torch.Generator | None = None,
    chunk: int | None = None,
) -> Any: ...
def ensemble(
    models: Iterable[nn.Module],
    inputs: Any = (),
    passes: int | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    heads: Heads = None,
    kinds: Kind | Mapping[Any, Kind] = "classes",
    generator: torch.Generator | None = None,
    chunk: int | None = None,
) -> Any:
    """The uncertainty of an ensemble: one pass of each member in eval mode, or several of each with dropout on.

        result = drifa_attn.ensemble([one, two, three], x)
        result = drifa_attn.ensemble((loaded(path) for path in paths), x)    # one in memory at a time

    Members are taken one after another, and of an iterable that makes them none is kept: each is let go before the next is
    asked for.

    Args:
        models: the members, with the same heads and shapes. Each counts the same.
        inputs: as `mc_dropout` takes them; every member gets the same.
        passes: None, or Monte Carlo passes of each member, >= 1. There must be at least two passes in all.
        kwargs: as in `mc_dropout`.
        heads: as in `mc_dropout`.
        kinds: as in `mc_dropout`.
        generator: as in `mc_dropout`; without `passes` nothing is random.
        chunk: as in `mc_dropout`.

    Returns, Raises: as `mc_dropout`; also ValueError: a member given twice, or members whose outputs differ. Of a list this is
        checked before the first pass, of other iterables when its turn comes.
    Source: Fig. 1B (five members, 30 passes each). Differs: the released evaluation averages member 0 alone and reads classes
        off by a threshold of 0.5; here every member counts, and the class is the argmax.
    """
    if isinstance(models, nn.Module) and not isinstance(models, nn.ModuleList):
        raise TypeError(f"ensemble expected a list of members, got one {type(models).__name__}: for it alone, mc_dropout.")
    if passes is not None:
        passes = count("ensemble", "passes", passes)
    each = 1 if passes is None else passes
    if isinstance(models, Sequence | nn.ModuleList):
        check_passes("ensemble", each * sum(1 for _ in in_turn(models)))
    question = Question("ensemble", inputs, kwargs, heads=heads, kinds=kinds, chunk=chunk)
    stream = Stream("ensemble", generator)
    for name, member in in_turn(models):
        question.ask(name, member, passes, stream)
        del member  # or it would live on while the next one is made
    check_passes("ensemble", question.passes)
    return question.answer()


def check_passes(owner: str, passes: int) -> None:
    """Raise a `ValueError` unless there are at least two passes."""
    if passes < 2:
        raise ValueError(f"{owner} expected at least 2 passes in all, got {passes}: one pass has no variance.")


def in_turn(models: Iterable[Any]) -> Iterator[tuple[str, nn.Module]]:
    """The members one after another, under the names that messages call them by; none is held while the next one is made."""
    seen: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
    number = 0
    for member in models:  # no enumerate: it holds what it gave last
        name = f"ensemble, member {number},"
        if not isinstance(member, nn.Module):
            raise TypeError(f"{name} expected an nn.Module, got {type(member).__name__}.")
        if member in seen:
            raise ValueError(f"ensemble got one network as members {seen[member]} and {number}: it would count twice.")
        seen[member] = number
        number += 1
        yield name, member
        del member
        if not isinstance(models, Sequence | nn.ModuleList):
            gc.collect()  # a module that carries a step refers to itself
