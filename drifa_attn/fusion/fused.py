"""`Fused`: backbones that advance together, refined after every stage, read out into one vector, with one head per task."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from drifa_attn.layout import Place, positions
from drifa_attn.network.glue import enter, leave
from drifa_attn.network.inputs import as_call
from drifa_attn.network.lockstep import Part
from drifa_attn.network.modes import without_statistics
from drifa_attn.network.site import Site
from drifa_attn.trees import at_path, map_tensors, replace_tensor

from .plan import FusionPlan, planned
from .presence import checked_inputs, cleared, first_tensor, presence, present_rows
from .protocol import Readout, Refiner


class Fused(nn.Module):
    """Several backbones in lockstep, refined after every stage, one linear head per task; `fuse` builds it.

        v_i = mean(branch_i(x_i)), refined after every stage        logits = lin(head, readout(v_1, …, v_m))

    Absent modalities add nothing to a gate. What the readout makes of them, it says. In training a branch runs on the samples
    that have its modality alone, so that batch norms see no others, and on none it does not run at all. In eval mode, where
    nothing depends on the batch, absent samples run as zeros. So they do in compiled code, whose shapes may not depend on
    values: where batch norms train and samples are absent, train uncompiled.

    Attributes:
        branches: the backbones by modality, the same objects that were given.
        refiners: one per stage, for DRIFA a MIFA, or none at all; `stages` are its sites by modality. `gates` shows their
            gates, `disabled` switches them off.
        readout: makes one vector per sample of all branches.
        plan: which features meet where, and what the fusion costs there; `print` it.
        heads: one linear layer per task.
        modality_dropout: in training, the probability that a present modality is dropped; a sample keeps at least one.

    Shape: {modality: what its backbone takes, `b …`: a tensor, a tuple of arguments or a dict of keyword arguments}, present
        `b m` (bool, modalities in the order of `branches`) -> {task: logits `b k`}. A modality that is not in the dict, or is
        None there, is absent from the whole batch.
    Raises: ValueError, TypeError: an unknown modality, an empty dict, unequal batch sizes, or a `present` that is not
        `b m` of bool.
    Differs: the paper fuses two ResNet-18 of its own. Other backbones, other numbers of them, and absent modalities are not in
        it.
    """

    pretrained_cfg = {"classifier": ("readout", "heads")}  # as timm's networks state theirs
    drifa_parts = "its branches, net.branches[name]"  # what `wrap` is to be given instead

    def __init__(
        self,
        branches: Mapping[str, nn.Module],
        refiners: Iterable[Refiner],
        readout: Readout,
        tasks: Mapping[str, int],
        *,
        stages: Sequence[Mapping[str, Site]],
        outputs: Mapping[str, Site],
        parts: Mapping[str, Mapping[bool, Sequence[Part]]],
        dropout: float,
        modality_dropout: float,
        recipe: Mapping[str, Any],
        flops: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.branches, self.refiners, self.readout = nn.ModuleDict(branches), nn.ModuleList(refiners), readout
        self.heads = nn.ModuleDict(
            {task: nn.Linear(readout.width, classes, device=device, dtype=dtype) for task, classes in tasks.items()}
        )
        self.modalities = list(branches)  # the compiler of torch 2.6 does not list a ModuleDict
        self.dropout = nn.Dropout(dropout)
        self.modality_dropout = modality_dropout
        self.stages, self.outputs, self.parts, self.recipe = stages, outputs, parts, dict(recipe)
        self.flops, self.checkpoints = flops, False
        readout.names = tuple(branches)
        for refiner, sites in zip(self.refiners, stages, strict=False):
            refiner.names = tuple(sites)  # type: ignore[assignment]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute what lies between two stages in the backward pass instead of keeping it."""
        self.checkpoints = enable

    def forward(self, inputs: Mapping[str, Any], present: Tensor | None = None) -> dict[str, Tensor]:
        """The logits of every task."""
        vectors, kept, present = self.advance(inputs, present)
        vectors = [vector.to(self.dtype) for vector in vectors]
        fused = self.dropout(self.readout(vectors, kept, present))
        if not self.readout.reads_vectors:  # DDP expects a gradient, if a zero one, of what comes behind the last maps too
            fused = fused + sum(0 * vector.sum() for vector in vectors)
        return {task: head(fused) for task, head in self.heads.items()}

    def features(self, inputs: Mapping[str, Any], present: Tensor | None = None) -> dict[str, Tensor]:
        """The pooled features `b c` of every branch, zeros for a modality that the whole batch lacks."""
        return dict(zip(self.modalities, self.advance(inputs, present)[0], strict=True))

    def losses(self) -> dict[str, Tensor]:
        """Auxiliary losses of the last forward in training, weighted, for `TaskLoss`; {} for most fusions."""
        return self.readout.losses()

    def advance(
        self, inputs: Mapping[str, Any], present: Tensor | None
    ) -> tuple[list[Tensor], dict[int, list[Tensor]], Tensor | None]:
        """All branches from their inputs to their vectors, the refined features that the readout keeps, and who is present."""
        inputs = checked_inputs(inputs, self.modalities, present)
        present = presence(inputs, self.modalities, present, self.modality_dropout if self.training else 0)
        run = Advance(self, first_tensor(inputs), present)
        for i, name in enumerate(self.modalities):
            if name in inputs:
                run.begin(name, inputs[name], None if present is None else present[:, i], alone=self.training)
        for k, sites in enumerate(self.stages):
            run.stage(self.refiners[k] if len(self.refiners) else None, sites)
        return [run.vector(name, site) for name, site in self.outputs.items()], run.kept, present

    @property
    def plan(self) -> FusionPlan:
        """Which features meet where, what the fusion adds there, and what the heads read; `print` it."""
        return planned(self)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the heads."""
        return next(self.heads.parameters()).dtype

    def run(self, name: str, k: int, state: tuple[Any, ...]) -> Any:
        """Part k of a branch."""
        branch = self.branches[name]
        part = self.parts[name][branch.training][k]
        if self.checkpoints and torch.is_grad_enabled():
            if torch.compiler.is_compiling():
                return checkpoint(part.run, branch, *state, use_reentrant=False)
            # The second run computes what the first did, and its batch norms must not count the batch again.
            contexts = lambda: (nullcontext(), without_statistics(branch))  # noqa: E731
            return checkpoint(part.run, branch, *state, use_reentrant=False, context_fn=contexts)
        return part.run(branch, *state)

    def extra_repr(self) -> str:
        return "\n".join(
            f"stage {k}: " + ", ".join(f"{name} {site.name}" for name, site in sites.items())
            for k, sites in enumerate(self.stages)
        )


class Advance:
    """One forward of the branches of a fused network, stage by stage."""

    def __init__(self, net: Fused, sample: Tensor, present: Tensor | None) -> None:
        self.net, self.sample, self.present = net, sample, present
        self.states: dict[str, tuple[Any, ...]] = {}  # what the next part of a branch takes
        self.rows: dict[str, Tensor] = {}  # the samples that a branch runs on, where those are not all
        self.done = dict.fromkeys(net.modalities, 0)  # how many of its parts a branch has run
        self.unused: dict[str, Any] = dict.fromkeys(net.modalities, 0)  # zeros that hold the parameters of absent branches
        self.kept: dict[int, list[Tensor]] = {}
        self.number = 0

    def begin(self, name: str, given: Any, has: Tensor | None, *, alone: bool) -> None:
        """Put an input into its branch: with `alone` only the samples that have it, else the others too, as zeros."""
        rows = present_rows(has) if alone else None
        if rows is not None:
            if not len(rows):
                return  # as if it were not given
            self.rows[name] = rows
        inputs = as_call(map_tensors(given, lambda x: cleared(x, has) if rows is None else x[rows]))
        self.states[name] = (enter(self.net.branches[name], *inputs),)

    def whole(self, name: str, y: Tensor) -> Tensor:
        """A feature of the samples that a branch ran on, with zeros for the others."""
        if name not in self.rows:
            return y
        return y.new_zeros(self.sample.shape[0], *y.shape[1:]).index_copy(0, self.rows[name], y)

    def stage(self, refiner: nn.Module | None, sites: Mapping[str, Site]) -> None:
        """Run the branches that meet here up to this stage, and refine their features."""
        outputs = {n: self.net.run(n, self.done[n], self.states[n]) for n in sites if n in self.states}
        xs = [
            self.whole(name, at_path(outputs[name][0], site.path)) if name in outputs else self.stand_in(site)
            for name, site in sites.items()
        ]
        seen = None if self.present is None else self.present[:, [self.net.modalities.index(name) for name in sites]]
        ys = xs if refiner is None else refiner(xs, seen)
        if self.number in self.net.readout.keeps:
            self.kept[self.number] = ys
        for (name, site), y in zip(sites.items(), ys, strict=True):
            self.done[name] += 1
            if name in outputs:
                output, handed = outputs[name]
                y = y[self.rows[name]] if name in self.rows else y
                self.states[name] = (replace_tensor(output, site.path, lambda _, y=y: y), *handed)  # type: ignore[misc]
            else:
                self.unused[name] = self.unused[name] + 0 * y.sum()
        self.number += 1

    def stand_in(self, place: Place) -> Tensor:
        """Zeros in the place of a feature, for a modality that the whole batch lacks; they take no memory."""
        zero = self.sample.new_zeros([1] * (1 + len(place.shape)), dtype=self.net.dtype)
        return zero.expand(self.sample.shape[0], *place.shape)

    def vector(self, name: str, site: Site) -> Tensor:
        """The pooled output of a branch after its last part."""
        if name in self.states:
            whole = leave(self.net.branches[name], self.net.run(name, self.done[name], self.states[name]))
            output = at_path(whole, site.path)
            pooled = output if output.ndim == 2 else positions(output, site.layout, site.num_prefix_tokens).mean(-1)
            return self.whole(name, pooled)
        # DDP expects a gradient, if a zero one, for every parameter of a branch that did not run.
        zero = self.unused[name] + sum((0 * p.sum() for p in self.net.branches[name].parameters() if p.requires_grad), 0)
        return self.sample.new_zeros(self.sample.shape[0], site.channels, dtype=self.net.dtype) + zero
