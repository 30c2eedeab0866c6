"""What every layer does, whatever its equation: one test, all layers (`case`)."""

import copy
import io
import pickle

import pytest
import torch
from torch.autograd import gradcheck
from torch.func import functional_call

from tests._compare import assert_same_bits, assert_same_math
from tests.cases import CASES, gradients, listed, loss, perturb_

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
POOLED = ("hifa", "clia", "mgifa", "mlifa")  # give a vector `b c`; the others give features like their input
KEEPS_FEATURES = [name for name in CASES if name not in POOLED and not name.startswith("rra")]
ATTENTION = [name for name in CASES if not name.startswith("rra")]


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_layer_takes_any_batch(case, batch, device):
    module, args = case.module(device=device), case.args(batch, device=device, grad=True)
    ys = listed(module(*args))
    assert all(y.shape[0] == batch and y.isfinite().all() for y in ys)
    for grad, leaf in zip(gradients(module, args), [*module.parameters(), *listed(args[0])], strict=True):
        assert grad.shape == leaf.shape
        assert grad.isfinite().all()


@pytest.mark.parametrize("name", KEEPS_FEATURES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_features_keep_dtype_shape_and_strides(name, dtype, device):
    for weight_dtype in {dtype, torch.float32}:  # a backbone in half precision may keep its attention in float32
        module, args = CASES[name].module(device=device, dtype=weight_dtype), CASES[name].args(device=device, dtype=dtype)
        for x, y in zip(listed(args[0]), listed(module(*args)), strict=True):
            assert (y.dtype, y.shape, y.stride(), y.device) == (dtype, x.shape, x.stride(), x.device)
        for gate in listed(module.gates(*args)):
            assert gate.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("name", POOLED)
@pytest.mark.parametrize("dtype", FLOATS)
def test_pooled_vectors_are_float32_at_least(name, dtype, device):
    value = CASES[name].module(device=device)(*CASES[name].args(3, device=device, dtype=dtype))
    assert (value.dtype, value.shape) == (torch.promote_types(dtype, torch.float32), (3, 7))


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("rra")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_block_keeps_dtype_and_channels_last(name, dtype, device):
    module = CASES[name].module(device=device, dtype=dtype).to(memory_format=torch.channels_last)
    (x,) = CASES[name].args(device=device, dtype=dtype)
    y = module(x.to(memory_format=torch.channels_last))
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("lower", [torch.float16, torch.bfloat16])
def test_autocast_changes_no_bit(name, dtype, lower, device):
    module, args = CASES[name].module(device=device), CASES[name].args(device=device, dtype=dtype, grad=True)
    expected, expected_grads = listed(module(*args)), gradients(module, args)
    with torch.autocast(device.type, dtype=lower):
        ys = listed(module(*args))
    for y, e in zip(ys, expected, strict=True):
        assert_same_bits(y, e)
    grads = torch.autograd.grad(loss(ys), [*module.parameters(), *listed(args[0])])
    for grad, e in zip(grads, expected_grads, strict=True):
        assert_same_math(grad, e)


def test_every_parameter_gets_a_gradient(case, device):
    module = case.module(device=device)
    args = case.args(4, device=device, grad=True)
    names = [name for name, _ in module.named_parameters()] + [f"x{i}" for i in range(len(case.shapes))]
    for name, grad in zip(names, gradients(module, args), strict=True):
        assert grad.isfinite().all(), name
        assert grad.abs().max() > 1e-6, name


def test_gradients_are_exact(case, device):
    module, args = case.module(device=device, dtype=torch.float64), case.args(device=device, dtype=torch.float64)
    xs, rest, names = listed(args[0]), args[1:], [name for name, _ in module.named_parameters()]

    def outputs(*leaves):
        inputs = list(leaves[: len(xs)])
        parameters = dict(zip(names, leaves[len(xs) :], strict=True))
        return tuple(listed(functional_call(module, parameters, (inputs if len(xs) > 1 else inputs[0], *rest))))

    leaves = [leaf.detach().requires_grad_() for leaf in (*xs, *module.parameters())]
    assert gradcheck(outputs, leaves, fast_mode=True)


def test_copies_are_equal_and_independent(case, device):
    module, args = case.module(device=device), case.args(device=device)
    expected = listed(module(*args))

    def through_a_file(value, **options):
        buffer = io.BytesIO()
        torch.save(value, buffer)
        buffer.seek(0)
        return torch.load(buffer, **options)

    loaded = case.layer(device=device).eval()
    loaded.load_state_dict(through_a_file(module.state_dict(), weights_only=True))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert repr(twin) == repr(module)
        for (name, value), (other, e) in zip(twin.state_dict().items(), module.state_dict().items(), strict=True):
            assert name == other
            assert_same_bits(value, e)
        for y, e in zip(listed(twin(*args)), expected, strict=True):
            assert_same_math(y, e)
        perturb_(twin)
        assert any(not torch.equal(y, e) for y, e in zip(listed(twin(*args)), expected, strict=True))
    for y, e in zip(listed(module(*args)), expected, strict=True):
        assert_same_bits(y, e)


def test_layer_is_built_on_meta_and_started_later(case):
    """Built without memory, then given some: the way large models are started."""
    meta, args = case.layer(device="meta").eval(), case.args(device="meta")
    assert all(t.is_meta for t in meta.state_dict().values())
    shapes = [y.shape for y in listed(meta(*args))]
    assert [y.shape for y in listed(case.module()(*case.args()))] == shapes
    torch.manual_seed(1)
    moved = meta.to_empty(device="cpu")
    moved.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)
    for name, value in moved.state_dict().items():
        leaf = name.rpartition(".")[2]
        last = "expand" in name if any("expand" in key for key in moved.state_dict()) else "scale" in name
        if getattr(moved, "init", "paper") == "identity" and last:
            assert (value == 0).all(), name
        elif getattr(moved, "init", "paper") == "identity" and "alpha" in name:
            assert (value == 2).all(), name
        elif (
            "scale" in name
            or "alpha" in name
            or "spread" in name
            or leaf == "running_var"
            or name.endswith(("bn1.weight", "bn2.weight", "bn.weight"))
        ):
            assert (value == 1).all(), name
        elif leaf == "weight":
            fan_out, fan_in = value.shape[0], value.shape[1]
            area = value[0, 0].numel()
            assert 0 < value.abs().max() <= (6 / (area * (fan_in + fan_out))) ** 0.5, name
        else:  # biases, centers, running means
            assert (value == 0).all(), name


def test_layer_is_deterministic(case, device):
    module, args = case.module(device=device), case.args(device=device, grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = gradients(module, args), gradients(module, args)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layer_is_built_where_it_is_asked(case, dtype, device):
    assert {(p.dtype, p.device.type) for p in case.layer(device=device, dtype=dtype).parameters()} == {(dtype, device.type)}


def test_layer_leaves_its_input_alone(case, device):
    args = case.args(device=device)
    before = [x.clone() for x in listed(args[0])]
    case.module(device=device)(*args)
    for x, b in zip(listed(args[0]), before, strict=True):
        assert_same_bits(x, b)


def test_samples_do_not_meet(case, device):
    """In eval mode; a NaN stays in its sample, forward and backward."""
    module, args = case.module(device=device), case.args(3, device=device)
    expected = [y[1:] for y in listed(module(*args))]
    for x in listed(args[0]):
        x[0] = torch.nan
        x.requires_grad_()
    ys = listed(module(*args))
    assert any(y[0].isnan().any() for y in ys)
    for y, e in zip(ys, expected, strict=True):
        assert_same_math(y[1:], e)
    for grad in torch.autograd.grad(loss([y[1:] for y in ys]), listed(args[0])):
        assert grad[1:].isfinite().all()
