"""The finished runs of a comparison as lines of JSON, so that one that was stopped goes on where it stopped."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_rows(path: Path, row: Sequence[str], protocol: Sequence[str] = ()) -> list[Row]:
    """The rows of a file; each has the names in `row`, and those in `protocol` in its "protocol".

    Raises: ValueError: a line that is no row, as a run that was killed may leave one; with its number.
    """
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            found = json.loads(line)
            for name in row:
                found[name]
            for name in protocol:
                found["protocol"][name]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}, is no row of a run: delete the line to do that run again.") from error
        rows.append(found)
    return rows


class Rows:
    """The finished runs of one protocol, a dataclass with `seeds`; a line is written when its run is finished.

    More or fewer seeds are the same protocol. Raises a `ValueError` where the file holds rows of another one.
    """

    def __init__(self, path: Path, protocol: Any, row: Sequence[str]) -> None:
        self.path = path
        self.protocol = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(protocol).items()}
        self.rows = read_rows(path, row, tuple(self.protocol)) if path.exists() else []
        for one in self.rows:
            if one["protocol"] | {"seeds": 0} != self.protocol | {"seeds": 0}:
                raise ValueError(
                    f"{path} holds rows of another protocol, {one['protocol']}: move it away, or name another output."
                )

    def find(self, **wanted: Any) -> list[Row]:
        """The rows with these values."""
        return [row for row in self.rows if all(row[key] == value for key, value in wanted.items())]

    def add(self, row: Row) -> None:
        """Write one more row."""
        row = row | {"protocol": self.protocol}
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
