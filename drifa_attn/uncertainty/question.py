"""One question to one network after another: its passes, and the running answer, in which no pass is kept."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from drifa_attn.checks import check_kinds
from drifa_attn.network.modes import eval_mode
from drifa_attn.randomness import sources

from .dropout import is_dropout
from .heads import ONLY, Heads, check_head, check_heads, kinds_given, picked
from .passes import Stream, called, calls, dropping, tensors_of
from .result import joined
from .running import RUNNING


class Question:
    """What is asked, with the arguments of `mc_dropout`, and the answer so far, one part for each chunk of the batch."""

    def __init__(
        self, owner: str, inputs: Any, kwargs: Mapping[str, Any] | None, *, heads: Heads, kinds: Any, chunk: int | None
    ) -> None:
        check_heads(owner, heads)
        check_kinds(owner, kinds)
        self.heads, self.kinds = heads, kinds
        self.calls = calls(owner, inputs, kwargs, chunk)
        self.parts: list[Part] = [Part() for _ in self.calls]
        self.passes = 0

    @torch.no_grad()
    def ask(self, name: str, model: nn.Module, passes: int | None, stream: Stream) -> None:
        """Run the passes of one network, which messages call by this name, a chunk of the batch at a time."""
        drawn_from = sources(model, beside=[tensor for call in self.calls for tensor in tensors_of(call)])
        with eval_mode(model, but=is_dropout if passes else None), stream.drawn_by(drawn_from):
            for call, part in zip(self.calls, self.parts, strict=True):
                for _ in range(passes or 1):
                    with nullcontext() if passes is None else dropping(name, call, drawn_from):
                        part.add(name, picked(name, called(name, model, call), self.heads), self)
        self.passes += passes or 1

    def answer(self) -> Any:
        """The results of the whole batch by head, or of its only head."""
        results = [part.results() for part in self.parts]
        whole = {head: joined([one[head] for one in results]) for head in results[0]}
        return whole.get(ONLY, whole)


class Part:
    """The running results for one chunk of the batch, by head."""

    def __init__(self) -> None:
        self.running: dict[Any, Any] = {}
        self.shapes: dict[Any, tuple[int, ...]] = {}

    def add(self, name: str, found: Mapping[Any, Tensor], question: Question) -> None:
        """Take one more pass, with heads and shapes as in the first one."""
        kinds = kinds_given(name, question.kinds, question.heads, found)
        for head, output in found.items():
            check_head(name, head, output, kinds[head])
        shapes = {head: tuple(output.shape) for head, output in found.items()}
        if not self.running:
            self.running, self.shapes = {head: RUNNING[kind]() for head, kind in kinds.items()}, shapes
        if shapes != self.shapes:
            one, other = (each.get(ONLY, each) for each in (shapes, self.shapes))
            raise ValueError(f"{name} gives logits {one}, but the first pass gave {other}.")
        for head, output in found.items():
            self.running[head].add(output)

    def results(self) -> dict[Any, Any]:
        """The result of every head so far."""
        return {head: running.result() for head, running in self.running.items()}
