"""What a network is made of, as one short text: where two networks have the same one, attention goes to the same places."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from drifa_attn.wrapping.inject import Carried, Slot, placed

PLAIN = (bool, int, float, str, type(None))
PASSING = ("training", "_", "drifa_")  # attributes that are no settings: of the mode, of modules themselves, of this library


def structure(model: nn.Module, slots: Sequence[Slot]) -> str:
    """A digest of a network without the attention that `wrap` put there, and of where attention goes.

    Of each module it holds the name, the class, the shapes of weights and the settings: attributes that are numbers, texts, or
    sequences of them, such as a stride or `global_pool`. Hooks and a `forward` of a module's own count too, values of weights
    do not.
    """
    attention = {id(part) for _, one in placed(model) for part in one.modules()}
    found = [described(name, module) for name, module in model.named_modules() if id(module) not in attention]
    found += [repr(replace(slot, is_masked=False)) for slot in slots]
    return hashlib.sha256("\n".join(found).encode()).hexdigest()


def described(name: str, module: nn.Module) -> str:
    """One module in one line."""
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    tensors = {key: tuple(t.shape) for key, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}
    settings = {key: value for key, value in vars(module).items() if not key.startswith(PASSING) and is_plain(value)}
    forward = vars(module).get("forward")
    own = forward.own if isinstance(forward, Carried) else forward
    tools = [len(module._forward_pre_hooks), len(module._forward_hooks), own is not None]
    return repr((name, kind, sorted(tensors.items()), sorted(settings.items()), tools))


def is_plain(value: Any) -> bool:
    """Whether a value is a number, a text, None, or a sequence of such."""
    return isinstance(value, PLAIN) or (isinstance(value, tuple | list) and all(is_plain(one) for one in value))
