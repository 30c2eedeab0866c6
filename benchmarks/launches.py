"""Counts the kernels that one layer launches on a GPU, without a GPU: `python -m benchmarks.launches` prints a table.

The layer runs on meta tensors. Every operator of PyTorch that computes something counts as one launch, and every launch of a
Triton kernel is counted instead of made. A library may need more than one kernel for an operator, so this is a lower bound.
"""

import importlib
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import timm.layers
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from drifa_attn import MFA, ops
from drifa_attn.ops import chunked, operators

from .arguments import Parser
from .kernels import MODULES, PACKAGE

# The function of a backend that an operator runs.
FUNCTIONS = {
    "mfa_stats": "mfa_forward",
    "mfa_stats_backward": "mfa_backward",
    "mfa_gain": "mfa_gain_forward",
    "mfa_gain_backward": "mfa_gain_backward",
    "gate": "gate_forward",
    "gate_backward": "gate_backward",
}
SILENT = (
    "empty",
    "new_empty",
    "detach",
    "alias",
    "lift_fresh",
    "_reshape_alias",
    "_unsafe_view",
    "promote_types",
)  # they compute nothing


class Launches(TorchDispatchMode):
    """Within this context, counts what is launched; fused operators run the functions of a backend, on meta tensors too."""

    def __init__(self, backend: ModuleType) -> None:
        super().__init__()
        self.backend = backend
        self.aten: Counter[str] = Counter()
        self.triton: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if func.namespace == "drifa_attn":
            with self:
                result = getattr(self.backend, FUNCTIONS[name])(*args, **(kwargs or {}))
            return operators.listed(result) if str(func._schema).endswith("[]") else result
        with self:  # below autograd, PyTorch leaves operators whole that are made of others, such as `to`
            result = func.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        if not func.is_view and not name.startswith(SILENT):
            self.aten[name] += 1
        return func(*args, **(kwargs or {}))

    def launch(self, kernel: Any, programs: int, device_of: Tensor, **arguments: Any) -> None:
        """In the place of `ops.triton.common.launch`."""
        self.triton[kernel.fn.__name__] += 1


class Count(NamedTuple):
    """Launches of PyTorch and of Triton."""

    aten: int
    triton: int

    def __str__(self) -> str:
        return f"{self.aten} + {self.triton}" if self.triton else str(self.aten)


def counted(run: Callable[[], Any], backend: ModuleType) -> tuple[Any, Launches]:
    """What `run` returns and what it launches."""
    with ExitStack() as patches:
        counter = Launches(backend)
        for module in MODULES:
            patches.enter_context(patch(f"{PACKAGE}.{module}.launch", counter.launch))
        patches.enter_context(counter)
        return run(), counter


def step(layer: nn.Module, shape: tuple[int, ...], mode: Any, backend: ModuleType) -> tuple[Count, Count]:
    """The launches of a layer forward and backward."""
    x = torch.empty(shape, dtype=next(layer.parameters()).dtype, device="meta", requires_grad=True)
    with ops.use(mode):
        y, forward = counted(lambda: layer(x), backend)
        _, backward = counted(lambda: y.backward(torch.empty_like(y)), backend)
    one, two = (Count(counter.aten.total(), counter.triton.total()) for counter in (forward, backward))
    return one, two


BF16, FP32 = torch.bfloat16, torch.float32
# label -> channels, side, reduction, dtype
LAYERS = {
    "dense c=64, 56²": (64, 56, None, BF16),
    "dense c=128, 28²": (128, 28, None, BF16),
    "reduced c=64 (d=8), 112²": (64, 112, 16, BF16),
    "reduced c=256 (d=16), 56²": (256, 56, 16, BF16),
    "reduced c=2048 (d=128), 7²": (2048, 7, 16, BF16),
    "reduced c=256 (d=16), 56², float32": (256, 56, 16, FP32),
    "dense c=256, 56², layer-wise": (256, 56, None, BF16),
}


def launches(label: str, mode: Any) -> tuple[Count, Count]:
    """The launches of one of `LAYERS`, batch 64, forward and backward, in a mode of `ops`."""
    channels, side, reduction, dtype = LAYERS[label]
    layer = MFA(channels, reduction=reduction, init="identity" if reduction else "paper", device="meta", dtype=dtype)
    return step(layer, (64, channels, side, side), mode, importlib.import_module(PACKAGE))


def squeeze_excite() -> tuple[Count, Count]:
    """Those of squeeze-and-excitation, for comparison."""
    return step(timm.layers.SEModule(256).to("meta", BF16), (64, 256, 56, 56), "reference", chunked)


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    Parser("python -m benchmarks.launches", description=__doc__).parse_args(arguments)
    print("| layer | eager forward | fused forward | eager backward | fused backward |\n|---|---|---|---|---|")
    for label in LAYERS:
        eager, fused = launches(label, "reference"), launches(label, "fused")
        print(f"| {label} | {eager[0]} | {fused[0]} | {eager[1]} | {fused[1]} |")
    print("| SE | {} | | {} | |".format(*squeeze_excite()))


if __name__ == "__main__":
    main()
