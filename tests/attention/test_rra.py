"""RRA (Fig. 1C)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drifa_attn import MFA, RRA
from drifa_attn.attention.rra import pad_same
from tests import reference, strategies
from tests._compare import assert_same_bits, assert_same_math
from tests.cases import perturb_, weights

PADDINGS = ["symmetric", "same"]


def built(*args, seed=0, **options):
    torch.manual_seed(seed)
    return perturb_(RRA(*args, **options))


def linear(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def norm(name, c):
    running = {f"{name}.running_mean": (c,), f"{name}.running_var": (c,), f"{name}.num_batches_tracked": ()}
    return {**linear(name, c), **running}


@pytest.mark.parametrize(("cin", "cout", "stride"), [(8, 8, 1), (8, 16, 1), (8, 8, 2), (16, 8, 2), (1, 1, 1)])
def test_rra_state_is_the_papers(cin, cout, stride):
    keys = {**linear("conv1", cout, cin, 3, 3), **linear("conv2", cout, cout, 3, 3), **norm("bn1", cout), **norm("bn2", cout)}
    for name in ("mfa1", "mfa2"):
        keys.update({f"{name}.{key}": tuple(value.shape) for key, value in MFA(cout).state_dict().items()})
    if stride != 1 or cin != cout:
        keys.update({**linear("proj.conv", cout, cin, 1, 1), **norm("proj.bn", cout)})
    assert {name: tuple(value.shape) for name, value in RRA(cin, cout, stride).state_dict().items()} == keys


def test_defaults_are_the_released_ones():
    for module in (module for module in RRA(4, 8, 2).modules() if isinstance(module, torch.nn.BatchNorm2d)):
        assert (module.eps, module.momentum) == (1e-3, 0.01)
    block = RRA(4, 8, eps=1e-5, momentum=0.1, reduction=2, init="identity")
    assert {(block.bn1.eps, block.bn1.momentum), (block.bn2.eps, block.bn2.momentum)} == {(1e-5, 0.1)}
    assert (block.mfa1.reduction, block.mfa2.init, block.proj.bn.eps) == (2, "identity", 1e-5)


@given(
    sizes=st.tuples(st.sampled_from([1, 2, 7]), st.sampled_from([1, 2, 7, 8]), st.integers(1, 9), st.integers(1, 9)),
    stride=st.integers(1, 3),
    padding=st.sampled_from(PADDINGS),
    options=st.fixed_dictionaries({"reduction": st.sampled_from([None, 2]), "init": strategies.INITS}),
    training=st.booleans(),
    seed=strategies.SEEDS,
    dtype=strategies.DTYPES,
)
def test_rra_is_the_equations(sizes, stride, padding, options, training, seed, dtype):
    cin, cout, h, w = sizes
    block = built(cin, cout, stride, padding=padding, seed=seed, dtype=torch.float64, **options).train(training)
    x = torch.randn(3, cin, h, w, dtype=torch.float64)
    expected, after = reference.rra(weights(block), x.numpy(), stride, padding, training=training)
    block.to(dtype)
    # In training a batch norm divides by a deviation that may be small: it magnifies what float32 has rounded before.
    rel = 1e-4 if training and dtype == torch.float32 else None
    assert_same_math(block(x.to(dtype)), expected, rel)
    buffers = dict(block.named_buffers())
    for name, value in after.items():
        assert_same_math(buffers[name], value, rel, name)
    assert {int(value) for name, value in buffers.items() if name.endswith("num_batches_tracked")} == {int(training)}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("size", [(9, 9), (8, 8), (7, 4), (1, 1), (2, 1)])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_output_size_is_rounded_up(padding, size, stride, device):
    block, x = built(3, 8, stride, padding=padding).eval().to(device), torch.randn(2, 3, *size)
    y = block(x.to(device))
    assert y.shape == (2, 8, *(-(-n // stride) for n in size))
    assert_same_math(y, reference.rra(weights(block), x.double().numpy(), stride, padding)[0])


@pytest.mark.parametrize(
    ("size", "stride", "agree"), [((9, 7), 2, True), ((8, 8), 1, True), ((8, 8), 2, False), ((9, 8), 2, False)]
)
def test_paddings_agree_where_they_should(size, stride, agree, device):
    x = torch.randn(2, 3, *size).to(device)
    symmetric, same = (built(3, 8, stride, padding=padding).eval().to(device)(x) for padding in PADDINGS)
    assert torch.allclose(symmetric, same, rtol=1e-5, atol=1e-6) == agree


def test_odd_row_and_column_are_padded_at_the_end():
    x = torch.ones(1, 1, 4, 5)
    padded = pad_same(x, 3, 2)
    assert padded.shape == (1, 1, 5, 7)
    assert_same_bits(padded[:, :, :4, 1:6], x)
    assert padded.sum() == x.sum()
    assert_same_bits(pad_same(torch.ones(1, 1, 3, 3), 1, 2), torch.ones(1, 1, 3, 3))


def test_projection_is_there_where_shapes_need_it():
    assert RRA(8, 8).proj is None
    assert all(RRA(*args).proj is not None for args in ((8, 8, 2), (8, 16), (16, 8)))


def test_identity_mfa_leaves_a_plain_residual_block(device):
    block, x = RRA(8, 8, init="identity").eval().to(device), torch.randn(2, 8, 5, 5, device=device)
    z = torch.relu(block.bn1(block.conv1(x)))
    assert_same_math(block(x), torch.relu(block.bn2(block.conv2(z)) + x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_trains(dtype, device):
    block, x = built(3, 8, 2).train().to(device), torch.randn(4, 3, 9, 9, device=device)
    with torch.autocast(device.type, dtype=dtype):
        y = block(x)
    assert_same_math(y.float(), built(3, 8, 2).train().to(device)(x), rel=4e-2)  # the convolutions run in half precision
    y.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((0, 8), {}, "RRA expected in_channels to be an integer >= 1, got 0"),
        ((8, -1), {}, "RRA expected out_channels to be an integer >= 1, got -1"),
        ((8, 8, 0), {}, "RRA expected stride to be an integer >= 1, got 0"),
        ((8, 8), {"padding": "valid"}, 'RRA expected padding "symmetric" or "same", got \'valid\''),
        ((8, 8), {"eps": 0.0}, r"RRA expected eps > 0, got 0\.0"),
        ((8, 8), {"eps": float("nan")}, "got nan"),
        ((8, 8), {"reduction": 0}, "reduction to be an integer >= 1, got 0"),
        ((8, 8), {"init": "zero"}, "got 'zero'"),
    ],
)
def test_options_are_checked(args, options, message):
    with pytest.raises(ValueError, match=message):
        RRA(*args, **options)


@pytest.mark.parametrize(
    ("x", "kind", "message"),
    [
        (torch.zeros(2, 7, 5, 5), ValueError, r"RRA expected x .*c=8, got \(2, 7, 5, 5\)"),
        (torch.zeros(2, 8, 5), ValueError, r'RRA expected x "b c h w" with c=8, got \(2, 8, 5\)'),
        (torch.zeros(2, 8, 0, 5), ValueError, r"at least one position, got \(2, 8, 0, 5\)"),
        (torch.zeros(2, 8, 5, 5, dtype=torch.int32), TypeError, r"got torch\.int32"),
    ],
)
def test_input_is_checked(x, kind, message):
    with pytest.raises(kind, match=message):
        RRA(8, 8)(x)


def test_repr_names_the_options():
    assert RRA(3, 8, 2, padding="same").extra_repr() == '3, 8, stride=2, padding="same"'
