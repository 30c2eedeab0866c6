"""Shows a table: by rich where that is installed and the output is a terminal, else as plain text; or data as JSON."""

import importlib.util
import json
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from drifa_attn.wrapping.table import table


class Table(NamedTuple):
    """A table with a title and notes below it; its first `left` columns are words, the others numbers."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    left: int = 1


def show(shown: Table) -> None:
    """Print a table."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich"):
        by_rich(shown)
        return
    lines = table(shown.header, shown.rows, shown.left) if shown.rows else []
    print("\n".join([shown.title, *lines, *shown.notes]))


def by_rich(shown: Table) -> None:
    """Print a table with rich."""
    from rich.console import Console
    from rich.table import Table as Drawn
    from rich.text import Text

    drawn = Drawn()
    for i, name in enumerate(shown.header):
        drawn.add_column(name, justify="left" if i < shown.left else "right", overflow="fold")
    for row in shown.rows:
        drawn.add_row(*map(Text, row))
    console = Console()
    for part in (Text(shown.title), drawn if shown.rows else "", *map(Text, shown.notes)):
        console.print(part)


def show_json(data: Any) -> None:
    """Print data as JSON."""
    print(json.dumps(data, indent=1))
