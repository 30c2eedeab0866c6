"""Which modules give the network's predictions: no stage and no block is one of them."""

from .record import Survey


def predictions(survey: Survey) -> set[str]:
    """The modules that give predictions."""
    return heads(survey) | output_layers(survey)


def heads(survey: Survey) -> set[str]:
    """The modules that read several maps and give the network's own output, with all that is in them."""
    tops = [
        name
        for name in survey.first.output_producers
        if name and len({shape[2:] for shape in survey.first.calls[name].input_shapes if len(shape) > 2}) > 1
    ]
    return {name for name in survey.modules if any(name == top or name.startswith(f"{top}.") for top in tops)}


def output_layers(survey: Survey) -> set[str]:
    """The innermost modules that give predictions: the last convolutions and linear layers, and what only follows them.

    Such a layer gives the network's own output, or is narrower than what it reads, or works at a higher resolution than
    another layer. The last layer of a trunk without a head does none of these.
    """
    calls, modules = survey.first.calls, survey.modules
    innermost = [name for name in calls if next(modules[name].children(), None) is None]
    weighted = [name for name in innermost if any(p.ndim > 1 for p in modules[name].parameters())]
    read = 0
    for name in innermost:
        read |= calls[name].input_reach if next(modules[name].parameters(), None) is not None else 0
    lowest = min((resolution(survey, name) for name in weighted if survey.found[name].sites), default=0)
    found, marks = set(), 0
    for name in weighted:
        mark = sum(output.mark for output in calls[name].outputs.values())
        if mark & read or not survey.found[name].sites:
            continue
        site, read_channels = survey.found[name].sites[0], {p.shape[1] for p in modules[name].parameters() if p.ndim > 1}
        if name in survey.first.output_producers:
            found.add(name)
        if resolution(survey, name) > lowest or site.channels < min(read_channels):
            marks |= mark
            found.add(name)
    return found | {name for name in innermost if calls[name].input_reach & marks}


def without_predictions(survey: Survey, names: list[str]) -> list[str]:
    """These modules, in calling order, without those that give predictions.

    A block that gives the network's own output does so if it is narrower than the block before it, or works at a higher
    resolution than another one. The last block of a trunk without a head does neither.
    """
    inside = heads(survey)
    names = [name for name in names if name not in inside]
    kept = []
    for before, name in zip([None, *names], names, strict=False):
        if name in survey.first.output_producers and before is not None:
            sites, earlier = survey.found[name].sites, survey.found[before].sites
            lowest = min((resolution(survey, other) for other in names if survey.found[other].sites), default=0)
            if sites and (resolution(survey, name) > lowest or (earlier and sites[0].channels < earlier[0].channels)):
                continue
        kept.append(name)
    return kept


def resolution(survey: Survey, name: str) -> int:
    """The number of positions of a module's first feature for one sample, in all rows that the sample is folded into."""
    site = survey.found[name].sites[0]
    return site.positions * site.folded
