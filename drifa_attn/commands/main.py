"""Reads the command line, runs one command, and answers a mistake with one line."""

import argparse
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from . import bench, doctor, families, inspect, maps, plan

COMMANDS: dict[str, ModuleType] = {
    "plan": plan,
    "families": families,
    "inspect": inspect,
    "maps": maps,
    "doctor": doctor,
    "bench": bench,
}
MISTAKES = (ValueError, TypeError, OSError, ImportError)


class Parser(argparse.ArgumentParser):
    """A parser that answers a mistake with one line and exit status 2."""

    def error(self, message: str) -> NoReturn:
        """End with this message."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def parsers() -> tuple[Parser, dict[str, Parser]]:
    """The command line, and that of each command."""
    whole = Parser("drifa-attn", description="DRIFA's dual attention for any network.", epilog=f"example: {plan.EXAMPLE}")
    commands = whole.add_subparsers(dest="command", metavar="command")
    each = {}
    for name, module in COMMANDS.items():
        said = (module.__doc__ or "").strip()
        each[name] = commands.add_parser(
            name,
            help=said.partition("\n")[0],
            description=said,
            epilog=f"example: {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.arguments(each[name])
    return whole, each


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0, 1 where the command itself says so, 2 after a mistake of the user, 130 interrupted."""
    whole, each = parsers()
    options = whole.parse_args(argv)
    if options.command is None:
        whole.print_help()
        return 0
    try:
        return int(COMMANDS[options.command].run(options) or 0)
    except BrokenPipeError:  # the reader of a pipe has gone: nothing is wrong, and nothing more can be said
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MISTAKES as error:
        each[options.command].error(str(error) or type(error).__name__)
    except KeyboardInterrupt:
        return 130
