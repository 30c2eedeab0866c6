"""What is measured: the flags, a case, and the ways in which a module can be computed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from drifa_attn import ops as dispatch

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
    threads: int | None = None  # None: as many as PyTorch takes
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
    verb: bool = False  # a function of the library: "forward" is a call of it, there is nothing to check or to count


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


def auto_compiled(module: nn.Module) -> Callable[..., Any]:
    """The same through `torch.compile`."""
    return partial(switched, "auto", torch.compile(module, fullgraph=True, dynamic=False))


def peers(module: nn.Module) -> Callable[..., Any]:
    """Another attention, or none, as it is."""
    return module


# How a module can be computed. To add one, add a function that makes a module into what is called.
PROVIDERS = {
    "eager": eager,
    "compile": compiled,
    "fused": fused,
    "auto": auto,
    "auto-compile": auto_compiled,
    "peers": peers,
}
