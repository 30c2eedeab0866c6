"""Which features of which branches meet in each fusion: stages of one reduction, of one fraction of depth, or as named."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from drifa_attn.network.survey import Survey
from drifa_attn.trees import tensors_in
from drifa_attn.wrapping.inject import Site

Pairs = Literal["stage", "block"] | Sequence[Mapping[str, str]]


def output_of(modality: str, survey: Survey) -> Site:
    """The tensor in a backbone's output that the heads read."""
    for path in survey.first.calls[""].leaves:
        site = survey.feature("", path)
        if isinstance(site, Site):
            return site
    raise ValueError(f"fuse found no feature in the output of backbone {modality!r}: {survey.feature('', path)}.")


def sites_of(survey: Survey, names: Mapping[str, Sequence[int]]) -> list[Site]:
    """The first site of each of these modules, in calling order."""
    found = [sites[0] for name, channels in names.items() if (sites := survey.sites(name, channels)[0])]
    return sorted(found, key=lambda site: survey.first.calls[site.module].order)


def paired(surveys: Mapping[str, Survey], at: Pairs) -> list[dict[str, Site]]:
    """Which features of which branches meet in each fusion."""
    if not isinstance(at, str):
        pairs = [listed(surveys, entry) for entry in at]
        if alone := [name for name in surveys if not any(name in sites for sites in pairs)]:
            raise ValueError(f"fuse got no stage of {alone} in at=: name at least one of every backbone.")
        return pairs
    if at not in ("stage", "block"):
        raise ValueError(f'fuse expected at "stage", "block" or a list of {{modality: module name}}, got {at!r}.')
    found = {}
    for name, survey in surveys.items():
        blocks = dict.fromkeys(survey.blocks() if at == "block" else (), ())
        found[name] = sites_of(survey, blocks or survey.stages())
        if not found[name]:
            raise ValueError(f"fuse found no {at} in backbone {name!r}: name modules, at=[{{{name!r}: ...}}, ...].")
    # The shapes alone decide: reductions that come back, as in pyramids that go down and up, are no stages to pair.
    octaves = {name: [octave(surveys[name], site) for site in sites] for name, sites in found.items()}
    shared = sorted(set.intersection(*map(set, octaves.values())) - {None})  # type: ignore[type-var]
    rising = all(None not in found and sorted(found) == found for found in octaves.values())  # type: ignore[type-var]
    if rising and len(shared) > 1 and at == "stage":
        last = {name: dict(zip(octaves[name], sites, strict=True)) for name, sites in found.items()}
        return [{name: last[name][k] for name in found} for k in shared]
    depth = min(map(len, found.values()))
    return [{name: sites[math.ceil((k + 1) * len(sites) / depth) - 1] for name, sites in found.items()} for k in range(depth)]


def octave(survey: Survey, site: Site) -> int | None:
    """How often the positions were halved along each axis up to here; None for vectors."""
    (x, *_) = (tensor for _, tensor in tensors_in(survey.inputs))
    if x.ndim < 3 or site.positions < 1:
        return None
    return round(math.log2(max(math.prod(x.shape[2:]) / site.positions, 1)) / (x.ndim - 2))


def listed(surveys: Mapping[str, Survey], entry: Mapping[str, str]) -> dict[str, Site]:
    """The features that one entry of `at` names."""
    if not isinstance(entry, Mapping) or not entry or any(name not in surveys for name in entry):
        raise ValueError(f"fuse expected entries {{modality: module name}} of {list(surveys)} in at=, got {entry!r}.")
    sites = {}
    for name in surveys:  # in the order of the branches
        if name in entry:
            if not entry[name] or entry[name] not in surveys[name].modules:
                raise ValueError(f"fuse: backbone {name!r} has no module {entry[name]!r}.")
            found, reasons = surveys[name].sites(entry[name], surveys[name].stages().get(entry[name], ()))
            if not found:
                raise ValueError(f"fuse: backbone {name!r} cannot be fused at {entry[name]!r}: {'; '.join(reasons)}.")
            sites[name] = found[0]
    return sites
