"""A short table of times on this machine: MFA by its equations, fused and compiled, beside SE.

What the repository measures, memory and whole networks too, is `python -m benchmarks` there, which is not in the package.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from drifa_attn import ops
from drifa_attn.attention import MFA

from .arguments import Refused, at_least_one, seconds
from .show import Table, show

EXAMPLE = "drifa-attn bench --channels 256 --side 14 --way equations fused"
WAYS = ("equations", "fused", "compiled")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FEWEST = 3  # measurements of each


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--batch", type=at_least_one, default=8, help="(default: %(default)s)")
    parser.add_argument("--channels", type=at_least_one, default=64, help="(default: %(default)s)")
    parser.add_argument("--side", type=at_least_one, default=56, help="height and width of the features (default: %(default)s)")
    parser.add_argument("--reduction", type=at_least_one, help="of MFA (default: none, the paper's width)")
    parser.add_argument("--device", type=device, default=device("auto"), help="auto (default), cpu or cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="(default: %(default)s)")
    parser.add_argument("--way", nargs="+", choices=WAYS, default=list(WAYS), help="how MFA is computed (default: all)")
    parser.add_argument("--seconds", type=seconds, default=1.0, help="spent on each row (default: %(default)s)")


def device(text: str) -> torch.device:
    """A device that is there."""
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if text not in ("cpu", "cuda") or (text == "cuda" and not torch.cuda.is_available()):
        raise Refused(f"this machine has cpu{', cuda' * torch.cuda.is_available()}, got {text!r}")
    return torch.device(text)


def run(options: argparse.Namespace) -> None:
    """Measure in turn, and show."""
    x = torch.randn(options.batch, options.channels, options.side, options.side, device=options.device)
    x = x.to(DTYPES[options.dtype]).requires_grad_()
    notes, ready = [], {}
    for name, layer in layers(options).items():
        try:
            layer(x)  # compiles
            ready[name] = layer
        except Exception as error:  # a compiler that is missing is a note, not the end
            notes.append(f"{name}: not measured, {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    found = {step: times(ready, partial(call, x), options.seconds / 2) for step, call in STEPS.items()}
    header = ("attention", *(f"{step} ms" for step in STEPS), *(f"{step} / SE" for step in STEPS))
    rows = [
        (name, *(f"{found[s][name]:.3f}" for s in STEPS), *(f"{found[s][name] / found[s]['SE']:.2f}" for s in STEPS))
        for name in ready
    ]
    where = f"{options.device.type}, {torch.get_num_threads()} threads" if options.device.type == "cpu" else device_name()
    title = f"one layer, {'×'.join(map(str, x.shape))} {options.dtype}, on {where}: medians"
    show(Table(title, header, rows, notes))


def device_name() -> str:
    """The name of the GPU."""
    return torch.cuda.get_device_name()


def layers(options: argparse.Namespace) -> dict[str, Callable[[Tensor], Tensor]]:
    """What is measured, by name; SE first."""
    from timm.layers import SEModule

    kind: dict[str, Any] = {"device": options.device, "dtype": DTYPES[options.dtype]}
    mfa = MFA(options.channels, reduction=options.reduction, **kind)
    found: dict[str, Callable[[Tensor], Tensor]] = {"SE": SEModule(options.channels).to(**kind)}
    for way in options.way:
        layer: Any = torch.compile(mfa, fullgraph=True, dynamic=False) if way == "compiled" else mfa
        found[f"MFA, {way}"] = partial(switched, "fused" if way == "fused" else "reference", layer)
    return found


def switched(mode: Any, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A layer within a mode of `ops`."""
    with ops.use(mode):
        return layer(x)


def forward(x: Tensor, layer: Callable[[Tensor], Tensor]) -> None:
    """A forward pass without gradients."""
    with torch.no_grad():
        layer(x)


def training(x: Tensor, layer: Callable[[Tensor], Tensor]) -> None:
    """A forward and a backward pass."""
    layer(x).float().sum().backward()


STEPS = {"inference": forward, "training": training}


def times(layers: Mapping[str, Any], call: Callable[[Any], None], seconds: float) -> dict[str, float]:
    """The median milliseconds of each, measured in turn: what else the machine does then hits all alike."""
    found: dict[str, list[float]] = {name: [] for name in layers}
    for layer in layers.values():
        call(layer)
    start = time.perf_counter()
    while len(found["SE"]) < FEWEST or time.perf_counter() - start < seconds * len(layers):
        for name, layer in layers.items():
            found[name].append(clocked(call, layer))
    return {name: 1000 * statistics.median(several) for name, several in found.items()}


def clocked(call: Callable[[Any], None], layer: Any) -> float:
    """The seconds of one call, the GPU's work included."""
    synchronise()
    start = time.perf_counter()
    call(layer)
    synchronise()
    return time.perf_counter() - start


def synchronise() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
