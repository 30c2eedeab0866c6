"""A network that reads the past alone is told so in its plan; one that does not, is not."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import drifa_attn
from drifa_attn.network.causal import is_triangle

SIGNAL = torch.zeros(2, 4, 20)


class Convolutions(nn.Module):
    """Two convolutions over time, the first of which sees what `how` lets it see."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.first = nn.Conv1d(4, 8, 3, padding=2 if how == "cut" else 0)
        self.second = nn.Conv1d(8, 8, 3, padding=1)
        self.pad = nn.ConstantPad1d((2, 0), 0.0)

    def forward(self, x):
        if self.how == "cut":
            x = self.first(x)[..., :-2]
        elif self.how == "module":
            x = self.first(self.pad(x))
        else:
            x = self.first(F.pad(x, {"start": (2, 0), "both": (1, 1), "end": (0, 2)}[self.how]))
        return self.second(x.relu()).mean(2)


class Tokens(nn.Module):
    """Self-attention over tokens `b n 8`."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        if how == "buffer":
            self.register_buffer("bias", torch.ones(1, 1, 20, 20).tril())
        if how == "attribute":
            self.linear.is_causal = True

    def forward(self, x):
        h = self.linear(x)
        if self.how == "triangle":
            return x + torch.tril(h @ h.mT) @ h
        return self.norm(x + F.scaled_dot_product_attention(h, h, h, is_causal=self.how == "argument"))


def warnings_of(net, example, **options):
    return [note for note in drifa_attn.plan(net, example_input=example, **options).notes if "causal" in note]


@pytest.mark.parametrize("how", ["cut", "module", "start"])
def test_convolutions_that_see_the_past_alone_are_told(how):
    (note,) = warnings_of(Convolutions(how), SIGNAL)
    assert "later inputs will change" in note
    assert ("Convolutions" if how == "cut" else "(first)") in note


@pytest.mark.parametrize("how", ["both", "end"])
def test_convolutions_that_see_the_future_are_not(how):
    assert not warnings_of(Convolutions(how), SIGNAL)


@pytest.mark.parametrize("how", ["triangle", "argument", "buffer", "attribute"])
def test_attention_to_the_past_alone_is_told(how):
    (note,) = warnings_of(Tokens(how), torch.zeros(2, 20, 8), at=["linear"])
    assert ("linear" if how == "attribute" else "Tokens") in note


def test_attention_to_all_tokens_is_not():
    assert not warnings_of(Tokens("none"), torch.zeros(2, 20, 8), at=["linear"])


def test_a_causal_mask_among_the_inputs_is_told():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
    mask, x = nn.Transformer.generate_square_subsequent_mask(12), torch.zeros(2, 12, 16)
    (note,) = warnings_of(encoder, (x, mask))
    assert "a mask of the example input" in note
    assert not warnings_of(encoder, (x, mask.T.flip(0)))


def test_networks_of_images_are_not():
    for name in ("test_resnet", "test_vit", "test_efficientnet", "swin_tiny_patch4_window7_224", "convnextv2_atto"):
        assert not warnings_of(timm.create_model(name), None)


def test_a_triangle_has_one_value_on_either_side():
    mask = torch.full((12, 12), -torch.inf).triu(1)
    assert is_triangle(mask)
    assert is_triangle(torch.ones(3, 5, 5).bool().tril())
    for other in (mask[:, :11], torch.ones(4, 4), torch.zeros(1, 1), torch.rand(4, 4), torch.eye(3), mask.T.flip(0)):
        assert not is_triangle(other)
