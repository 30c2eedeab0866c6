"""One network of the suite: how it is built, and what it is given."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from drifa_attn.network.inputs import batch_of

from .leaves import leaves

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network with its inputs.

    Attributes:
        library: where the network comes from.
        name: of the network.
        build: makes it, with random weights.
        inputs: makes what its forward takes: a tensor, a tuple of arguments, or a dict of keyword arguments.
        training: the same for its training mode, where that differs (a detector also takes targets).
        part: the name of the part that is wrapped, "backbone"; empty when that is the network itself.
        part_inputs: makes what the part takes, where there is a part.
        options: what `plan` and `wrap` are given besides the example input, `{"layouts": ...}`.
    """

    library: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    training: Callable[[], Any] | None = None
    part: str = ""
    part_inputs: Callable[[], Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The name with the part that is wrapped."""
        return f"{self.name} `.{self.part}`" if self.part else self.name

    @property
    def key(self) -> str:
        """What one row of the results is found by."""
        return f"{self.library}/{self.name}{'.' * bool(self.part)}{self.part}"

    def bare(self) -> nn.Module:
        """The network, not wrapped, in eval mode, with the same weights every time."""
        seed()
        model = self.build().eval()
        seed()
        awaken_(model)
        return model

    def unit(self, model: nn.Module) -> nn.Module:
        """What is wrapped in a network: its part, or all of it."""
        return model.get_submodule(self.part)

    def example(self) -> Any:
        """What `plan` is given as the example input."""
        seed()
        return (self.part_inputs or self.inputs)()

    def samples(self) -> int:
        """How many samples the example input holds."""
        return batch_of(as_call(self.example()))

    def call(self, model: nn.Module, *, training: bool = False) -> Any:
        """The output of a network in the mode that it is in, for the same inputs and the same luck every time."""
        seed()
        args, kwargs = as_call((training and self.training or self.inputs)())
        seed()
        return model(*args, **kwargs)


def seed() -> None:
    """Start every source of luck that networks draw from at the same place."""
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)  # noqa: NPY002 - masks of wav2vec 2.0 are drawn from it


def awaken_(model: nn.Module) -> None:
    """Give weight to what starts at zero: a zero head or norm would hide what lies behind it."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel() and not parameter.any():
                parameter.normal_(std=0.1)


def as_call(inputs: Any) -> Call:
    """Arguments and keyword arguments."""
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def loss(output: Any) -> Tensor:
    """One number that depends on every floating-point number of an output, each with a weight of its own.

    A plain sum would have no gradient behind a softmax or a norm.
    """
    seed()
    tensors = [tensor for tensor in leaves(output).values() if tensor.is_floating_point() and tensor.requires_grad]
    return sum((tensor * torch.randn_like(tensor)).sum() for tensor in tensors)


def images(*size: int, batch: int = 2, channels: int = 3) -> Callable[[], Tensor]:
    """Makes a batch of images, sequences or volumes of this size."""
    return lambda: torch.randn(batch, channels, *size)


def tokens(length: int = 12, batch: int = 2, words: int = 90) -> Callable[[], Tensor]:
    """Makes a batch of sentences: the numbers of words."""
    return lambda: torch.randint(3, words, (batch, length))
