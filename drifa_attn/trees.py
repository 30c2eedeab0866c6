"""Tensors within nested tuples, lists and dicts: find them, change them, follow a path to one.

A path is the keys that lead to a tensor; of a tensor that stands alone it is empty.
"""

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor

Path = tuple[int | str, ...]


def tensors_in(tree: Any, path: Path = ()) -> list[tuple[Path, Tensor]]:
    """Every tensor of nested tuples, lists and dicts, with the keys that lead to it."""
    found: list[tuple[Path, Tensor]] = []
    if isinstance(tree, Tensor):
        return [(path, tree)]
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, tuple | list) else ()
    for key, value in pairs:
        if isinstance(value, Tensor):
            found.append(((*path, key), value))
        elif isinstance(value, dict | tuple | list):
            found += tensors_in(value, (*path, key))
    return found


def map_tensors(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same nesting with `function` applied to every tensor."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(value, function) for key, value in tree.items()}
    return type(tree)(map_tensors(value, function) for value in tree) if isinstance(tree, tuple | list) else tree


def replace_tensor(tree: Any, path: Path, function: Callable[[Tensor], Tensor]) -> Any:
    """The same nesting with `function` applied to the tensor at `path`."""
    if not path:
        return function(tree)
    key, rest = path[0], path[1:]
    if isinstance(tree, dict):
        changed = copy.copy(tree)
        changed[key] = replace_tensor(tree[key], rest, function)
        return changed
    items = [replace_tensor(v, rest, function) if k == key else v for k, v in enumerate(tree)]
    return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)


def at_path(tree: Any, path: Path) -> Tensor:
    """The tensor at `path`."""
    for key in path:
        tree = tree[key]
    return tree
