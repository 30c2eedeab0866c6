"""The three networks that are compared, called alike: images by branch in, logits by task out."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import drifa_attn
from examples.drifa_net.data import Data
from examples.drifa_net.model import DrifaNet
from examples.drifa_net.records import read_record

MODELS = ("drifa_net", "fuse", "concat")

CALIBRATION = 64  # training images that attention is fitted to

Inputs = dict[str, Tensor]  # images by branch
Labels = dict[str, Tensor]  # classes by task


class Named(nn.Module):
    """A DRIFA-Net whose branches and tasks have names.

    Shape: {branch: images `b c h w`} -> {task: logits `b k`}.
    """

    def __init__(self, branches: Sequence[str], tasks: Mapping[str, int], **options: Any) -> None:
        super().__init__()
        self.names, self.tasks = tuple(branches), tuple(tasks)
        self.net = DrifaNet(tuple(tasks.values()), branches=len(branches), **options)
        for part in self.net.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.momentum = 0.1  # the released 0.01 takes hundreds of steps to forget its start: too many for short runs

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The logits of every task."""
        return dict(zip(self.tasks, self.net([inputs[name] for name in self.names]), strict=True))

    def features(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The pooled features `b c` of every branch."""
        fused = self.net.features([inputs[name] for name in self.names])
        return dict(zip(self.names, fused.chunk(len(self.names), 1), strict=True))


def build(configuration: Mapping[str, Any], data: Data) -> nn.Module:
    """The network of a run.

    Args:
        configuration: its "model", with "width" and "reduction" of a DRIFA-Net, or "backbones" and "pretrained" of the others,
            and the "fusion" of fuse.
        data: whose branches and tasks it gets.

    Raises: ValueError: backbones that timm does not have, that are neither one nor one per branch, or that cannot be fused.
    """
    images, _ = data.test[0]
    shapes = {branch: tuple(image.shape) for branch, image in zip(data.branches, images, strict=True)}
    tasks = {task: len(classes) for task, classes in data.tasks.items()}
    if configuration["model"] == "drifa_net":
        kind = {"width": configuration["width"], "reduction": configuration["reduction"]}
        return Named(data.branches, tasks, in_channels=[shape[0] for shape in shapes.values()], **kind)
    names = configuration["backbones"]
    if len(names) not in (1, len(shapes)):
        raise ValueError(f"--backbones expected one network, or one for each of the branches {list(shapes)}, got {names}.")
    backbones = {}
    for name, (branch, shape) in zip(names * (len(shapes) // len(names)), shapes.items(), strict=True):
        backbones[branch] = backbone(name, shape, pretrained=configuration["pretrained"])
    fusion = "concat" if configuration["model"] == "concat" else configuration.get("fusion", "mifa")
    examples = {branch: torch.zeros(2, *shape) for branch, shape in shapes.items()}
    return drifa_attn.fuse(backbones, tasks, fusion=fusion, dropout=0.25, example_inputs=examples)


def calibrate(net: nn.Module, data: Data) -> None:
    """Fit the paper's attention of a fused network, before training, to training images; fewer than 16 are too few."""
    count = min(len(data.train), CALIBRATION)
    if isinstance(net, drifa_attn.Fused) and attentions(net) and count >= 16:
        samples = [data.train[i] for i in range(count)]
        images = [torch.stack(branch) for branch in zip(*(images for images, _ in samples), strict=True)]
        inputs, _ = named(images, torch.stack([targets for _, targets in samples]), data, torch.device("cpu"))
        drifa_attn.calibrate(net, inputs)


@torch.no_grad()
def rehearse(net: nn.Module, data: Data) -> None:
    """Raise a `ValueError` unless the network takes images of these sizes."""
    images, _ = data.test[0]
    inputs = {branch: image.expand(2, -1, -1, -1) for branch, image in zip(data.branches, images, strict=True)}
    device = next(net.parameters()).device
    try:
        net.eval()({branch: image.to(device) for branch, image in inputs.items()})
    except Exception as error:  # networks refuse sizes in their own ways
        sizes = {branch: tuple(image.shape[1:]) for branch, image in inputs.items()}
        raise ValueError(f"the network cannot take images of these sizes, {sizes}: give another --size. {error}") from error


def groups(net: nn.Module, lr: float) -> list[dict[str, Any]]:
    """The weights for an optimizer; what refines in a fused network gets five times the rate."""
    if not isinstance(net, drifa_attn.Fused):
        return [{"params": list(net.parameters()), "lr": lr}]
    return drifa_attn.parameter_groups(net, lr, 5 * lr)


def named(images: Sequence[Tensor], targets: Tensor, data: Data, device: torch.device) -> tuple[Inputs, Labels]:
    """A batch of the data by names, on the device."""
    inputs = {branch: image.to(device, non_blocking=True) for branch, image in zip(data.branches, images, strict=True)}
    return inputs, dict(zip(data.tasks, targets.to(device, non_blocking=True).unbind(1), strict=True))


def restored(folder: Path, data: Data) -> tuple[nn.Module, dict[str, Any]]:
    """The network that a finished run left in its folder, in eval mode, and the run's record.

    Raises: ValueError: no finished run, or one on other data.
    """
    run, weights = read_record(folder / "run.json"), folder / "model.safetensors"
    if run["data"] != json.loads(json.dumps(data.report)):
        raise ValueError(
            f"{folder} was trained on other data, {run['configuration']['data']}: give the same --data and --size."
        )
    net = build({**run["configuration"], "pretrained": False}, data)
    try:
        net.load_state_dict(load_file(weights))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{weights} is damaged, or of another network: train again. {error}") from error
    return net.eval(), run


def backbone(name: str, shape: Sequence[int], *, pretrained: bool) -> nn.Module:
    """A timm network without its classifier, for images of this shape."""
    if not timm.is_model(name):
        similar = timm.list_models(f"*{name.partition('_')[0].rstrip('0123456789')}*")[:5]
        raise ValueError(f"--backbones: timm has no network {name!r}. Similar names: {', '.join(similar) or 'none'}.")
    try:
        fixed = timm.get_pretrained_cfg(name, allow_unregistered=False).fixed_input_size
        options = {"img_size": tuple(shape[1:])} if fixed else {}
        return timm.create_model(name, pretrained=pretrained, num_classes=0, in_chans=shape[0], **options)
    except Exception as error:  # networks refuse sizes, and downloads fail, in their own ways
        raise ValueError(f"--backbones {name} cannot be had for images {tuple(shape)}: {error}") from error


def attentions(net: nn.Module) -> dict[str, nn.Module]:
    """Every MFA and MIFA of a network, in the order of its parts."""
    return {name: part for name, part in net.named_modules() if isinstance(part, drifa_attn.MFA | drifa_attn.MIFA)}
