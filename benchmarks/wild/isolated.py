"""Runs a function in a process of its own, so that one that crashes, hangs or takes all memory stops nothing else."""

import multiprocessing
import os
import resource
import signal
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

SECONDS = 300
GIBIBYTES = 8


class CrashedError(Exception):
    """What became of a process that gave no result."""


def isolated(function: Callable[..., Any], *args: Any, seconds: float = SECONDS, gibibytes: float = GIBIBYTES) -> Any:
    """What a function returns, from a fork of this process with these limits of time and memory.

    Raises: CrashedError: it gave nothing within the limits.
    """
    context = multiprocessing.get_context("fork")  # what was imported is there at once
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(writer, gibibytes, function, args))
    process.start()
    writer.close()
    try:
        if not reader.poll(seconds):
            raise CrashedError(f"it took longer than {seconds:.0f} s")
        kind, result = reader.recv()
    except EOFError:
        process.join()
        raise CrashedError(f"the process died: {ending(process.exitcode)}") from None
    finally:
        process.kill()
        process.join()
        reader.close()
    if kind == "error":
        raise CrashedError(result)
    return result


def ending(code: int | None) -> str:
    """How a process ended, in words."""
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"


def run(writer: Connection, gibibytes: float, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Send what the function returns; nothing else of it is seen."""
    limit = int(gibibytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        sent = "result", function(*args)
    except BaseException as error:  # whatever it is, the other process wants to know
        sent = "error", f"{type(error).__name__}: {error}"
    writer.send(sent)
    writer.close()
