"""Where attention can go in a network: its stages, residual blocks and convolutions, and where their channels are.

Nothing here knows a network by name. Two traces on the meta device, at two batch and image sizes, tell which modules run once,
which add or concatenate what they read (blocks), which axis of an output does not move with the image (channels), how many
tokens are no positions (prefix), and what the network's result depends on (live).
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from drifa_attn.layout import Layout
from drifa_attn.trees import Path, map_tensors, tensors_in
from drifa_attn.wrapping.inject import CONTAINERS, Site, carrier_of, detach

from .trace import MOST_PREFIX, Leaf, Trace, meta_clone, trace

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CHANNELS_FIRST = (*CONVOLUTIONS, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
BLOCK_NAMES = re.compile("Block|Bottleneck|Residual")
LARGER = (16, 128, 256)  # added to the last axes in the second trace: twice and more the largest stride in use


def default_shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Shapes, without the batch axis, that the network may take as its one input, the likeliest first."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    config = config if isinstance(config, Mapping) else vars(config)
    first = next((m for m in model.modules() if isinstance(m, (*CONVOLUTIONS, nn.Linear))), None)
    sizes = [getattr(m, key) for m in model.modules() for key in ("img_size", "image_size") if hasattr(m, key)]
    squares = [tuple(s) if isinstance(s, tuple | list) else (s, s) for s in sizes if s]
    if config.get("input_size"):
        squares.append(tuple(config["input_size"][1:]))
        yield from ((config["input_size"][0], *square) for square in squares)
    if isinstance(first, nn.Linear):
        yield (first.in_features,)
    elif isinstance(first, nn.Conv3d):
        yield from ((first.in_channels, 16, *square) for square in [*squares, (112, 112), (224, 224)])
    elif isinstance(first, nn.Conv2d):
        yield from ((first.in_channels, *square) for square in [*squares, (224, 224), (512, 512)])
    yield from ((3, *square) for square in [*squares, (224, 224), (512, 512)])


def resized(tensor: Tensor, batch: int, larger: bool) -> Tensor:
    """An input with one more sample and, if `larger`, a larger image (axes 2 and on of a floating-point tensor)."""
    shape = list(tensor.shape)
    if shape and shape[0] == batch:
        shape[0] += 1
    if larger and tensor.is_floating_point() and tensor.ndim > 2:
        shape[2:] = [size + step for size, step in zip(shape[2:], LARGER[-len(shape) + 2 :], strict=True)]
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)


class Survey:
    """What two traces of a network's copy found, and the questions that choose sites.

    Args:
        model: the network; only its copy runs, without the attention that may be in it.
        example_input: a tensor, a tuple of arguments or a dict of keyword arguments; None tries the network's own size.
    """

    def __init__(self, model: nn.Module, example_input: Any = None) -> None:
        self.title = type(model).__name__
        try:
            self.clone = meta_clone(model)
        except Exception as error:
            raise ValueError(
                f"{self.title} could not be copied to the meta device ({type(error).__name__}: {error}): "
                "plan it before its first run, or clear what it keeps of one."
            ) from error
        detach(self.clone)
        self.modules = dict(self.clone.named_modules())
        self.inputs, self.first = self.trace_first(model, example_input)
        self.second, self.is_resized = self.trace_second()
        self.feature_info = list(feature_entries(self.clone))

    def trace_first(self, model: nn.Module, example_input: Any) -> tuple[tuple[tuple, dict], Trace]:
        """The inputs that run, and their trace."""
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
        if example_input is None:
            shapes = dict.fromkeys(default_shapes(model))
            candidates: list[tuple[tuple, dict]] = [
                ((torch.empty(2, *shape, dtype=dtype, device="meta"),), {}) for shape in shapes
            ]
        else:
            candidates = [as_call(example_input)]
        error: Exception | None = None
        for args, kwargs in candidates:
            try:
                return (args, kwargs), trace(self.clone, args, kwargs)
            except Exception as exception:  # noqa: BLE001 - a network may fail in any way on a guessed input
                error = exception
        tried = ", ".join(str([tuple(t.shape) for _, t in tensors_in(inputs)]) for inputs in candidates)
        advice = "check" if example_input is not None else "pass"
        raise ValueError(
            f"{self.title} could not be traced on the meta device with inputs {tried} ({type(error).__name__}: {error}): "
            f"{advice} example_input=, or wrap the part that maps a tensor to features, such as a detector's .backbone."
        ) from error

    def trace_second(self) -> tuple[Trace | None, bool]:
        """A trace at another batch size and, if the network takes one, another image size."""
        for larger in (True, False):
            args, kwargs = map_tensors(self.inputs, partial(resized, batch=self.first.batch, larger=larger))
            try:
                return trace(self.clone, args, kwargs), larger
            except Exception:  # noqa: BLE001, S112 - many networks have one size; the first trace still stands
                continue
        return None, False

    def feature(self, name: str, path: Path, channels: Collection[int] = (), layout: Layout | None = None) -> Site | str:
        """One tensor of a module's output as a site, live or not, or the reason why it cannot be one."""
        leaf = self.first.calls[name].leaves[path]
        other = self.second.calls[name].leaves.get(path) if self.second and name in self.second.calls else None
        if not leaf.is_floating or len(leaf.shape) < 2:
            return f"its output is no floating-point feature: {leaf.shape}"
        if leaf.shape[0] != self.first.batch or (other and self.second and other.shape[0] != self.second.batch):
            return f"the first axis of its output {leaf.shape} is not the batch"
        if other and len(other.shape) != len(leaf.shape):
            return f"its output changes rank: {leaf.shape} and {other.shape}"
        axis = len(leaf.shape) - 1 if layout == "b ... c" else 1 if layout else self.channel_axis(name, leaf, other, channels)
        if axis not in (1, len(leaf.shape) - 1):
            return f"which axis of its output {leaf.shape} holds the channels is undecided: name it in layouts="
        tokens_last = axis != 1 and len(leaf.shape) > 2
        prefix = self.prefix(leaf, other) if tokens_last and len(leaf.shape) == 3 else 0
        return Site(
            name,
            carrier_of(self.clone, name),
            path,
            leaf.shape[axis],
            "b ... c" if tokens_last else "b c ...",
            prefix,
            leaf.shape[1:],
        )

    def features(self, name: str, channels: Collection[int] = (), layout: Layout | None = None) -> dict[Path, Site | str]:
        """Every tensor of a module's output as `feature` sees it; beside maps, a single token has nothing to pool over."""
        call = self.first.calls.get(name)
        if call is None:
            return {(): "it is not called"}
        found = {path: self.feature(name, path, channels, layout) for path in call.leaves}
        if not found:
            return {(): "its output holds no tensor"}
        if any(isinstance(site, Site) and site.positions > 1 for site in found.values()):
            for path, site in found.items():
                if isinstance(site, Site) and site.positions == 1:
                    found[path] = "it is a single position beside maps"
        return found

    def sites(self, name: str, channels: Collection[int] = (), layout: Layout | None = None) -> tuple[list[Site], list[str]]:
        """The sites of a module's output, and the reasons against those of its tensors that are none."""
        sites, reasons = [], []
        for path, site in self.features(name, channels, layout).items():
            if isinstance(site, Site) and self.first.calls[name].count > 1:
                return [], [f"it is called {self.first.calls[name].count} times in one forward"]
            if isinstance(site, Site) and not self.first.is_live(self.first.calls[name].leaves[path], site.num_prefix_tokens):
                what = f"all but its {site.num_prefix_tokens} prefix tokens are" if site.num_prefix_tokens else "its output is"
                site = f"{what} discarded: the network's result does not depend on it"
            if isinstance(site, Site):
                sites.append(site)
            else:
                reasons.append("".join(f"[{key}]" for key in path) + " " * bool(path) + site)
        return sites, reasons

    def channel_axis(self, name: str, leaf: Leaf, other: Leaf | None, channels: Collection[int]) -> int | None:
        """The axis that holds the channels: the one that does not move with the image, or is as long as is known."""
        if len(leaf.shape) == 2:
            return 1
        axes = list(range(1, len(leaf.shape)))
        if self.is_resized and other:
            still = [axis for axis in axes if leaf.shape[axis] == other.shape[axis]]
            if len(still) == 1:
                return still[0]
            axes = still or axes
        last = self.last_parametric(name)
        width = {p.shape[0] for p in last.parameters(recurse=False) if p.ndim} if last else ()
        for known in (channels, width):
            fitting = [axis for axis in axes if leaf.shape[axis] in known]
            if len(fitting) == 1:
                return fitting[0]
        if isinstance(last, CHANNELS_FIRST):
            return 1
        return len(leaf.shape) - 1 if isinstance(last, nn.Linear | nn.LayerNorm) else None

    def last_parametric(self, name: str) -> nn.Module | None:
        """The module with weights of its own that ran last inside a module."""
        inside = [n for n in self.first.calls if n == name or n.startswith(f"{name}." if name else "")]
        inside = [n for n in inside if next(self.modules[n].parameters(recurse=False), None) is not None]
        return self.modules[max(inside, key=lambda n: self.first.calls[n].order)] if inside else None

    def prefix(self, leaf: Leaf, other: Leaf | None) -> int:
        """How many leading tokens are no positions: what is left over when a grid of some convolution is taken away."""
        fitting = set(leftovers(leaf.shape[1], self.grids(self.first)))
        if other and self.second:
            fitting &= set(leftovers(other.shape[1], self.grids(self.second)))
        if fitting:
            return min(fitting)
        stated = [getattr(module, "num_prefix_tokens", 0) for module in self.modules.values()]
        return next((n for n in stated if isinstance(n, int) and 0 < n < leaf.shape[1]), 0)

    def grids(self, record: Trace) -> set[int]:
        """The numbers of positions of all maps that convolutions made, of as many axes as the first has."""
        kind = next((type(m) for name in record.calls if isinstance(m := self.modules[name], CONVOLUTIONS)), nn.Conv2d)
        return {
            math.prod(leaf.shape[2:])
            for name, call in record.calls.items()
            if isinstance(self.modules[name], kind)
            for leaf in call.leaves.values()
        } - {1}

    def outline(self) -> list[str]:
        """The first modules of the network, for a message."""
        return [f"{name} ({type(module).__name__})" for name, module in self.modules.items() if name][:20]

    def is_candidate(self, name: str) -> bool:
        """Whether a module can be a block: not the network, no pyramid or head (they take or give dicts), its output a map."""
        if not name or self.first.calls[name].is_dict:
            return False
        return any(isinstance(site, Site) and site.positions > 1 for site in self.features(name).values())

    def lifted(self, name: str) -> str:
        """The element of a stack around a module with a residual inside, or the module itself if there is none."""
        element = name
        while element:
            parent = element.rpartition(".")[0]
            if isinstance(self.modules[parent], CONTAINERS) and element in self.first.calls:
                kind = type(self.modules[element])
                alike = sum(type(self.modules[other]) is kind for other in self.first.calls)
                return element if alike > 1 else name
            element = parent
        return name

    def blocks(self) -> list[str]:
        """The residual blocks in calling order: innermost modules that add to what they read, and all of their classes.

        Where those hold less than half of the weights, modules that concatenate count too (dense and inception blocks); where
        there are none, modules whose class is called a block.
        """
        found = self.closed({frame for frame, _, _ in self.first.additions})
        if self.share(found) < 0.5:
            found = self.closed(found | self.first.concatenations)
        if not found:
            found = self.closed({name for name in self.first.calls if BLOCK_NAMES.search(type(self.modules[name]).__name__)})
        return sorted(found, key=lambda name: self.first.calls[name].order)

    def closed(self, frames: set[str]) -> set[str]:
        """The stack elements around these modules, and all modules of their classes: the innermost of nested ones."""
        names = {self.lifted(frame) for frame in frames}
        kinds = {type(self.modules[name]) for name in names} - set(CONTAINERS)
        names |= {self.lifted(name) for name in self.first.calls if type(self.modules[name]) in kinds}
        names = {name for name in names if self.is_candidate(name)}
        once = {name for name in names if self.first.calls[name].count == 1}
        return {name for name in names if not any(other.startswith(f"{name}.") for other in once)}

    def share(self, names: set[str]) -> float:
        """The share of the network's weights, heads left out, that lies in these modules."""
        inside = sum(p.numel() for name in names for p in self.modules[name].parameters())
        maps = [n for n, c in self.first.calls.items() if any(len(leaf.shape) > 2 for leaf in c.leaves.values())]
        total = sum(p.numel() for n in maps for p in self.modules[n].parameters(recurse=False))
        return inside / max(total, 1)

    def convolutions(self, *, shortcuts: bool) -> list[str]:
        """The convolutions in blocks (or anywhere, without blocks) that a norm follows, at more than one position."""
        blocks = self.blocks()
        left_out = set() if shortcuts else self.shortcuts()
        return [
            name
            for name in sorted(self.first.calls, key=lambda name: self.first.calls[name].order)
            if isinstance(self.modules[name], CONVOLUTIONS) and name in self.first.normed and name not in left_out
            if not blocks or any(name.startswith(f"{block}.") for block in blocks)
            if self.is_candidate(name)
        ]

    def shortcuts(self) -> set[str]:
        """The convolutions on the shorter side of residual sums: projections."""
        found: set[str] = set()
        for frame, *reaches in self.first.additions:
            inside = [
                (name, leaf.mark)
                for name, call in self.first.calls.items()
                if isinstance(self.modules[name], CONVOLUTIONS) and name.startswith(f"{frame}." if frame else "")
                for leaf in call.leaves.values()
            ]
            one, two = ({name for name, mark in inside if mark & reach} for reach in reaches)
            if len(one) != len(two):
                found |= min(one, two, key=len) - max(one, two, key=len)
        return found

    def stages(self) -> dict[str, list[int]]:
        """The ends of the stages, with their channels where the network states them.

        `feature_info` if at least half of its entries can be sites, else the last live block of every shape (every block where
        all have one shape, as in plain transformers), else, in networks without blocks, the last layer of every resolution or,
        for vectors, of every linear layer.
        """
        stated: dict[str, list[int]] = {}
        for name, channels in self.feature_info:
            stated.setdefault(name, []).append(channels)
        usable = [name for name, channels in stated.items() if self.sites(name, channels)[0]]
        if usable and 2 * len(usable) >= len(stated):
            return stated
        return {name: [] for name in self.block_stages() or self.layer_stages()}

    def block_stages(self) -> list[str]:
        """The last live block of every shape of output; all blocks if there is one shape."""
        last = {}
        blocks = self.blocks()
        for name in blocks:
            if sites := self.sites(name)[0]:
                last[tuple(site.shape for site in sites)] = name
        return blocks if len(last) == 1 else list(last.values())

    def layer_stages(self) -> list[str]:
        """The last innermost module of every resolution (for vectors, from one linear layer to the next) with weights; the
        head is left out.
        """
        last: dict[Any, str] = {}
        weighted, layers = set(), 0
        for name in sorted(self.first.calls, key=lambda name: self.first.calls[name].order):
            module = self.modules[name]
            sites, _ = self.sites(name)
            is_weighted = next(module.parameters(), None) is not None
            if next(module.children(), None) or not sites or (is_weighted and name in self.first.output_producers):
                continue
            layers += any(p.ndim > 1 for p in module.parameters())
            key = (sites[0].positions, layers if sites[0].positions == 1 else None)
            last[key] = name
            if is_weighted:
                weighted.add(key)
        maps = {key for key in weighted if key[0] > 1}
        return [name for key, name in last.items() if key in (maps or weighted)]


