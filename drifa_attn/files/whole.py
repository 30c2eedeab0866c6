"""A checkpoint of a whole network, as torch, timm, Lightning or a Trainer write it: the network's own weights in it.

Such a file is data. Of a torch file only tensors and plain values are read (`weights_only=True`), and nothing is executed.
"""

import argparse
import pickle
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drifa_attn.wrapping.inject import CHILD

from .format import FORMAT

ZIP = b"PK\x03\x04"  # a torch file begins like every zip archive
HELD = re.compile(rf"(?:^|\.)({CHILD}(?:_\d+)?)(?=\.)")  # the name of attention within a key
NONE = (
    "the checkpoint holds no attention that wrap put there. Load it by load_state_dict; one of a fused network, or of one with "
    "attention in its own code, after the network was built by the same call."
)
State = Mapping[str, Tensor]


def is_zip(path: Path) -> bool:
    """Whether a file begins as those of torch do."""
    with path.open("rb") as file:
        return file.read(len(ZIP)) == ZIP


def is_whole(path: Path) -> bool:
    """Whether a file is a checkpoint of a whole network, not one of `save_attention`; a `ValueError` for any other file."""
    from safetensors import SafetensorError, safe_open

    if is_zip(path):
        return True
    try:
        with safe_open(path, framework="pt") as opened:
            return FORMAT not in (opened.metadata() or {})
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no safetensors file, or was cut short ({error}), and no torch file: save or copy it again."
        ) from error


def network_state(path: Path, own: Collection[str], weights: str | None) -> dict[str, Tensor]:
    """The weights that a checkpoint holds of a network whose own weights are called `own`, by their names in the network.

    A checkpoint may hold the network under an entry ("state_dict", "state_dict_ema") and its keys may have something before
    the network's names ("module.", "model."). What else is in it, such as the weights of a loss, is left there.

    Raises: ValueError: it holds no attention, or the network several times and `weights` names none of them.
    """
    found = {
        f"{entry}.{prefix}".strip("."): (state, prefix)
        for entry, state in entries(path).items()
        for prefix in prefixes(state, own)
    }
    if not found:
        raise ValueError(f"{path}: {NONE}")
    if weights is not None and weights not in found:
        raise ValueError(f"{path} has no weights {weights!r} of such a network, it has {list(found)}: weights= names one.")
    if weights is None and len(found) > 1:
        raise ValueError(f"{path} holds the network as {list(found)}: pick one, load_attention(..., weights=...).")
    state, prefix = found[next(iter(found)) if weights is None else weights]
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def entries(path: Path) -> dict[str, State]:
    """Every part of a checkpoint that is a state dict, by its name there; the name of one that is the whole file is empty."""
    if not is_zip(path):
        from safetensors.torch import load_file

        return {"": load_file(path)}
    checkpoint = torch_file(path)
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a state dict: save model.state_dict().")
    parts = {"": checkpoint, **{name: value for name, value in checkpoint.items() if isinstance(value, Mapping)}}
    states = {name: {key: value for key, value in part.items() if is_weight(key, value)} for name, part in parts.items()}
    return {
        str(name): {key.replace("_orig_mod.", ""): value for key, value in state.items()}  # of networks that are compiled
        for name, state in states.items()
        if state
    }


def is_weight(key: Any, value: Any) -> bool:
    """Whether this is an entry of a state dict."""
    return isinstance(key, str) and isinstance(value, Tensor)


def torch_file(path: Path) -> Any:
    """What a torch file holds; a `ValueError` if that is more than tensors and plain values."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # plain values by name, which timm's saver adds
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"a {found[1]}" if found else str(error).partition("\n")[0]
        raise ValueError(
            f"{path} holds more than tensors and plain values ({what}), and is not read, for that could run code. Where you "
            'trust it: torch.save(torch.load(path, weights_only=False)["state_dict"], other), and load that.'
        ) from error
    except (RuntimeError, EOFError) as error:
        first = str(error).partition(". ")[0]
        raise ValueError(f"{path} is no torch file, or was cut short ({first}): save or copy it again.") from error


def prefixes(state: State, own: Collection[str]) -> list[str]:
    """What stands before the network's own names in the keys of a state that holds attention; several if it is there twice."""
    seen: Counter[str] = Counter()
    for key in state:
        parts = key.split(".")
        seen.update(".".join(parts[:i]) + "." * bool(i) for i in range(len(parts)) if ".".join(parts[i:]) in own)
    most = max(seen.values(), default=0)
    likely = [prefix for prefix, number in seen.items() if number == most]
    return [prefix for prefix in likely if any(key.startswith(prefix) and HELD.search(key[len(prefix) :]) for key in state)]
