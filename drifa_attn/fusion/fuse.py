"""`fuse`: DRIFA over any backbones, Fig. 1A: they advance together, and one MIFA reads and gates all of them at every stage."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from drifa_attn.checks import Init, check_count, check_init
from drifa_attn.layout import positions
from drifa_attn.network.lockstep import Part, check_parts, cut
from drifa_attn.network.survey import Survey
from drifa_attn.network.trace import meta_clone
from drifa_attn.trees import at_path, replace_tensor
from drifa_attn.wrapping.inject import Fusion, Site, detach
from drifa_attn.wrapping.plan import PARALLEL

from .pairs import Pairs, output_of, paired


class Fused(nn.Module):
    """Several backbones in lockstep, fused by MIFA at every stage, one linear head per task; `fuse` builds it.

        f_i = mean(branch_i(x_i)), after every stage gated by MIFA        logits = lin(head, [f_1 ; … ; f_m])

    Absent modalities add nothing to a gate; at the head they are zeros, and the others are scaled by m over their number.

    Attributes:
        branches: the backbones by modality, the same objects that were given.
        fusions: one MIFA per stage, `stages` its sites by modality; `attention_maps` shows their gates, `disabled` switches
            them off.
        heads: one linear layer per task.
        modality_dropout: in training, the share of present modalities that is taken away; a sample never loses all.

    Shape: {modality: what its backbone takes, `b …`}, present `b m` (bool, modalities in the order of `branches`) ->
        {task: logits `b k`}. A modality left out of the dict is absent from the whole batch.
    Raises: ValueError, TypeError: an unknown modality, none at all, unequal batch sizes, or a `present` that is no bool `b m`.
    Differs: the paper fuses two ResNet-18 of its own; any backbones, any number, absent modalities are not in it.
    """

    pretrained_cfg = {"classifier": "heads"}  # as timm's networks state theirs

    def __init__(
        self,
        branches: Mapping[str, nn.Module],
        fusions: Sequence[Fusion],
        heads: Mapping[str, nn.Linear],
        *,
        stages: Sequence[Mapping[str, Site]],
        outputs: Mapping[str, Site],
        parts: Mapping[str, Mapping[bool, Sequence[Part]]],
        dropout: float,
        modality_dropout: float,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.branches, self.fusions, self.heads = nn.ModuleDict(branches), nn.ModuleList(fusions), nn.ModuleDict(heads)
        self.modalities = list(branches)  # the compiler of torch 2.6 does not list a ModuleDict
        self.dropout = nn.Dropout(dropout)
        self.modality_dropout = modality_dropout
        self.stages, self.outputs, self.parts, self.options = stages, outputs, parts, dict(options)
        self.checkpoints = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute what lies between two stages in the backward pass instead of keeping it."""
        self.checkpoints = enable

    def forward(self, inputs: Mapping[str, Tensor], present: Tensor | None = None) -> dict[str, Tensor]:
        """The logits of every task."""
        features, present = self.advance(inputs, present)
        if present is not None:
            kept = present.sum(1, keepdim=True).clamp(min=1)
            features = [torch.where(present[:, i, None], f, 0) * (len(features) / kept) for i, f in enumerate(features)]
        fused = self.dropout(torch.cat([feature.to(self.dtype) for feature in features], 1))
        return {task: head(fused) for task, head in self.heads.items()}

    def features(self, inputs: Mapping[str, Tensor], present: Tensor | None = None) -> dict[str, Tensor]:
        """The pooled features `b c` of every branch, zeros for a modality that the whole batch lacks."""
        return dict(zip(self.modalities, self.advance(inputs, present)[0], strict=True))

    def advance(self, inputs: Mapping[str, Tensor], present: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
        """All branches from their inputs to their pooled features, and who is present after modality dropout."""
        present = self.presence(inputs, present)
        sample = next(iter(inputs.values()))
        states: dict[str, tuple[Any, ...]] = {}
        for i, name in enumerate(self.modalities):
            if name in inputs:
                x = inputs[name]
                if present is not None and x.is_floating_point():  # what an absent sample holds reaches nothing
                    x = torch.where(present[:, i].reshape(-1, *[1] * (x.ndim - 1)), x, 0)
                states[name] = (x,)
        done = dict.fromkeys(self.modalities, 0)  # how many of its parts a branch has run
        unused: dict[str, Tensor] = {}
        for fusion, sites in zip(self.fusions, self.stages, strict=True):
            outputs = {
                name: self.run(name, ran, states[name]) for name, ran in done.items() if name in sites and name in states
            }
            xs = [at_path(outputs[n][0], s.path) if n in outputs else self.stand_in(n, s, sample) for n, s in sites.items()]
            seen = None if present is None else present[:, [self.modalities.index(name) for name in sites]]
            for (name, site), y in zip(sites.items(), fusion(xs, seen), strict=True):
                done[name] += 1
                if name in outputs:
                    output, handed = outputs[name]
                    states[name] = (replace_tensor(output, site.path, lambda _, y=y: y), *handed)  # type: ignore[misc]
                else:
                    unused[name] = unused.get(name, 0) + 0 * y.sum()
        features = []
        for name, site in self.outputs.items():
            if name in states:
                output = at_path(self.run(name, done[name], states[name]), site.path)
                features.append(output if output.ndim == 2 else positions(output, site.layout, site.num_prefix_tokens).mean(-1))
            else:  # zeros that hold every parameter of the branch, so that none is without a gradient
                zero = unused.get(name, 0) + sum((0 * p.sum() for p in self.branches[name].parameters() if p.requires_grad), 0)
                features.append(sample.new_zeros(sample.shape[0], site.channels, dtype=self.dtype) + zero)
        return features, present

    @property
    def dtype(self) -> torch.dtype:
        return next(self.heads.parameters()).dtype

    def run(self, name: str, k: int, state: tuple[Any, ...]) -> Any:
        """One part of a branch."""
        branch = self.branches[name]
        part = self.parts[name][branch.training][k]
        if self.checkpoints and torch.is_grad_enabled():
            return checkpoint(part.run, branch, *state, use_reentrant=False)
        return part.run(branch, *state)

    def stand_in(self, name: str, site: Site, sample: Tensor) -> Tensor:
        """A feature of one position for a modality that the whole batch lacks."""
        ones = [1] * (len(site.shape) - 1)
        shape = (
            (site.channels, *ones) if site.layout == "b c ..." else (*[site.num_prefix_tokens + n for n in ones], site.channels)
        )
        return sample.new_zeros(sample.shape[0], *shape, dtype=self.dtype)

    def presence(self, inputs: Mapping[str, Tensor], present: Tensor | None) -> Tensor | None:
        """Who is present, `b m`; None if all are."""
        if not isinstance(inputs, Mapping):
            raise TypeError(f"Fused expected a dict of inputs by modality, got {type(inputs).__name__}.")
        names = self.modalities
        unknown = [name for name in inputs if name not in names]
        if unknown or not inputs:
            raise ValueError(f"Fused expected inputs of some of the modalities {names}, got {list(inputs)}.")
        sizes = {name: x.shape[0] for name, x in inputs.items()}
        if any(size != next(iter(sizes.values())) for size in sizes.values()):
            raise ValueError(
                f"Fused expected one batch size for all modalities, got {sizes}: name absent samples in `present`."
            )
        sample = next(iter(inputs.values()))
        if present is not None:
            if not isinstance(present, Tensor) or present.dtype != torch.bool:
                got = present.dtype if isinstance(present, Tensor) else type(present).__name__
                raise TypeError(f"Fused expected present to be a boolean tensor (b m), got {got}: convert it with .bool().")
            if tuple(present.shape) != (sample.shape[0], len(names)):
                raise ValueError(
                    f"Fused expected present of shape (b, m) = {(sample.shape[0], len(names))}, got {tuple(present.shape)}."
                )
        drops = self.training and self.modality_dropout > 0
        if len(inputs) < len(names) or (drops and present is None):
            given = torch.tensor([name in inputs for name in names], device=sample.device)
            present = given.expand(sample.shape[0], -1) if present is None else present & given
        if drops and present is not None:
            kept = present & (torch.rand(present.shape, device=present.device) >= self.modality_dropout)
            present = torch.where(kept.any(1, keepdim=True), kept, present)
        return present

    def extra_repr(self) -> str:
        return "\n".join(
            f"stage {k}: " + ", ".join(f"{name} {site.name}" for name, site in sites.items())
            for k, sites in enumerate(self.stages)
        )


def fuse(
    backbones: Mapping[str, nn.Module],
    tasks: Mapping[str, int],
    *,
    at: Pairs = "stage",
    reduction: int | None = 16,
    dim: int | None = None,
    init: Init = "identity",
    dropout: float = 0.0,
    modality_dropout: float = 0.0,
    classifiers: Mapping[str, str] | None = None,
    example_inputs: Mapping[str, Tensor] | None = None,
) -> Fused:
    """Fuse backbones of any family, one a modality, stage by stage with MIFA, and give the whole one head per task (Fig. 1A).

        net = drifa_attn.fuse({"dermoscopy": resnet, "smear": swin}, tasks={"lesion": 7, "cell": 5})
        logits = net({"dermoscopy": x, "smear": y})

    Each backbone is cut at its stages and compared with itself, in eval and training mode, before it is used; its classifier is
    taken off (`reset_classifier(0)` where it has that, as timm's). With `init="identity"` and all modalities present, each
    branch's features equal those of its own backbone to the last bit until training moves them.

    Args:
        backbones: {modality: network}, at least one; kept as they are, wrapped or not, but for their classifiers.
        tasks: {task: classes}, at least one.
        at: "stage" pairs stages by reduction where the networks share at least two, else by fraction of depth; "block" pairs
            blocks by fraction of depth, in a network without any its stages; or a list with one {modality: module name} per
            fusion, in calling order.
        reduction: as `MIFA` takes it; not used with a `dim`.
        dim: as `MIFA` takes it.
        init: as `MIFA` takes it.
        dropout: before the heads, in [0, 1).
        modality_dropout: in training, the share of modalities taken away, in [0, 1).
        classifiers: {modality: module name} to take off where a backbone has no `reset_classifier`; others keep their output.
        example_inputs: {modality: tensor} where a network does not say what it takes.

    Raises: ValueError, TypeError: an argument out of its range, or a backbone that cannot be advanced, with the reason. The
        backbones are then untouched.
    Differs: the paper fuses two networks of its own.
    """
    check_fuse(backbones, tasks, reduction, dim, init, dropout, modality_dropout, classifiers or {}, example_inputs or {})
    classifiers, example_inputs = classifiers or {}, example_inputs or {}
    clones, surveys = {}, {}
    for name, backbone in backbones.items():
        clones[name] = without_classifier(meta_clone(backbone), name, classifiers.get(name))
        detach(clones[name])
        surveys[name] = Survey(clones[name], example_inputs.get(name))
    stages = paired(surveys, at)
    outputs = {name: output_of(name, survey) for name, survey in surveys.items()}
    parts = {}
    for name, backbone in backbones.items():
        names = [sites[name].module for sites in stages if name in sites]
        parts[name] = advanced(name, backbone, clones[name], surveys[name], names, classifiers.get(name))
    weight = next(
        (p for backbone in backbones.values() for p in backbone.parameters() if p.is_floating_point()), torch.empty(0)
    )
    kind: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    fusions = [
        Fusion(
            list(sites),
            [site.channels for site in sites.values()],
            dim=dim,
            reduction=None if dim else reduction,
            init=init,
            layout=[site.layout for site in sites.values()],
            num_prefix_tokens=[site.num_prefix_tokens for site in sites.values()],
            **kind,
        )
        for sites in stages
    ]
    width = sum(site.channels for site in outputs.values())
    return Fused(
        {name: without_classifier(backbone, name, classifiers.get(name)) for name, backbone in backbones.items()},
        fusions,
        {task: nn.Linear(width, classes, **kind) for task, classes in tasks.items()},
        stages=stages,
        outputs=outputs,
        parts=parts,
        dropout=dropout,
        modality_dropout=modality_dropout,
        options={"reduction": reduction, "dim": dim, "init": init, "classifiers": classifiers},
    )


def check_fuse(
    backbones: Any,
    tasks: Any,
    reduction: Any,
    dim: Any,
    init: str,
    dropout: float,
    modality_dropout: float,
    classifiers: Mapping[str, str],
    example_inputs: Mapping[str, Tensor],
) -> None:
    """Raise unless these are arguments of `fuse`."""
    for what, mapping in (("backbones", backbones), ("tasks", tasks)):
        if not isinstance(mapping, Mapping) or not mapping:
            raise TypeError(f"fuse expected {what} as a dict with at least one entry, got {mapping!r:.80}.")
        for name in mapping:
            if not isinstance(name, str) or not name or "." in name:
                raise ValueError(f"fuse expected the names of {what} to be strings without dots, got {name!r}.")
    for name, backbone in backbones.items():
        if not isinstance(backbone, nn.Module):
            raise TypeError(f"fuse expected a network as backbone {name!r}, got {type(backbone).__name__}.")
        if isinstance(backbone, PARALLEL) or hasattr(backbone, "_orig_mod") or backbone._compiled_call_impl is not None:
            raise ValueError(
                f"fuse got a parallel or compiled backbone {name!r}: fuse first, then make the whole parallel or compile it."
            )
    if len({id(backbone) for backbone in backbones.values()}) < len(backbones):
        raise ValueError("fuse got one network under several names: copy.deepcopy it, or give each modality its own.")
    for task, classes in tasks.items():
        check_count("fuse", f"tasks[{task!r}]", classes)
    for what, number in (("reduction", reduction), ("dim", dim)):
        if number is not None:
            check_count("fuse", what, number)
    check_init("fuse", init)
    for what, rate in (("dropout", dropout), ("modality_dropout", modality_dropout)):
        if not 0 <= rate < 1:
            raise ValueError(f"fuse expected {what} in [0, 1), got {rate!r}.")
    for what, by_name in (("classifiers", classifiers), ("example_inputs", example_inputs)):
        if unknown := [name for name in by_name if name not in backbones]:
            raise ValueError(f"fuse got {what} for {unknown}, but its modalities are {list(backbones)}.")


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


def advanced(
    modality: str, backbone: nn.Module, clone: nn.Module, survey: Survey, stages: Sequence[str], classifier: str | None
) -> dict[bool, list[Part]]:
    """The parts of a backbone for both modes, tried on a copy of it."""
    args, kwargs = survey.inputs
    try:
        if len(args) != 1 or kwargs:
            raise ValueError("it takes more than one input")
        with torch.no_grad():
            parts = {training: cut(clone.train(training), stages, args[0]) for training in (False, True)}
        if not any(p.is_meta for p in backbone.parameters()):
            trial = without_classifier(copy.deepcopy(backbone).cpu(), modality, classifier)
            trial = trial.float() if any(p.dtype is torch.float16 for p in trial.parameters()) else trial
            dtype = next((p.dtype for p in trial.parameters() if p.is_floating_point()), args[0].dtype)
            check_parts(trial, parts, stages, torch.randn(args[0].shape, generator=torch.Generator().manual_seed(0)).to(dtype))
    except Exception as error:
        raise ValueError(
            f"fuse cannot advance backbone {modality!r} ({type(backbone).__name__}) stage by stage: "
            f"{type(error).__name__}: {str(error).partition(chr(10))[0]}. Name other stages in at=, or another backbone."
        ) from error
    return parts
