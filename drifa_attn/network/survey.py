"""Where the channels of every feature of a network are, and which features can be refined.

Nothing here knows a network by name. Two traces, at two batch and image sizes, tell which axis of an output does not move with
the image (channels), how many tokens are no positions (prefix), which modules run once, and what the network's result depends
on.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from drifa_attn.layout import Layout
from drifa_attn.trees import Path, tensors_in

from .copies import CONVOLUTIONS, copied
from .site import Site
from .trace import MOST_PREFIX, Inputs, Output, Trace, traces

CHANNELS_FIRST = (*CONVOLUTIONS, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)


@dataclass
class Found:
    """What a module's output holds.

    Attributes:
        sites: the tensors that can be refined.
        reasons: why each of its other tensors cannot.
        is_map: whether one of its tensors has more than one position, refinable or not.
    """

    sites: list[Site]
    reasons: list[str]
    is_map: bool


@dataclass
class Survey:
    """What two traces of a network's copy tell.

    Attributes:
        title: what messages call the network.
        clone: the copy; modules: its modules by name.
        inputs: what the copy was run with.
        first, second: the traces; second is None if only one forward worked.
        is_resized: whether the second trace had another image size.
        stated: the channels that `feature_info` states, by module.
        found: what was found at every module that was called.
        notes: what the user should know about the traces.
    """

    title: str
    clone: nn.Module
    modules: dict[str, nn.Module]
    inputs: Inputs
    first: Trace
    second: Trace | None
    is_resized: bool
    stated: dict[str, list[int]]
    found: dict[str, Found] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def survey(
    model: nn.Module,
    example_input: Any = None,
    *,
    prepare: Callable[[nn.Module], object] | None = None,
    layouts: Mapping[str, Layout] | None = None,
    channels: Mapping[str, Collection[int]] | None = None,
) -> Survey:
    """Survey a network by running its copy; the network itself is untouched.

    Args:
        model: the network.
        example_input: a tensor, a tuple of arguments or a dict of keyword arguments; None tries the network's own size.
        prepare: takes out of the copy what is to be left out.
        layouts: the layouts of modules where they are known.
        channels: the channels of modules where they are known.

    Raises: ValueError: the network cannot be copied or traced.
    """
    title = type(model).__name__
    clone, candidates = copied(model, example_input)
    if prepare is not None:
        prepare(clone)
    try:
        seen = traces(clone, candidates)
    except Exception as error:
        tried = ", ".join(str([tuple(t.shape) for _, t in tensors_in(inputs)]) for inputs in candidates)
        advice = "check" if example_input is not None else "pass"
        raise ValueError(
            f"{title} could not be traced on the meta device with inputs {tried} ({type(error).__name__}: {error}): "
            f"{advice} example_input=, or wrap the part that maps a tensor to features, such as a detector's .backbone."
        ) from error
    stated: dict[str, list[int]] = {}
    for name, width in feature_entries(clone):
        stated.setdefault(name, []).append(width)
    modules = dict(clone.named_modules())
    record = Survey(title, clone, modules, seen.inputs, seen.first, seen.second, seen.is_resized, stated)
    known = stated | dict(channels or {})
    for name in seen.first.calls:
        record.found[name] = looked_through(record, name, known.get(name, ()), (layouts or {}).get(name))
    if seen.second is None:
        record.notes = (f"only one forward worked, so layouts are less certain ({seen.error})",)
    return record


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


def looked_through(survey: Survey, name: str, channels: Collection[int], layout: Layout | None) -> Found:
    """The sites in a module's output, and why its other tensors were rejected."""
    call = survey.first.calls[name]
    features = {path: feature(survey, name, path, channels, layout) for path in call.outputs}
    is_map = any(isinstance(site, Site) and site.positions > 1 for site in features.values())
    sites, reasons = [], [] if features else ["its output holds no tensor"]
    for path, site in features.items():
        if isinstance(site, Site) and is_map and site.positions == 1:  # a single token has nothing to pool over
            site = "it is a single vector; the module's other outputs are feature maps"
        if isinstance(site, Site) and call.count > 1:
            return Found([], [f"it is called {call.count} times in one forward"], is_map)
        if isinstance(site, Site) and not is_live(survey.first, call.outputs[path], site.num_prefix_tokens):
            site = unread(site)
        if isinstance(site, Site):
            sites.append(site)
        else:
            reasons.append("".join(f"[{key}]" for key in path) + " " * bool(path) + site)
    return Found(sites, reasons, is_map)


def is_live(record: Trace, output: Output, num_prefix_tokens: int) -> bool:
    """Whether the network's result depends on this tensor; with prefix tokens, on the positions behind them."""
    return bool(output.mark & (record.output_through_positions if num_prefix_tokens else record.output_reach))


