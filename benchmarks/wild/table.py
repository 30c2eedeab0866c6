"""The table of all networks, as a page of Markdown."""

import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version

from .contract import CONTRACT
from .promises import PROMISES
from .row import Row

LIBRARIES = {
    "transformers": "transformers",
    "MONAI": "monai",
    "segmentation-models-pytorch": "segmentation-models-pytorch",
    "torchvision": "torchvision",
    "open_clip": "open-clip-torch",
    "vit-pytorch": "vit-pytorch",
    "pytorchcv": "pytorchcv",
}
MOST = 160  # characters of a reason in the table


def table(rows: Sequence[Row], waiting: int = 0) -> list[str]:
    """The lines of the page about the networks of other libraries, and of timm; `waiting` is how many were not run yet."""
    foreign, own = [row for row in rows if row.library != "timm"], [row for row in rows if row.library == "timm"]
    return [
        "# Networks of other libraries",
        "",
        f"Written by `make wild` on {datetime.now(timezone.utc):%Y-%m-%d}: {versions()}, Python {platform.python_version()}, "
        "CPU.",
        "",
        f"- **{len(foreign)} networks** were built from their configuration, with random weights, as small as that allows.",
        *counted(foreign, "networks"),
        *([f"- {waiting} more were not run yet: `make wild` goes on with them."] if waiting else []),
        "",
        "The promises, each checked on every network:",
        "",
        *(f"{number}. {promise}." for number, promise in enumerate(PROMISES, start=1)),
        "",
        "A promise that cannot be asked of the network itself, not wrapped, is named after the number of those that are kept.",
        "",
        *(line for library in LIBRARIES for line in section(library, [row for row in foreign if row.library == library])),
        *(timm_part(own) if own else []),
    ]


def counted(rows: Sequence[Row], what: str) -> list[str]:
    """How many keep every promise, are refused, break one, or could not be run."""
    found = {
        "are wrapped and keep every promise": [row for row in rows if is_kept(row)],
        "are refused with a reason, and are untouched": [row for row in rows if row.refused],
        "break a promise": [row for row in rows if row.broken],
        "do not run themselves, or took too long": [row for row in rows if row.failed],
    }
    return [f"- **{len(some)} of {len(rows)} {what}** {verb}." for verb, some in found.items()]


def timm_part(rows: Sequence[Row]) -> list[str]:
    """The lines about what timm asks of its own networks."""
    asked = sum(len(CONTRACT) - len(row.not_asked) for row in rows)
    kept = asked - sum(len(row.broken) for row in rows)
    return [
        "# What timm asks of its networks",
        "",
        "The smallest architecture of every family that has one of at most 60 million weights, wrapped, with moved gates.",
        "",
        f"- **{kept} of {asked} checks** hold.",
        *counted(rows, "architectures"),
        "",
        *(f"{number}. {sentence}." for number, sentence in enumerate(CONTRACT, start=1)),
        "",
        *section("timm", rows),
    ]


def versions() -> str:
    """The versions of all that takes part."""
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", *LIBRARIES.values()))


def is_kept(row: Row) -> bool:
    """Whether a network is wrapped and no promise is broken."""
    return not (row.refused or row.broken or row.failed)


def section(library: str, rows: Sequence[Row]) -> list[str]:
    """The table of one library."""
    if not rows:
        return []
    return [
        f"## {library}",
        "",
        "| network | sites | where | weights | promises kept | skipped, refused or broken |",
        "|---|---|---|---|---|---|",
        *map(line, rows),
        "",
    ]


def line(row: Row) -> str:
    """The table's row of a network."""
    sites = f"{len(row.sites)}: {row.layouts}" if row.sites else "–"
    share = f"+{100 * row.share:.1f} %" if row.sites else "–"
    cells = [row.title, sites, named(row.sites), share, verdict(row), reasons(row)]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def named(sites: Sequence[str]) -> str:
    """The names of the sites; of many the first and the last."""
    names = [f"`{name}`" for name in sites]
    return ", ".join(names if len(names) <= 5 else [*names[:2], "…", names[-1]])


def verdict(row: Row) -> str:
    """How many promises are kept of those that could be asked."""
    if row.failed:
        return "failed"
    if row.refused:
        return "refused"
    asked = len(CONTRACT if row.library == "timm" else PROMISES) - len(row.not_asked)
    return f"{asked - len(row.broken)} of {asked}"


def reasons(row: Row) -> str:
    """What went wrong, and what was left out."""
    found = [row.failed or row.refused] if row.failed or row.refused else []
    found += [f"**{number} broken**: {shortened(why)}" for number, why in row.broken.items()]
    found += [f"{number} not asked: {shortened(why)}" for number, why in row.not_asked.items()]
    return "; ".join([*found, *grouped(row.skipped)])


def grouped(skipped: Sequence[str]) -> list[str]:
    """The reasons against sites, each once, with the number of places that it stands for."""
    found: dict[str, int] = {}
    for text in skipped:
        reason = text.partition(": ")[2] or text
        found[reason] = found.get(reason, 0) + 1
    return [f"{shortened(reason)} (× {number})" if number > 1 else shortened(reason) for reason, number in found.items()]


def shortened(text: str) -> str:
    """A text of a bearable length."""
    text = " ".join(text.split())
    return text if len(text) <= MOST else f"{text[:MOST]}…"
