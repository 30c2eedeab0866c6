"""How time, memory, FLOPs and the roofline are measured, on a CPU and on a GPU."""

import ctypes
import gc
import random
import sys
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Measurement, timer
from torch.utils.benchmark.utils.common import TaskSpec

from drifa_attn.network.trace import FlopCount

MIB = 2**20
SHORTEST_BLOCK = 0.001  # seconds a CPU measurement lasts at least: shorter calls are repeated within it
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt, in malloc.h
FEWEST, MOST = 5, 200  # measurements of one provider


class Times(NamedTuple):
    """Milliseconds a call takes: median, 20th and 80th percentile."""

    p50: float
    p20: float
    p80: float


def quantiles(milliseconds: Sequence[float]) -> Times:
    """The three percentiles of single measurements, linear between neighbours."""
    return Times(*torch.tensor(milliseconds, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8]).double()).tolist())


def times(runs: Sequence[Callable[[], Any]], device: torch.device, seconds: float) -> list[Times]:
    """The time of each of several ways to do the same, measured for about `seconds` each."""
    if device.type == "cuda":
        from triton.testing import do_bench

        rep = 1000 * seconds
        return [quantiles(do_bench(run, warmup=rep / 4, rep=rep, return_mode="all")) for run in runs]
    return alternate(runs, seconds)


def alternate(runs: Sequence[Callable[[], Any]], seconds: float) -> list[Times]:
    """CPU times in alternation, one measurement of each in turn: what else the machine does then hits all of them alike.

    Each round has an order of its own, since what ran before decides what the caches hold.
    """
    keep_freed_memory()
    order = random.Random(0)
    numbers = [max(1, round(SHORTEST_BLOCK / max(clocked(run, 1), 1e-6))) for run in runs]
    samples: list[list[float]] = [[] for _ in runs]
    start = timer()
    while len(samples[0]) < FEWEST or (timer() - start < seconds * len(runs) and len(samples[0]) < MOST):
        for i in order.sample(range(len(runs)), len(runs)):
            samples[i].append(clocked(runs[i], numbers[i]))
    spec = TaskSpec("run()", setup="", num_threads=torch.get_num_threads())
    measured = (Measurement(1, sample, spec) for sample in samples)
    return [quantiles([1000 * t for t in m.times]) for m in measured]


def keep_freed_memory() -> None:
    """Let the C library of Linux keep the memory that it is given back.

    By default it returns large blocks to the system, and every 4 KiB of the next one costs a page fault. These take as
    long as a light layer, and whether a layer meets them depends on what ran before it.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)) if mallopt else ():
            mallopt(parameter, value)


def clocked(run: Callable[[], Any], number: int) -> float:
    """Seconds of one call, averaged over a number of them."""
    start = timer()
    for _ in range(number):
        run()
    return (timer() - start) / number


class Memory(NamedTuple):
    """Bytes allocated during a call, above those live before it: at most at one moment, and still at its end."""

    peak: int
    end: int


def memory(run: Callable[[], Any], device: torch.device) -> Memory:
    """What a call allocates. Its result counts as live at the end.

    On a GPU by the caching allocator's own statistics. On a CPU by summing every allocation and release that the profiler
    reports for PyTorch's allocator, inside custom ops and compiled code too; scratch memory of oneDNN and BLAS is not in it.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = run()
        torch.cuda.synchronize(device)
        peak, end = torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_allocated(device) - before
        del result
        return Memory(peak, end)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the profiler's own, on what it does not record
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            result = run()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = live = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del result
    return Memory(peak, live)


def tensors(value: Any) -> list[Tensor]:
    """The tensors in arguments or outputs."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for one in value for tensor in tensors(one)] if isinstance(value, list | tuple) else []


def nbytes(value: Any) -> int:
    """Bytes of the tensors in arguments or outputs."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(value))


def kept(run: Callable[..., Any], args: tuple, device: torch.device) -> int:
    """Bytes a forward pass leaves behind for the backward pass, besides its arguments, the weights and its output.

    Everything still allocated when it returns counts, whether autograd saved it or an op holds it in another way.
    """
    outputs: list[Any] = []
    end = memory(lambda: outputs.append(run(*args)), device).end
    return max(0, end - nbytes(outputs))


class Cost(NamedTuple):
    """What a module's equations ask for in one mode, whatever computes them.

    `flops` are those of products and convolutions. `bytes` have to move at least: each input and parameter is read once, each
    output written once; a backward pass reads inputs, parameters and the outputs' gradients and writes as many gradients.
    """

    flops: int
    bytes: int


def cost(module: nn.Module, args: tuple, mode: str) -> Cost:
    """FLOPs and bytes of one call, counted on the meta device."""
    module = deepcopy(module).to("meta")
    inputs = to_meta(args)
    with FlopCount() as forward:
        outputs = tensors(module(*inputs))
    weights, results = nbytes([inputs, list(module.parameters())]), nbytes(outputs)
    first = Cost(forward.total, weights + results)
    if mode == "forward":
        return first
    leaves = [t for t in (*tensors(inputs), *module.parameters()) if t.requires_grad]
    with FlopCount() as backward:
        torch.autograd.grad(sum(output.sum() for output in outputs), leaves, allow_unused=True)
    second = Cost(backward.total, 2 * weights + results)
    return second if mode == "backward" else Cost(first.flops + second.flops, first.bytes + second.bytes)


def to_meta(value: Any) -> Any:
    """Arguments of the same shapes without memory."""
    if isinstance(value, Tensor):
        return torch.empty_like(value, device="meta", requires_grad=value.requires_grad)
    return type(value)(to_meta(one) for one in value) if isinstance(value, list | tuple) else value


class Ceiling(NamedTuple):
    """One side of the roofline: a large copy (bytes), or a large product (FLOPs), as matrices or as a convolution."""

    op: str
    shape: tuple[int, ...]
    run: Callable[[], Any]
    flops: int
    bytes: int


def ceilings(device: torch.device, dtype: torch.dtype, *, side: int | None = None) -> list[Ceiling]:
    """The measurements the roofline is drawn from; `side` of the square operands, by default large for the device.

    A product is measured twice, since matrices and convolutions come from different libraries on a CPU: the faster is the roof.
    """
    side = side or (8192 if device.type == "cuda" else 1536)
    a = torch.randn(side, side, device=device).to(dtype)
    big = torch.zeros(16, side, side, device=device, dtype=dtype)
    target = torch.empty_like(big)
    weight, maps = (
        torch.randn(side, side, 1, 1, device=device).to(dtype),
        torch.randn(1, side, side, 1, device=device).to(dtype),
    )
    return [
        Ceiling("roofline copy", (16, side, side), lambda: target.copy_(big), 0, 2 * nbytes(big)),
        Ceiling("roofline matmul", (side, side, side), lambda: a @ a, 2 * side**3, 3 * nbytes(a)),
        Ceiling("roofline conv", (side, side, side), lambda: F.conv2d(maps, weight), 2 * side**3, 3 * nbytes(a)),
    ]
