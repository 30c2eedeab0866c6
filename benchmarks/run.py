"""The run of it all: prepare the cases, measure them side by side, and write their rows."""

import gc
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch._functorch import config as functorch_config

from . import measure
from .cases import DTYPES, PROVIDERS, Case, Options, Setup
from .correctness import Reference, check, leaves, like
from .measure import MIB, tensors
from .rows import COMPILED, Row, environment, write


class Prepared(NamedTuple):
    """A case that is ready to be timed: the call, and its row so far."""

    run: Callable[[], Any]
    row: Row


def training_step(module: nn.Module, run: Callable[..., Any], args: tuple) -> Callable[[], None]:
    """Forward, cross-entropy, backward and AdamW of a network."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        loss = sum(
            F.cross_entropy(y.float(), torch.zeros(len(y), dtype=torch.long, device=y.device)) for y in tensors(run(*args))
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def call(case: Case, setup: Setup, run: Callable[..., Any], mode: str) -> Callable[[], Any]:
    """What one measurement of a mode executes."""
    if mode == "forward":
        return torch.no_grad()(partial(run, *setup.args))
    if mode == "full" and case.network:
        return training_step(setup.module, run, setup.args)
    outputs = tensors(run(*setup.args)) if mode == "backward" else []

    def differentiate() -> Any:
        ys = outputs or tensors(run(*setup.args))
        return torch.autograd.grad(ys, leaves(setup), gradients, retain_graph=bool(outputs))

    gradients = like(outputs or tensors(run(*setup.args)))
    return differentiate


def prepare(case: Case, mode: str, row: Row, options: Options, reference: Reference) -> Prepared:
    """Build a case, check it, and measure all but its time."""
    torch.manual_seed(0)
    setup = case.build()
    run = PROVIDERS[case.provider](setup.module)
    setup.module.eval()
    if not case.verb:
        check(case, setup, run, mode, options.dtype, reference)
    setup.module.train(case.network and mode != "forward")
    once = call(case, setup, run, mode)
    once()  # compiles, and allocates an optimizer's state
    peak = measure.memory(once, options.device).peak
    if case.verb:
        return Prepared(once, replace(row, peak=peak / MIB))
    kept = measure.kept(run, setup.args, options.device) / MIB if mode != "forward" else None
    flops, moved = reference.cost(case, setup, mode)
    params = sum(p.numel() for p in setup.module.parameters())
    return Prepared(once, replace(row, peak=peak / MIB, kept=kept, params=params, flops=flops, bytes=moved))


def measured(suite: str, group: Sequence[Case], mode: str, options: Options, reference: Reference) -> Iterator[Row]:
    """The rows of cases that are measured side by side."""
    ready: list[Prepared] = []
    for case in group:
        if case.verb and mode != "forward":
            continue
        row = blank(suite, case, mode, options)
        if case.provider in COMPILED and not IS_CHILD:
            yield apart(suite, case, mode, options)
            continue
        if time.monotonic() > options.deadline:
            yield replace(row, error="not measured: the time limit was reached")
            continue
        try:
            ready.append(prepare(case, mode, row, options, reference))
        except Exception as failure:
            yield replace(row, error=summary(failure))
    if not ready:
        return
    try:
        found = measure.times([prepared.run for prepared in ready], options.device, options.seconds)
    except Exception as failure:
        yield from (replace(prepared.row, error=summary(failure)) for prepared in ready)
        return
    for prepared, (p50, p20, p80) in zip(ready, found, strict=True):
        yield replace(prepared.row, p50=p50, p20=p20, p80=p80)


IS_CHILD = False  # whether this process exists for one row


def apart(suite: str, case: Case, mode: str, options: Options) -> Row:
    """The row of a compiled case, measured in a process of its own.

    A process may use again what it compiled before: a plain network that was compiled first has stood for a wrapped one.
    """
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(alone, suite, case, mode, options, torch.get_num_threads()).result()
    except Exception as failure:
        return replace(blank(suite, case, mode, options), error=summary(failure), process="own")


def alone(suite: str, case: Case, mode: str, options: Options, threads: int) -> Row:
    """In a new process: the row of one case."""
    global IS_CHILD
    IS_CHILD = True
    torch.set_num_threads(threads)
    with repeatable(mode):
        (row,) = measured(suite, [case], mode, options, Reference())
    return replace(row, process="own")


def blank(suite: str, case: Case, mode: str, options: Options) -> Row:
    """The row of a case before it is measured."""
    return Row(suite, case.op, case.provider, mode, case.shape, options.layout, options.dtype, **environment(options.device))


def summary(failure: BaseException) -> str:
    """An exception in one line."""
    return f"{type(failure).__name__}: {' '.join(str(failure).split())}"[:300]


def roofline(suite: str, options: Options, side: int | None) -> Iterator[Row]:
    """The rows of the roofline of this device and dtype."""
    for ceiling in measure.ceilings(options.device, DTYPES[options.dtype], side=side):
        (found,) = measure.times([ceiling.run], options.device, options.seconds)
        shape = "x".join(map(str, ceiling.shape))
        row = Row(suite, ceiling.op, "peers", "forward", shape, "contiguous", options.dtype, **environment(options.device))
        yield replace(row, p50=found.p50, p20=found.p20, p80=found.p80, flops=ceiling.flops, bytes=ceiling.bytes)


def run(suite: str, groups: Iterable[Sequence[Case]], options: Options, *, side: int | None = None) -> list[Row]:
    """Measure the roofline and every case, print the rows, and append them to the CSV file as they come."""
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads or before)
    try:
        return all_rows(suite, groups, options, side)
    finally:
        torch.set_num_threads(before)


def all_rows(suite: str, groups: Iterable[Sequence[Case]], options: Options, side: int | None) -> list[Row]:
    """The same, in the threads that are set."""
    gc.freeze()  # collecting garbage before each count of memory need not look at what is loaded already
    rows: list[Row] = []

    def keep(some: Iterable[Row]) -> None:
        for row in some:
            rows.append(row)
            print(line(row), flush=True)
            if options.csv:
                write([row], options.csv)

    keep(roofline(suite, options, side))
    for group in groups:
        reference = Reference()
        for mode in options.modes:
            with repeatable(mode):
                keep(measured(suite, [c for c in group if options.wants(c.op, c.provider)], mode, options, reference))
            torch.compiler.reset()
            if options.device.type == "cuda":
                torch.cuda.empty_cache()
    return rows


def repeatable(mode: str) -> AbstractContextManager:
    """A compiled backward pass may reuse what forward kept for it, unless it is to run alone, more than once."""
    return functorch_config.patch(donated_buffer=False) if mode == "backward" else nullcontext()


def line(row: Row) -> str:
    """A row as the console shows it."""
    what = f"{row.op:22} {row.provider:8} {row.mode:8} {row.shape:16} {row.dtype}"
    if row.error:
        return f"{what}  {row.error}"
    memory = "" if row.peak is None else f"  peak {row.peak:9.2f} MiB"
    kept = "" if row.kept is None else f"  kept {row.kept:9.3f} MiB"
    return f"{what}  {row.p50:9.3f} ms [{row.p20:.3f}, {row.p80:.3f}]{memory}{kept}"
