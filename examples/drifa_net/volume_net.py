"""A small network that reads volumes: what a branch of them is, since timm has none."""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (16, 32, 64, 128)


class Block(nn.Module):
    """A residual block of two convolutions, as ResNet-18's with a third axis.

    Shape: x `b c d h w` -> `b out d/stride h/stride w/stride`.
    """

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm3d(out)
        self.conv2 = nn.Conv3d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm3d(out)
        self.shortcut = nn.Sequential(nn.Conv3d(channels, out, 1, stride, bias=False), nn.BatchNorm3d(out))

    def forward(self, x: Tensor) -> Tensor:
        """The features behind the block."""
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


def volume_net(channels: int = 1) -> nn.Sequential:
    """Volumes `b c d h w` -> features `b 128 d/16 h/16 w/16`: a stem, and four stages of a block each; 0.9 million weights."""
    stem = nn.Sequential(nn.Conv3d(channels, WIDTHS[0], 3, 2, 1, bias=False), nn.BatchNorm3d(WIDTHS[0]), nn.ReLU())
    stages = zip((WIDTHS[0], *WIDTHS), WIDTHS, (1, 2, 2, 2), strict=False)
    blocks = [(f"stage{k}", Block(before, width, stride)) for k, (before, width, stride) in enumerate(stages, 1)]
    return nn.Sequential(OrderedDict([("stem", stem), *blocks]))
