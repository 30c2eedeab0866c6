"""Which modules end a stage of a network."""

from typing import Any

from .blocks import blocks, in_order
from .survey import Survey


def stages(survey: Survey) -> list[str]:
    """The ends of the stages.

    These are the modules of `feature_info` if at least half of them can be sites. Else it is the last block of every shape of
    output that the network reads (every block where all have one shape, as in plain transformers). In networks without blocks
    it is the last layer of every resolution, or for vectors every linear layer.
    """
    usable = [name for name in survey.stated if name in survey.found and survey.found[name].sites]
    if usable and 2 * len(usable) >= len(survey.stated):
        return list(survey.stated)
    return block_stages(survey) or layer_stages(survey)


def block_stages(survey: Survey) -> list[str]:
    """The last block of every shape of output that is read; all blocks if there is one shape."""
    last, names = {}, blocks(survey)
    for name in names:
        if sites := survey.found[name].sites:
            last[tuple(site.shape for site in sites)] = name
    return names if len(last) == 1 else list(last.values())


def layer_stages(survey: Survey) -> list[str]:
    """The last innermost module of every resolution that has weights; the head is left out.

    For vectors a stage goes from one linear layer to the next.
    """
    last: dict[Any, str] = {}
    weighted, layers = set(), 0
    for name in in_order(survey, set(survey.first.calls)):
        module, sites = survey.modules[name], survey.found[name].sites
        is_weighted = next(module.parameters(), None) is not None
        if next(module.children(), None) or not sites or (is_weighted and name in survey.first.output_producers):
            continue
        layers += any(p.ndim > 1 for p in module.parameters())
        key = (sites[0].positions, layers if sites[0].positions == 1 else None)
        last[key] = name
        if is_weighted:
            weighted.add(key)
    maps = {key for key in weighted if key[0] > 1}
    return [name for key, name in last.items() if key in (maps or weighted)]
