"""Where the time of one attention goes: queueing, as it is called, its kernels alone in a CUDA graph, and a profile.

Each shape is measured by the equations, by what the library chooses, and by SE; then whole networks; then one profile.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import SEModule
from torch.profiler import ProfilerActivity, profile

import drifa_attn
from drifa_attn import MFA, ops

from .arguments import Parser
from .arguments import device as device_type
from .cases import switched
from .run import summary

BF16, FP32 = torch.bfloat16, torch.float32
# Batch, channels, side, reduction, dtype.
ON_GPU: tuple[tuple[Any, ...], ...] = (
    (64, 64, 56, None, BF16),
    (64, 128, 28, None, BF16),
    (64, 256, 14, None, BF16),
    (64, 256, 56, None, BF16),
    (64, 256, 56, 16, BF16),
    (64, 64, 112, 16, BF16),
    (1, 256, 56, 16, BF16),
    (64, 64, 56, None, FP32),
    (64, 256, 56, 16, FP32),
)
ON_CPU: tuple[tuple[Any, ...], ...] = ((1, 64, 8, None, BF16), (1, 64, 8, 16, BF16))
CALLS = 20


def times(run: Callable[[], Any], device: torch.device) -> str:
    """Milliseconds: of queueing one of several calls; of a call; of its kernels alone."""
    run()
    wait(device)
    start = time.perf_counter()
    for _ in range(CALLS):
        run()
    found = [f"queued {1000 * (time.perf_counter() - start) / CALLS:.3f}"]
    if device.type == "cuda":
        wait(device)
        from triton.testing import do_bench, do_bench_cudagraph

        for name, bench in (("called", do_bench), ("graph", do_bench_cudagraph)):
            try:
                found.append(f"{name} {bench(run, return_mode='median'):.3f}")
            except Exception as failure:
                found.append(f"{name} {summary(failure)[:100]}")
    return " ".join(found) + " ms"


def wait(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def layers(device: torch.device) -> Iterator[str]:
    """A line for each shape and way."""
    for b, c, side, reduction, dtype in ON_GPU if device.type == "cuda" else ON_CPU:
        x = torch.randn(b, c, side, side, device=device).to(dtype)
        layer = MFA(c, reduction=reduction, device=device, dtype=dtype)
        name = f"{b}x{c}x{side}x{side} /{reduction} {str(dtype)[6:]}"
        for mode in ("reference", "auto"):
            run = torch.no_grad()(partial(switched, mode, layer, x))
            yield f"{name} {mode} {times(run, device)} | {switched(mode, ops.explain, layer, x)}"
        yield f"{name} SE {times(torch.no_grad()(partial(SEModule(c).to(x), x)), device)}"


def networks(device: torch.device) -> Iterator[str]:
    """A line for each whole network."""
    side = 224 if device.type == "cuda" else 32
    for batch in (1, 64) if device.type == "cuda" else (1,):
        x = torch.randn(batch, 3, side, side, device=device, dtype=BF16)
        for name in ("plain", "MFA"):
            model = timm.create_model("resnet50")
            model = (model if name == "plain" else drifa_attn.wrap(model)).to(device, BF16).eval()
            yield f"resnet50 {name}, batch {batch}: {times(torch.no_grad()(partial(model, x)), device)}"


def steps(device: torch.device, number: int) -> None:
    """A number of forward and backward passes."""
    b, c, side = (64, 64, 56) if device.type == "cuda" else (1, 64, 8)
    x = torch.randn(b, c, side, side, device=device).to(BF16).requires_grad_()
    layer = MFA(c, device=device, dtype=BF16)
    for _ in range(number):
        layer(x).sum().backward()
    wait(device)


def profiled(device: torch.device) -> str:
    """The operators and kernels of forward and backward passes, the dearest first."""
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=kinds) as found:
        steps(device, 5)
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return found.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=40)


def main(arguments: list[str] | None = None) -> None:
    """Measure and print; with `--once` run one forward and backward pass, for another profiler to look at."""
    parser = Parser("python -m benchmarks.where", description=__doc__)
    parser.add_argument("--device", type=device_type, default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    parser.add_argument("--once", action="store_true", help="one forward and one backward pass, for another profiler")
    options = parser.parse_args(arguments)
    if options.once:
        steps(options.device, 1)
        return
    for lines in (layers, networks):
        for line in lines(options.device):
            print(line, flush=True)
    print(profiled(options.device))


if __name__ == "__main__":
    main()
