"""What the tests of the fused operators share: where they run, the equations that they are held to, and how close.

Triton decides between its compiler and its interpreter when it is imported. `tests/conftest.py` imports it for the interpreter,
unless the tests that need a GPU are to run.
"""

from typing import NamedTuple

import pytest
import torch
from hypothesis import strategies as st

from tests._compare import max_abs

try:
    from triton.language import cdiv
    from triton.runtime.interpreter import InterpretedFunction

    INTERPRETING = isinstance(cdiv, InterpretedFunction)
except ImportError:
    INTERPRETING = False

DEVICE = "cpu" if INTERPRETING or not torch.cuda.is_available() else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16) if INTERPRETING else (torch.bfloat16, torch.float16)
# The tests of a kernel run here if triton interprets it, else on a GPU.
on_kernels = pytest.mark.usefixtures("interpreter") if INTERPRETING else pytest.mark.cuda


class Problem(NamedTuple):
    """One input of the statistics: its shape and the seed of its numbers."""

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

    def numbers(self):
        """A function that gives the next random numbers of these sizes.

        They are float32 that the dtype of the problem holds without rounding, so that no error is that of the inputs.
        """
        generator = torch.Generator().manual_seed(self.seed)

        def numbers(*shape, scale=1.0):
            return (scale * torch.randn(shape, generator=generator)).to(self.dtype).float().to(DEVICE)

        return numbers

    def tensors(self):
        """x, the five weights and biases, and the squeeze."""
        numbers, w = self.numbers(), self.width
        x = stored(numbers(self.b, self.c, self.n).to(self.dtype), self.layout)
        weights = [numbers(w, w, scale=w**-0.5) for _ in range(5)]
        biases = [numbers(w, scale=0.3) for _ in range(5)]
        if self.d is None:
            return x, weights, biases, None, None
        return x, weights, biases, numbers(w, self.c, scale=self.c**-0.5), numbers(w)

    def gradients_of(self, stats):
        """Gradients of the statistics."""
        return self._replace(seed=self.seed + 1).numbers()(*stats.shape)


def stored(x, layout):
    """`b c n` in the memory of a contiguous or channels-last map, or of a part of a larger one."""
    if layout == "nhwc":
        return x.mT.contiguous().mT
    if layout == "sliced":
        return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]
    return x.contiguous()


@st.composite
def problems(draw, squeezes=True):
    """Awkward shapes: odd widths around and below the tile sizes, few and many positions, every layout."""
    c = draw(st.sampled_from([3, 8, 16, 17, 24, 33, 64, 65, 130]))
    d = draw(st.sampled_from([None, 8, 16, 19, 40])) if squeezes else None
    c = draw(st.sampled_from([1, 3, c])) if d else c
    n = draw(st.sampled_from([1, 2, 7, 16, 49, 65, 100]))
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


def assert_no_worse(actual, reference, exact, dtype, times, name):
    """Assert that the largest error is at most `times` that of plain torch in this dtype, where that is above one rounding."""
    actual, reference, exact = actual.cpu().double(), reference.cpu().double(), exact.cpu()
    rounding = max(torch.finfo(dtype).eps / 2, 1e-6) * max_abs(exact)
    bound = times * max(max_abs(reference - exact), rounding)
    assert max_abs(exact) == 0 or bound < 0.2 * max_abs(exact), f"{name}: bound {bound:.1e} lets anything pass"
    assert max_abs(actual - exact) <= bound, f"{name}: error {max_abs(actual - exact):.2e} > {bound:.2e}"


def mfa_maps(x, weights, biases, squeeze_weight, squeeze_bias):
    """h1, z2, h3, z4 and t of the equations of HIFA and CLIA."""
    z = x if squeeze_weight is None else lin(squeeze_weight, squeeze_bias, x)
    conv1, conv2, conv3, conv4, local = zip(weights, biases, strict=True)
    h1 = lin(*conv1, z).sigmoid()
    z2 = lin(*conv2, h1)
    h3 = lin(*conv3, h1 + z2.sigmoid()).sigmoid()
    z4 = lin(*conv4, h3)
    return h1, z2, h3, z4, lin(*local, z).sigmoid()


def mfa_equations(where):
    """The five statistics, the maxima read where the kernel found them."""

    def stats(*inputs):
        h1, z2, h3, z4, t = mfa_maps(*inputs)
        wide = torch.promote_types(h1.dtype, torch.float32)
        vectors = (h1.mean(2), at(z2, where[0]).sigmoid(), h3.mean(2), at(z4, where[1]).sigmoid(), t.mean(2))
        return torch.stack([vector.to(wide) for vector in vectors])

    return stats


