"""One network of the suite on trial: fresh copies of it, bare, wrapped and with moved gates, and what they give."""

from functools import cached_property
from typing import Any

import torch
from torch import nn

import drifa_attn
from drifa_attn import Plan

from .case import Case


class BrokenPromiseError(Exception):
    """What does not hold."""


class NotAskedError(Exception):
    """Why a promise cannot be asked of a network."""


def demand(wrong: str, when: str = "") -> None:
    """Raise a `BrokenPromiseError` where something is wrong."""
    if wrong:
        raise BrokenPromiseError(f"{when}: {wrong}" if when else wrong)


class Trial:
    """A network of the suite, bare and wrapped, and what it gives. All its networks have the same weights."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def plan(self, model: nn.Module) -> Plan:
        """The plan for the part of a network that is to be wrapped."""
        return drifa_attn.plan(self.case.unit(model), example_input=self.case.example(), **self.case.options)

    def wrapped(self) -> nn.Module:
        """A fresh network, wrapped."""
        model = self.case.bare()
        unit = self.case.unit(model)
        given = drifa_attn.wrap(unit, example_input=self.case.example(), **self.case.options)
        demand("" if given is unit else "wrap returned another object")
        return model

    def moved(self) -> nn.Module:
        """A fresh network, wrapped, with gates that have left their start."""
        model = self.wrapped()
        move_(self.case.unit(model))
        return model

    @torch.no_grad()
    def output(self, model: nn.Module) -> Any:
        """What a network gives, in the mode that it is in."""
        return self.case.call(model)

    @cached_property
    def expected(self) -> Any:
        """What the bare network gives in eval mode."""
        return self.output(self.case.bare())

    @cached_property
    def network(self) -> nn.Module:
        """One network with moved gates, in eval mode, for checks that leave it as it is."""
        return self.moved()

    @cached_property
    def changed(self) -> Any:
        """What the network with moved gates gives in eval mode."""
        return self.output(self.network)


def move_(unit: nn.Module) -> None:
    """Move all weights of the attention off their start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in drifa_attn.attention_parameters(unit):
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.2)


def said(error: BaseException) -> str:
    """The kind and the first line of an error."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
