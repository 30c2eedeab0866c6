"""The three networks that are compared, called alike: images by branch in, logits by task out."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
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
from examples.drifa_net.volume_net import volume_net

MODELS = ("drifa_net", "fuse", "concat")

RECORD = 64  # channels of a record's branch
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

    def forward(self, inputs: Mapping[str, Tensor], present: Tensor | None = None) -> dict[str, Tensor]:
        """The logits of every task."""
        return dict(zip(self.tasks, self.net([inputs[name] for name in self.names], present), strict=True))

    def features(self, inputs: Mapping[str, Tensor], present: Tensor | None = None) -> dict[str, Tensor]:
        """The pooled features `b c` of every branch."""
        fused = self.net.features([inputs[name] for name in self.names], present)
        return dict(zip(self.names, fused.chunk(len(self.names), 1), strict=True))


def build(configuration: Mapping[str, Any], data: Data) -> nn.Module:
    """The network of a run.

    Args:
        configuration: its "model", with "width" and "reduction" of a DRIFA-Net, or "backbones" and "pretrained" of the others,
            and the "fusion" of fuse.
        data: whose branches and tasks it gets.

    Raises: ValueError: backbones that timm does not have, that are neither one nor one per branch of images, or that cannot be
        fused; records or volumes in a DRIFA-Net.
    """
    shapes = data.shapes
    images = [branch for branch in shapes if is_image(shapes[branch])]
    tasks = {task: len(classes) for task, classes in data.tasks.items()}
    if configuration["model"] == "drifa_net":
        if len(images) < len(shapes):
            others = ", ".join(branch for branch in shapes if branch not in images)
            raise ValueError(f"--model drifa_net reads images alone, not {others}: give --model fuse, or an empty --record.")
        kind = {"width": configuration["width"], "reduction": configuration["reduction"]}
        return Named(data.branches, tasks, in_channels=[shape[0] for shape in shapes.values()], **kind)
    names, pretrained = backbone_names(configuration["backbones"], images), configuration["pretrained"]
    backbones = {
        branch: backbone(names[branch], shape, pretrained=pretrained) if branch in names else own_branch(shape)
        for branch, shape in shapes.items()
    }
    fusion = "concat" if configuration["model"] == "concat" else configuration.get("fusion", "mifa")
    examples = {branch: torch.zeros(2, *shape) for branch, shape in shapes.items()}
    return drifa_attn.fuse(backbones, tasks, fusion=fusion, dropout=0.25, example_inputs=examples)


def is_image(shape: Sequence[int]) -> bool:
    """Whether a branch of this shape sees images, not volumes or records."""
    return len(shape) == 3


def backbone_names(names: Sequence[str], images: Sequence[str]) -> dict[str, str]:
    """The network of each branch of images: one for all, or each its own."""
    if len(names) not in (1, len(images)):
        raise ValueError(f"--backbones expected one network, or one for each of the branches {list(images)}, got {names}.")
    return dict(zip(images, [*names] * (len(images) // len(names)), strict=True)) if images else {}


def own_branch(shape: Sequence[int]) -> nn.Module:
    """The branch of a record or of volumes, which timm has no networks for."""
    return volume_net(shape[0]) if len(shape) == 4 else mlp(shape)


def mlp(shape: Sequence[int]) -> nn.Module:
    """The branch of a record: two layers, normed by sample, so that one in a batch is enough."""
    layers = [nn.Linear(shape[0], RECORD), nn.LayerNorm(RECORD), nn.GELU(), nn.Linear(RECORD, RECORD), nn.GELU()]
    return nn.Sequential(*layers)


def scaled(data: Data, configuration: Mapping[str, Any]) -> Data:
    """The data as the backbones of a run expect it: each with the mean and deviation that timm states of it."""
    if configuration["model"] == "drifa_net":
        return data
    names = backbone_names(configuration["backbones"], [name for name in data.shapes if is_image(data.shapes[name])])
    scales = {}
    for branch, name in names.items():
        with suppress(RuntimeError):  # of names that timm does not have: `build` says so
            known = timm.get_pretrained_cfg(name, allow_unregistered=False)
            found = timm.data.resolve_data_config(pretrained_cfg=known.to_dict())
            scales[branch] = (found["mean"], found["std"])
    return replace(data, scales=scales)


def calibrate(net: nn.Module, data: Data) -> None:
    """Fit the paper's attention of a fused network, before training, to training images; fewer than 16 are too few."""
    count = min(len(data.train), CALIBRATION)
    if isinstance(net, drifa_attn.Fused) and attentions(net) and count >= 16:
        (batch,) = data.loader(data.train, [range(count)])
        inputs, present, _ = named(batch, data, torch.device("cpu"))
        drifa_attn.calibrate(net, inputs, present)


@torch.no_grad()
def rehearse(net: nn.Module, data: Data) -> None:
    """Raise a `ValueError` unless the network takes images of these sizes."""
    inputs = {branch: torch.zeros(2, *shape) for branch, shape in data.shapes.items()}
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


def named(batch: Iterable[Any], data: Data, device: torch.device) -> tuple[Inputs, Tensor | None, Labels]:
    """A batch of the data's loader on the device: what networks take, who is present if not all are, and classes by task."""
    inputs, present, targets = batch
    inputs = {branch: x.to(device, non_blocking=True) for branch, x in inputs.items()}
    for branch, (mean, deviation) in data.scales.items():
        mean, deviation = (inputs[branch].new_tensor(values)[:, None, None] for values in (mean, deviation))
        inputs[branch] = ((inputs[branch] + 1) / 2 - mean) / deviation
    labels = dict(zip(data.tasks, targets.to(device, non_blocking=True).unbind(1), strict=True))
    return inputs, None if present.all() else present.to(device, non_blocking=True), labels


def paired_up(present: Tensor | None) -> Tensor | None:
    """Who is present in a batch of training, without a branch that a single sample has, which a batch norm cannot take.

    It stays where it is all that its sample has.
    """
    if present is None:
        return None
    return present & ~((present.sum(0) == 1) & (present.sum(1, keepdim=True) > 1))


def restored(folder: Path, run: Mapping[str, Any], data: Data) -> nn.Module:
    """The network that a finished run left in its folder, in eval mode, for data like its own.

    Raises: ValueError: no weights, or of another network.
    """
    weights = folder / "model.safetensors"
    net = build({**run["configuration"], "pretrained": False}, data)
    try:
        net.load_state_dict(load_file(weights))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{weights} is damaged, or of another network: train again. {error}") from error
    return net.eval()


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
