"""Tensors within nested tuples, lists, dicts, named tuples and dataclasses: find them, change them, follow a path to one.

A path is the keys that lead to a tensor; of a tensor that stands alone it is empty. The key of a dataclass is a field's name.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Path = tuple[int | str, ...]


def parts(tree: Any) -> dict[Any, Any]:
    """What a nesting holds, by key; {} for what is no nesting."""
    if isinstance(tree, Mapping):  # also a dataclass that is a dict, as the outputs of transformers are
        return dict(tree.items())
    if isinstance(tree, (tuple, list)):
        return dict(enumerate(tree))
    if dataclasses.is_dataclass(tree) and not isinstance(tree, (type, nn.Module)):
        return {field.name: getattr(tree, field.name, None) for field in dataclasses.fields(tree)}
    return {}


def rebuilt(tree: Any, changes: Mapping[Any, Any]) -> Any:
    """A shallow copy of a nesting with other parts at these keys."""
    if isinstance(tree, (tuple, list)):
        items = [changes.get(key, value) for key, value in enumerate(tree)]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if type(tree) is dict:
        return {**tree, **changes}
    changed = copy.copy(tree)
    for key, value in changes.items():
        if isinstance(tree, Mapping):
            changed[key] = value
        else:
            object.__setattr__(changed, key, value)  # the dataclass may be frozen
    return changed


def tensors_in(tree: Any, path: Path = (), within: tuple[int, ...] = ()) -> list[tuple[Path, Tensor]]:
    """Every tensor of a nesting, with the keys that lead to it; what lies within itself is not entered again."""
    if isinstance(tree, Tensor):
        return [(path, tree)]
    # The compiler of torch 2.6 knows no id of a tuple; what is compiled does not lie within itself.
    mine = len(within) if torch.compiler.is_dynamo_compiling() else id(tree)
    if mine in within:
        return []
    found = []
    for key, value in parts(tree).items():
        found += tensors_in(value, (*path, key), (*within, mine))
    return found


def map_tensors(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same nesting with `function` applied to every tensor."""
    if isinstance(tree, Tensor):
        return function(tree)
    changes = {key: map_tensors(value, function) for key, value in parts(tree).items()}
    return rebuilt(tree, changes) if changes else tree


def replace_tensor(tree: Any, path: Path, function: Callable[[Tensor], Tensor]) -> Any:
    """The same nesting with `function` applied to the tensor at `path`."""
    if not path:
        return function(tree)
    return rebuilt(tree, {path[0]: replace_tensor(parts(tree)[path[0]], path[1:], function)})


def holds(tree: Any, path: Path) -> bool:
    """Whether there is a tensor at `path`."""
    for key in path:
        inside = parts(tree)
        if key not in inside:
            return False
        tree = inside[key]
    return isinstance(tree, Tensor)


def at_path(tree: Any, path: Path) -> Tensor:
    """The tensor at `path`."""
    for key in path:
        tree = parts(tree)[key]
    return tree
