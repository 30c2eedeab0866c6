"""Which implementation runs, and why."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from types import ModuleType
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from drifa_attn.functional import exact

from . import launch, lean

Mode = Literal["auto", "0", "1"]
MODES = ("auto", "0", "1")

# Elements of a map at the width attention works at, below which a fused op on a CPU is not worth its call (measured on two
# cores). Without gradients it has to save time; behind a squeeze maps are narrow, and that takes more of them. With gradients
# it saves what would be kept for backward, at up to twice the time of so small a layer.
SMALL = 2**17
SMALL_SQUEEZED = 2**19
SMALL_TRAINED = 2**15


def check_mode(owner: str, mode: str) -> Mode:
    """`mode` if it is one, else a `ValueError`."""
    if mode in MODES:
        return cast(Mode, mode)
    raise ValueError(f'{owner} expected "auto", "0" (the plain equations) or "1" (always fused), got {mode!r}.')


class _State:
    """The process's mode: a plain attribute, for `torch.compile` to guard."""

    mode: Mode = check_mode("DRIFA_FUSED", os.environ.get("DRIFA_FUSED", "auto"))


@contextmanager
def fused(mode: Mode) -> Iterator[None]:
    """Within this context attention runs in this mode, in all threads; the environment's `DRIFA_FUSED` is the first one.

    Args:
        mode: "auto" chooses by measured rules (`explain` tells what and why), "0" is the plain equations of `functional`,
            "1" is always a fused op, by Triton where it can run, else lean.

    Raises: ValueError: another mode.
    """
    mode = check_mode("ops.fused", mode)
    before, _State.mode = _State.mode, mode
    try:
        yield
    finally:
        _State.mode = before


class Choice(NamedTuple):
    """The implementation an input gets: "eager", "lean" or "triton", and why."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def is_exporting() -> bool:
    """Whether `torch.export`, or what builds on it, is running; torch 2.6 does not tell its strict form from compiling."""
    compiler = torch.compiler
    if hasattr(compiler, "is_exporting"):
        return compiler.is_exporting()
    return compiler.is_compiling() and not compiler.is_dynamo_compiling()


def plain_needed(x: Tensor) -> str | None:
    """Why what happens around this call takes the plain equations, or None."""
    if x.is_meta:
        return "meta tensors have no values to fuse over"
    if is_exporting():
        return "an exported graph is to run without this library"
    if torch.compiler.is_compiling():
        return None
    if torch._C._functorch.maybe_current_level() is not None:
        return "torch.func transforms need equations they can see"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode derivatives need equations they can see"
    return None


def kernels(x: Tensor, width: int | None) -> tuple[bool, str]:
    """Whether the Triton kernels take this `b c n` (without a width, the gate alone), and why (not)."""
    if x.device.type != "cuda" and not launch.interpreting():
        return False, f"on {x.device.type} the lean ops are the fused ones"
    reason = launch.supports_gate(x) if width is None else launch.supports(x, width)
    return reason is None, reason or f"Triton takes {x.dtype} at width {width}"


def plain(x: Tensor, width: int, *, products: int = 5) -> str | None:
    """Why `b c n` features take the plain equations at a width, or None. All of it can be compiled, unlike `kernels`.

    `products` is how many lie between x and what leaves the op, a measure of what there is to save: five in MFA, one in MIFA.
    """
    if _State.mode == "0":
        return "DRIFA_FUSED is 0"
    if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        return "a traced or ONNX graph cannot hold the fused ops"
    if _State.mode == "1":
        return None
    reason = plain_needed(x)
    if reason:
        return reason
    if x.device.type not in ("cpu", "cuda"):
        return f"fused ops are not measured on {x.device.type}"
    # Inductor may compute a map anew for backward, to other bits than its maximum has: the gradient is then 0 / 0. Fused ops
    # keep the place, so compiled code takes them at any size.
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        elements, small = x.shape[0] * x.shape[2] * width, SMALL if width == x.shape[1] else SMALL_SQUEEZED
        small = SMALL_TRAINED if torch.is_grad_enabled() else small
        if x.shape[2] == 1:
            return "one position a sample: nothing to pool"
        if elements < small:
            return f"a map of {elements} elements is small: fewer than {small}"
        if products == 1 and not torch.is_grad_enabled():
            return "one product a modality: without gradients nothing is kept that could be saved"
    return None


def choose(x: Tensor, width: int, *, products: int = 5) -> Choice:
    """The implementation for the statistics of `b c n` features at a width."""
    reason = plain(x, width, products=products)
    if reason:
        return Choice("eager", reason)
    ok, reason = kernels(x, width)
    return Choice("triton" if ok else "lean", reason if _State.mode == "auto" else f"DRIFA_FUSED is 1; {reason}")


def implementation(x: Tensor, width: int, kind: str) -> ModuleType:
    """The module whose functions run on `x`: `lean`, or the Triton one of this kind ("mfa", "mifa")."""
    if kernels(x, width)[0]:
        return import_module(f".triton_{kind}", __package__)
    return lean


@contextmanager
def undisturbed(x: Tensor) -> Iterator[None]:
    """The context an op's kernel runs in: without autocast, and on a GPU with the device of x current."""
    with exact(x), torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        yield
