"""MIFA, MGIFA and MLIFA (Fig. 3)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drifa_attn import MGIFA, MIFA, MLIFA, functional, ops
from drifa_attn.layout import positions
from tests import reference, strategies
from tests._compare import assert_same_bits, assert_same_math
from tests.cases import gradients, loss, perturb_, weights

WIDTHS = st.sampled_from([{}, {"reduction": 1}, {"reduction": 4}, {"dim": 1}, {"dim": 5}])


def built(channels, modalities=None, *, seed=0, start=False, **options):
    torch.manual_seed(seed)
    module = MIFA(channels, modalities, **options)
    if start:
        return module
    perturb_(module)
    with torch.no_grad():  # the sums of four modalities at width 64 saturate a gate, which would hide mistakes
        module.global_scale.mul_(0.1)
        module.local_scale.mul_(0.1)
    return module


def shapes(module):
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def linear(name, out, into):
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def paper_shapes(channels, d):
    keys = {**linear("mgifa.dense", d, d), "global_scale": (1,), "local_scale": (d,)}
    for i, c in enumerate(channels):
        keys.update({**linear(f"mlifa.convs.{i}", d, d), f"alphas.{i}": (c,)})
    return keys


def wide_shapes(channels, d):
    keys = paper_shapes(channels, d)
    for i, c in enumerate(channels):
        keys.update({**linear(f"squeezes.{i}", d, c), **linear(f"expands.{i}", c, d)})
    return keys


@pytest.mark.parametrize(("c", "m"), [(1, 1), (8, 2), (33, 2), (8, 4)])
def test_mifa_state_is_the_papers(c, m):
    assert shapes(MIFA(c, m)) == shapes(MIFA([c] * m)) == paper_shapes([c] * m, c)
    assert sum(p.numel() for p in MIFA(c, m).parameters()) == (m + 1) * (c * c + c) + (m + 1) * c + 1
    buffers = dict.fromkeys(functional.Statistics._fields, (c,))
    assert shapes(MIFA(c, m, init="identity")) == {**paper_shapes([c] * m, c), **buffers}
    assert shapes(MGIFA(c)) == linear("dense", c, c)
    assert shapes(MLIFA(c, m)) == {key: s for i in range(m) for key, s in linear(f"convs.{i}", c, c).items()}


def test_mifa_of_two_is_the_default():
    assert (MIFA(8).modalities, MLIFA(8).modalities, MIFA((8, 8, 8)).modalities) == (2, 2, 3)


@pytest.mark.parametrize(
    ("channels", "options", "d"),
    [
        ((3, 17), {}, 17),
        ((64, 32), {"reduction": 4}, 16),
        ((64, 32), {"reduction": 16}, 8),
        ((64, 32), {"dim": 5}, 5),
        ((8, 8), {"dim": 8}, 8),
        ((64, 64), {"reduction": 2}, 32),
    ],
)
def test_width_is_the_one_asked_for(channels, options, d):
    assert shapes(MIFA(channels, **options)) == wide_shapes(channels, d)


@given(strategies.modalities(), WIDTHS, strategies.INITS, strategies.SEEDS, strategies.DTYPES)
def test_mifa_is_the_equations(drawn, width, init, seed, dtype):
    """Any number, layouts, channels, widths and absences; prefix tokens and absent modalities pass unchanged."""
    xs, present = [one.x.to(dtype) for one in drawn.each], drawn.present
    mifa = built([one.channels for one in drawn.each], init=init, seed=seed, dtype=dtype, **width, **drawn.options)
    arrays = [one.positions(x).double().numpy() for one, x in zip(drawn.each, xs, strict=True)]
    mask, w = None if present is None else present.numpy(), weights(mifa)
    for gate, expected in zip(mifa.gates(xs, present), reference.mifa_gates(w, arrays, mask), strict=True):
        assert_same_math(gate, expected)
    ys = mifa(xs, present)
    assert isinstance(ys, list)
    for i, (one, x, y, expected) in enumerate(zip(drawn.each, xs, ys, reference.mifa(w, arrays, mask), strict=True)):
        assert_same_math(one.positions(y), expected)
        if one.num_prefix_tokens:
            assert_same_bits(y[:, : one.num_prefix_tokens], x[:, : one.num_prefix_tokens])
        if present is not None:
            assert_same_bits(y[~present[:, i]], x[~present[:, i]])


@given(strategies.modalities(equal=True), strategies.SEEDS)
def test_module_is_functional(drawn, seed):
    mifa = built(drawn.each[0].channels, len(drawn.each), seed=seed, dtype=torch.float64, **drawn.options)
    gates = functional.mifa(
        [positions(one.x, one.layout, one.num_prefix_tokens) for one in drawn.each],
        (mifa.mgifa.dense.weight, mifa.mgifa.dense.bias),
        mifa.mlifa.weights(),
        mifa.global_scale,
        mifa.local_scale,
        present=drawn.present,
    )
    with ops.use("reference"):
        own = mifa.gates(drawn.xs, drawn.present)
    for gate, expected in zip(own, gates, strict=True):
        assert_same_math(gate, expected)


@given(strategies.modalities(), strategies.SEEDS)
def test_layouts_agree(drawn, seed):
    """The same positions, all channels first against each in its own layout."""
    channels = [one.channels for one in drawn.each]
    mixed, first = (built(channels, seed=seed, dtype=torch.float64, **options) for options in (drawn.options, {}))
    ys, expected = mixed(drawn.xs, drawn.present), first([one.positions() for one in drawn.each], drawn.present)
    for one, y, e in zip(drawn.each, ys, expected, strict=True):
        assert_same_math(one.positions(y), e)


@given(strategies.modalities(at_least=2, layouts=["b c ..."]), WIDTHS, strategies.SEEDS, st.randoms(use_true_random=False))
def test_modalities_have_no_order(drawn, width, seed, random):
    """Modalities permuted with their weights give the outputs permuted."""
    order = random.sample(range(len(drawn.xs)), len(drawn.xs))
    channels = [one.channels for one in drawn.each]
    mifa = built(channels, seed=seed, init="identity", dtype=torch.float64, **width)
    moved = MIFA([channels[i] for i in order], init="identity", dtype=torch.float64, **width)
    place = {str(i): str(new) for new, i in enumerate(order)}
    moved.load_state_dict({".".join(place.get(part, part) for part in k.split(".")): v for k, v in mifa.state_dict().items()})
    present = None if drawn.present is None else drawn.present[:, order]
    expected = mifa(drawn.xs, drawn.present)
    for y, i in zip(moved([drawn.xs[i] for i in order], present), order, strict=True):
        assert_same_math(y, expected[i])


@given(strategies.modalities(layouts=["b c ..."]), strategies.SEEDS)
def test_positions_have_no_order(drawn, seed):
    mifa = built([one.channels for one in drawn.each], seed=seed, dtype=torch.float64)
    xs = [x if x.ndim > 2 else x[..., None] for x in drawn.xs]
    orders = [torch.randperm(x.shape[-1], generator=torch.Generator().manual_seed(seed)) for x in xs]
    shuffled = mifa([x[..., order] for x, order in zip(xs, orders, strict=True)], drawn.present)
    for y, expected, order in zip(shuffled, mifa(xs, drawn.present), orders, strict=True):
        assert_same_math(y, expected[..., order])


@given(strategies.modalities(), strategies.SEEDS, st.randoms(use_true_random=False))
def test_samples_have_no_order_and_do_not_meet(drawn, seed, random):
    mifa = built([one.channels for one in drawn.each], seed=seed, dtype=torch.float64, **drawn.options)
    xs, present, batch = drawn.xs, drawn.present, len(drawn.xs[0])
    for samples in (random.sample(range(batch), batch), [batch - 1]):
        some = None if present is None else present[samples]
        for y, expected in zip(mifa([x[samples] for x in xs], some), mifa(xs, present), strict=True):
            assert_same_math(y, expected[samples])


@given(strategies.modalities(), WIDTHS, strategies.SEEDS)
def test_identity_start_changes_no_bit(drawn, width, seed):
    channels = [one.channels for one in drawn.each]
    mifa = built(channels, init="identity", seed=seed, start=True, **width, **drawn.options)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        xs = [x.to(dtype) for x in drawn.xs]
        for x, y in zip(xs, mifa(xs, drawn.present), strict=True):
            assert_same_bits(y, x)


@given(strategies.modalities(layouts=["b c ..."], at_least=2), strategies.SEEDS, st.data())
def test_absent_is_left_out(drawn, seed, data):
    """The other outputs equal those of a MIFA built without the modality, of the same weights."""
    gone = data.draw(st.integers(0, len(drawn.xs) - 1))
    channels = [one.channels for one in drawn.each]
    whole = built(channels, seed=seed, dim=8, init="identity", dtype=torch.float64)
    kept = [i for i in range(len(channels)) if i != gone]
    part = MIFA([channels[i] for i in kept], dim=8, init="identity", dtype=torch.float64)
    place = {str(i): str(new) for new, i in enumerate(kept)}
    state = {k: v for k, v in whole.state_dict().items() if str(gone) not in k.split(".")}
    part.load_state_dict({".".join(place.get(name, name) for name in k.split(".")): v for k, v in state.items()})
    present = torch.ones(len(drawn.xs[0]), len(drawn.xs), dtype=torch.bool)
    present[:, gone] = False
    ys = whole(drawn.xs, present)
    for y, i in zip(part([drawn.xs[i] for i in kept]), kept, strict=True):
        assert_same_math(ys[i], y)
    assert_same_bits(ys[gone], drawn.xs[gone])


def test_all_present_is_no_mask(device):
    mifa, xs = built(8, 3).to(device), [torch.randn(2, 8, n, device=device) for n in (5, 3, 1)]
    for y, expected in zip(mifa(xs, torch.ones(2, 3, dtype=torch.bool, device=device)), mifa(xs), strict=True):
        assert_same_math(y, expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
@pytest.mark.parametrize(
    "options", [{"channels": 8}, {"channels": (8, 3)}, {"channels": 8, "init": "identity", "reduction": 1}]
)
def test_what_an_absent_modality_holds_reaches_nothing(value, options, device):
    mifa = built(modalities=2, **options).to(device)
    shapes = [(3, c, n) for c, n in zip(mifa.channels, (5, 4), strict=True)]
    present = torch.tensor([[True, False], [False, True], [False, False]], device=device)

    def run(filling):
        torch.manual_seed(1)
        xs = [torch.randn(shape).to(device) for shape in shapes]
        xs = [torch.where(present[:, i, None, None], x, filling).requires_grad_() for i, x in enumerate(xs)]
        return xs, mifa(xs, present), gradients(mifa, (xs, present))

    xs, ys, grads = run(value)
    _, expected_ys, expected_grads = run(0.0)
    for i, (x, y, expected) in enumerate(zip(xs, ys, expected_ys, strict=True)):
        assert_same_bits(y[~present[:, i]], x[~present[:, i]])
        assert_same_math(y[present[:, i]], expected[present[:, i]])
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert_same_math(grad, expected)


def test_no_modality_at_all_leaves_no_gradient_none(device):
    """Data-parallel training waits for every parameter in every step."""
    for options in ({}, {"init": "identity"}, {"dim": 5}):
        mifa = built(8, **options).to(device)
        xs = [torch.randn(2, 8, n, device=device, requires_grad=True) for n in (5, 3)]
        ys = mifa(xs, torch.zeros(2, 2, dtype=torch.bool, device=device))
        loss(ys).backward()
        for x, y in zip(xs, ys, strict=True):
            assert_same_bits(y, x)
        assert all(p.grad is not None and p.grad.abs().max() == 0 for p in mifa.parameters())


def test_local_convolutions_are_not_shared(device):
    mifa, xs = built(8).to(device), [torch.randn(2, 8, 5, device=device)] * 2
    before = mifa.gates(xs)[0]
    torch.nn.init.zeros_(mifa.mlifa.convs[1].weight)
    assert (mifa.gates(xs)[0] - before).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"reduction": 1}])
def test_large_half_precision_maps_stay_finite(dtype, options, device):
    """Two modalities of 60000 add up beyond float16; a constant map has the gate of one position."""
    mifa = built(3, 2, **options).to(device)
    for alpha in mifa.alphas:
        torch.nn.init.ones_(alpha)  # the true output is in range
    x = torch.full((1, 3, 1024, 1024), 60000.0, dtype=dtype, device=device, requires_grad=True)
    gate, one = mifa.gates([x, x])[0], mifa.gates([x[..., :1, :1].float()] * 2)[0]
    assert_same_math(gate, one, rel=1e-5 if dtype == torch.float16 else 2e-2)
    with torch.autocast(device.type, dtype=dtype):
        ys = mifa([x, x])
    for y, expected in zip(ys, mifa([x, x]), strict=True):
        assert_same_bits(y, expected)
        assert y.isfinite().all()
    grads = torch.autograd.grad(ys[0].float().mean() + ys[1].float().mean(), [x, *mifa.parameters()])
    assert all(grad.isfinite().all() for grad in grads)


def test_one_modality_is_enough(device):
    x = torch.randn(2, 8, 5, device=device)
    for mifa in (built(8, 1), built([8])):
        (y,) = mifa.to(device)([x])
        assert_same_math(y, reference.mifa(weights(mifa), [x.double().cpu().numpy()])[0])


def test_tuples_are_lists_too(device):
    mifa, xs = built(8).to(device), [torch.randn(2, 8, 5, device=device)] * 2
    for y, expected in zip(mifa(tuple(xs)), mifa(xs), strict=True):
        assert_same_bits(y, expected)


def test_dtypes_may_differ_between_modalities(device):
    mifa = built(8, init="identity").to(device)
    xs = [torch.randn(2, 8, 5).to(device, dtype) for dtype in (torch.float16, torch.float32)]
    for x, y in zip(xs, mifa(xs), strict=True):
        assert y.dtype == x.dtype
        assert y.isfinite().all()


def test_repr_names_the_options():
    assert MIFA(8).extra_repr() == '8, modalities=2, dim=8, init="paper"'
    assert MIFA((8, 3), init="identity").extra_repr() == '(8, 3), modalities=2, dim=8, init="identity"'
    assert (MGIFA(8).extra_repr(), MLIFA(8, 3).extra_repr()) == ("8", "8, modalities=3")


@pytest.mark.parametrize(
    ("channels", "options", "message"),
    [
        (0, {}, "MIFA expected channels to be an integer >= 1, got 0"),
        ((8, -1), {}, "got -1"),
        ((), {}, "MIFA expected modalities to be an integer >= 1, got 0"),
        (8, {"modalities": 0}, "got 0"),
        (8, {"modalities": 1.5}, r"got 1\.5"),
        ((8, 8), {"modalities": 3}, r"channels once or once per modality \(3\), got 2: \(8, 8\)"),
        (8, {"layout": ["b c ..."]}, r"layout once or once per modality \(2\), got 1"),
        (8, {"num_prefix_tokens": [0, 0, 0]}, "num_prefix_tokens once or once per modality"),
        (8, {"layout": ("b c ...", "nhwc")}, "got 'nhwc'"),
        (8, {"num_prefix_tokens": (0, 1)}, 'got num_prefix_tokens=1 with layout "b c'),
        (8, {"dim": 4, "reduction": 2}, r"dim or reduction, got both \(dim=4, reduction=2\)"),
        (8, {"dim": 0}, "dim to be an integer >= 1, got 0"),
        (8, {"reduction": -2}, "reduction to be an integer >= 1, got -2"),
        (8, {"init": None}, "got None"),
    ],
)
def test_options_are_checked(channels, options, message):
    with pytest.raises(ValueError, match=message):
        MIFA(channels, **options)


X, M = torch.zeros(2, 8, 5), torch.ones(2, 2, dtype=torch.bool)


@pytest.mark.parametrize("layer", [MGIFA, MLIFA, MIFA])
@pytest.mark.parametrize(
    ("args", "kind", "message"),
    [
        ((X,), TypeError, "expected a list of .* tensors, one per modality, got Tensor"),
        (({"a": X, "b": X},), TypeError, "got dict"),
        (([X, None],), TypeError, "expected a tensor, got NoneType"),
        (([X, X.long()],), TypeError, r"got torch\.int64"),
        (([X, X[:1]],), ValueError, r"one batch size for all modalities, got \[2, 1\]"),
        (([X, X[:, :7]],), ValueError, r"with c=8, got \(2, 7, 5\)"),
        (([X, X], M.float()), TypeError, r"present to be a boolean tensor \(b m\), got torch\.float32"),
        (([X, X], [True, True]), TypeError, "got list"),
        (([X, X], M.T[:1]), ValueError, r"present of shape \(b, m\) = \(2, 2\), got \(1, 2\)"),
        (([X, X], M.to("meta")), ValueError, "present on cpu, where the features are, got meta"),
    ],
)
def test_input_is_checked(layer, args, kind, message):
    with pytest.raises(kind, match=f"{layer.__name__} .*{message}"):
        layer(8)(*args)


@pytest.mark.parametrize("layer", [MLIFA, MIFA])
def test_number_of_modalities_is_checked(layer):
    with pytest.raises(ValueError, match=f"{layer.__name__} expected 2 modalities, got 3: name absent ones in `present`"):
        layer(8)([X, X, X])


def test_global_attention_needs_a_modality():
    with pytest.raises(ValueError, match="MGIFA expected"):
        MGIFA(8)([])
