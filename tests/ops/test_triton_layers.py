"""The layers on the Triton kernels, and the kernels as operators of PyTorch."""

import pytest
import torch

from drifa_attn import MFA, MIFA, ops
from drifa_attn.ops import operators
from tests._compare import assert_same_math
from tests._triton import skip_without_triton
from tests.cases import listed, loss, perturb_
from tests.ops._fused import DEVICE, INTERPRETING, on_kernels

skip_without_triton()

# float32 is multiplied exactly in the interpreter, elsewhere only where TF32 is allowed
DTYPE, REL = (torch.float32, 1e-4) if INTERPRETING else (torch.bfloat16, 5e-2)


def channels_last(x):
    return x.to(memory_format=torch.channels_last)


def same(x):
    return x


# the options of the layer, the shape of x without the batch, and the memory format of x
MFAS = {
    "map": ({}, (24, 5, 4), same),
    "channels-last map": ({}, (24, 5, 4), channels_last),
    "tokens": ({"layout": "b ... c", "num_prefix_tokens": 2}, (9, 24), same),
    "reduced identity": ({"reduction": 2, "init": "identity"}, (40, 30), same),
}


def check(layer, xs, *args):
    """Outputs and gradients of the fused operators against the reference equations."""
    leaves = [*xs, *layer.parameters()]
    results = []
    for mode in ("fused", "reference"):
        with ops.use(mode):
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
    with ops.use("fused"):
        assert ops.explain(layer, x).path == "triton"
    check(layer, [x])


@on_kernels
def test_mifa_runs_on_the_kernels():
    xs = [torch.randn(3, *shape).to(DEVICE, DTYPE).requires_grad_() for shape in ((24, 5, 4), (30, 24))]
    layer = perturb_(MIFA(24, layout=("b c ...", "b ... c"), device=DEVICE, dtype=DTYPE))
    with ops.use("fused"):
        assert ops.explain(layer, xs).path == "triton"
    check(layer, xs)
    check(layer, xs, torch.tensor([[True, True], [False, True], [True, False]], device=DEVICE))


@on_kernels
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
def test_ops_pass_opcheck():
    """It checks among other things that results have the strides that the compiler expects, and share no memory."""

    def leaf(*shape):
        return (torch.randn(shape, device=DEVICE) / shape[-1] ** 0.5).requires_grad_()

    d, c = 24, 40
    x, squeeze, present = leaf(2, c, 9), (leaf(d, c), leaf(d)), torch.ones(2, device=DEVICE).bool()
    weights, biases = [leaf(d, d) for _ in range(5)], [leaf(d) for _ in range(5)]
    torch.library.opcheck(operators.mfa_stats_op, (x, weights, biases, *squeeze, True))
    torch.library.opcheck(operators.mifa_stats_op, (x, weights[0], biases[0], *squeeze, present, True))
    torch.library.opcheck(operators.gate_op, (leaf(2, 9, c), leaf(2, c), "b ... c", 2))
