"""Which modules of a network are its residual blocks, and which convolutions stand in them."""

import re

from torch import nn

from .copies import CONVOLUTIONS
from .heads import heads, without_predictions
from .record import Survey

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
BLOCK_NAMES = re.compile("Block|Bottleneck|Residual")


def blocks(survey: Survey) -> list[str]:
    """The residual blocks in calling order: innermost modules that add to what they read, and all modules of their classes.

    Where those hold less than half of the weights, modules count too that add in other words (a difference, `lerp`, a stack
    that is summed), and then those that concatenate (dense and inception blocks). Where there are none, modules count whose
    class is called a block. What gives predictions is no block.
    """
    found = closed(survey, {frame for frame, _, _ in survey.first.additions})
    if weight_share(survey, found) < 0.5:
        found = closed(survey, found | survey.first.other_sums)
    if weight_share(survey, found) < 0.5:
        found = closed(survey, found | survey.first.concatenations)
    if not found:
        named = {name for name in survey.first.calls if BLOCK_NAMES.search(type(survey.modules[name]).__name__)}
        found = closed(survey, named)
    return without_predictions(survey, in_order(survey, found))


def in_order(survey: Survey, names: set[str]) -> list[str]:
    """These modules in the order in which their calls ended."""
    return sorted(names, key=lambda name: survey.first.calls[name].order)


def closed(survey: Survey, frames: set[str]) -> set[str]:
    """The blocks around these modules, and all blocks of the same classes; of nested ones the innermost.

    A frame is where a sum was seen. It may be a part of a block (its attention), so it is lifted to the block first. Other
    modules of the block's class are blocks too, even if their own sum was not seen: it may be a fused operation.
    """
    names = {lifted(survey, frame) for frame in frames}
    kinds = {type(survey.modules[name]) for name in names} - set(CONTAINERS)
    names |= {lifted(survey, name) for name in survey.first.calls if type(survey.modules[name]) in kinds}
    names = {name for name in names if is_candidate(survey, name)}
    names = {name for name in names if not is_folded_within(survey, name)} or names
    once = {name for name in names if survey.first.calls[name].count == 1}
    return {name for name in names if not any(other.startswith(f"{name}.") for other in once)}


def is_folded_within(survey: Survey, name: str) -> bool:
    """Whether a module works on pieces, such as patches, of what a module around it works on, as in MobileViT."""
    inner = [site.folded for site in survey.found[name].sites]
    around = [survey.found.get(".".join(name.split(".")[:i])) for i in range(1, name.count(".") + 1)]
    return any(site.folded < min(inner, default=0) for found in around if found for site in found.sites)


def lifted(survey: Survey, name: str) -> str:
    """The repeated block that contains this module, or the module itself if there is none.

    A block is the direct child of a container and has siblings of its class somewhere in the network.
    """
    element = name
    while element:
        parent = element.rpartition(".")[0]
        if isinstance(survey.modules[parent], CONTAINERS) and element in survey.first.calls:
            kind = type(survey.modules[element])
            alike = sum(type(survey.modules[other]) is kind for other in survey.first.calls)
            return element if alike > 1 else name
        element = parent
    return name


def is_candidate(survey: Survey, name: str) -> bool:
    """Whether a module can be a block: it gives features, and is neither the network nor a pyramid or head, which use dicts.

    Vectors are features where the network has no maps.
    """
    if not name or survey.first.calls[name].is_dict:
        return False
    found = survey.found[name]
    return found.is_map or (bool(found.sites) and not any(other.is_map for other in survey.found.values()))


def weight_share(survey: Survey, names: set[str]) -> float:
    """The share of the network's weights, without its heads, that lies in these modules."""
    inside = sum(p.numel() for name in names for p in survey.modules[name].parameters())
    maps = [n for n, c in survey.first.calls.items() if any(len(output.shape) > 2 for output in c.outputs.values())]
    total = sum(p.numel() for n in maps for p in survey.modules[n].parameters(recurse=False))
    return inside / max(total, 1)


def convolutions(survey: Survey, *, shortcuts: bool) -> list[str]:
    """The convolutions in blocks (anywhere in a network without blocks) that a norm follows, at more than one position."""
    within = blocks(survey)
    left_out = heads(survey) | (set() if shortcuts else projections(survey))
    return [
        name
        for name in in_order(survey, set(survey.first.calls))
        if isinstance(survey.modules[name], CONVOLUTIONS) and name in survey.first.normed and name not in left_out
        if not within or any(name.startswith(f"{block}.") for block in within)
        if is_candidate(survey, name)
    ]


def projections(survey: Survey) -> set[str]:
    """The convolutions on the shorter side of residual sums."""
    found: set[str] = set()
    for frame, *reaches in survey.first.additions:
        inside = [
            (name, output.mark)
            for name, call in survey.first.calls.items()
            if isinstance(survey.modules[name], CONVOLUTIONS) and name.startswith(f"{frame}." if frame else "")
            for output in call.outputs.values()
        ]
        one, two = ({name for name, mark in inside if mark & reach} for reach in reaches)
        if len(one) != len(two):
            found |= min(one, two, key=len) - max(one, two, key=len)
    return found