def unread(site: Site) -> str:
    """The reason against a feature that does not reach the network's result."""
    if site.num_prefix_tokens == 1:
        return "the network reads only the class token of this output"
    if site.num_prefix_tokens:
        return f"the network reads only the {site.num_prefix_tokens} prefix tokens of this output"
    return "the network's result does not depend on this output"


def output_site(survey: Survey) -> Site | str:
    """The tensor in the network's own output that a head reads, or the reason why none can be read."""
    outputs = survey.first.calls[""].outputs
    if not outputs:
        return "its output holds no tensor"
    seen = [feature(survey, "", path) for path in outputs]
    return next((site for site in seen if isinstance(site, Site)), seen[-1])


def feature(survey: Survey, name: str, path: Path, channels: Collection[int] = (), layout: Layout | None = None) -> Site | str:
    """One tensor of a module's output as a site, whether or not the network reads it, or the reason why it cannot be one."""
    first, second = survey.first, survey.second
    one = first.calls[name].outputs[path]
    other = second.calls[name].outputs.get(path) if second and name in second.calls else None
    if not one.is_floating or len(one.shape) < 2:
        return f"its output is no floating-point feature: {one.shape}"
    if one.shape[0] != first.batch or (other and second and other.shape[0] != second.batch):
        return f"the first axis of its output {one.shape} is not the batch"
    if other and len(other.shape) != len(one.shape):
        return f"its output changes rank: {one.shape} and {other.shape}"
    last = len(one.shape) - 1
    axis = last if layout == "b ... c" else 1 if layout else channel_axis(survey, name, one, other, channels)
    if axis not in (1, last):
        return f"which axis of its output {one.shape} holds the channels is undecided: name it in layouts="
    tokens_last = axis != 1 and last > 1
    return Site(
        module=name,
        path=path,
        channels=one.shape[axis],
        layout="b ... c" if tokens_last else "b c ...",
        num_prefix_tokens=prefix_tokens(survey, one, other) if tokens_last and last == 2 else 0,
        shape=one.shape[1:],
    )


def channel_axis(survey: Survey, name: str, one: Output, other: Output | None, channels: Collection[int]) -> int | None:
    """The axis that holds the channels: the one that does not move with the image, or whose length is known."""
    if len(one.shape) == 2:
        return 1
    axes = list(range(1, len(one.shape)))
    if survey.is_resized and other:
        still = [axis for axis in axes if one.shape[axis] == other.shape[axis]]
        if len(still) == 1:
            return still[0]
        axes = still or axes
    last = last_weighted(survey, name)
    width = {p.shape[0] for p in last.parameters(recurse=False) if p.ndim} if last else ()
    for known in (channels, width):
        fitting = [axis for axis in axes if one.shape[axis] in known]
        if len(fitting) == 1:
            return fitting[0]
    if isinstance(last, CHANNELS_FIRST):
        return 1
    return len(one.shape) - 1 if isinstance(last, nn.Linear | nn.LayerNorm) else None


def last_weighted(survey: Survey, name: str) -> nn.Module | None:
    """The module with weights of its own that ran last inside a module."""
    inside = [n for n in survey.first.calls if n == name or n.startswith(f"{name}." if name else "")]
    inside = [n for n in inside if next(survey.modules[n].parameters(recurse=False), None) is not None]
    return survey.modules[max(inside, key=lambda n: survey.first.calls[n].order)] if inside else None


def prefix_tokens(survey: Survey, one: Output, other: Output | None) -> int:
    """Number of prefix tokens: the length of the sequence minus the grid of some convolution."""
    fitting = set(leftovers(one.shape[1], grids(survey, survey.first)))
    if other and survey.second:
        fitting &= set(leftovers(other.shape[1], grids(survey, survey.second)))
    if fitting:
        return min(fitting)
    stated = [getattr(module, "num_prefix_tokens", 0) for module in survey.modules.values()]
    return next((n for n in stated if isinstance(n, int) and 0 < n < one.shape[1]), 0)


def grids(survey: Survey, record: Trace) -> set[int]:
    """The numbers of positions of all maps that convolutions made, of as many axes as the first has."""
    kind = next((type(m) for name in record.calls if isinstance(m := survey.modules[name], CONVOLUTIONS)), nn.Conv2d)
    return {
        math.prod(output.shape[2:])
        for name, call in record.calls.items()
        if isinstance(survey.modules[name], kind)
        for output in call.outputs.values()
    } - {1}


def leftovers(tokens: int, grids: set[int]) -> list[int]:
    """The numbers of prefix tokens with which the rest is one of these grids."""
    return [tokens - grid for grid in grids if 0 <= tokens - grid <= MOST_PREFIX]
