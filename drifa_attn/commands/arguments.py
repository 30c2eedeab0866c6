"""The types of arguments; each refuses what cannot be meant."""

import argparse
import math
from pathlib import Path

Refused = argparse.ArgumentTypeError


def at_least_one(text: str) -> int:
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


def readable(text: str) -> Path:
    """A file that can be read."""
    try:
        open(text, "rb").close()
    except OSError as error:
        raise Refused(f"{text!r} cannot be read: {error.strerror}") from None
    return Path(text)
