"""Decides which implementation runs for an input, and says why.

Two questions, each asked once. `reference_reason`: do the reference equations run, or a fused operator? It can be compiled. A
fused operator asks `triton_reason` when it runs: does Triton take this input, or the chunked operators? The answer needs real
tensors, so it is never part of a compiled graph. On a GPU the first question asks also whether Triton would take the input: the
chunked operators launch hundreds of small kernels there, and are slower than the equations. They run on a GPU only where
`use("fused")` asks for their memory. This file imports no triton, so that it can say why triton is not used.
"""

import functools
import importlib.metadata
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from drifa_attn.functional import Linear, Masks
from drifa_attn.layout import positions

from . import chunked

Mode = Literal["auto", "reference", "fused"]
Way = Literal["reference", "grouped", "fused"]
MODES = ("auto", "reference", "fused")

# Elements of a map (at the width that attention works at) from which a fused operator pays on a CPU, measured on two cores.
# Without gradients it must save time. With gradients it saves the memory that is kept for backward, and may take up to twice
# the time in so small a layer. Where attention is reduced, its maps are a small part of what is kept: there it must not take
# longer.
SMALL = 2**17
SMALL_TRAINED = 2**15
SMALL_TRAINED_REDUCED = 2**18

GROUPED = "without gradients, a CPU computes groups of samples whose maps stay in its cache"
MOST_GROUPED = 2**22  # elements of one sample's map, beyond which no group fits
NARROW, WIDE = 32, 128  # up to the first, groups pay; up to the second for small maps; beyond, each group reads big weights

MINIMUM_TRITON = (3, 6)  # interpreted with this version and with 3.8; the configurations were compiled with 3.8
WIDEST = 4096  # the widest that was compiled; nothing in the layer-wise kernels depends on it
WIDEST_EXACT = 32  # the widest whose float32 products run without tensor cores: beyond, they would outlast the maps


def check_mode(owner: str, mode: str) -> Mode:
    """`mode` if it is a known one, else a `ValueError`."""
    if mode in MODES:
        return cast(Mode, mode)
    raise ValueError(f'{owner} expected "auto", "reference" (the equations) or "fused" (always fused), got {mode!r}.')


class _State:
    """The mode of the process, a plain attribute, so that `torch.compile` guards on it."""

    mode: Mode = check_mode("DRIFA_BACKEND", os.environ.get("DRIFA_BACKEND", "auto"))


@contextmanager
def use(mode: Mode) -> Iterator[None]:
    """Within this context, attention runs in this mode, in all threads; elsewhere in the mode of `DRIFA_BACKEND`.

    Args:
        mode: "auto" chooses by measured rules (`explain` tells what and why). "reference" runs the equations of `functional`.
            "fused" runs a fused operator wherever one can: Triton's where it can run, else the chunked one.

    Raises: ValueError: another mode.
    """
    mode = check_mode("ops.use", mode)
    before, _State.mode = _State.mode, mode
    try:
        yield
    finally:
        _State.mode = before


