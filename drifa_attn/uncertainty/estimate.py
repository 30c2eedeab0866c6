"""Uncertainty of a prediction from several passes, Fig. 1B: Monte Carlo dropout, ensembles, and both together."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from drifa_attn.checks import count
from drifa_attn.network.modes import eagerly, eval_mode
from drifa_attn.trees import map_tensors, tensors_in

from .dropout import DropoutMode, is_dropout

ONLY = object()  # the head of a model whose output is one tensor


@dataclass(frozen=True, eq=False)
class Uncertainty:
    """What `s` passes say about `b` samples of `k` classes: the mean prediction, and how uncertain it is.

        probs = mean_s p_s                               total     = −Σ_k probs · log probs
        aleatoric = mean_s (−Σ_k p_s · log p_s)          epistemic = mean_s Σ_k p_s · log(p_s / probs)

    The class is `probs.argmax(1)`. Entropies are in nats, in [0, log k]; `total = aleatoric + epistemic` to rounding.

    Attributes:
        probs: `b k`, the mean of the passes' softmax.
        total: `b`, the predictive entropy.
        aleatoric: `b`, the expected entropy: how uncertain each single pass is.
        epistemic: `b`, the mutual information, as the mean divergence of a pass from the mean: how much the passes disagree.
            It is negative only by rounding; it is not clamped.
        variance: `b k`, of a class's probability over the passes (their mean squared distance from `probs`), in [0, 1/4].

    All are float32, float64 for float64 logits. Source: Fig. 1B; the decomposition is that of arXiv:1703.02910.
    """

    probs: Tensor
    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    variance: Tensor


Result = Uncertainty | dict[Any, Uncertainty]


def expected(p: Tensor, value: Tensor) -> Tensor:
    """The expectation of a value over the last axis, with 0 · log 0 = 0."""
    return (p * value).masked_fill(p == 0, 0).sum(-1)


def decompose(logits: Tensor) -> Uncertainty:
    """The uncertainty in the logits `s b k` of several passes; −inf is a class ruled out, NaN stays in its sample."""
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    log_mean = log_p.logsumexp(0) - math.log(len(log_p))  # b k
    p = log_p.exp()
    probs = p.mean(0)
    return Uncertainty(
        probs=probs,
        total=-expected(probs, log_mean),
        aleatoric=-expected(p, log_p).mean(0),
        epistemic=expected(p, log_p - log_mean).mean(0),
        variance=(p - probs).square().mean(0),
    )


def mc_dropout(
    model: nn.Module,
    inputs: Any,
    passes: int = 30,
    *,
    generator: torch.Generator | None = None,
    chunk: int | None = None,
) -> Result:
    """The uncertainty of a network in its own dropout: several passes with dropout on and everything else in eval mode.

        result = drifa_attn.mc_dropout(model, x, generator=torch.Generator().manual_seed(0))

    Dropout is `nn.Dropout` and its kin, `F.dropout` and its kin wherever called with a rate (the heads of many timm networks),
    the dropout of attention weights in `nn.MultiheadAttention` and timm, and what `add_dropout` put in. Batch norm keeps its
    statistics; stochastic depth, patch dropout, modality dropout and the dropout inside an RNN stay off. No gradients.
    Afterwards, also after an error, every module has its own mode again. A compiled network runs uncompiled here.

    Args:
        model: gives logits: one tensor `b k`, k >= 2, or a dict, list or tuple of them, one per head.
        inputs: a tensor, list or dict is the model's one argument, a tuple its positional arguments.
        passes: their number, >= 2.
        generator: makes the result reproducible and leaves torch's global random state alone; None draws from that.
        chunk: how many samples of the batch go through the model at a time; None: all. Other chunks draw other masks.

    Returns: the `Uncertainty`, or for several heads a dict of it by the same keys, 0, 1, … for a list or tuple.
    Raises: ValueError, TypeError: an argument out of its range, an output that is no such logits, or a model without an active
        dropout.
    Source: Fig. 1B. Differs: classes are read off by argmax, not by a threshold of 0.5.
    """
    passes = count("mc_dropout", "passes", passes)
    check_passes("mc_dropout", passes)
    return estimate({"mc_dropout": model}, inputs, passes, generator, chunk)


def ensemble(
    models: Iterable[nn.Module],
    inputs: Any,
    passes: int | None = None,
    *,
    generator: torch.Generator | None = None,
    chunk: int | None = None,
) -> Result:
    """The uncertainty of an ensemble: one pass of each member in eval mode, or several of each with dropout on.

        result = drifa_attn.ensemble([one, two, three], x)

    Args:
        models: the members, with the same heads and shapes. Each counts the same.
        inputs: as `mc_dropout` takes them; every member gets the same.
        passes: None, or Monte Carlo passes of each member, >= 1. There must be at least two passes in all.
        generator: as in `mc_dropout`; without `passes` nothing is random.
        chunk: as in `mc_dropout`.

    Returns, Raises: as `mc_dropout`; also ValueError: a member given twice, or members whose outputs differ.
    Source: Fig. 1B (five members, 30 passes each). Differs: the released evaluation averages member 0 alone and reads classes
        off by a threshold of 0.5; here every member counts, and the class is the argmax.
    """
    if isinstance(models, nn.Module) and not isinstance(models, nn.ModuleList):
        raise TypeError(f"ensemble expected a list of members, got one {type(models).__name__}: for it alone, mc_dropout.")
    members = list(models)
    if passes is not None:
        passes = count("ensemble", "passes", passes)
    check_passes("ensemble", len(members) * (1 if passes is None else passes))
    for i, member in enumerate(members):
        if (first := next(j for j, other in enumerate(members) if other is member)) < i:
            raise ValueError(f"ensemble got one network as members {first} and {i}: it would count twice.")
    return estimate({f"ensemble, member {i},": m for i, m in enumerate(members)}, inputs, passes, generator, chunk)


def check_passes(owner: str, passes: int) -> None:
    """Raise a `ValueError` unless there are at least two passes."""
    if passes < 2:
        raise ValueError(f"{owner} expected at least 2 passes in all, got {passes}: one pass has no variance.")


@torch.no_grad()
def estimate(
    models: Mapping[str, nn.Module], inputs: Any, passes: int | None, generator: torch.Generator | None, chunk: int | None
) -> Result:
    """The uncertainty over all passes of all models, which messages call by these names, a chunk of the batch at a time."""
    for name, model in models.items():
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name} expected an nn.Module, got {type(model).__name__}.")
    owner = next(iter(models))
    pieces = split(owner, inputs, chunk)
    sources = random_sources(models.values(), inputs)
    parts: list[dict[Any, Uncertainty]] = []
    with ExitStack() as stack:
        stack.enter_context(seeded(owner, sources, generator))
        for model in models.values():
            stack.enter_context(eval_mode(model, but=is_dropout if passes else None))
        for piece in pieces:
            runs: list[dict[Any, Tensor]] = []
            for name, model in models.items():
                for _ in range(passes or 1):
                    with nullcontext() if passes is None else dropping(name, piece, sources):
                        runs.append(heads(name, model(*piece)))
                    check_alike(name, runs[-1], runs[0])
            parts.append({head: decompose(torch.stack([one[head] for one in runs])) for head in runs[0]})
    whole = {head: joined([part[head] for part in parts]) for head in parts[0]}
    return whole.get(ONLY, whole)


def split(owner: str, inputs: Any, chunk: int | None) -> list[tuple]:
    """The positional arguments for each chunk of the batch."""
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    sizes = {len(tensor) for _, tensor in tensors_in(args) if tensor.ndim}
    if not sizes:
        raise TypeError(f"{owner} expected inputs as a tensor, a list, a dict or a tuple of arguments, got {inputs!r:.80}.")
    if chunk is None:
        return [args]
    chunk = count(owner, "chunk", chunk)
    if len(sizes) > 1:
        raise ValueError(f"{owner} expected inputs of one batch size to take in chunks, got {sorted(sizes)}: leave chunk out.")
    starts = range(0, max(*sizes, 1), chunk)
    return [map_tensors(args, lambda t, i=i: t[i : i + chunk] if t.ndim else t) for i in starts]  # type: ignore[misc]


def heads(name: str, output: Any) -> dict[Any, Tensor]:
    """The logits by head."""
    if isinstance(output, list | tuple):
        output = dict(enumerate(output))
    found = dict(output) if isinstance(output, Mapping) else {ONLY: output}
    if not found:
        raise ValueError(f"{name} expected logits from the model, got none: {output!r}.")
    for head, logits in found.items():
        where = name if head is ONLY else f"{name} head {head!r}"
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
            raise TypeError(f"{where} expected logits from the model, one floating-point tensor (b k) per head, got {got}.")
        if logits.ndim == 2 and logits.shape[1] == 1:
            raise ValueError(f"{where} got a single logit z, {tuple(logits.shape)}: give two, torch.cat([0 * z, z], 1).")
        if logits.ndim != 2 or not logits.shape[1]:
            raise ValueError(f"{where} expected logits (b k) from the model, k >= 2, got {tuple(logits.shape)}.")
    return found


def check_alike(name: str, logits: Mapping[Any, Tensor], first: Mapping[Any, Tensor]) -> None:
    """Raise a `ValueError` unless a pass gives heads of the shapes that the first one gave."""
    one, other = ({head: tuple(t.shape) for head, t in each.items()} for each in (logits, first))
    if one != other:
        raise ValueError(f"{name} gives logits {spelled(one)}, but the first pass gave {spelled(other)}.")


def spelled(shapes: Mapping[Any, tuple[int, ...]]) -> str:
    """The shapes of heads as messages show them."""
    return str(shapes.get(ONLY, shapes))


def joined(parts: Sequence[Uncertainty]) -> Uncertainty:
    """The uncertainty of a batch from those of its chunks."""
    return Uncertainty(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Uncertainty)))


def random_sources(models: Iterable[nn.Module], inputs: Any) -> list[torch.Generator]:
    """Where dropout draws from on the CPU and on every device that models and inputs are on."""
    held = chain.from_iterable(chain(model.parameters(), model.buffers()) for model in models)
    devices = {tensor.device for tensor in chain(held, (tensor for _, tensor in tensors_in(inputs)))}
    sources = [torch.default_generator]
    for device in sorted(devices, key=str):
        if device.type == "mps":
            sources.append(torch.mps._get_default_mps_generator())
        elif device.type not in ("cpu", "meta"):
            sources.append(torch.get_device_module(device).default_generators[device.index])
    return sources


@contextmanager
def seeded(owner: str, sources: Sequence[torch.Generator], generator: torch.Generator | None) -> Iterator[None]:
    """Within this context the sources follow the generator, if there is one; afterwards they are where they were."""
    if generator is None:
        yield
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"{owner} expected a torch.Generator, got {generator!r}: torch.Generator().manual_seed(0).")
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    states = [source.get_state() for source in sources]
    try:
        for source in sources:
            source.manual_seed(seed)
        yield
    finally:
        for source, state in zip(sources, states, strict=True):
            source.set_state(state)


@contextmanager
def dropping(name: str, args: tuple, sources: Sequence[torch.Generator]) -> Iterator[None]:
    """Around one pass: functional dropout is on. A `ValueError` if nothing was drawn, for then all passes are equal."""
    before = [source.get_state() for source in sources]
    with eagerly(), DropoutMode():
        yield
    drawn = any(not torch.equal(source.get_state(), state) for source, state in zip(sources, before, strict=True))
    if not drawn and all(tensor.numel() for _, tensor in tensors_in(args)):
        raise ValueError(f"{name} found no active dropout in the model: drifa_attn.add_dropout(model, 0.1) puts it in.")
