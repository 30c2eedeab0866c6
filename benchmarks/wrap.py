"""Whole backbones: plain, with SE or CBAM at the sites that `drifa_attn.wrap` finds, and wrapped."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import timm
import torch
from einops import rearrange
from torch import Tensor, nn

import drifa_attn
from drifa_attn.layout import Layout
from drifa_attn.wrapping.inject import placed

from .cases import DTYPES, Case, Options, Setup, text
from .layers import peer

NETWORKS = (
    "resnet18",
    "resnet50",
    "convnext_tiny",
    "efficientnet_b0",
    "swin_tiny_patch4_window7_224",
    "vit_small_patch16_224",
)
# How `wrap` is called; the peers go to the sites of its default.
WAYS: dict[str, dict[str, Any]] = {
    "MFA": {},
    "MFA block": {"at": "block"},
    "MFA block dense": {"at": "block", "reduction": None},
    "MFA paper": {"variant": "paper"},
}
PEERS = ("plain", "SE", "CBAM")


class OnLayout(nn.Module):
    """An attention written for `b c h w`, on features of any layout; prefix tokens pass unchanged, as in MFA.

    Tokens are laid out as the square they were cut from.
    """

    def __init__(self, attention: nn.Module, layout: Layout, num_prefix_tokens: int) -> None:
        super().__init__()
        self.attention, self.layout, self.num_prefix_tokens = attention, layout, num_prefix_tokens

    def forward(self, x: Tensor) -> Tensor:
        """The features, refined."""
        if self.layout == "b c ..." and x.ndim == 4:
            return self.attention(x)
        if self.layout == "b ... c" and x.ndim == 4:
            return rearrange(self.attention(rearrange(x, "b h w c -> b c h w")), "b c h w -> b h w c")
        if self.layout == "b c ...":
            raise ValueError(f"takes features b c h w, got {tuple(x.shape)} in the layout b c ...")
        first, tokens = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        side = math.isqrt(tokens.shape[1])
        if side**2 != tokens.shape[1]:
            raise ValueError(f"takes maps, and {tokens.shape[1]} tokens are no square")
        maps = self.attention(rearrange(tokens, "b (h w) c -> b c h w", h=side))
        return torch.cat([first, rearrange(maps, "b c h w -> b (h w) c")], dim=1)


def put_peer(model: nn.Module, name: str) -> nn.Module:
    """The network with another attention in the place of ours: what replaces the child is used."""
    owners = {id(child): (module, key) for module in model.modules() for key, child in module.named_children()}
    for site, attention in list(placed(model)):
        owner, key = owners[id(attention)]
        setattr(owner, key, OnLayout(peer(name, site.channels), site.layout, site.num_prefix_tokens))
    return model


def network(name: str, way: str) -> nn.Module:
    """A backbone, plain or refined; no gain is one, where attention would have no say."""
    model = timm.create_model(name)
    if way == "plain":
        return model
    drifa_attn.wrap(model, **WAYS.get(way, {}))
    if way in PEERS:
        return put_peer(model, way)
    for _, attention in placed(model):
        with torch.no_grad():
            attention.alpha.mul_(1.5)
    return model


def setup(name: str, way: str, shape: tuple[int, ...], options: Options) -> Setup:
    """A backbone and images for it."""
    module = network(name, way).to(options.device, DTYPES[options.dtype])
    return Setup(
        module.to(memory_format=torch.channels_last) if options.layout == "channels_last" else module, (options.randn(*shape),)
    )


def cases(options: Options) -> Iterator[list[Case]]:
    """All forms of one backbone, side by side."""
    for shape in options.sizes([(1, 3, 224, 224)], [(64, 3, 224, 224)]):
        if shape[1] != 3:
            raise ValueError(f"--shape {text(shape)} has {shape[1]} channels: these networks take images of 3.")
        for name in NETWORKS:
            ours = [(way, provider) for way in WAYS for provider in ("eager", "compile", "fused", "auto")]
            yield [
                Case(f"{name} {way}", provider, text(shape), partial(setup, name, way, shape, options), network=True)
                for way, provider in [(way, "peers") for way in PEERS] + ours
            ]
