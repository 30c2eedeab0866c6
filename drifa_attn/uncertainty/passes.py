"""One pass of a network: what it is called with, what it draws from, and what its dropout does."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from drifa_attn.checks import check_mapping, count
from drifa_attn.network.modes import eagerly
from drifa_attn.randomness import seed_from, untouched
from drifa_attn.trees import map_tensors, tensors_in

from .dropout import DropoutMode

Call = tuple[tuple, dict[str, Any]]  # positional and keyword arguments


def calls(owner: str, inputs: Any, kwargs: Mapping[str, Any] | None, chunk: int | None) -> list[Call]:
    """The arguments for each chunk of the batch."""
    check_mapping(owner, "kwargs", kwargs, "{parameter: value}")
    call = inputs if isinstance(inputs, tuple) else (inputs,), dict(kwargs or {})
    sizes = {len(tensor) for tensor in tensors_of(call) if tensor.ndim}
    if not sizes:
        raise TypeError(
            f"{owner} expected inputs as a tensor, a list, a dict or a tuple of arguments, or kwargs, got {inputs!r:.80}."
        )
    if chunk is None:
        return [call]
    chunk = count(owner, "chunk", chunk)
    if len(sizes) > 1:
        raise ValueError(f"{owner} expected inputs of one batch size to take in chunks, got {sorted(sizes)}: leave chunk out.")
    starts = range(0, max(*sizes, 1), chunk)
    return [map_tensors(call, lambda t, i=i: t[i : i + chunk] if t.ndim else t) for i in starts]  # type: ignore[misc]


def tensors_of(call: Call) -> list[Tensor]:
    """The tensors among the arguments."""
    return [tensor for _, tensor in tensors_in(call)]


def called(name: str, model: nn.Module, call: Call) -> Any:
    """What the model gives; where it fails with a dict of its own parameters, the error says how to give those."""
    args, kwargs = call
    try:
        return model(*args, **kwargs)
    except Exception as error:
        if len(args) == 1 and not kwargs and are_keywords(model, args[0]):
            raise TypeError(
                f"{name} gave the model one dict with {list(args[0])} as its one argument, and got {type(error).__name__}: "
                f"{error}. For keyword arguments of these names leave inputs out and pass kwargs={{...}}."
            ) from error
        raise


def are_keywords(model: nn.Module, given: Any) -> bool:
    """Whether this is a dict by names of parameters that the model's forward is known to have."""
    try:
        return isinstance(given, Mapping) and set(given) <= {*inspect.signature(model.forward).parameters}
    except ValueError:  # a traced network has no signature
        return False


class Stream:
    """What passes draw from: with a generator a stream of its own, which nothing between them moves, else the global one."""

    def __init__(self, owner: str, generator: torch.Generator | None) -> None:
        self.seed = seed_from(owner, generator)
        self.states: dict[torch.Generator, Tensor] = {}

    @contextmanager
    def drawn_by(self, sources: Sequence[torch.Generator]) -> Iterator[None]:
        """Within this context the global generators follow the stream; afterwards they are where they were."""
        if self.seed is None:
            yield
            return
        with untouched(sources):
            for source in sources:
                if source in self.states:
                    source.set_state(self.states[source])
                else:
                    source.manual_seed(self.seed)
            yield
            self.states.update((source, source.get_state()) for source in sources)


@contextmanager
def dropping(name: str, call: Call, sources: Sequence[torch.Generator]) -> Iterator[None]:
    """Around one pass: functional dropout is on. A `ValueError` if nothing was drawn, for then all passes are equal."""
    before = [source.get_state() for source in sources]
    with eagerly(), DropoutMode():
        yield
    drawn = any(not torch.equal(source.get_state(), state) for source, state in zip(sources, before, strict=True))
    if not drawn and all(tensor.numel() for tensor in tensors_of(call)):
        raise ValueError(f"{name} found no active dropout in the model: drifa_attn.add_dropout(model, 0.1) puts it in.")
