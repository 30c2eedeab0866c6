"""What all suites share: flags, cases, providers, the check before the clock, and the run of it all."""

import argparse
import gc
import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch import config as functorch_config

from drifa_attn import ops as dispatch

from . import measure
from .measure import MIB, tensors
from .rows import Row, environment, write

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = ("forward", "backward", "full")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Options:
    """What to measure and how; the flags of every suite."""

    device: torch.device = torch.device("cpu")
    dtype: str = "fp32"
    layout: str = "contiguous"
    providers: tuple[str, ...] = ("eager", "compile", "fused", "peers")
    ops: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    modes: tuple[str, ...] = ("forward", "full")
    seconds: float = 1.0
    csv: Path | None = None
    deadline: float = float("inf")  # on `time.monotonic`

    def wants(self, op: str, provider: str) -> bool:
        """Whether a case is among those asked for."""
        return provider in self.providers and (not self.ops or any(fnmatch(op, pattern) for pattern in self.ops))

    def sizes(self, cpu: Sequence[tuple[int, ...]], gpu: Sequence[tuple[int, ...]]) -> Sequence[tuple[int, ...]]:
        """The shapes asked for, or a suite's own for this device."""
        return self.shapes or (gpu if self.device.type == "cuda" else cpu)

    def randn(self, *shape: int, grad: bool = False) -> Tensor:
        """An input of this device, dtype and layout, the same numbers at every call after one seed."""
        x = torch.randn(shape).to(self.device, DTYPES[self.dtype])
        if x.ndim == 4:
            x = x.contiguous(memory_format=LAYOUTS[self.layout])
        return x.requires_grad_(grad)


class Setup(NamedTuple):
    """What a case runs: a module and its arguments; and, where that is no layer of the library, the equations it is held to."""

    module: nn.Module
    args: tuple
    exact: nn.Module | None = None


@dataclass(frozen=True)
class Case:
    """One thing to measure: an `op` on a shape by a provider. `build` makes it and may raise."""

    op: str
    provider: str
    shape: str
    build: Callable[[], Setup]
    network: bool = False  # "full" is then a training step, and only the outputs are checked


def text(shape: Sequence[int], modalities: int = 1) -> str:
    """A shape as rows name it."""
    sizes = "x".join(map(str, shape))
    return sizes if modalities == 1 else f"{modalities}*{sizes}"


def switched(choice: str, run: Callable[..., Any], *args: Any) -> Any:
    """A call with the library's backend at "reference" (the plain equations), "fused" or "auto" (what it chooses)."""
    with dispatch.use(choice):
        return run(*args)


def eager(module: nn.Module) -> Callable[..., Any]:
    """The equations as `drifa_attn.functional` writes them."""
    return partial(switched, "reference", module)


def compiled(module: nn.Module) -> Callable[..., Any]:
    """The same equations through `torch.compile`."""
    return partial(switched, "reference", torch.compile(module, fullgraph=True, dynamic=False))


def fused(module: nn.Module) -> Callable[..., Any]:
    """The fused operators of `drifa_attn.ops` everywhere: Triton's on a GPU, chunked ones on a CPU."""
    return partial(switched, "fused", module)


def auto(module: nn.Module) -> Callable[..., Any]:
    """What the library does unless it is told otherwise."""
    return partial(switched, "auto", module)


def peers(module: nn.Module) -> Callable[..., Any]:
    """Another attention, or none, as it is."""
    return module


# How a module can be computed. To add one, add a function that makes a module into what is called.
PROVIDERS = {"eager": eager, "compile": compiled, "fused": fused, "auto": auto, "peers": peers}

# Largest relative error (L2) of an output, and of the gradient of one weight or input, against float64. A maximum may move to a
# nearly tied position that a float64 run does not choose, and its gradient with it: for gradients three times eager's own
# error is allowed instead, up to a cap that a wrong sign, a zero or a doubled gradient exceeds.
OUTPUT = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2}
NETWORK = {"fp32": 1e-3, "fp16": 5e-2, "bf16": 0.3}  # a whole network's outputs
GRADIENT = {"fp32": 1e-3, "fp16": 5e-2, "bf16": 0.1}
CAP = 0.5


class Prepared(NamedTuple):
    """A case that is ready to be timed: the call, and its row so far."""

    run: Callable[[], Any]
    row: Row


def leaves(setup: Setup) -> list[Tensor]:
    """What gradients are taken of: inputs that ask for one, then parameters."""
    return [t for t in (*tensors(setup.args), *setup.module.parameters()) if t.requires_grad]