def as_float64(inputs):
    return [[one.double() for one in t] if isinstance(t, list) else t if t is None else t.double() for t in inputs]


def check_forward(problem, forward):
    inputs = problem.tensors()
    stats, where = forward(*inputs)
    assert stats.shape == (5, problem.b, problem.width)
    assert (stats.dtype, where.dtype) == (torch.float32, torch.int32)
    h1, z2, h3, z4, t = mfa_maps(*as_float64(inputs))
    exact = torch.stack([h1.mean(2), z2.amax(2).sigmoid(), h3.mean(2), z4.amax(2).sigmoid(), t.mean(2)])
    reference, _ = gradients(mfa_equations(where), inputs, stats, problem.dtype)
    assert_no_worse(stats, reference, exact, problem.dtype, 2, "stats")
    found = torch.stack([at(z2, where[0]).sigmoid(), at(z4, where[1]).sigmoid()])
    assert_no_worse(found, reference[1::2], exact[1::2], problem.dtype, 4, "where")


def check_backward(problem, backend):
    inputs = problem.tensors()
    stats, where = backend.mfa_forward(*inputs)
    grads = problem.gradients_of(stats)
    results = backend.mfa_backward(grads, *inputs, stats, where)
    assert results[0].dtype == problem.dtype
    assert results[0].stride() == torch.empty_like(inputs[0]).stride()
    _, exact = gradients(mfa_equations(where), inputs, grads, torch.float64)
    _, reference = gradients(mfa_equations(where), inputs, grads, problem.dtype)
    for place, values in enumerate(zip(flat(results), reference, exact, strict=True)):
        assert_no_worse(*values, problem.dtype, 3, f"gradient {place}")


def mifa_maps(x, weight, bias, squeeze_weight, squeeze_bias, present):
    """z, and t before σ; an absent sample is zeros."""
    x = x if present is None else torch.where(present[:, None, None], x, 0)
    z = x if squeeze_weight is None else lin(squeeze_weight, squeeze_bias, x)
    return z, lin(weight, bias, z)


def mifa_equations(where):
    """The six statistics, the extrema read where the kernel found them."""

    def stats(*inputs):
        z, t = mifa_maps(*inputs)
        wide = torch.promote_types(z.dtype, torch.float32)
        low_t, top_t = at(t, where[2]).sigmoid(), at(t, where[3]).sigmoid()
        vectors = (at(z, where[0]), z.mean(2), at(z, where[1]), low_t, t.sigmoid().mean(2), top_t)
        return torch.stack([vector.to(wide) for vector in vectors])

    return stats


def check_mifa(problem, backend, *, masked):
    x, [weight, *_], [bias, *_], *squeeze = problem.tensors()
    present = None
    if masked:
        present = torch.arange(problem.b, device=DEVICE) % 2 == 0
        x[~present] = torch.nan
    inputs = (x, weight, bias, *squeeze, present)
    stats, where = backend.mifa_forward(*inputs)
    assert (stats.dtype, where.dtype) == (torch.float32, torch.int32)
    z, t = mifa_maps(*(i if i is None or i.dtype == torch.bool else i.double() for i in inputs))
    low_t, top_t = t.amin(2).sigmoid(), t.amax(2).sigmoid()
    exact = torch.stack([z.amin(2), z.mean(2), z.amax(2), low_t, t.sigmoid().mean(2), top_t])
    grads = problem.gradients_of(stats)
    reference, reference_grads = gradients(mifa_equations(where), inputs, grads, problem.dtype)
    for half, name in ((slice(0, 3), "z"), (slice(3, 6), "t")):
        assert_no_worse(stats[half], reference[half], exact[half], problem.dtype, 2, f"stats of {name}")
        found = mifa_equations(where)(*(i if i is None or i.dtype == torch.bool else i.double() for i in inputs))
        assert_no_worse(found[half], reference[half], exact[half], problem.dtype, 4, f"where of {name}")
    results = backend.mifa_backward(grads, *inputs, stats, where)
    assert results[0].stride() == torch.empty_like(x).stride()
    _, exact_grads = gradients(mifa_equations(where), inputs, grads, torch.float64)
    for place, values in enumerate(zip(flat(results), reference_grads, exact_grads, strict=True)):
        assert_no_worse(*values, problem.dtype, 3, f"gradient {place}")
