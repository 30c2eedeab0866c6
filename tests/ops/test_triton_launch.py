"""What every launch of a Triton kernel promises: offsets beyond 32 bits, one axis of programs, and the device of its tensor."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from tests._compare import assert_same_bits
from tests._triton import skip_without_triton
from tests.ops._fused import Problem, flat, on_kernels

skip_without_triton()
from drifa_attn.ops.triton import common, gate, mfa, mifa  # noqa: E402  (imports triton, which may be missing)

FAR = 2**30 + 64  # elements from one sample to the next: the stride fits 32 bits, the offset of the third sample does not


def apart(x):
    """The three samples of x in one memory, each as it lay, so far apart that no 32-bit offset reaches the last.

    Memory between them is never touched, so that none is taken.
    """
    try:
        memory = torch.empty(2 * FAR + x[0].numel(), dtype=x.dtype, device=x.device)
    except RuntimeError as error:
        pytest.skip(f"no room for addresses: {error}")
    far = memory.as_strided(x.shape, (FAR, *x.stride()[1:]))
    far.copy_(x)
    return far


@on_kernels
@pytest.mark.parametrize(("width", "reduced"), [(32, None), (32, 16), (144, None)])
def test_mfa_reaches_beyond_32_bits(width, reduced):
    x, *weights = Problem(3, width, 20, reduced, "nchw", torch.bfloat16, 3).tensors()
    far = apart(x)
    stats, where = mfa.mfa_forward(x, *weights)
    assert_same_bits(mfa.mfa_forward(far, *weights)[0], stats)
    grads = torch.randn_like(stats)
    expected = flat(mfa.mfa_backward(grads, x, *weights, stats, where))
    for found, one in zip(flat(mfa.mfa_backward(grads, far, *weights, stats, where)), expected, strict=True):
        assert_same_bits(found.contiguous(), one.contiguous())


@on_kernels
def test_mifa_and_the_gate_reach_beyond_32_bits():
    x, weights, biases, *_ = Problem(3, 16, 20, None, "nchw", torch.bfloat16, 3).tensors()
    far, factor = apart(x), torch.rand(3, 16, device=x.device)
    conv = weights[0], biases[0], None, None, None
    assert_same_bits(mifa.mifa_forward(far, *conv)[0], mifa.mifa_forward(x, *conv)[0])
    place = "b c ...", 0
    assert_same_bits(gate.gate_forward(far, factor, *place).contiguous(), gate.gate_forward(x, factor, *place))
    for found, one in zip(gate.gate_backward(x, far, factor, *place), gate.gate_backward(x, x, factor, *place), strict=True):
        assert_same_bits(found.contiguous(), one)


def test_programs_lie_on_one_axis_and_on_the_device_of_their_tensor(monkeypatch):
    """The first axis of a grid holds 2³¹ − 1 programs, the others 65,535."""
    seen = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: seen.append((grid, arguments))

    def device_of(tensor):
        seen.append(tensor.device)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    common.launch(Kernel(), 70_000, SimpleNamespace(device="cuda:1"), n=3)
    assert seen == ["cuda:1", ((70_000,), {"n": 3, "enable_fp_fusion": True})]
