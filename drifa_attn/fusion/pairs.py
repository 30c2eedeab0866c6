"""Which features of which branches meet at each stage: those of one reduction, of one fraction of depth, or as named."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from drifa_attn.network.blocks import blocks
from drifa_attn.network.features import output_site
from drifa_attn.network.record import Survey
from drifa_attn.network.site import Site
from drifa_attn.network.stages import stages
from drifa_attn.trees import tensors_in

Pairs = Literal["stage", "block"] | Sequence[Mapping[str, str]]


def branch_outputs(surveys: Mapping[str, Survey]) -> dict[str, Site]:
    """For each branch the tensor in its output that is read at its end."""
    outputs = {}
    for modality, survey in surveys.items():
        site = output_site(survey)
        if not isinstance(site, Site):
            raise ValueError(f"fuse found no feature in the output of backbone {modality!r}: {site}.")
        outputs[modality] = site
    return outputs


def paired(surveys: Mapping[str, Survey], at: Pairs) -> list[dict[str, Site]]:
    """The sites by modality that meet at each stage."""
    if not isinstance(at, str | Sequence):
        raise TypeError(f'fuse expected at "stage", "block" or a list of {{modality: module name}}, got {type(at).__name__}.')
    if not isinstance(at, str):
        pairs = [listed(surveys, entry) for entry in at]
        if alone := [name for name in surveys if not any(name in sites for sites in pairs)]:
            raise ValueError(f"fuse got no stage of {alone} in at=: name at least one of every backbone.")
        return pairs
    if at not in ("stage", "block"):
        raise ValueError(f'fuse expected at "stage", "block" or a list of {{modality: module name}}, got {at!r}.')
    found = {name: found_at(name, survey, at) for name, survey in surveys.items()}
    return (by_reduction(surveys, found) if at == "stage" else None) or by_depth(found)


def found_at(modality: str, survey: Survey, at: str) -> list[Site]:
    """The first site of each block, or of each stage, in calling order."""
    names = (blocks(survey) if at == "block" else []) or stages(survey)
    sites = [survey.found[name].sites[0] for name in names if name in survey.found and survey.found[name].sites]
    if not sites:
        raise ValueError(f"fuse found no {at} in backbone {modality!r}: name modules, at=[{{{modality!r}: ...}}, ...].")
    return sorted(sites, key=lambda site: survey.first.calls[site.module].order)


def by_reduction(surveys: Mapping[str, Survey], found: Mapping[str, Sequence[Site]]) -> list[dict[str, Site]] | None:
    """The last sites of each reduction that all branches share; None where they share fewer than two.

    Only shapes decide. Reductions that come back, as in pyramids that go down and up, are no stages to pair.
    """
    octaves = {name: [octave(surveys[name], site) for site in sites] for name, sites in found.items()}
    rising = all(None not in one and sorted(one) == one for one in octaves.values())  # type: ignore[type-var]
    shared = sorted(set.intersection(*map(set, octaves.values())) - {None})  # type: ignore[type-var]
    if not rising or len(shared) < 2:
        return None
    last = {name: dict(zip(octaves[name], sites, strict=True)) for name, sites in found.items()}
    return [{name: last[name][k] for name in found} for k in shared]


def by_depth(found: Mapping[str, Sequence[Site]]) -> list[dict[str, Site]]:
    """As many stages as the branch with the fewest sites has, at the same fractions of each branch's depth."""
    depth = min(map(len, found.values()))
    return [{name: sites[math.ceil((k + 1) * len(sites) / depth) - 1] for name, sites in found.items()} for k in range(depth)]


def octave(survey: Survey, site: Site) -> int | None:
    """How often the positions were halved along each axis up to here; None for vectors."""
    (x, *_) = (tensor for _, tensor in tensors_in(survey.inputs))
    if x.ndim < 3 or site.positions < 1:
        return None
    return round(math.log2(max(math.prod(x.shape[2:]) / site.positions, 1)) / (x.ndim - 2))


def listed(surveys: Mapping[str, Survey], entry: Mapping[str, str]) -> dict[str, Site]:
    """The features that one entry of `at` names, in the order of the branches."""
    if not isinstance(entry, Mapping) or not entry or any(name not in surveys for name in entry):
        raise ValueError(f"fuse expected entries {{modality: module name}} of {list(surveys)} in at=, got {entry!r}.")
    sites = {}
    for name, survey in surveys.items():
        if name in entry:
            if not entry[name] or entry[name] not in survey.modules:
                raise ValueError(f"fuse: backbone {name!r} has no module {entry[name]!r}.")
            here = survey.found.get(entry[name])
            if here is None or not here.sites:
                reasons = "; ".join(here.reasons) if here else "it is not called"
                raise ValueError(f"fuse: backbone {name!r} cannot be fused at {entry[name]!r}: {reasons}.")
            sites[name] = here.sites[0]
    return sites
