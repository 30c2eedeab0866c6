"""Helpers of several tests about uncertainty."""

import dataclasses

import torch
from torch import nn

from drifa_attn import Uncertainty
from tests._compare import assert_same_bits

FIELDS = [field.name for field in dataclasses.fields(Uncertainty)]
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def assert_same_result(one, other):
    for name in FIELDS:
        assert_same_bits(getattr(one, name), getattr(other, name))


class Says(nn.Module):
    """A network that gives these logits whatever it is asked, and one batch of them a call where there are several."""

    def __init__(self, *each):
        super().__init__()
        self.each, self.calls = each, 0

    def forward(self, x):
        self.calls += 1
        return self.each[(self.calls - 1) % len(self.each)]


def members(logits):
    return [Says(one) for one in logits]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def net(p=0.5, classes=4):
    """A small network with batch norm and dropout in training mode, moved off its start."""
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(p), nn.Linear(8, classes))
    model(torch.randn(16, 6))
    return model


def spread(result):
    """How far the passes are apart."""
    return max(result.variance.max().item() for result in (result.values() if isinstance(result, dict) else [result]))


def modes(model):
    return [module.training for module in model.modules()]


class Heads(nn.Module):
    """Several inputs, several heads, in the nesting that `out` makes of two logits."""

    def __init__(self, out, take=lambda *xs: xs):
        super().__init__()
        self.body, self.out, self.take = net(classes=7), out, take

    def forward(self, *args):
        a, b, *_ = self.take(*args)
        z = self.body(a) + self.body(b)
        return self.out(z[:, :3], z[:, 3:])
