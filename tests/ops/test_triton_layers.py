"""The layers with the Triton kernels behind their dispatcher: whole, and as PyTorch's operators."""

import pytest
import torch

from drifa_attn import MFA, MIFA, ops
from drifa_attn.ops import register
from tests._compare import assert_same_math
from tests.cases import listed, loss, perturb_
from tests.ops._fused import DEVICE, INTERPRETING, interpret, on_kernels, outside

pytest.importorskip("triton")

# float32 is multiplied exactly in the interpreter, elsewhere only where TF32 is allowed
DTYPE, REL = (torch.float32, 1e-4) if INTERPRETING else (torch.bfloat16, 5e-2)


def channels_last(x):
    return x.to(memory_format=torch.channels_last)


def same(x):
    return x


# the layer, the shape of x without the batch, how x lies in memory
MFAS = {
    "map": ({}, (24, 5, 4), same),
    "channels-last map": ({}, (24, 5, 4), channels_last),
    "tokens": ({"layout": "b ... c", "prefix": 2}, (9, 24), same),
    "reduced identity": ({"reduction": 2, "init": "identity"}, (40, 30), same),
}


@outside
def test_everything_passes_in_the_interpreter():
    interpret(__file__)


def check(layer, xs, *args):
    """Outputs and gradients of the fused ops against the plain equations."""
    leaves = [*xs, *layer.parameters()]
    results = []
    for mode in ("1", "0"):
        with ops.fused(mode):
            ys = layer(xs if isinstance(layer, MIFA) else xs[0], *args)
            results.append([*listed(ys), *torch.autograd.grad(loss(ys), leaves)])
    for actual, expected in zip(*results, strict=True):
        assert_same_math(actual, expected, rel=REL)
    for y, x in zip(results[0], xs, strict=False):  # outputs come first
        assert y.stride() == x.stride()


@on_kernels
@pytest.mark.parametrize(("options", "shape", "lie"), MFAS.values(), ids=MFAS)
def test_mfa_runs_on_the_kernels(options, shape, lie):
    x = lie(torch.randn(3, *shape).to(DEVICE, DTYPE)).requires_grad_()
    layer = perturb_(MFA(shape[-1] if "layout" in options else shape[0], device=DEVICE, dtype=DTYPE, **options))
    with ops.fused("1"):
        assert ops.explain(layer, x).path == "triton"
    check(layer, [x])


@on_kernels
def test_mifa_runs_on_the_kernels():
    xs = [torch.randn(3, *shape).to(DEVICE, DTYPE).requires_grad_() for shape in ((24, 5, 4), (30, 24))]
    layer = perturb_(MIFA(24, layout=("b c ...", "b ... c"), device=DEVICE, dtype=DTYPE))
    with ops.fused("1"):
        assert ops.explain(layer, xs).path == "triton"
    check(layer, xs)
    check(layer, xs, torch.tensor([[True, True], [False, True], [True, False]], device=DEVICE))


@on_kernels
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
def test_ops_pass_opcheck():
    """Among else, that results lie in memory as the compiler was told, and share none."""

    def leaf(*shape):
        return (torch.randn(shape, device=DEVICE) / shape[-1] ** 0.5).requires_grad_()

    d, c = 24, 40
    x, squeeze, present = leaf(2, c, 9), (leaf(d, c), leaf(d)), torch.ones(2, device=DEVICE).bool()
    weights, biases = [leaf(d, d) for _ in range(5)], [leaf(d) for _ in range(5)]
    torch.library.opcheck(register.mfa_stats, (x, weights, biases, *squeeze, True))
    torch.library.opcheck(register.mifa_stats, (x, weights[0], biases[0], *squeeze, present, True))
    torch.library.opcheck(register.gate, (leaf(2, 9, c), leaf(2, c), "b ... c", 2))
