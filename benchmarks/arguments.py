"""What the commands of this folder may be given: everything is checked before the first step, and a mistake is one line."""

import argparse
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch

Refused = argparse.ArgumentTypeError


class Parser(argparse.ArgumentParser):
    """A parser that answers a mistake with one line and exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Within this context a mistake that shows later than the arguments are read is answered in the same way."""
        try:
            yield
        except (Refused, ValueError, OSError, ImportError) as error:
            self.error(str(error))


def count(text: str) -> int:
    """An integer of at least 1."""
    if not (text.isdecimal() and int(text) >= 1):
        raise Refused(f"expected an integer >= 1, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise Refused(f"expected a number > 0, got {text!r}")
    return value


def shape(text: str) -> tuple[int, ...]:
    """The four sizes of an input `b c h w`."""
    sizes = text.split("x")
    if len(sizes) != 4 or not all(size.isdecimal() and int(size) >= 1 for size in sizes):
        raise Refused(f"expected four sizes >= 1 (batch, channels, height, width) as 8x64x56x56, got {text!r}")
    return tuple(map(int, sizes))


def device(text: str) -> torch.device:
    """A device that is there, cpu, cuda or cuda:1; "auto" is a GPU where there is one."""
    there = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    there += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if text == "auto":
        return torch.device("cuda" if "cuda" in there else "cpu")
    if text not in there:
        raise Refused(f"this machine has {', '.join(there)}, got {text!r}")
    return torch.device(text)


def output(text: str) -> Path:
    """A file that can be written, in a folder that is there or can be made; nothing is changed."""
    path = Path(text)
    try:
        there = nearest(path)
        if there == path:
            path.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise Refused(f"{text!r} cannot be written: {error.strerror}") from None
    return path


def nearest(path: Path) -> Path:
    """A path if it is there, else what is there of the folders above it."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return nearest(path.parent)
    return path
