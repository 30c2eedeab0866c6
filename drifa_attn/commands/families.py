"""Where attention can go in networks of timm: a table with a row for each that matches a pattern.

Without a pattern it lists timm's families and plans nothing. With one, every architecture whose name or family matches is
planned, without memory; a large one takes seconds. What `make matrix` of the repository does besides, wrapping and training
the smallest network of every family for real, takes half an hour and is not done here.
"""

import argparse
import fnmatch
import sys

from drifa_attn.wrapping.plan import Plan, plan
from drifa_attn.wrapping.table import count

from .networks import on_meta
from .show import Table, show

EXAMPLE = "drifa-attn families 'convnext*'"


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("pattern", nargs="?", metavar="GLOB", help="of architectures or families, such as 'resnet*'")


def run(options: argparse.Namespace) -> None:
    """List the families, or plan what matches."""
    import timm

    names = {family: timm.list_models(module=family) for family in timm.list_modules()}
    names = {family: found for family, found in names.items() if found}
    if options.pattern is None:
        rows = [(family, str(len(found)), found[0]) for family, found in names.items()]
        note = f"{sum(map(len, names.values()))} architectures of timm {timm.__version__}. A pattern plans them: {EXAMPLE}"
        show(Table("timm's families", ("family", "architectures", "the first"), rows, [note], left=1))
        return
    chosen = [
        (family, name)
        for family, found in names.items()
        for name in found
        if fnmatch.fnmatch(family, options.pattern) or fnmatch.fnmatch(name, options.pattern)
    ]
    if not chosen:
        raise ValueError(f"no architecture or family of timm {timm.__version__} matches {options.pattern!r}.")
    planned: list[tuple[str, ...]] = []
    for number, (family, name) in enumerate(chosen, 1):
        if sys.stderr.isatty():
            print(f"{number} of {len(chosen)}: {name}", end="\033[K\r", file=sys.stderr, flush=True)
        planned.append(row(family, name))
    show(Table("sites of attention", ("architecture", "family", "layouts", "params", "stage", "block"), planned, left=3))


def row(family: str, name: str) -> tuple[str, ...]:
    """One architecture: at how many stages and blocks attention can go, in which layouts, or why it cannot."""
    cells, layouts, params = [], "", "–"
    for at in ("stage", "block"):
        try:
            found: Plan = plan(on_meta(name), at)
        except ValueError as error:
            layouts = layouts or str(error).partition("\n")[0]
            cells.append("–")
            continue
        cells.append(str(len(found.sites)))
        layouts = ", ".join(dict.fromkeys(site.layout for site in found.sites))
        params = count(found.params)
    return name, family, layouts, params, *cells