class Choice(NamedTuple):
    """The implementation that runs for an input, "reference", "grouped", "chunked" or "triton", and the reason."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


Features = Tensor | Sequence[Tensor]  # `b c n` for MFA, or a list of them, one per modality, for MIFA


def is_fused(x: Features, width: int, linears: Iterable[Linear | None] = (), mask: Tensor | Masks = None) -> bool:
    """Whether a fused operator runs for these features, see `way`."""
    return way(x, width, linears, mask) == "fused"


def way(x: Features, width: int, linears: Iterable[Linear | None] = (), mask: Tensor | Masks = None) -> Way:
    """What runs for these features, the one choice that a forward makes: the equations, those in groups, or a fused operator.

    Only the equations take linear maps that must be called, and masks.
    """
    reason = reference_reason(x, width, refusal(linears, mask))
    return "fused" if reason is None else "grouped" if reason is GROUPED else "reference"


def refusal(linears: Iterable[Linear | None] = (), mask: Tensor | Masks = None) -> str | None:
    """Why no fused operator can take these linear maps or this mask, or None."""
    if any(map(callable, linears)):
        return "a linear map must be called"
    if mask is not None and (isinstance(mask, Tensor) or any(one is not None for one in mask)):
        return "a mask is given, and the fused operators pool over every position"
    return None


def reference_reason(x: Features, width: int, refused: str | None = None) -> str | None:
    """Why the reference equations run for these features, or None if a fused operator runs; the largest modality decides.

    Shape: x `b c n`, or a list of m features `b c_i n_i`. `width` is the width that attention works at. `refused` is what
        `refusal` answered.
    """
    mode = _State.mode
    if mode == "reference":
        return "the mode is reference"
    if torch.jit.is_tracing():
        return "a traced or ONNX graph cannot contain the fused operators"
    if refused:
        return refused
    if mode == "fused":
        return None
    if isinstance(x, Tensor):
        return special_reason(x) or size_reason(x, width) or kernel_reason([x], width)
    return special_reason(x[0]) or size_reason(largest(x), width, products=1) or kernel_reason(x, width)


def special_reason(x: Tensor) -> str | None:
    """Why something around this call needs the reference equations, or None."""
    if x.is_meta:
        return "meta tensors have no values to fuse over"
    if torch.compiler.is_compiling():
        return "an exported graph must run without this library" if is_exporting() else None
    if torch._C._functorch.maybe_current_level() is not None:
        return "torch.func transforms need equations that they can see"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode derivatives need equations that they can see"
    return None


def size_reason(x: Tensor, width: int, *, products: int = 5) -> str | None:
    """Why a fused operator would not pay for `b c n` features, or None.

    `products` is the number of products between x and the pooled vectors: five in MFA, one in MIFA.
    """
    if not (x.is_cpu or x.is_cuda):
        return f"fused operators are not measured on {x.device.type}"
    trained = torch.is_grad_enabled()
    in_groups = not trained and products > 1 and x.dtype in (torch.float32, torch.float64)
    # For backward, Inductor may recompute a map with other bits than those that its maximum came from. Fused operators store
    # the position of the maximum, and keep less, so compiled code that is trained takes them at any size. Without gradients
    # the batch stays one group: what depends on a size would be part of the graph.
    if x.is_cpu and torch.compiler.is_compiling():
        if trained:
            return None
        return GROUPED if in_groups and width <= WIDE else "without gradients, the compiler fuses the equations itself"
    b, c, n = x.shape
    if n == 1:
        return "one position per sample: nothing to pool"
    if x.is_cuda:
        return None
    elements, small = b * n * width, least(trained, width < c)
    fits = n * width <= MOST_GROUPED and (width <= NARROW or (width <= WIDE and elements < small))
    if in_groups and fits and b:
        return GROUPED
    if elements < small:
        return f"a map of {elements} elements is small: fewer than {small}"
    if products == 1 and not trained:
        return "one product per modality: without gradients, no memory can be saved"
    return None


def least(trained: bool, reduced: bool) -> int:
    """The elements of a map from which a fused operator pays on a CPU."""
    if not trained:
        return SMALL
    return SMALL_TRAINED_REDUCED if reduced else SMALL_TRAINED


def kernel_reason(xs: Sequence[Tensor], width: int) -> str | None:
    """Why the Triton kernels would refuse one of these `b c n` features of a GPU, or None; on a CPU nothing depends on it."""
    for x in xs:
        reason = unsupported(x, width) if x.device.type == "cuda" else None
        if reason:
            return f"{reason}, and the chunked operators launch more kernels than the equations"
    return None


def is_exporting() -> bool:
    """Whether `torch.export`, or something built on it, runs; in torch 2.6 its strict form looks like compiling."""
    compiler = torch.compiler
    if hasattr(compiler, "is_exporting"):
        return compiler.is_exporting()
    return compiler.is_compiling() and not compiler.is_dynamo_compiling()


def backend(x: Tensor, width: int | None = None) -> ModuleType:
    """The module whose functions run on `x`, see `triton_reason`: `ops.triton` or `ops.chunked`."""
    if triton_reason(x, width) is not None:
        return chunked
    from . import triton  # not above: it imports triton

    return triton


def triton_reason(x: Tensor, width: int | None = None) -> str | None:
    """Why the chunked operators run on `x`, or None if Triton's do.

    Args:
        x: `b c n`; for the gate any layout.
        width: the width that attention works at; None asks for the gate.
    """
    if x.device.type != "cuda" and not interpreting():
        return f"on {x.device.type} the fused operators are the chunked ones"
    return unsupported_by_gate(x) if width is None else unsupported(x, width)


def unsupported_by_gate(x: Tensor) -> str | None:
    """Why the Triton gate cannot take `x`, or None."""
    return machine_reason(x.device, x.dtype) or shape_reason(x)


def unsupported(x: Tensor, width: int) -> str | None:
    """Why Triton's statistics cannot take `x` (`b c n`) at a width of `width` channels, or None."""
    if max(width, x.shape[1]) > WIDEST:
        return f"{max(width, x.shape[1])} channels are more than the {WIDEST} that the kernels were compiled for"
    return machine_reason(x.device, x.dtype, width) or shape_reason(x)


