"""The copy of a network that runs in its place: without memory on the meta device, or a real one on the CPU."""

import copy
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from drifa_attn.trees import tensors_in

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def meta_clone(model: nn.Module, *, with_hooks: bool = False) -> nn.Module:
    """A copy of the network without memory: same modules and attributes, every tensor they hold on the meta device.

    Hooks that are plain functions are left out unless asked for: what they write to may not belong to the network.
    """
    return cloned(model, lambda tensor: torch.empty_like(tensor, device="meta", requires_grad=False), with_hooks)


def real_clone(model: nn.Module, *, with_hooks: bool = False) -> nn.Module:
    """A copy of the network on the CPU, with the values of its weights; in float32 where the network is in float16."""
    clone = cloned(model, lambda tensor: tensor.detach().cpu().clone(), with_hooks)
    return clone.float() if any(tensor.dtype is torch.float16 for tensor in clone.parameters()) else clone


def cloned(model: nn.Module, function: Callable[[Tensor], Tensor], with_hooks: bool) -> nn.Module:
    """A copy of the network in eval mode, with `function` of every tensor that its modules hold."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for _, tensor in tensors_in(vars(module)):  # parameters, buffers, and whatever else it keeps
            other = function(tensor)
            memo[id(tensor)] = nn.Parameter(other, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else other
    clone = copy.deepcopy(model, memo).eval()
    for registered in hooks_of(clone):
        for key, hook in list(registered.items()):
            if isinstance(hook, FunctionType):
                registered[key] = rebound(hook, memo) if with_hooks else None
                if not with_hooks:
                    del registered[key]
    return clone


def copies(model: nn.Module) -> Iterator[tuple[bool, bool, nn.Module | Exception]]:
    """The copies to try, the cheapest first: whether it is real, whether it has all hooks of the network, and the copy.

    A copy that cannot be made is the error; a `ValueError` is raised where not even the first one can.
    """
    hooks = (False, True) if has_function_hooks(model) else (False,)
    for is_real in (False, True) if has_memory(model) else (False,):
        for with_hooks in hooks:
            try:
                clone: nn.Module | Exception = (real_clone if is_real else meta_clone)(model, with_hooks=with_hooks)
            except Exception as error:
                if not is_real and not with_hooks:
                    what = f"{type(model).__name__} could not be copied to the meta device ({type(error).__name__}: {error})"
                    raise ValueError(f"{what}: {advice(model)}.") from error
                clone = error
            yield is_real, with_hooks == hooks[-1], clone


def has_memory(model: nn.Module) -> bool:
    """Whether the network can run: none of its weights is on the meta device."""
    return not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def hooks_of(model: nn.Module) -> list[MutableMapping[int, Any]]:
    """The registered forward hooks and forward pre-hooks of all modules."""
    return [registered for module in model.modules() for registered in (module._forward_hooks, module._forward_pre_hooks)]


def has_function_hooks(model: nn.Module) -> bool:
    """Whether a forward hook of a module is a plain function, which a copy of the network does not copy."""
    return any(isinstance(hook, FunctionType) for registered in hooks_of(model) for hook in registered.values())


def rebound(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """The same function, for the copy of a network: what it reads and writes outside of itself is the copy's, or is copied."""
    cells = [CellType(copy.deepcopy(cell.cell_contents, memo)) for cell in function.__closure__ or ()]
    held = {name: function.__globals__.get(name) for name in function.__code__.co_names}
    held = {name: copy.deepcopy(value, memo) for name, value in held.items() if isinstance(value, dict | list | set | deque)}
    defaults = copy.deepcopy(function.__defaults__, memo)
    bound = FunctionType(function.__code__, {**function.__globals__, **held}, function.__name__, defaults, tuple(cells))
    bound.__kwdefaults__ = copy.deepcopy(function.__kwdefaults__, memo)
    return bound


def advice(model: nn.Module) -> str:
    """What to do about a network that cannot be copied, by what is in it."""
    for name, module in model.named_modules():
        where = f"{name or 'the network itself'} ({type(module).__name__})"
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers") and any(is_lazy(tensor) for tensor in value.values()):
                return f"{where} is lazy: run the network once, then wrap it"
            if key.startswith("_") or is_copied(value):
                continue
            return f"{where} keeps {key!r}, a {type(value).__name__}, which cannot be copied: take it off while you wrap"
    return "plan it before its first run, or clear what it keeps of one"


def is_copied(value: Any) -> bool:
    """Whether Python can copy a value."""
    try:
        copy.deepcopy(value)
    except Exception:
        return False
    return True
