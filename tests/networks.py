"""The networks of the tests: a small one of every kind, each as small as it gets with its structure whole."""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import timm
import torch
import torchvision
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.models.regnet import RegNet, RegNetCfg
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.video.resnet import BasicBlock, BasicStem, Conv3DSimple, VideoResNet

from drifa_attn import plan


class Net(nn.Module):
    """Children by name and a forward given as a function of the network and its inputs."""

    def __init__(self, forward, **children):
        super().__init__()
        self.run = forward
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)


def conv(c_in=8, c_out=8):
    return nn.Conv2d(c_in, c_out, 3, padding=1)


class RunsItsChildren(nn.Module):
    """A stage whose forward runs whatever children it has."""

    def __init__(self, *blocks):
        super().__init__()
        for i, block in enumerate(blocks):
            self.add_module(f"{i}", block)

    def forward(self, x):
        for block in self.children():
            x = block(x)
        return x


class Network(NamedTuple):
    """How to build a network, the size of its image, and the sites to be found in it.

    Stages are given as channels x positions in calling order, blocks as their number and a regex for their names.
    """

    build: Callable[[], nn.Module]
    size: int
    layout: str
    num_prefix_tokens: int
    stages: str
    blocks: tuple[int, str]
    of_blocks: tuple[str, int] | None = None  # layout and prefix where they are not those of the stages


def of_timm(name, **options):
    return partial(timm.create_model, name, pretrained=False, num_classes=10, **options)


def mvit():
    return MultiScaleVit(MultiScaleVitCfg(depths=(1, 2, 1), embed_dim=24), img_size=64, num_classes=10)


def regnet():
    return RegNet(RegNetCfg(depth=5, w0=16, wa=24.0, wm=2.0, group_size=8), num_classes=10)


def video():
    return VideoResNet(BasicBlock, [Conv3DSimple] * 4, [1] * 4, BasicStem, num_classes=10)


SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
CROSSVIT = {"img_size": 96, "img_scale": (1.0, 1.0), "embed_dim": (24, 48), "depth": ((1, 2, 0), (1, 2, 0))}
COAT = {"img_size": 160, "embed_dims": (16, 16, 16, 16), "serial_depths": (1, 2, 1, 1), "parallel_depth": 2}
TNT = {"img_size": 80, "embed_dim": 48, "inner_dim": 12, "depth": 3, "num_heads_inner": 2, "num_heads_outer": 4}
PIT = {"img_size": 160, "base_dims": (16, 16, 16), "depth": (1, 2, 1), "heads": (1, 2, 4)}
TV_SWIN = ([4, 4], 16, [2, 2], [2, 4], [4, 4])
MAPS, TOKENS = "b c ...", "b ... c"

NETWORKS = {
    # Stages are Sequentials, one an activation that works in place.
    "resnet": Network(of_timm("test_resnet"), 64, MAPS, 0, "32x1024 32x256 48x64 192x16 96x4", (4, r"layer[1-4]\.0")),
    # The head reads the class token: the last block's patch tokens go nowhere.
    "vit": Network(of_timm("test_vit", img_size=80), 80, TOKENS, 1, "64x25 64x25 64x25 64x25 64x25", (5, r"blocks\.[0-4]")),
    "efficientnet": Network(
        of_timm("test_efficientnet"), 64, MAPS, 0, "16x1024 24x256 32x64 48x16 64x4", (4, r"blocks\.[1-4]\.0")
    ),
    # b h w c
    "swin": Network(
        of_timm("swin_tiny_patch4_window7_224", **SWIN), 64, TOKENS, 0, "16x256 32x64", (4, r"layers\.[01]\.blocks\.[01]")
    ),
    # b h w c
    "mambaout": Network(
        of_timm("test_mambaout"), 64, TOKENS, 0, "16x256 32x64 48x16 64x4", (6, r"stages\.[0-3]\.blocks\.[0-2]")
    ),
    # A stage is a ModuleDict with a forward of its own; its layers take lists.
    "densenet": Network(
        of_timm("densenet121", growth_rate=8, block_config=(2, 2)),
        *(64, MAPS, 0, "16x1024 32x256 32x64", (4, r"features\.denseblock[12]\.denselayer[12]")),
    ),
    # Lists of tokens.
    "crossvit": Network(
        of_timm("crossvit_tiny_240", **CROSSVIT), 96, TOKENS, 1, "24x64 48x36", (6, r"blocks\.[01]\.blocks\.(0\.0|1\.[01])")
    ),
    # (tokens, their grid)
    "mvitv2": Network(mvit, 64, TOKENS, 0, "24x256 48x64 96x16", (4, r"stages\.\d\.blocks\.\d\[0\]")),
    # A stage runs whatever children it has.
    "regnet": Network(regnet, 64, MAPS, 0, "32x1024 16x256 32x64 64x16 128x4", (5, r"s[1-4]\.b[1-7]")),
    # Tuples with discarded tensors, one module under many names.
    "coat": Network(
        of_timm("coat_tiny", **COAT),
        *(160, TOKENS, 1, "16x1600 16x400 16x100 16x25 16x400 16x100 16x25"),
        (9, r"cpe1|serial_blocks[1-4]\.[01]|parallel_blocks\.0\[[123]\]"),
    ),
    # (pixels of all patches, tokens)
    "tnt": Network(of_timm("tnt_s_legacy_patch16_224", **TNT), 80, TOKENS, 1, "48x25 48x25", (2, r"blocks\.[01]\[1\]")),
    # (map, class token), the last map discarded; its blocks take tokens.
    "pit": Network(
        of_timm("pit_ti_224", **PIT), 160, MAPS, 0, "16x361 32x100", (3, r"transformers\.[01]\.blocks\.[01]"), (TOKENS, 1)
    ),
    "torchvision resnet": Network(
        torchvision.models.resnet18, 64, MAPS, 0, "64x256 128x64 256x16 512x4", (8, r"layer[1-4]\.[01]")
    ),
    # b h w c
    "torchvision swin": Network(
        partial(SwinTransformer, *TV_SWIN, num_classes=10), 64, TOKENS, 0, "16x256 32x64", (4, r"features\.[13]\.[01]")
    ),
    # b c d h w
    "torchvision video": Network(video, 32, MAPS, 0, "64x1024 128x128 256x16 512x4", (4, r"layer[1-4]\.0")),
}


def built(name, batch=2):
    """A network of the list in eval mode, always with the same weights, and an input for it."""
    torch.manual_seed(0)
    model = NETWORKS[name].build().eval()
    frames = (4,) if name == "torchvision video" else ()
    return model, torch.randn(batch, 3, *frames, *[NETWORKS[name].size] * 2)


@cache
def planned(name, at):
    """The plan of a network of the list, made once."""
    model, x = built(name)
    return plan(model, at, example_input=x)
