"""Where the channels of a feature are, and whether it can be refined.

Two traces, at two batch and image sizes, tell which axis of an output does not move with the image (channels), how many tokens
are no positions (prefix), which modules run once, and what the network's result depends on.
"""

import math
from collections.abc import Collection

from torch import nn

from drifa_attn.layout import Layout
from drifa_attn.trees import Path

from .copies import CONVOLUTIONS
from .record import Found, Survey
from .site import Site
from .trace import MOST_PREFIX, Output, Trace

CHANNELS_FIRST = (*CONVOLUTIONS, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)


def looked_through(survey: Survey, name: str, channels: Collection[int], layout: Layout | None) -> Found:
    """The sites in a module's output, and why its other tensors were rejected."""
    call = survey.first.calls[name]
    features = {path: feature(survey, name, path, channels, layout) for path in call.outputs}
    is_map = any(isinstance(site, Site) and site.positions > 1 for site in features.values())
    whole = any(isinstance(site, Site) and site.folded == 1 for site in features.values())
    sites, reasons = [], [] if features else ["its output holds no tensor"]
    for path, site in features.items():
        if isinstance(site, Site) and site.folded > 1 and whole:
            site = f"it has {site.folded} rows for each sample; the module's other outputs have one"
        if isinstance(site, Site) and is_map and site.positions == 1:  # a single token has nothing to pool over
            site = "it is a single vector; the module's other outputs are feature maps"
        if isinstance(site, Site) and call.count > 1:
            reason = f"it is called {call.count} times in one forward: wrap the part that is shared by itself"
            return Found([], [reason], is_map, [site for site in features.values() if isinstance(site, Site)])
        if isinstance(site, Site) and not remembers(survey.modules[name]):
            site = "a copy of the module would forget what it carries: name the one before or around it"
        if isinstance(site, Site) and not is_live(survey.first, call.outputs[path], site.num_prefix_tokens):
            site = unread(site)
        if isinstance(site, Site):
            sites.append(site)
        else:
            reasons.append("".join(f"[{key}]" for key in path) + " " * bool(path) + site)
    return Found(sites, reasons, is_map)


def remembers(module: nn.Module) -> bool:
    """Whether a copy or a file of a module has what hangs on it: those of einops are built anew from their pattern."""
    own = getattr(type(module), "__getstate__", None)
    if own in (None, getattr(object, "__getstate__", None)):
        return True
    try:
        return "_modules" in module.__getstate__()  # type: ignore[operator]
    except Exception:  # parametrised modules refuse to be written; their copies are whole
        return True


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
    """The tensor in the network's own output that a head reads, or the reason why none can be read.

    Of several outputs it is the first if that is a vector, else the last map: backbones list their maps from the input on.
    """
    outputs = survey.first.calls[""].outputs
    if not outputs:
        return "its output holds no tensor"
    seen = [feature(survey, "", path, layout=survey.layouts.get("")) for path in outputs]
    sites = [site for site in seen if isinstance(site, Site)]
    if not sites:
        return seen[-1]
    top = min(len(site.path) for site in sites)
    maps = [site for site in sites if site.positions > 1 and len(site.path) == top]
    return maps[-1] if maps and sites[0].positions > 1 else sites[0]


def trailing_linear(survey: Survey) -> str | None:
    """The name of the linear layer whose vectors are the network's own output; None if there is no such layer."""
    ends = [name for name in survey.first.output_producers if isinstance(survey.modules[name], nn.Linear)]
    return next((name for name in ends if any(len(o.shape) == 2 for o in survey.first.calls[name].outputs.values())), None)


def feature(survey: Survey, name: str, path: Path, channels: Collection[int] = (), layout: Layout | None = None) -> Site | str:
    """One tensor of a module's output as a site, whether or not the network reads it, or the reason why it cannot be one."""
    second = survey.second
    one = survey.first.calls[name].outputs[path]
    other = second.calls[name].outputs.get(path) if second and name in second.calls else None
    if not one.is_floating or len(one.shape) < 2:
        return f"its output is no floating-point feature: {one.shape}"
    if not (times := folded(survey, one, other)):
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
        num_prefix_tokens=prefix_tokens(survey, name, one, other) if tokens_last and last == 2 else 0,
        shape=one.shape[1:],
        folded=times,
    )


def folded(survey: Survey, one: Output, other: Output | None) -> int:
    """How many rows of a feature belong to each sample; 0 where its first axis is not the batch.

    More than one, as for frames of a video, is told by two traces: in both the first axis is the same multiple of the batch.
    """
    if one.shape[0] == survey.first.batch == 0:
        return 1
    times, rest = divmod(one.shape[0], max(survey.first.batch, 1))
    if rest or (times != 1 and not other):
        return 0
    return times if not (other and survey.second) or other.shape[0] == times * survey.second.batch else 0


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
    last = last_weighted(survey, name) or weighted_before(survey, name, one)
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


def weighted_before(survey: Survey, name: str, one: Output) -> nn.Module | None:
    """The last module with weights of its own that ran before a module without, and whose output has the same shape."""
    reach = survey.first.calls[name].input_reach
    before = [
        (call.order, other)
        for other, call in survey.first.calls.items()
        if any(output.shape == one.shape and output.mark & reach for output in call.outputs.values())
        if next(survey.modules[other].parameters(recurse=False), None) is not None
    ]
    return survey.modules[max(before)[1]] if before else None


def prefix_tokens(survey: Survey, name: str, one: Output, other: Output | None) -> int:
    """Number of prefix tokens: the length of the sequence minus the grid of some convolution that it comes from."""
    fitting = set(leftovers(one.shape[1], grids(survey, survey.first, name)))
    if other and survey.second:
        fitting &= set(leftovers(other.shape[1], grids(survey, survey.second, name)))
    if fitting:
        return min(fitting)
    stated = [getattr(module, "num_prefix_tokens", 0) for module in survey.modules.values()]
    return next((n for n in stated if isinstance(n, int) and 0 < n < one.shape[1]), 0)


def grids(survey: Survey, record: Trace, name: str) -> set[int]:
    """The numbers of positions of all maps that convolutions before or in a module made, of as many axes as the first has."""
    kind = next((type(m) for called in record.calls if isinstance(m := survey.modules[called], CONVOLUTIONS)), nn.Conv2d)
    reach, within = record.calls[name].input_reach, f"{name}." if name else ""
    return {
        math.prod(output.shape[2:])
        for called, call in record.calls.items()
        if isinstance(survey.modules[called], kind)
        for output in call.outputs.values()
        if output.mark & reach or called.startswith(within)
    } - {1}


def leftovers(tokens: int, grids: set[int]) -> list[int]:
    """The numbers of prefix tokens with which the rest is one of these grids."""
    return [tokens - grid for grid in grids if 0 <= tokens - grid <= MOST_PREFIX]
