"""The arms of the comparison: each modality alone, every fusion of drifa_attn, and variants of two of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import drifa_attn

from .data import Collection

REFINING = 5  # what lies between the branches starts where it does nothing, and gets so many times the rate of the rest
BASELINE, CALIBRATED = "concat", "mifa, calibrated"


class Squashed(drifa_attn.fusion.FUSIONS["mmtm"][0]):  # type: ignore[misc]
    """MMTM with a sigmoid where it has a relu: what the modalities say together is then bounded, as in MIFA."""

    def gates(self, xs: Sequence[Tensor], present: Tensor | None = None) -> list[Tensor]:
        """The gates `b c_i` of features xs, channels first."""
        means = [x.flatten(2).mean(-1) if x.ndim > 2 else x for x in xs]
        if present is not None:
            means = [torch.where(has[:, None], mean, 0) for has, mean in zip(present.unbind(1), means, strict=True)]
        together = self.squeeze(torch.cat(means, 1)).sigmoid()
        return [excite(together).sigmoid() for excite in self.excites]


@dataclass(frozen=True)
class Arm:
    """One way to put the modalities together.

    Attributes:
        fusion, options: as `drifa_attn.fuse` takes them.
        calibrates: whether the attention is calibrated before training.
        alone: the one modality that it has; None for all.
    """

    fusion: Any = BASELINE
    options: Mapping[str, Any] = field(default_factory=dict)
    calibrates: bool = False
    alone: str | None = None


VARIANTS = {
    "mifa, wide": Arm("mifa", {"reduction": 4}),
    "mifa, wide, calibrated": Arm("mifa", {"reduction": 4}, calibrates=True),
    "mifa, paper's start": Arm("mifa", {"init": "paper"}),
    "mmtm, narrow": Arm("mmtm", {"reduction": 20}),
    "mmtm, drawn start": Arm("mmtm", {"init": "paper"}),
    "mmtm, gain below one": Arm("mmtm", {"init": "paper", "scale": 1.0}),
    "mmtm, squashed": Arm(Squashed),
}


def arms(collection: Collection) -> dict[str, Arm]:
    """Every arm of a collection by its name; a modality that no test sample has is not tried alone."""
    tested = collection.divide(0)["test"].rows
    alone = {f"{view} alone": Arm(alone=view) for view in collection.views if view in tested}
    systems = {name: Arm(name) for name in drifa_attn.fusion.FUSIONS}
    return alone | systems | {CALIBRATED: Arm("mifa", calibrates=True)} | VARIANTS


def built(collection: Collection, arm: Arm, seed: int, modality_dropout: float) -> drifa_attn.Fused:
    """The network of an arm; branches and, where they read as much, heads start alike in all arms of a seed."""
    torch.manual_seed(seed)
    branches = {name: view.branch.build() for name, view in collection.views.items()}
    if arm.alone:
        branches = {arm.alone: branches[arm.alone]}
    stages = {name: collection.views[name].branch.stages for name in branches}
    net = drifa_attn.fuse(
        branches,
        {task: len(classes) for task, classes in collection.tasks.items()},
        fusion=arm.fusion,
        fusion_options=arm.options,
        at=[dict(zip(stages, met, strict=True)) for met in zip(*stages.values(), strict=True)],
        example_inputs={name: torch.zeros(2, *collection.views[name].branch.shape) for name in branches},
        modality_dropout=modality_dropout,
        generator=torch.Generator().manual_seed(seed),
    )
    for head in net.heads.values():
        torch.manual_seed(seed)
        head.reset_parameters()  # type: ignore[operator]
    return net


def groups(net: drifa_attn.Fused, rate: float) -> list[dict[str, Any]]:
    """What takes gradients, with its rates."""
    return drifa_attn.parameter_groups(net, rate, REFINING * rate)


def trained_weights(net: nn.Module) -> int:
    """How many numbers take gradients."""
    return sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)


def added_flops(net: drifa_attn.Fused) -> int:
    """The FLOPs of matrix products that the fusion adds for one sample."""
    return net.plan.readout_flops + sum(stage.flops for stage in net.plan.stages)


def deviations(net: drifa_attn.Fused, inputs: Mapping[str, Tensor]) -> dict[str, float]:
    """How much gains differ: by stage and modality the deviation of a channel's over samples, mean over channels."""
    try:
        found = drifa_attn.gains(net, dict(inputs))
    except ValueError:  # most fusions do not multiply channels
        return {}
    return {name: gains.std(0).mean().item() for name, gains in found.items()}
