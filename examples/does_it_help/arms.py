"""The arms of the comparison: what each trains of a pretrained network, besides its head."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import drifa_attn

from .networks import halves

HEAD_RATE, ATTENTION_RATE = 3e-3, 1e-2  # of what an arm's own rate is not for
WEIGHT_DECAY = 1e-2


class Doubled(nn.Module):
    """Twice the features. As attention, of a strength s, it is a learned constant per channel: `x + s · (2x − x)`."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Twice the features x."""
        return 2 * x


@dataclass(frozen=True)
class Arm:
    """One way to adapt a pretrained network.

    Attributes:
        wrap: what `drifa_attn.wrap` is given; None: no attention.
        calibrates: whether the attention is calibrated before training.
        tunes: which weights of the network itself are trained, and get the arm's rate: "nothing", "norms", "lora" or "all".
    """

    wrap: Mapping[str, Any] | None = None
    calibrates: bool = False
    tunes: str = "nothing"
    options: Mapping[str, Any] = field(default_factory=dict)


MFA: dict[str, Any] = {"wrap": {}, "calibrates": True}
SE: dict[str, Any] = {"wrap": {"attention": "se"}}
ARMS = {
    "head only": Arm(),
    "constant": Arm({"attention": Doubled}),
    "MFA": Arm(**MFA),
    "MFA, uncalibrated": Arm({}),
    "MFA, dense": Arm({"reduction": None}, calibrates=True),
    "SE": Arm(**SE),
    "ECA": Arm({"attention": "eca"}),
    "CBAM": Arm({"attention": "cbam"}),
    "norms": Arm(tunes="norms"),
    "norms + MFA": Arm(**MFA, tunes="norms"),
    "norms + SE": Arm(**SE, tunes="norms"),
    "LoRA": Arm(tunes="lora"),
    "all": Arm(tunes="all"),
    "all + MFA": Arm(**MFA, tunes="all"),
    "all + SE": Arm(**SE, tunes="all"),
}
Groups = list[dict[str, Any]]


def adapted(model: nn.Module, arm: Arm, sites: tuple[str, ...], images: Tensor) -> tuple[nn.Module, nn.Module]:
    """A pretrained network made ready for an arm, in two parts: the first stays as it is, the second is trained.

    What the second part trains takes gradients, and nothing else does. Calibration reads the images.
    """
    model.requires_grad_(False)
    model.get_classifier().requires_grad_(True)
    if arm.wrap is not None:
        drifa_attn.wrap(model, list(sites), example_input=images[:1], **arm.wrap)
        if arm.calibrates:
            drifa_attn.calibrate(model, images)
    if arm.tunes == "all":
        model.requires_grad_(True)
    elif arm.tunes == "norms":
        for norm in norms(model):
            norm.requires_grad_(True)
    before, behind = halves(model, sites) if arm.tunes in ("nothing", "lora") else (nn.Identity(), model)
    if arm.tunes == "lora":
        add_lora(behind)
    return before, behind


def norms(model: nn.Module) -> list[nn.Module]:
    """The batch norms of the network itself."""
    held = drifa_attn.attention_parameters(model) if refined(model) else []
    added = {id(parameter) for parameter in held}
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d) and not any(id(parameter) in added for parameter in module.parameters())
    ]


def refined(model: nn.Module) -> bool:
    """Whether a network holds attention."""
    try:
        return bool(drifa_attn.attention_parameters(model))
    except ValueError:
        return False


def add_lora(model: nn.Module, weights: int = 20_800) -> None:
    """LoRA of rank one by peft, on the last 1x1 convolutions, about as many weights as MFA has at the three sites."""
    from peft import LoraConfig, inject_adapter_in_model  # not above: only this arm needs it

    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)]
    chosen: list[str] = []
    while names and weights > 0:
        chosen.append(names.pop())
        convolution = model.get_submodule(chosen[-1])
        weights -= convolution.in_channels + convolution.out_channels  # type: ignore[operator]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inject_adapter_in_model(LoraConfig(r=1, lora_alpha=1, target_modules=chosen), model)
    for parameter in trained:
        parameter.requires_grad_(True)


def groups(model: nn.Module, head: nn.Module, arm: Arm, rate: float) -> Groups:
    """What takes gradients, with its rates: the arm's own is for what it tunes, else for its attention, else for the head."""
    if refined(model):
        own = arm.tunes != "nothing"
        attention_lr = ATTENTION_RATE if own else rate
        found = drifa_attn.parameter_groups(
            model, rate if own else HEAD_RATE, attention_lr, weight_decay=WEIGHT_DECAY, classifier="classifier"
        )
        for group in found:
            if group["name"].startswith("head"):
                group["lr"] = HEAD_RATE
        return found
    of_head = {id(parameter) for parameter in head.parameters()}
    found = []
    for part, lr in (("head", rate if arm.tunes == "nothing" else HEAD_RATE), ("rest", rate)):
        for decays in (True, False):  # as in drifa_attn.parameter_groups: no decay of vectors
            parameters = [
                parameter
                for parameter in model.parameters()
                if parameter.requires_grad and (id(parameter) in of_head) == (part == "head") and (parameter.ndim > 1) == decays
            ]
            if parameters:
                found.append({"params": parameters, "lr": lr, "weight_decay": WEIGHT_DECAY if decays else 0.0})
    return found


def trained_weights(model: nn.Module) -> int:
    """How many numbers take gradients."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def deviations(model: nn.Module, inputs: Tensor) -> list[float]:
    """How much the gates attend: for each site the deviation of a channel's gain over the inputs, mean over channels."""
    parts = [drifa_attn.gains(model, some) for some in inputs.split(256)]
    return [torch.cat([part[site] for part in parts]).std(0).mean().item() for site in parts[0]]


@torch.no_grad()
def batched(module: nn.Module, images: Tensor, size: int = 256) -> Tensor:
    """What a module makes of images, a batch at a time."""
    return torch.cat([module(part) for part in images.split(size)])
