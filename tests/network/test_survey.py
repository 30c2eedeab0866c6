"""Where sites are found. The networks here, each as small as it gets with its structure whole, are those of the wrap tests."""

import re
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import pytest
import timm
import torch
import torchvision
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.models.regnet import RegNet, RegNetCfg
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.video.resnet import BasicBlock, BasicStem, Conv3DSimple, VideoResNet

from drifa_attn import plan
from drifa_attn.network.survey import MOST_PREFIX, Survey, default_shapes, feature_entries, leftovers, resized
from tests.network.test_trace import Net, conv


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


@pytest.mark.parametrize("name", NETWORKS)
def test_stages_are_the_known_ones(name):
    known, sites = NETWORKS[name], planned(name, "stage").sites
    assert [f"{site.channels}x{site.positions}" for site in sites] == known.stages.split()
    assert {(site.layout, site.num_prefix_tokens) for site in sites} == {(known.layout, known.num_prefix_tokens)}


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_are_the_known_ones(name):
    known, sites = NETWORKS[name], planned(name, "block").sites
    number, names = known.blocks
    assert len({site.name for site in sites}) == len(sites) == number
    assert all(re.fullmatch(names, site.name) for site in sites)
    assert {(site.layout, site.num_prefix_tokens) for site in sites} == {
        known.of_blocks or (known.layout, known.num_prefix_tokens)
    }


# Which axis holds the channels -------------------------------------------------------------------------------------------


def feature(net, shape, name="f", path=(), **options):
    return Survey(net, torch.empty(shape)).feature(name, path, **options)


def fixed(net, x):
    """A network that takes one size of image."""
    assert x.shape[2:] == (8, 8), "one size"
    return net.f(x)


class Widened(nn.Module):
    """The channels last, at the size of the image."""

    def __init__(self, last):
        super().__init__()
        self.last = last

    def forward(self, x):
        return self.last(x.permute(0, 2, 3, 1))


IMAGES = {
    "map": (conv(3, 5), (2, 3, 8, 8), MAPS, 5),
    "square map": (conv(3, 8), (2, 3, 8, 8), MAPS, 8),  # as many channels as rows
    "channels last": (Widened(nn.Linear(3, 5)), (2, 3, 8, 8), TOKENS, 5),
    "square channels last": (Widened(nn.Linear(3, 8)), (2, 3, 8, 8), TOKENS, 8),
}
OTHERS = {
    "sequence": (nn.Conv1d(3, 5, 1), (2, 3, 7), MAPS, 5),
    "volume": (nn.Conv3d(3, 5, 1), (2, 3, 4, 5, 6), MAPS, 5),
    "vector": (nn.Linear(6, 5), (2, 6), MAPS, 5),
    "tokens": (nn.Sequential(nn.Linear(6, 5), nn.ReLU()), (2, 7, 6), TOKENS, 5),
}


@pytest.mark.parametrize(
    ("kind", "forward"), [*((kind, lambda net, x: net.f(x)) for kind in IMAGES | OTHERS), *((kind, fixed) for kind in IMAGES)]
)
def test_channels_are_found_in_every_layout(kind, forward):
    last, shape, layout, channels = (IMAGES | OTHERS)[kind]
    site = feature(Net(forward, f=last), shape)
    assert (site.layout, site.channels, site.num_prefix_tokens) == (layout, channels, 0)
    assert site.shape[0 if layout == MAPS else -1] == channels


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (Net(lambda net, x: x.mean()), r"no floating-point feature: \(\)"),
        (Net(lambda net, x: x.flatten(1).argmax(1, keepdim=True)), r"no floating-point feature: \(2, 1\)"),
        (Net(lambda net, x: x.flatten(0, 1)), r"first axis of its output \(6, 8, 8\) is not the batch"),
        (Net(lambda net, x: x.movedim(0, 1)), r"first axis of its output \(3, 2, 8, 8\) is not the batch"),
        (
            Net(lambda net, x: x.permute(0, 2, 1, 3)),
            r"which axis of its output \(2, 8, 3, 8\) .* undecided: name it in layouts=",
        ),
    ],
    ids=["scalar", "integers", "batch folded in", "batch second", "channels in the middle"],
)
def test_what_is_no_feature_is_named(f, reason):
    found = feature(Net(lambda net, x: net.f(x), f=f), (2, 3, 8, 8))
    assert isinstance(found, str)
    assert re.search(reason, found), found


