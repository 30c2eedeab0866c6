"""What the commands of the examples may be given: everything is checked before the first step, and a mistake is one line."""

import argparse
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

Refused = argparse.ArgumentTypeError


class Parser(argparse.ArgumentParser):
    """A parser that answers a mistake with one line and exit status 2; a command's description keeps its lines."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Within this context a mistake that shows later than the arguments are read is answered in the same way."""
        try:
            yield
        except (Refused, ValueError, OSError, ImportError) as error:
            self.error(str(error))

    def refuse(self, options: argparse.Namespace, names: Sequence[str], why: str) -> None:
        """End the command if one of these options was given, since it would change nothing."""
        for name in names:
            if getattr(options, name) != self.get_default(name):
                self.error(f"--{name.replace('_', '-')} {why}")


def integer(least: int) -> Callable[[str], int]:
    """The type of an integer that is not below another."""

    def check(text: str) -> int:
        if not (text.isdecimal() and int(text) >= least):
            raise Refused(f"expected an integer >= {least}, got {text!r}")
        return int(text)

    return check


def positive(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise Refused(f"expected a number > 0, got {text!r}")
    return value


def probability(text: str) -> float:
    """A number in [0, 1)."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise Refused(f"expected a number in [0, 1), got {text!r}")
    return value


def source(text: str) -> Path:
    """A file or a folder that can be read."""
    path = Path(text)
    try:
        if not text:
            raise FileNotFoundError(2, "it has no name")
        os.listdir(path) if path.is_dir() else path.open("rb").close()
    except OSError as error:
        raise Refused(f"{text!r} cannot be read: {error.strerror}") from None
    return path


def output(text: str) -> Path:
    """A folder that can be written to, and that is there or can be made; nothing is changed."""
    path = Path(text)
    try:
        if not text:
            raise FileNotFoundError(2, "it has no name")
        tempfile.TemporaryFile(dir=nearest(path)).close()
    except OSError as error:
        raise Refused(f"{text!r} is no folder that can be written to: {error.strerror}") from None
    return path


def check_files(folder: Path, names: Sequence[str]) -> None:
    """Raise unless files of these names can be written to a folder; nothing is changed."""
    output(str(folder))
    for path in (folder / name for name in names):
        if nearest(path) == path:
            path.open("ab").close()


def nearest(path: Path) -> Path:
    """A path if it is there, else what is there of the folders above it."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return nearest(path.parent)
    return path
