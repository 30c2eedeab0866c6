"""What the tests of the pictures share."""

from io import BytesIO

import matplotlib
import timm
import torch

import drifa_attn
from drifa_attn import Uncertainty


def words(figure):
    """Every text of a figure that is not empty."""
    figure.savefig(BytesIO())
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def cells(axes):
    return [text.get_text() for text in axes.texts]


def gates_of(b=12, c=6, k=3):
    """Gates at which channel j opens for class j and nothing else happens, and flat ones."""
    labels = torch.arange(b) % k
    opened = torch.full((b, c), 0.5)
    opened[torch.arange(b), labels] = 0.9
    return {"flat": torch.full((b, c), 0.5), "open": opened}, labels


def result_of(probs, uncertainty=None):
    """An `Uncertainty` of these probabilities, with these numbers as its total."""
    total = torch.zeros_like(probs[:, 0]) if uncertainty is None else uncertainty
    return Uncertainty(probs=probs, total=total, aleatoric=total.flip(0), epistemic=total, variance=probs)


def moved():
    """A wrapped network whose attention has been moved, and images."""
    torch.manual_seed(0)
    model = drifa_attn.wrap(timm.create_model("test_resnet", num_classes=5))
    for parameter in drifa_attn.attention_parameters(model):
        parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    return model, torch.randn(3, 3, 64, 64)
