"""Which modules end a stage of a network. A stage is what runs at one resolution, until the resolution changes."""

import math
from collections.abc import Sequence
from itertools import groupby

from torch import nn

from .blocks import blocks, in_order
from .heads import predictions, resolution
from .record import Survey

TABLES = (nn.Embedding, nn.EmbeddingBag)  # what they give is the input in other words


def stages(survey: Survey) -> list[str]:
    """The ends of the stages, in calling order.

    These are the modules of `feature_info` if at least half of them can be sites. Else it is the last block of every
    resolution, or every block of a network with one resolution, such as a plain transformer. Where layers outside of the
    blocks raise the resolution again, as in a U-Net, and in networks without blocks, it is the end of every run of layers at
    one resolution, or for vectors every linear layer.
    """
    usable = [name for name in survey.stated if name in survey.found and survey.found[name].sites]
    if usable and 2 * len(usable) >= len(survey.stated):
        return list(survey.stated)
    everything = blocks(survey)
    names = [name for name in everything if survey.found[name].sites]
    layers = steps(survey, everything)
    if names and not rises(survey, layers, names):
        return block_stages(survey, names) or everything
    return layer_stages(survey, layers, names)


def rises(survey: Survey, layers: Sequence[str], names: Sequence[str]) -> bool:
    """Whether weighted layers outside of the blocks work at a higher resolution than a block before them."""
    lowest = math.inf
    for name in layers:
        if name in names:
            lowest = min(lowest, resolution(survey, name))
        elif resolution(survey, name) > lowest and is_weighted(survey, [name]):
            return True
    return False


def runs(survey: Survey, names: Sequence[str]) -> list[list[str]]:
    """These modules, grouped by the runs in which the resolution stays the same."""
    return [list(run) for _, run in groupby(names, key=lambda name: resolution(survey, name))]


def block_stages(survey: Survey, names: Sequence[str]) -> list[str]:
    """The last block of every resolution, or where there is one resolution of every width; [] where there is one of both.

    Where blocks add, a width that doubles begins a stage too: in dilated networks the resolution stays.
    A block that gives only what it adds to a concatenation, as in some dense networks, stands for the module around it.
    """
    widths = {name: survey.found[name].sites[0].channels for name in names}
    found = runs(survey, names)
    if not survey.first.additions:
        return [joined(survey, run) for run in found]
    if len(found) == 1:
        return [] if len(set(widths.values())) == 1 else list({width: name for name, width in widths.items()}.values())
    return [
        name
        for run in found
        for name, after in zip(run, [*run[1:], None], strict=True)
        if after is None or widths[after] >= 2 * widths[name]
    ]


def joined(survey: Survey, run: Sequence[str]) -> str:
    """The last module of a run, or the one around the run that puts its features together and so has more channels."""
    last = run[-1]
    parent = last.rpartition(".")[0]
    around = survey.found.get(parent)
    if not parent or not around or not around.sites or resolution(survey, parent) != resolution(survey, last):
        return last
    return parent if around.sites[0].channels > survey.found[last].sites[0].channels else last


def layer_stages(survey: Survey, layers: Sequence[str], names: Sequence[str]) -> list[str]:
    """The end of every run of layers at one resolution: its last block, or the outermost module that ends there.

    Only runs with weights count, and only maps where there are maps. For vectors a run is one linear layer and what follows.
    """
    found = runs(survey, layers)
    maps = [run for run in found if resolution(survey, run[0]) > 1 and is_weighted(survey, run)]
    if maps:
        return list(dict.fromkeys(end(survey, run, layers, names) for run in maps))
    return [end for run in found for end in vector_ends(survey, run)]


def steps(survey: Survey, names: Sequence[str]) -> list[str]:
    """What runs in a network, in calling order: the blocks, and the innermost modules outside of them without predictions."""
    left_out = predictions(survey)
    inner = {
        name
        for name, module in survey.modules.items()
        if name in survey.first.calls
        and next(module.children(), None) is None
        and not isinstance(module, TABLES)
        and not any(name.startswith(f"{block}.") for block in names)
    }
    found = in_order(survey, inner - left_out | set(names))
    return [name for name in found if any(site.channels > 1 for site in survey.found[name].sites)]  # one channel is a mask


def is_weighted(survey: Survey, run: Sequence[str]) -> bool:
    """Whether one of these layers has weights."""
    return any(next(survey.modules[name].parameters(), None) is not None for name in run)


def end(survey: Survey, run: Sequence[str], layers: Sequence[str], names: Sequence[str]) -> str:
    """The last block of a run, or else the outermost module around its last layer that holds layers of no other run."""
    within = [name for name in run if name in names]
    if within:
        return within[-1]
    last = parent = run[-1]
    others = set(layers) - set(run)
    while (parent := parent.rpartition(".")[0]) and not any(layer.startswith(f"{parent}.") for layer in others):
        around = survey.found.get(parent)
        if around and around.sites and resolution(survey, parent) == resolution(survey, run[-1]):
            last = parent
    return last


def vector_ends(survey: Survey, run: Sequence[str]) -> list[str]:
    """Of layers that give vectors, the last one before each next linear layer."""
    starts = [i for i, name in enumerate(run) if any(p.ndim > 1 for p in survey.modules[name].parameters())]
    return [run[stop - 1] for stop in [*starts[1:], len(run)]] if starts else []
