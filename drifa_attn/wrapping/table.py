"""The plan of attention as a table, of plain text or of HTML."""

from collections.abc import Sequence
from html import escape
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """The lines of a table; its first `left` columns start at the left, the others end at the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines


def count(number: float) -> str:
    """A number with a unit: 25.56 M."""
    for unit in ("", " k", " M", " G"):
        if abs(number) < 1000:
            return f"{number:.0f}" if not unit else f"{number:.2f}{unit}"
        number /= 1000
    return f"{number:.2f} T"


def share(part: float, whole: float) -> str:
    """A part in per cent of the whole."""
    return f"+{100 * part / whole:.1f} %" if whole else "all"


def layout_text(site: Any) -> str:
    """The layout of a site, with its prefix tokens if it has some."""
    return f"{site.layout}, {site.num_prefix_tokens} prefix tokens" if site.num_prefix_tokens else site.layout


def plan_text(plan: Any) -> str:
    """What `print(plan)` shows."""
    title, header, rows, notes = plan_parts(plan)
    return "\n".join([title, *table(header, rows, left=3), *notes])


def plan_html(plan: Any) -> str:
    """What a notebook shows of a plan."""
    title, header, rows, notes = plan_parts(plan)
    names = "".join(f"<th>{escape(name)}</th>" for name in header)
    cells = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    below = "<br>".join(map(escape, notes))
    return f"<p>{escape(title)}</p><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table><p>{below}</p>"


def plan_parts(plan: Any) -> tuple[str, Sequence[str], list[Sequence[str]], list[str]]:
    """The title of a plan's table, its header and rows, and the lines below it."""
    header = ("site", "features", "layout", "channels", "params", "FLOPs")
    rows: list[Sequence[str]] = [
        (s.name, "×".join(map(str, s.shape)), layout_text(s), str(s.channels), count(s.params), count(s.flops))
        for s in plan.sites
    ]
    options = ", ".join(f"{key}={value!r}".replace("'", '"') for key, value in plan.spec.options.items())
    params, flops = sum(s.params for s in plan.sites), sum(s.flops for s in plan.sites)
    notes = [
        f"{len(plan.sites)} sites add {count(params)} parameters ({share(params, plan.params)} of {count(plan.params)}) "
        f"and {count(flops)} FLOPs per sample ({share(flops, plan.flops)} of {count(plan.flops)})",
        *(f"skipped {name}: {reason}" for name, reason in plan.skipped),
        *(f"note: {note}" for note in plan.notes),
    ]
    return f"{plan.network}, at={plan.at}, attention={plan.spec.name}({options})", header, rows, notes