def test_undecided_axes_take_a_layout():
    net = Net(lambda net, x: net.f(x) * 2, f=Net(lambda net, x: x.flatten(2).softmax(-1)[:, :, :5]))
    assert "undecided" in feature(net, (2, 7, 4, 4))
    assert [feature(net, (2, 7, 4, 4), layout=layout).channels for layout in (MAPS, TOKENS)] == [7, 5]


# Prefix tokens -----------------------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Patches of any grid, and prefix tokens before them."""

    def __init__(self, prefix, patch):
        super().__init__()
        self.patch, self.prefix = patch, nn.Parameter(torch.zeros(1, prefix, 8))

    def forward(self, x):
        x = self.patch(x).flatten(2).mT
        return torch.cat([self.prefix.expand(len(x), -1, -1), x], 1)


@pytest.mark.parametrize("prefix", [0, 1, 5, MOST_PREFIX])
@pytest.mark.parametrize(
    ("patch", "shape"),
    [(nn.Conv2d(3, 8, 2, 2), (2, 3, 8, 12)), (nn.Conv1d(3, 8, 2, 2), (2, 3, 64)), (nn.Conv3d(3, 8, 2, 2), (2, 3, 4, 8, 8))],
    ids=["image", "signal", "video"],
)
def test_prefix_tokens_are_those_beyond_the_grid(prefix, patch, shape):
    net = Net(
        lambda net, x: net.head(net.f(net.tokens(x))), tokens=Tokens(prefix, patch), f=nn.Linear(8, 8), head=nn.Linear(8, 2)
    )
    site = feature(net, shape)
    assert (site.layout, site.num_prefix_tokens, site.channels) == (TOKENS, prefix, 8)


def test_leftovers_are_small_and_never_negative():
    assert sorted(leftovers(50, {49, 50, 51, 34, 33})) == [0, 1, MOST_PREFIX]


# Inputs ------------------------------------------------------------------------------------------------------------------


def test_default_shapes_come_from_the_network():
    stated = Net(lambda net, x: net.f(x), f=nn.Conv2d(4, 8, 3))
    assert next(default_shapes(stated)) == (4, 224, 224)
    stated.pretrained_cfg = {"input_size": (4, 32, 48)}
    assert next(default_shapes(stated)) == (4, 32, 48)
    stated.img_size = (40, 24)
    assert next(default_shapes(stated)) == (4, 40, 24)
    assert next(default_shapes(nn.Sequential(nn.Linear(7, 2)))) == (7,)
    assert next(default_shapes(nn.Sequential(nn.Conv3d(2, 8, 3)))) == (2, 16, 112, 112)


def test_resized_adds_a_sample_and_moves_every_image_axis():
    assert resized(torch.empty(2, 3, 32, 32), batch=2, larger=False).shape == (3, 3, 32, 32)
    larger = resized(torch.empty(2, 3, 4, 32, 32), batch=2, larger=True).shape
    assert larger[:2] == (3, 3)
    assert all(a > b for a, b in zip(larger[2:], (4, 32, 32), strict=True))
    assert larger[3] != larger[4]
    assert resized(torch.zeros(2, 9, dtype=torch.long), batch=2, larger=True).shape == (3, 9)  # token ids keep their length


@pytest.mark.parametrize("name", ["resnet", "densenet", "crossvit"])
def test_feature_entries_are_modules_of_a_part_too(name):
    model, _ = built(name)
    entries = list(feature_entries(model))
    assert entries
    part = nn.ModuleDict({"backbone": model, "head": nn.Linear(2, 2)})
    assert [(f"backbone.{module}", channels) for module, channels in entries] == list(feature_entries(part))
    assert all(part.get_submodule(module) for module, _ in feature_entries(part))
    assert not list(feature_entries(nn.Linear(2, 2)))
