"""What a deployment does to a layer: compile, export, ONNX, trace. Each against the layer itself."""

import pytest
import torch
from torch.export import Dim, export

from tests._compare import assert_same_math
from tests.cases import CASES, gradients, listed, loss
from tests.older import needs_later_torch

NAMES = ["mfa-reduced-identity", "mfa-tokens", "mifa-three-masked", "rra-projection-same"]
EVERY = pytest.mark.parametrize("name", NAMES)


def dynamic_batch(args):
    """The batch of every tensor of `args` is dynamic."""
    return tuple([{0: Dim.AUTO}] * len(a) if isinstance(a, list) else {0: Dim.AUTO} for a in args)


def assert_same_outputs(actual, expected):
    for a, e in zip(listed(actual), listed(expected), strict=True):
        assert_same_math(a, e)


def assert_compiles(case, backend, device):
    torch._dynamo.reset()
    module = case.module(device=device)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for batch in (2, 5):
        args = case.args(batch, device=device, grad=True)
        ys = listed(compiled(*args))
        assert_same_outputs(ys, module(*args))
        leaves = [*module.parameters(), *listed(args[0])]
        for grad, expected in zip(torch.autograd.grad(loss(ys), leaves), gradients(module, args), strict=True):
            assert_same_math(grad, expected, rel=1e-4)  # a bias gradient sums cancelling terms, here in another order


@EVERY
def test_layer_compiles_whole(name, device):
    assert_compiles(CASES[name], "aot_eager", device)


@pytest.mark.slow  # most of the time is the C++ compiler's
@pytest.mark.parametrize("name", ["mfa-reduced-identity"])
def test_layer_compiles_whole_with_inductor(name, device):
    assert_compiles(CASES[name], "inductor", device)


@EVERY
@pytest.mark.parametrize("strict", [True, False])
def test_layer_exports(name, strict):
    case = CASES[name]
    module, args = case.module(), case.args()
    program = export(module, args, dynamic_shapes=dynamic_batch(args), strict=strict).module()
    for batch in (2, 5):
        args = case.args(batch)
        assert_same_outputs(program(*args), module(*args))


NORMS = pytest.param(NAMES[-1], marks=needs_later_torch("finds no batch norm for ONNX in today's onnxscript"))


@pytest.mark.parametrize("name", [*NAMES[:-1], NORMS])
def test_layer_exports_to_onnx(name):
    case = CASES[name]
    module, args = case.module(), case.args()
    program = torch.onnx.export(module, args, dynamo=True, verbose=False, dynamic_shapes=dynamic_batch(args))
    for batch in (2, 5):
        args = case.args(batch)
        assert_same_outputs(program(*args), module(*args))


# Tracing still works and is still asked for; torch warns that it will not for ever, and that MIFA gives a list.
@pytest.mark.filterwarnings("ignore:`torch.jit.trace:FutureWarning")
@pytest.mark.filterwarnings("ignore:Encountering a list at the output of the tracer:torch.jit.TracerWarning")
@pytest.mark.parametrize("name", [*NAMES[:-1], "rra"])  # padding="same" depends on the size: a trace holds for one size
def test_layer_traces(name):
    case = CASES[name]
    module = case.module()
    traced = torch.jit.trace(module, case.args())
    args = case.args(5)
    assert_same_outputs(traced(*args), module(*args))