def feature_entries(model: nn.Module) -> Iterator[tuple[str, int]]:
    """The `feature_info` of a network or of a part of it, its module names as they are in the network."""
    names = {name for name, _ in model.named_modules()}
    for prefix, module in model.named_modules():
        info: Any = getattr(module, "feature_info", None)
        entries = info.get_dicts() if hasattr(info, "get_dicts") else info
        if not isinstance(entries, list | tuple):
            continue
        found = []
        for entry in entries:
            spellings = [entry.get("module") or "", (entry.get("module") or "").replace(".", "_")]
            full = next((n for s in spellings if s and (n := f"{prefix}.{s}".lstrip(".")) in names), None)
            found += [(full, entry.get("num_chs"))] if full else []
        if found:
            yield from found
            return


def leftovers(tokens: int, grids: set[int]) -> list[int]:
    """The numbers of prefix tokens that leave a grid."""
    return [tokens - grid for grid in grids if 0 <= tokens - grid <= MOST_PREFIX]


def as_call(example_input: Any) -> tuple[tuple, dict]:
    """Arguments and keyword arguments of an example input, on the meta device."""
    args = example_input if isinstance(example_input, tuple) else () if isinstance(example_input, dict) else (example_input,)
    kwargs = example_input if isinstance(example_input, dict) else {}
    if not any(True for _ in tensors_in((args, kwargs))):
        raise TypeError(
            f"example_input expected a tensor, a tuple of arguments or a dict of keyword arguments, got {example_input!r}."
        )
    return map_tensors((args, kwargs), lambda tensor: tensor.to("meta"))
