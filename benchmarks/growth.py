"""How the cost of whole networks and of the library's verbs grows: `wrap`, every fusion, `plan`, `calibrate`, files."""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

import drifa_attn
from drifa_attn.attention.start import FEWEST_SAMPLES
from drifa_attn.fusion import FUSIONS
from drifa_attn.wrapping.inject import placed

from .cases import DTYPES, Case, Options, Setup, text
from .scaling import INSIDE, STEPS


@dataclass(frozen=True)
class Size:
    """A network and its input: images `batch 3 side side` of each modality, `depth` blocks a stage, the first `width` wide."""

    batch: int = 4
    side: int = 64
    width: int = 16
    modalities: int = 2
    depth: int = 1

    def grown(self, axis: str, step: int) -> "Size":
        """The same with one size multiplied."""
        return replace(self, **{axis: getattr(self, axis) * step})

    def label(self, axis: str) -> str:
        """The shape of an input; before a star stands the size along an axis that is no part of it."""
        shape = text((self.batch, 3, self.side, self.side))
        return shape if axis in INSIDE else f"{getattr(self, axis)}*{shape}"


def backbone(size: Size) -> nn.Module:
    """A small ResNet of four stages."""
    widths = tuple(size.width * 2**i for i in range(4))
    stem = {"stem_type": "deep", "stem_width": size.width // 2}  # as narrow as the first stage
    return ResNet(BasicBlock, (size.depth,) * 4, num_classes=3, channels=widths, **stem)


def wrapped(size: Size) -> nn.Module:
    """A backbone with MFA in every block; the gains are moved off one, where attention would have no say."""
    model = drifa_attn.wrap(backbone(size), "block")
    for _, attention in placed(model):
        nn.init.constant_(attention.alpha, 3.0)
    return model


class Trained(nn.Module):
    """A fused network as a function of a list of inputs.

    The losses that a fusion adds are added to the logits, so that their cost is measured; cross-entropy does not see them.
    """

    def __init__(self, net: drifa_attn.Fused) -> None:
        super().__init__()
        self.net = net

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        """The logits of each task."""
        logits = self.net(dict(zip(self.net.branches, xs, strict=True)))
        added = sum(self.net.losses().values()) if self.training else 0
        return [each + added for each in logits.values()]


def fused(fusion: str, size: Size) -> nn.Module:
    """Backbones of one kind, fused after every stage."""
    names = [f"modality_{i}" for i in range(size.modalities)]
    example = torch.zeros(2, 3, size.side, size.side)
    branches = {name: backbone(size) for name in names}
    net = drifa_attn.fuse(branches, {"task": 3}, fusion=fusion, example_inputs=dict.fromkeys(names, example))
    return Trained(net)


class Verb(nn.Module):
    """A function of the library as what a case runs, with a folder of its own for files."""

    def __init__(self, name: str, size: Size) -> None:
        super().__init__()
        folder = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, folder)
        self.run = verbs(size, Path(folder) / "attention.safetensors")[name]()

    def forward(self) -> None:
        """Call it."""
        self.run()


def verbs(size: Size, path: Path) -> dict[str, Callable[[], Callable[[], Any]]]:
    """The verbs that are measured, by name: each makes its network, and what is called again and again."""

    def plan() -> Callable[[], Any]:
        return partial(drifa_attn.plan, backbone(size), "block")

    def wrap() -> Callable[[], Any]:
        model = backbone(size)
        return lambda: drifa_attn.unwrap(drifa_attn.wrap(model, "block"))

    def calibrate() -> Callable[[], Any]:
        images = torch.randn(size.batch, 3, size.side, size.side)
        return partial(drifa_attn.calibrate, drifa_attn.wrap(backbone(size), "block"), images)

    def save() -> Callable[[], Any]:
        return partial(drifa_attn.save_attention, wrapped(size), path)

    def load() -> Callable[[], Any]:
        save()()
        model = backbone(size)
        return lambda: drifa_attn.unwrap(drifa_attn.load_attention(model, path))

    return {"plan": plan, "wrap and unwrap": wrap, "calibrate": calibrate, "save_attention": save, "load_attention": load}


# Which axes each verb is measured along: those that its work depends on.
ALONG = {
    "plan": ("depth",),
    "wrap and unwrap": ("width", "depth"),
    "calibrate": ("batch", "side", "width", "depth"),
    "save_attention": ("width", "depth"),
    "load_attention": ("width", "depth"),
}


def network_setup(build: Callable[[Size], nn.Module], size: Size, options: Options) -> Setup:
    """A network and its images."""
    module = build(size).to(options.device, DTYPES[options.dtype])
    xs = [options.randn(size.batch, 3, size.side, size.side) for _ in range(size.modalities)]
    return Setup(module, (xs,) if isinstance(module, Trained) else (xs[0],))


def verb_setup(name: str, size: Size) -> Setup:
    """A verb; it runs on the CPU, where networks are made."""
    return Setup(Verb(name, size), ())


def cases(options: Options) -> Iterator[list[Case]]:
    """One thing along one axis after the other, all its sizes side by side."""
    for shape in options.sizes([(4, 3, 64, 64)], [(32, 3, 64, 64)]):
        start = Size(batch=shape[0], side=shape[2])
        networks = {"wrap": wrapped, **{f"fuse {name}": partial(fused, name) for name in FUSIONS}}
        for name, build in networks.items():
            for axis in ("batch", "side", "width", *(("modalities",) if name != "wrap" else ()), "depth"):
                sizes = [start.grown(axis, step) for step in STEPS]
                setups = [partial(network_setup, build, size, options) for size in sizes]
                labels = [size.label(axis) for size in sizes]
                yield [
                    Case(f"{name} by {axis}", "auto", label, setup, network=True)
                    for label, setup in zip(labels, setups, strict=True)
                ]
        for name, axes in ALONG.items():
            first = replace(start, batch=max(start.batch, FEWEST_SAMPLES)) if name == "calibrate" else start
            for axis in axes:
                sizes = [first.grown(axis, step) for step in STEPS]
                yield [Case(f"{name} by {axis}", "auto", s.label(axis), partial(verb_setup, name, s), verb=True) for s in sizes]