def shape_reason(x: Tensor) -> str | None:
    """Why the shape or the strides of `x` are beyond the kernels, or None."""
    if 0 in x.shape:
        return f"x is empty: {tuple(x.shape)}"
    if sum(abs(stride) * (size - 1) for stride, size in zip(x.stride()[1:], x.shape[1:], strict=True)) >= 2**31:
        return "one sample of x spans 2^31 elements or more"
    return None


def machine_reason(device: torch.device, dtype: torch.dtype, width: int | None = None) -> str | None:
    """Why the kernels cannot run on this device in this dtype, the statistics at this width, or None.

    It reads versions, the GPU and switches of PyTorch, so the compiler takes its answer as a constant of the graph.
    """
    missing = triton_missing()
    if missing:
        return missing
    if device.type != "cuda" and not (interpreting() and device.type == "cpu"):
        return f"x is on {device}, the kernels run on CUDA"
    if device.type == "cuda" and capability(device) < 80:
        return f"compute capability {capability(device) / 10} is below 8.0"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"x is {dtype}, the kernels take float16, bfloat16 and float32"
    if width is not None and width > WIDEST_EXACT and dtype == torch.float32 and not interpreting() and not tf32_allowed():
        return (
            f"float32 without TF32 has no tensor cores, which a width of {width} > {WIDEST_EXACT} needs; "
            "torch.backends.cuda.matmul.allow_tf32 = True allows them"
        )
    return None


machine_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]  # assume_constant_result imports the compiler


@functools.cache  # reading the version takes longer than a small kernel
def triton_missing() -> str | None:
    """Why triton cannot be used, or None."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "triton is not installed"
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_TRITON:
        return f"triton is {version}, the kernels need >= {'.'.join(map(str, MINIMUM_TRITON))}"
    return None


def interpreting() -> bool:
    """Whether triton, if imported now, runs kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def capability(device: torch.device) -> int:
    """The compute capability of a device, 90 for 9.0; the interpreter counts as 9.0."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def tf32_allowed() -> bool:
    """Whether PyTorch's switch allows tensor cores for float32 matrix products."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch >= 2.9; reading the old switch fails if the new one was used
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32


def largest(xs: Sequence[Tensor]) -> Tensor:
    """The `b c n` modality with the most elements."""
    found, *others = xs  # max with a key is more than the compiler of torch 2.6 follows
    for x in others:
        if x.shape[1] * x.shape[2] > found.shape[1] * found.shape[2]:
            found = x
    return found


def choose(x: Features, width: int, refused: str | None = None) -> Choice:
    """The implementation for the pooled vectors of these features, and the reason; see `reference_reason`."""
    reason = reference_reason(x, width, refused)
    if reason:
        return Choice("grouped" if reason is GROUPED else "reference", reason)
    x = x if isinstance(x, Tensor) else largest(x)
    reason = triton_reason(x, width)
    path = "chunked" if reason else "triton"
    reason = reason or f"Triton takes {x.dtype} at width {width}"
    return Choice(path, reason if _State.mode == "auto" else f"the mode is fused; {reason}")


def explain(layer: Any, x: Any, mask: Tensor | Masks = None) -> Choice:
    """Which implementation a layer runs for an input, and why.

    Args:
        layer: an `MFA` or `MIFA`.
        x: what its forward takes: features, or for a `MIFA` a list of them.
        mask: what its forward takes.

    Raises: TypeError: another layer.
    """
    if hasattr(layer, "layouts"):
        places = zip(layer.layouts, layer.num_prefix_tokens, strict=True)
        features: Features = [positions(one, *place) for one, place in zip(x, places, strict=True)]
    elif hasattr(layer, "local_scale") and hasattr(layer, "layout"):
        features = positions(x, layer.layout, layer.num_prefix_tokens)
    else:
        raise TypeError(f"ops.explain expected an MFA or MIFA, got {type(layer).__name__}: pass one that it contains.")
    return choose(features, layer.local_scale.shape[0], layer.must_call() or refusal(mask=mask))
