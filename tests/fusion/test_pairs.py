"""Which stages meet."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from drifa_attn import fuse
from tests._compare import assert_same_bits
from tests._fusion import TASKS, fused, given
from tests.networks import Net, conv


def met(net):
    return [{name: site.module for name, site in sites.items()} for sites in net.stages]


def test_stages_of_one_reduction_meet():
    backbones, inputs = given(("resnet", "swin"))
    net = fuse(backbones, TASKS, example_inputs=inputs)
    assert met(net) == [{"resnet": "layer1", "swin": "layers.0"}, {"resnet": "layer2", "swin": "layers.1"}]
    for sites in net.stages:
        assert len({site.positions for site in sites.values()}) == 1


def test_stages_of_one_depth_meet_where_reductions_say_nothing():
    backbones, inputs = given(("resnet", "vit"))
    net = fuse(backbones, TASKS, example_inputs=inputs)
    assert [sites["vit"] for sites in met(net)] == [f"blocks.{i}" for i in range(5)]
    assert [sites["resnet"] for sites in met(net)] == ["act1", "layer1", "layer2", "layer3", "layer4"]
    backbones, inputs = given(("record", "vit"))
    net = fuse(backbones, TASKS, example_inputs=inputs)
    assert [sites["vit"] for sites in met(net)] == ["blocks.2", "blocks.4"]


@torch.no_grad()
def test_named_stages_meet_and_a_branch_may_stay_out():
    pairs = [{"vit": "blocks.1", "resnet": "layer3"}, {"resnet": "layer4"}]
    net, inputs = fused(("resnet", "vit"), at=pairs)
    assert met(net) == [{"resnet": "layer3", "vit": "blocks.1"}, {"resnet": "layer4"}]
    assert [refiner.modalities for refiner in net.refiners] == [2, 1]
    assert net(inputs)["cell"].shape == (2, 5)


# Vectors -----------------------------------------------------------------------------------------------------------------


def layers(*widths, norm=False):
    steps = [nn.Sequential(nn.Linear(a, b), nn.LayerNorm(b), nn.ReLU()) for a, b in zip(widths, widths[1:], strict=False)]
    return nn.Sequential(*(steps if norm else [layer for step in steps for layer in (step[0], step[2])]))


class Record(nn.Module):
    """A clinical record's network: named stages, one residual, and a head."""

    def __init__(self):
        super().__init__()
        self.intake = layers(9, 16, norm=True)
        self.body = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.intake(x)
        return self.head(x + self.body(x))


KEPT = {"record": None}  # its last linear layer stays
VECTORS = {
    "equal widths": (lambda: layers(9, 16, 16, 16, 12), ["1", "3", "5", "7"]),
    "normed": (lambda: layers(9, 16, 16, 12, norm=True), ["0.2", "1.2", "2.2"]),
    "named stages": (
        lambda: nn.Sequential(OrderedDict(one=layers(9, 16), two=layers(16, 16), head=nn.Linear(16, 2))),
        ["one.1", "two.1"],
    ),
    "residual": (Record, ["intake.0.2", "body.3"]),
}


@pytest.mark.parametrize(("build", "expected"), VECTORS.values(), ids=VECTORS)
@pytest.mark.parametrize("at", ["stage", "block"])
@torch.no_grad()
def test_vectors_meet_after_every_linear_layer(build, expected, at):
    """A last one that nothing follows is the head; a network without blocks meets others with its stages."""
    model, x = build().eval(), torch.randn(2, 9)
    y = model(x)
    net = fuse({"record": model, "other": layers(5, 8, 8, 8, 8, 2)}, TASKS, at=at, classifiers=KEPT | {"other": None}).eval()
    assert [sites["record"] for sites in met(net)] == expected
    inputs = {"record": x, "other": torch.randn(2, 5)}
    assert_same_bits(net.features(inputs)["record"], y)
    for refiner in net.refiners:
        refiner.alphas[0].fill_(3.0)
    assert not torch.equal(net.features(inputs)["record"], y)


@torch.no_grad()
def test_named_stages_of_plain_modules_meet():
    at = [{"image": "down", "record": "intake"}, {"image": "up", "record": "body"}]
    image = Net(lambda net, x: net.up(net.down(x)).mean((2, 3)), down=conv(), up=conv()).eval()
    inputs = {"image": torch.randn(2, 8, 6, 6), "record": torch.randn(2, 9)}
    net = fuse({"image": image, "record": Record().eval()}, TASKS, at=at, example_inputs=inputs, classifiers=KEPT).eval()
    assert met(net) == at
    assert [refiner.channels for refiner in net.refiners] == [(8, 16), (8, 16)]
    assert_same_bits(net.features(inputs)["image"], image(inputs["image"]))
    assert list(net(inputs)) == list(TASKS)
