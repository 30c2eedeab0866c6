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

    Such a layer gives the network's own output, or maps that are narrower than what it reads or finer than others. The last
    layer of a trunk without a head does none of these.
    """
    calls, modules = survey.first.calls, survey.modules
    innermost = [name for name in calls if next(modules[name].children(), None) is None]
    weighted = [name for name in innermost if any(p.ndim > 1 for p in modules[name].parameters())]
    read = 0
    for name in innermost:
        read |= calls[name].input_reach if next(modules[name].parameters(), None) is not None else 0
    found, marks, coarsest = set(), 0, lowest(survey)
    for name in weighted:
        mark = sum(output.mark for output in calls[name].outputs.values())
        if mark & read or not survey.found[name].sites:
            continue
        site, read_channels = survey.found[name].sites[0], {p.shape[1] for p in modules[name].parameters() if p.ndim > 1}
        if name in survey.first.output_producers:
            found.add(name)
        if site.positions > 1 and (resolution(survey, name) > coarsest or site.channels < min(read_channels)):
            marks |= mark
            found.add(name)
    return found | {name for name in innermost if calls[name].input_reach & marks}


def without_predictions(survey: Survey, names: list[str]) -> list[str]:
    """These blocks without those that give predictions: the network's own output, narrower than what they read or finer.

    Finer is what works at a higher resolution than a layer before it. The last block of a trunk without a head is neither.
    """
    inside, coarsest = heads(survey), lowest(survey)
    kept = []
    for name in names:
        if name in survey.first.output_producers and survey.found[name].sites:
            site = survey.found[name].sites[0]
            axis = 1 if site.layout == "b c ..." else -1
            read = [shape[axis] for shape in survey.first.calls[name].input_shapes if len(shape) == len(site.shape) + 1]
            if resolution(survey, name) > coarsest or site.channels < min(read, default=0):
                continue
        if name not in inside:
            kept.append(name)
    return kept


def lowest(survey: Survey) -> int:
    """The resolution of the coarsest map; of a network without maps one."""
    found = [resolution(survey, name) for name, found in survey.found.items() if found.sites]
    return min((positions for positions in found if positions > 1), default=1)


def resolution(survey: Survey, name: str) -> int:
    """The number of positions of a module's first feature for one sample, in all rows that the sample is folded into."""
    site = survey.found[name].sites[0]
    return site.positions * site.folded
