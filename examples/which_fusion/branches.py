"""The networks that read one modality: small ones that are trained, and the second half of a pretrained one that is not."""

import copy
from collections import OrderedDict
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from examples.does_it_help.networks import halves, lite0

CUT = "blocks.5"  # of the pretrained network: what lies before is computed once and kept
WIDTH = 64  # of what is trained


class Frozen(nn.Sequential):
    """Layers that are never in training mode, so that their batch norms keep what they know."""

    def train(self, mode: bool = True) -> "Frozen":
        """Stay in eval mode."""
        return super().train(False)


@dataclass(frozen=True)
class Branch:
    """The kind of network that reads a modality of some shape.

    Attributes:
        kind: "vector" (two linear stages), "map" (two convolutional ones) or "frozen" (the second half of EfficientNet-Lite0).
        shape: of one sample.
    """

    kind: str
    shape: tuple[int, ...]

    @property
    def stages(self) -> tuple[str, ...]:
        """The two modules after which it meets the others; of the frozen network the first is where it is cut."""
        return ("met", "blocks.6") if self.kind == "frozen" else ("stage1", "stage2")

    def build(self) -> nn.Module:
        """A new network; its weights are drawn from torch's random state, or pretrained."""
        if self.kind == "frozen":
            return copy.deepcopy(second_half())
        if self.kind == "vector":
            return nn.Sequential(OrderedDict(stage1=dense(self.shape[0]), stage2=dense(WIDTH)))
        first, second = convolution(self.shape[0], WIDTH // 2), convolution(WIDTH // 2, WIDTH)
        return nn.Sequential(OrderedDict(stage1=first, stage2=second))


@cache
def second_half() -> nn.Module:
    """What lies behind the cut of EfficientNet-Lite0; its input is the first place where others meet it."""
    behind = halves(lite0(0).requires_grad_(False), (CUT,))[1]
    return Frozen(OrderedDict([("met", nn.Identity()), *behind.named_children()])).eval()


def dense(features: int) -> nn.Module:
    """A stage that reads vectors."""
    return nn.Sequential(nn.Linear(features, WIDTH), nn.LayerNorm(WIDTH), nn.GELU(), nn.Dropout(0.2))


def convolution(channels: int, width: int) -> nn.Module:
    """A stage that reads maps and halves them."""
    layer = nn.Conv2d(channels, width, 3, 2, padding=1)
    return nn.Sequential(layer, nn.GroupNorm(4, width), nn.GELU(), nn.Dropout(0.2))


@torch.no_grad()
def first_half(images: Tensor, size: int = 256) -> Tensor:
    """What the first half of EfficientNet-Lite0 makes of images `n h w 3` of uint8 and of their mirror images: `n 2 c h w`."""
    before = halves(lite0(0), (CUT,))[0]
    found = []
    for part in images.split(size):
        x = part.permute(0, 3, 1, 2).float() / 127.5 - 1  # as EfficientNet-Lite takes them
        found.append(torch.stack([before(x), before(x.flip(-1))], 1))
    return torch.cat(found)
