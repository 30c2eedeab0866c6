"""What timm asks of each of its networks, asked of wrapped ones whose gates have moved.

A check raises `BrokenPromiseError` with what does not hold, or `NotAskedError` where the network itself, not wrapped, cannot do
what is asked.
"""

from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import drifa_attn

from .leaves import difference, is_close
from .promises import five_gradients
from .trial import NotAskedError, Trial, demand, move_, said

CONTRACT = (
    "forward gives finite logits of every class, and is its features and its head",
    "every weight of the attention gets a gradient, and no other weight loses its own",
    "without its classifier it gives its features, with a new one as many logits as that has",
    "as a backbone of features it gives the channels and reductions that it states",
    "its intermediate features are as many, and the last of them is its features",
    "gradient checkpointing changes no output and no gradient",
    "an optimiser with layer-wise decay takes every weight once",
)


def asked(what: Callable[[], Any]) -> Any:
    """What a network that is not wrapped gives; where it gives an error, the wrapped one is not asked either."""
    try:
        return what()
    except Exception as error:
        raise NotAskedError(f"the bare network does not ({said(error)})") from error


def parts(model: Any, x: Tensor) -> Tensor:
    """The logits by way of the features."""
    return model.forward_head(model.forward_features(x))


@torch.no_grad()
def one_forward(trial: Trial) -> None:
    """The logits."""
    model: Any = trial.network
    logits = trial.changed
    demand("" if logits.shape == trial.expected.shape else f"logits of shape {tuple(logits.shape)}")
    demand("" if logits.isfinite().all() else "logits that are not finite")
    bare: Any = trial.case.bare()
    if not is_close(asked(lambda: parts(bare, trial.case.example())), trial.expected):
        raise NotAskedError("the bare network is not its features and its head")
    demand(difference(parts(model, trial.case.example()), logits), "features and head")


@torch.no_grad()
def three_heads(trial: Trial) -> None:
    """Other classifiers, and none."""
    model, bare = trial.moved(), trial.case.bare()
    x = trial.case.example()
    for classes in (0, 10):
        expected = asked(lambda classes=classes: headed(bare, x, classes).shape)
        found = headed(model, x, classes)
        demand("" if found.shape == expected else f"{classes} classes: shape {tuple(found.shape)}, not {tuple(expected)}")
        demand("" if found.isfinite().all() else f"{classes} classes: not finite")
    hidden = asked(lambda: bare.forward_head(bare.forward_features(x), pre_logits=True).shape)  # type: ignore[operator]
    found = model.forward_head(model.forward_features(x), pre_logits=True)  # type: ignore[operator]
    demand("" if found.shape == hidden else f"before the logits: shape {tuple(found.shape)}, not {tuple(hidden)}")


def headed(model: Any, x: Tensor, classes: int) -> Tensor:
    """What a network gives with a classifier of so many classes."""
    model.reset_classifier(classes)
    return model(x)


@torch.no_grad()
def four_features(trial: Trial) -> None:
    """A backbone that gives the maps of its stages."""
    x = trial.case.example()
    bare = asked(lambda: timm.create_model(trial.case.name, features_only=True).eval())
    expected = asked(lambda: bare(x))
    drifa_attn.wrap(bare, example_input=x)
    demand("" if not difference(bare(x), expected) else "wrapped, at the start, its maps are others")
    move_(bare)
    found = bare(x)
    demand("" if difference(found, expected) else "moved gates do not change its maps")
    for tensor, map_, width in zip(found, expected, bare.feature_info.channels(), strict=True):
        demand("" if tensor.shape == map_.shape and width in tensor.shape else f"a map of shape {tuple(tensor.shape)}")


@torch.no_grad()
def five_intermediates(trial: Trial) -> None:
    """The features of all its stages."""
    x, bare, model = trial.case.example(), trial.case.bare(), trial.network
    last, expected = asked(lambda: bare.forward_intermediates(x))  # type: ignore[operator]
    if difference(last, asked(lambda: bare.forward_features(x))):  # type: ignore[operator]
        raise NotAskedError("the bare network's last intermediate features are not its features")
    last, found = model.forward_intermediates(x)  # type: ignore[operator]
    demand(difference(last, model.forward_features(x)), "the last")  # type: ignore[operator]
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (found, expected)]
    demand("" if shapes[0] == shapes[1] else f"shapes {shapes[0]}, not {shapes[1]}")


def six_checkpointing(trial: Trial) -> None:
    """The features computed twice, to save memory."""
    asked(lambda: gradients(trial, trial.case.bare(), enable=True))
    plain, twice = (gradients(trial, trial.moved(), enable=enable) for enable in (False, True))
    demand(difference(twice[0].detach(), plain[0].detach()), "the output")
    demand("" if plain[1].keys() == twice[1].keys() else "other weights have gradients")
    demand("" if is_close(twice[1], plain[1]) else f"the gradients: {difference(twice[1], plain[1])}")


def gradients(trial: Trial, model: Any, *, enable: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of a network with or without checkpointing, and the gradients by weight."""
    model.set_grad_checkpointing(enable)
    logits = trial.case.call(model)
    logits.square().sum().backward()
    return logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def seven_layer_decay(trial: Trial) -> None:
    """An optimiser of timm's."""
    asked(lambda: create_optimizer_v2(trial.case.bare(), opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7))
    model: nn.Module = trial.wrapped()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    demand("" if sorted(held) == sorted(map(id, model.parameters())) else "not every weight is held once")


CONTRACT_CHECKS: tuple[Callable[[Trial], None], ...] = (
    one_forward,
    five_gradients,
    three_heads,
    four_features,
    five_intermediates,
    six_checkpointing,
    seven_layer_decay,
)
