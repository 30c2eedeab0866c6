"""The plan of a fused network: which features meet where, what the fusion adds there, and what the heads read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from drifa_attn.layout import Place
from drifa_attn.network.copies import meta_clone
from drifa_attn.network.site import Site
from drifa_attn.wrapping.table import count, layout_text, share, table

from .protocol import Untouched


@dataclass(frozen=True)
class PlannedStage:
    """A stage, and what the fusion adds there.

    Attributes:
        sites: the features that meet, by modality.
        refiner: the class of what refines them; None where they pass on as they are.
        note: why they do, or what else there is to say; else empty.
        read: whether the readout reads their maps.
        params: of the refiner.
        flops: of the refiner's matrix products for one sample, two for a multiply-add.
    """

    sites: Mapping[str, Site]
    refiner: str | None
    note: str
    read: bool
    params: int
    flops: int


@dataclass(frozen=True)
class FusionPlan:
    """What a fused network does beside its branches; `print` shows it as a table.

    Attributes:
        fusion: its name, or that of its class.
        options: as given.
        stages: in calling order; none where only the vectors at the end meet.
        readout: the class of the readout.
        vectors: the channels of each branch's vector, by modality.
        reads_vectors: whether the readout reads them.
        width: of the vector that the heads read.
        tasks: the classes of each task.
        readout_params: of the readout.
        readout_flops: of the readout, for one sample.
        params: of the branches.
        flops: of the branches, for one sample.
    """

    fusion: str
    options: Mapping[str, Any]
    stages: tuple[PlannedStage, ...]
    readout: str
    vectors: Mapping[str, int]
    reads_vectors: bool
    width: int
    tasks: Mapping[str, int]
    readout_params: int
    readout_flops: int
    params: int
    flops: int

    def __str__(self) -> str:
        return plan_text(self)


def planned(net: Any) -> FusionPlan:
    """The plan of a fused network; what it holds is counted on copies without memory."""
    fusion, stages = net.recipe["fusion"], []
    for k, sites in enumerate(net.stages):
        refiner = net.refiners[k] if len(net.refiners) else None
        acts = refiner is not None and not isinstance(refiner, Untouched)
        stages.append(
            PlannedStage(
                sites=dict(sites),
                refiner=type(refiner).__name__ if acts else None,
                note=getattr(refiner, "reason", ""),
                read=k in net.readout.keeps,
                params=size(refiner) if acts else 0,
                flops=flops(refiner, [features(list(sites.values())), None]) if acts else 0,
            )
        )
    kept = {k: features(list(net.stages[k].values())) for k in net.readout.keeps}
    vectors = [torch.empty(2, site.channels, device="meta") for site in net.outputs.values()]
    return FusionPlan(
        fusion=fusion if isinstance(fusion, str) else fusion.__name__,
        options=net.recipe["fusion_options"],
        stages=tuple(stages),
        readout=type(net.readout).__name__,
        vectors={name: site.channels for name, site in net.outputs.items()},
        reads_vectors=net.readout.reads_vectors,
        width=net.readout.width,
        tasks={task: head.out_features for task, head in net.heads.items()},
        readout_params=size(net.readout),
        readout_flops=flops(net.readout, [vectors, kept, None]),
        params=size(net.branches),
        flops=net.flops,
    )


def size(module: nn.Module | None) -> int:
    """The number of parameters."""
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


def features(places: Sequence[Place]) -> list[Tensor]:
    """Features of these places without memory, of two samples."""
    return [torch.empty(2, *place.shape, device="meta") for place in places]


def flops(module: Callable[..., Any] | None, args: Sequence[Any]) -> int:
    """The FLOPs of a module's matrix products for one sample."""
    from torch.utils.flop_counter import FlopCounterMode  # not above: it imports triton

    copy = meta_clone(module).float().eval()  # type: ignore[arg-type]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy(*args)
    return counter.get_total_flops() // 2


def plan_text(plan: FusionPlan) -> str:
    """What `print(plan)` shows."""
    header = ("stage", "modality", "site", "features", "layout", "refiner", "params", "FLOPs")
    met = [(k, stage) for k, stage in enumerate(plan.stages) if stage.refiner or stage.read or stage.note]
    rows = [row for k, stage in met for row in stage_rows(k, stage)]
    options = ", ".join(f"{key}={value!r}".replace("'", '"') for key, value in plan.options.items())
    params = plan.readout_params + sum(stage.params for stage in plan.stages)
    total = plan.readout_flops + sum(stage.flops for stage in plan.stages)
    heads = ", ".join(f"{task} ({classes})" for task, classes in plan.tasks.items())
    vectors = " + ".join(f"{channels} of {name}" for name, channels in plan.vectors.items())
    maps = ", ".join(str(k) for k, stage in enumerate(plan.stages) if stage.read)
    read = [f"the vectors, {vectors}"] * plan.reads_vectors + [f"the maps of stage {maps}"] * bool(maps)
    lines = [
        f'fusion="{plan.fusion}"({options}) of {", ".join(plan.vectors)}',
        *(table(header, rows, left=6) if rows else ["  no stages meet: every branch runs to its end"]),
        f"{plan.readout} reads {', and '.join(read)}; it has {count(plan.readout_params)} parameters and "
        f"{count(plan.readout_flops)} FLOPs",
        f"heads read {plan.width} numbers per sample: {heads}",
        f"the fusion adds {count(params)} parameters ({share(params, plan.params)} of {count(plan.params)}) and {count(total)} "
        f"FLOPs per sample ({share(total, plan.flops)} of {count(plan.flops)})",
    ]
    return "\n".join([*lines, *(f"stage {k} is left alone: {s.note}" for k, s in enumerate(plan.stages) if s.note)])


def stage_rows(k: int, stage: PlannedStage) -> list[tuple[str, ...]]:
    """One row per modality; the first names the stage and its costs."""
    rows: list[tuple[str, ...]] = []
    for i, (modality, site) in enumerate(stage.sites.items()):
        costs = (stage.refiner or "none", count(stage.params), count(stage.flops)) if i == 0 else ("", "", "")
        rows.append((str(k) if i == 0 else "", modality, site.name, "×".join(map(str, site.shape)), layout_text(site), *costs))
    return rows
