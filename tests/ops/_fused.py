"""What the tests of the Triton kernels share: where they run, the equations they are held to, and how close.

Triton decides between compiler and interpreter when it is imported, so a file's tests run twice: here on a GPU, and in a
process of their own in the interpreter, on the CPU.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import strategies as st

from tests._compare import max_abs

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETING else "cuda"
on_kernels = pytest.mark.skipif(False, reason="") if INTERPRETING else pytest.mark.cuda
outside = pytest.mark.skipif(INTERPRETING, reason="this is the interpreter's process")

DTYPES = (torch.float32, torch.bfloat16, torch.float16) if INTERPRETING else (torch.bfloat16, torch.float16)


def interpret(file):
    """Run the tests of `file` in the interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", str(file)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


class Problem(NamedTuple):
    """One input of the statistics, by shape and seed."""

    b: int
    c: int
    n: int
    d: int | None
    layout: str
    dtype: torch.dtype
    seed: int

    @property
    def width(self):
        return self.c if self.d is None else self.d

    def numbers(self, *shape, scale=1.0):
        """The next random numbers, float32."""
        return (scale * torch.randn(shape, generator=self.generator)).to(DEVICE)

    def tensors(self):
        """x, the five weights and biases, and the squeeze."""
        self.__class__.generator = torch.Generator().manual_seed(self.seed)
        x, w = stored(self.numbers(self.b, self.c, self.n).to(self.dtype), self.layout), self.width
        weights = [self.numbers(w, w, scale=w**-0.5) for _ in range(5)]
        biases = [self.numbers(w, scale=0.3) for _ in range(5)]
        if self.d is None:
            return x, weights, biases, None, None
        return x, weights, biases, self.numbers(w, self.c, scale=self.c**-0.5), self.numbers(w)


def stored(x, layout):
    """`b c n` in the memory of a contiguous or channels-last map, or of a part of a larger one."""
    if layout == "nhwc":
        return x.mT.contiguous().mT
    if layout == "sliced":
        return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]
    return x.contiguous()


@st.composite
def problems(draw, squeezes=True):
    """Awkward shapes: odd widths around the tile sizes, few and many positions, every layout."""
    c = draw(st.sampled_from([16, 17, 24, 33, 64, 65, 130]))
    d = draw(st.sampled_from([None, 16, 19, 40])) if squeezes else None
    c = draw(st.sampled_from([1, 3, c])) if d else c
    n = draw(st.sampled_from([2, 7, 16, 49, 65, 100]))
    layout, dtype = draw(st.sampled_from(["nchw", "nhwc", "sliced"])), draw(st.sampled_from(DTYPES))
    return Problem(draw(st.integers(1, 2)), c, n, d, layout, dtype, draw(st.integers(0, 2**16)))


def lin(weight, bias, t):
    return torch.einsum("dc,bcn->bdn", weight, t) + bias[:, None]


def at(t, where):
    return t.gather(2, where.long()[..., None])[..., 0]


def gradients(equations, inputs, grads, dtype):
    """The statistics and the gradients of all float inputs, with maps and weights in `dtype`, by autograd."""
    leaves = []

    def leaf(t):
        if isinstance(t, list):
            return [leaf(one) for one in t]
        if t is None or not t.is_floating_point():
            return t
        leaves.append(t.detach().to(dtype).requires_grad_())
        return leaves[-1]

    stats = equations(*(leaf(t) for t in inputs))
    return stats.detach(), torch.autograd.grad(stats, leaves, grads.to(stats.dtype))


def flat(results):
    """The tensors of a backward's result, in the order of its inputs."""
    return [t for one in results for t in (one if isinstance(one, list) else [one]) if t is not None]


def assert_no_worse(actual, eager, exact, dtype, times, name):
    """Assert that the largest error is at most `times` eager torch's own in this dtype, where that is above one rounding."""
    actual, eager, exact = actual.cpu().double(), eager.cpu().double(), exact.cpu()
    rounding = max(torch.finfo(dtype).eps / 2, 1e-6) * max_abs(exact)
    bound = times * max(max_abs(eager - exact), rounding)
    assert max_abs(exact) == 0 or bound < 0.2 * max_abs(exact), f"{name}: bound {bound:.1e} lets anything pass"
    assert max_abs(actual - exact) <= bound, f"{name}: error {max_abs(actual - exact):.2e} > {bound:.2e}"