def like(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients to send back, of no special direction."""
    return [torch.linspace(0, 50, y.numel(), device=y.device).sin().view(y.shape).to(y) for y in outputs]


def results(run: Callable[..., Any], setup: Setup, gradients: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of one call."""
    with torch.set_grad_enabled(gradients):
        outputs = tensors(run(*setup.args))
    grads = torch.autograd.grad(outputs, leaves(setup), like(outputs)) if gradients else ()
    return [y.detach() for y in outputs], list(grads)


def doubled(value: Any) -> Any:
    """Arguments in float64."""
    if isinstance(value, Tensor):
        return value.detach().double().requires_grad_(value.requires_grad)
    return type(value)(doubled(one) for one in value)


def head(value: Any) -> Any:
    """The first two samples of arguments."""
    if isinstance(value, Tensor):
        return value[:2]
    return type(value)(head(one) for one in value)


def errors(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """`‖actual − exact‖ / ‖exact‖` of each tensor; one that is nearly zero beside the others is held to a thousandth of them.

    Such a one may be all cancellation: the bias before a softmax has no gradient but rounding.
    """
    norms = [torch.linalg.vector_norm(e).item() for e in exact]
    floor = 1e-3 * math.hypot(*norms)
    distances = [torch.linalg.vector_norm(a.to(e) - e).item() for a, e in zip(actual, exact, strict=True)]
    return [distance / (max(norm, floor) or 1.0) for distance, norm in zip(distances, norms, strict=True)]


class Reference:
    """What the providers of one op of a group share: float64 results, the errors of eager's gradients, the equations' cost."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str, bool], tuple[list[Tensor], list[Tensor], list[float]]] = {}
        self.costs: dict[tuple[str, str, str], measure.Cost] = {}

    def cost(self, case: Case, setup: Setup, mode: str) -> measure.Cost:
        """FLOPs and bytes of the equations."""
        key = (case.op, case.shape, mode)
        if key not in self.costs:
            self.costs[key] = switched("reference", measure.cost, setup.exact or setup.module, setup.args, mode)
        return self.costs[key]

    def get(self, case: Case, setup: Setup, gradients: bool) -> tuple[list[Tensor], list[Tensor], list[float]]:
        """Float64 outputs, float64 gradients, and the errors of eager's gradients."""
        key = (case.op, case.shape, gradients)
        if key not in self.known:
            plain = Setup(setup.exact or setup.module, setup.args)
            exact = Setup(deepcopy(plain.module).double(), doubled(plain.args))
            outputs, grads = results(eager(exact.module), exact, gradients)
            _, own = results(eager(plain.module), plain, gradients)
            self.known[key] = (outputs, grads, errors(own, grads))
        return self.known[key]


def check(case: Case, setup: Setup, run: Callable[..., Any], mode: str, dtype: str, reference: Reference) -> None:
    """Raise a `ValueError` if what is about to be timed does not compute what it should."""
    if case.network:
        setup = setup._replace(args=head(setup.args))
    gradients = mode != "forward" and not case.network
    outputs, grads, eager_errors = reference.get(case, setup, gradients)
    ours, own = results(run, setup, gradients)
    for i, found in enumerate(errors(ours, outputs)):
        bound = (NETWORK if case.network else OUTPUT)[dtype]
        if not found <= bound:
            raise ValueError(f"wrong: output {i} is off by {found:.1e} relative to float64, allowed {bound:.1e}")
    for i, (found, eager_error) in enumerate(zip(errors(own, grads), eager_errors, strict=True)):
        bound = min(max(GRADIENT[dtype], 3 * eager_error), CAP)
        if not found <= bound:
            raise ValueError(f"wrong: gradient {i} is off by {found:.1e} relative to float64, allowed {bound:.1e}")


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
    check(case, setup, run, mode, options.dtype, reference)
    setup.module.train(case.network and mode != "forward")
    once = call(case, setup, run, mode)
    once()  # compiles, and allocates an optimizer's state
    peak = measure.memory(once, options.device).peak
    kept = measure.kept(run, setup.args, options.device) / MIB if mode != "forward" else None
    flops, moved = reference.cost(case, setup, mode)
    params = sum(p.numel() for p in setup.module.parameters())
    return Prepared(once, replace(row, peak=peak / MIB, kept=kept, params=params, flops=flops, bytes=moved))


def measured(suite: str, group: Sequence[Case], mode: str, options: Options, reference: Reference) -> Iterator[Row]:
    """The rows of cases that are measured side by side."""
    ready: list[Prepared] = []
    for case in group:
        row = blank(suite, case, mode, options)
        if case.provider == "compile" and not IS_CHILD:
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


def shape(value: str) -> tuple[int, ...]:
    """A shape from its text, as a flag's type."""
    try:
        sizes = tuple(int(size) for size in value.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected sizes as 8x64x56x56, got {value!r}") from None
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected sizes >= 1, got {value!r}")
    return sizes
