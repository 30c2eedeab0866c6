"""The fused operators against the reference equations: values, gradients, memory, and how PyTorch sees them."""

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from drifa_attn import MFA, MIFA, functional, ops
from drifa_attn.layout import positions, scale
from drifa_attn.ops import chunked, operators
from tests import strategies
from tests._compare import assert_no_worse, assert_same_bits, assert_same_math
from tests.cases import CASES, gradients, listed, loss, perturb_

LAYERS = ["mfa", "mfa-reduced-identity", "mfa-tokens", "mifa", "mifa-three-masked"]
EVERY = pytest.mark.parametrize("name", LAYERS)


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks even of tiny maps, parts of one sample among them."""
    monkeypatch.setattr(chunked, "CHUNK", 32)


def cast(module, args, dtype):
    xs = [x.detach().to(dtype).requires_grad_() for x in listed(args[0])]
    first = xs if isinstance(args[0], list) else xs[0]
    return module.to(dtype), (first, *args[1:])


def both(case, mode, dtype, seed=0):
    """Outputs and gradients of a layer in one mode and dtype, from one seed."""
    torch.manual_seed(seed)
    module, args = cast(case.module(), case.args(3, grad=True), dtype)
    with ops.use(mode):
        return listed(module(*args)), gradients(module, args)


@EVERY
def test_fused_is_no_worse_than_the_reference(name, small_chunks):
    """Against float64: at most twice the error of the reference equations forward, three times backward."""
    case = CASES[name]
    exact = both(case, "reference", torch.float64)
    fused, reference = (both(case, mode, torch.float32) for mode in ("fused", "reference"))
    for factor, *values in zip((2, 3), fused, reference, exact, strict=True):
        for actual, plain, expected in zip(*values, strict=True):
            assert_no_worse(actual, plain, expected, factor)


@EVERY
def test_fused_gradients_are_exact(name, small_chunks):
    case = CASES[name]
    torch.manual_seed(0)
    module, args = cast(case.module(), case.args(3, grad=True), torch.float64)
    with ops.use("fused"):
        xs = listed(args[0])

        def outputs(*xs):
            return tuple(listed(module(list(xs) if len(xs) > 1 else xs[0], *args[1:])))

        assert gradcheck(outputs, xs, fast_mode=True)
    for a, e in zip(both(case, "fused", torch.float64)[1], both(case, "reference", torch.float64)[1], strict=True):
        assert_same_math(a, e)


@given(strategies.features(), st.sampled_from([None, 3]), strategies.SEEDS, strategies.DTYPES, st.sampled_from([16, 2**20]))
def test_fused_mfa_takes_any_features(features, reduction, seed, dtype, chunk):
    x = features.x.to(dtype).requires_grad_()
    torch.manual_seed(seed)
    mfa = perturb_(MFA(features.channels, reduction=reduction, dtype=dtype, **features.options))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "CHUNK", chunk)
        with ops.use("fused"):
            y = mfa(x)
            grads = torch.autograd.grad(loss(y), [x, *mfa.parameters()])
    with ops.use("reference"):
        expected = mfa(x)
        expected_grads = torch.autograd.grad(loss(expected), [x, *mfa.parameters()])
    assert_same_math(y, expected)
    for grad, e in zip(grads, expected_grads, strict=True):
        assert_same_math(grad, e, rel=1e-9 if dtype == torch.float64 else 1e-3)


@given(strategies.modalities(), strategies.SEEDS)
def test_fused_mifa_takes_any_modalities(drawn, seed):
    torch.manual_seed(seed)
    mifa = perturb_(MIFA([one.channels for one in drawn.each], dtype=torch.float64, **drawn.options))
    xs = [x.clone().requires_grad_() for x in drawn.xs]
    results = []
    for mode in ("fused", "reference"):
        with ops.use(mode):
            ys = mifa(xs, drawn.present)
            results.append([*ys, *torch.autograd.grad(loss(ys), [*xs, *mifa.parameters()], allow_unused=True)])
    for a, e in zip(*results, strict=True):
        if e is None or e.abs().max() < 1e-12:
            assert a is None or a.abs().max() < 1e-10
        else:
            assert_same_math(a, e, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_worse_than_the_reference(dtype):
    x = torch.randn(3, 16, 200).to(dtype)
    mfa = perturb_(MFA(16))
    with ops.use("reference"):
        exact, plain = mfa.gates(x.double()), mfa.gates(x)
    with ops.use("fused"):
        gate = mfa.gates(x)
        assert gate.dtype == torch.float32
        assert_no_worse(gate, plain, exact, 2)
        with torch.autocast("cpu", torch.bfloat16):
            assert_same_bits(mfa.gates(x), gate)


@EVERY
def test_autocast_changes_no_bit(name):
    module, args = CASES[name].module(), CASES[name].args()
    with ops.use("fused"):
        expected = listed(module(*args))
        with torch.autocast("cpu", torch.bfloat16):
            for y, e in zip(listed(module(*args)), expected, strict=True):
                assert_same_bits(y, e)


def kept_bytes(mode, layer, *args):
    """Bytes that autograd keeps for backward, without inputs and weights; memory that is kept twice counts once."""
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *(x for a in args for x in listed(a)))}
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with ops.use(mode), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ys = listed(layer(*args))
    return sum(size for at, size in kept.items() if at not in own), ys


@pytest.mark.parametrize("modalities", [1, 2])
def test_a_tenth_is_kept_for_backward(modalities):
    xs = [torch.randn(2, 16, 40, 40, requires_grad=True) for _ in range(modalities)]
    layer, args = (MFA(16), xs[0]) if modalities == 1 else (MIFA(16), xs)
    fused, reference = (kept_bytes(mode, layer, args)[0] for mode in ("fused", "reference"))
    assert 0 < fused < reference / 10, (fused, reference)


@EVERY
def test_fused_is_deterministic(name, small_chunks):
    module, args = CASES[name].module(), CASES[name].args(3, grad=True)
    with ops.use("fused"):
        first, second = ([*listed(module(*args)), *gradients(module, args)] for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)


def test_nan_stays_in_its_sample(small_chunks):
    mfa, x = perturb_(MFA(8)), torch.randn(3, 8, 30)
    with ops.use("fused"):
        expected = mfa(x)
        x[1, 3, 7] = torch.nan
        x.requires_grad_()
        y = mfa(x)
        (grad,) = torch.autograd.grad(y[::2].square().sum(), x)
    assert y[1].isnan().all()
    assert_same_math(y[::2], expected[::2])
    assert grad[::2].isfinite().all()


def test_absent_is_left_out(small_chunks):
    """The values of an absent modality reach no output and no gradient."""
    mifa, xs = perturb_(MIFA(8)), [torch.randn(2, 8, 30) for _ in range(2)]
    present = torch.tensor([[True, False], [True, True]])
    xs[1][0] = torch.nan
    xs = [x.requires_grad_() for x in xs]
    alone = perturb_(MIFA(8, 1))
    alone.load_state_dict({k: v for k, v in mifa.state_dict().items() if k in alone.state_dict()})
    with ops.use("fused"):
        ys = mifa(xs, present)
        assert_same_math(ys[0][:1], alone([xs[0][:1]])[0])
        grads = torch.autograd.grad(ys[0].sum() + ys[1][1].sum(), [*xs, *mifa.parameters()], allow_unused=True)
    assert all(grad.isfinite().all() for grad in grads if grad is not None)
    assert not grads[1][0].any()


def test_identity_start_changes_no_bit():
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        for shape, options in (((2, 8, 5, 6), {}), ((2, 7, 8), {"layout": "b ... c", "num_prefix_tokens": 2})):
            x = torch.randn(shape).to(dtype)
            with ops.use("fused"):
                assert_same_bits(MFA(8, init="identity", reduction=2, **options)(x), x)


@given(strategies.features(dtype=torch.float32), strategies.SEEDS, st.sampled_from([torch.float32, torch.bfloat16]))
def test_gate_is_the_product(features, seed, dtype):
    x = features.x.to(dtype).requires_grad_()
    factor = torch.rand(x.shape[0], features.channels, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    with ops.use("fused"):
        y = ops.gate(x, factor, features.layout, features.num_prefix_tokens)
    expected = scale(x, factor, features.layout, features.num_prefix_tokens)
    assert_same_bits(y, expected)
    dy = torch.ones_like(expected)
    for grad, e in zip(*(torch.autograd.grad(out, [x, factor], dy) for out in (y, expected)), strict=True):
        assert_same_math(grad, e, rel=2e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize("squeezed", [False, True])
def test_ops_pass_opcheck(squeezed):
    def leaf(*shape):
        return torch.randn(shape, requires_grad=True)

    d, c = (8, 12) if squeezed else (8, 8)
    squeeze = (leaf(d, c), leaf(d)) if squeezed else (None, None)
    x = leaf(2, c, 9)
    weights, biases = [leaf(d, d) for _ in range(5)], [leaf(d) for _ in range(5)]
    torch.library.opcheck(operators.mfa_stats_op, (x, weights, biases, *squeeze, True))
    head = [leaf(d, 2 * d), leaf(d), leaf(d, d), leaf(d), leaf(1), leaf(d)]
    measured = [torch.randn(d), torch.rand(d) + 1] * 2 if squeezed else []
    tail = head, measured, [leaf(c, d), leaf(c)] if squeezed else [], leaf(c) if squeezed else None
    torch.library.opcheck(operators.mfa_gain_op, (x, weights, biases, *squeeze, *tail, True))
    present = torch.tensor([True, False])
    torch.library.opcheck(operators.mifa_stats_op, (x, leaf(d, d), leaf(d), *squeeze, present, True))
    torch.library.opcheck(operators.gate_op, (x, torch.rand(2, c, requires_grad=True), "b c ...", 0))


def assert_compiles(module, args, backend):
    """One graph, without a break, that gives the outputs and gradients of the module itself."""
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    leaves = [*module.parameters(), *listed(args[0])]
    ys = listed(compiled(*args))
    for y, e in zip(ys, listed(module(*args)), strict=True):
        assert_same_math(y, e)
    for grad, e in zip(torch.autograd.grad(loss(ys), leaves), gradients(module, args), strict=True):
        assert_same_math(grad, e, rel=1e-4)


@EVERY
def test_fused_compiles_whole(name):
    with ops.use("fused"):
        assert_compiles(CASES[name].module(), CASES[name].args(3, grad=True), "aot_eager")


def test_auto_compiles_whole():
    """At sizes that are fused without a compiler, and at others."""
    mfa = perturb_(MFA(16))
    for size, path in ((40, "chunked"), (4, "reference")):
        x = torch.randn(8, 16, size, size, requires_grad=True)
        assert ops.explain(mfa, x).path == path
        assert_compiles(mfa, (x,), "aot_eager")


@pytest.mark.slow  # most of the time is the C++ compiler's
@pytest.mark.parametrize("mode", ["fused", "auto"])
def test_fused_compiles_whole_with_inductor(mode):
    mfa, mifa = perturb_(MFA(16, reduction=2)), perturb_(MIFA(16))
    xs = [torch.randn(8, 16, size, size, requires_grad=True) for size in (40, 36)]
    with ops.use(mode):
        assert_compiles(mfa, (xs[0],), "inductor")
        assert_compiles(mifa, (xs,), "inductor")


@pytest.mark.parametrize("mode", ["fused", "auto"])
def test_compiled_graphs_hold_the_ops_at_any_size(mode):
    graphs = []

    def keep(graph, example):
        graphs.append(graph)
        return graph

    with ops.use(mode):
        torch.compile(MFA(8), fullgraph=True, backend=keep)(torch.randn(2, 8, 30))
    names = {str(node.target) for node in graphs[0].graph.nodes}
    assert {"drifa_attn.mfa_gain.default", "drifa_attn.gate.default"} <= names, names


def test_exported_graphs_need_no_library_unless_asked():
    mfa, x = MFA(16).eval(), torch.randn(2, 16, 80, 80)
    assert ops.explain(mfa, x).path == "chunked"

    def names():
        return [str(node.target) for node in torch.export.export(mfa, (x,), strict=False).graph.nodes]

    assert not any("drifa_attn" in name for name in names())
    with ops.use("fused"):
        assert any("drifa_attn.mfa_gain" in name for name in names())


def test_second_derivatives_are_refused():
    mfa, x = MFA(8), torch.randn(2, 8, 30, requires_grad=True)
    with ops.use("fused"):
        (grad,) = torch.autograd.grad(mfa(x).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="DRIFA_BACKEND=reference"):
            grad.sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch.func.jvp's own
def test_transforms_take_the_reference_equations():
    mfa, x = MFA(16), torch.randn(3, 2, 16, 3000)
    assert_same_math(torch.func.vmap(mfa)(x), torch.stack([mfa(one) for one in x]))
    tangent = torch.func.jvp(mfa, (x[0],), (torch.ones_like(x[0]),))[1]
    assert tangent.isfinite().all()


@pytest.mark.parametrize(
    ("x", "path", "reason"),
    [
        (torch.zeros(8, 16, 64, 64), "chunked", "on cpu the fused operators are the chunked ones"),
        (torch.zeros(8, 16, 1, 1), "reference", "one position"),
        (torch.zeros(1, 16, 8, 8), "reference", "1024 elements is small"),
        (torch.zeros(8, 16, 64, 64, device="meta"), "reference", "meta"),
    ],
)
def test_explain_names_path_and_reason(x, path, reason):
    mfa = MFA(16, device=x.device)
    choice = ops.explain(mfa, x)
    assert (choice.path, reason in choice.reason) == (path, True), choice
    assert str(choice) == f"{path}: {choice.reason}"
    with ops.use("reference"):
        assert ops.explain(mfa, x) == ("reference", "the mode is reference")
    with ops.use("fused"):
        assert ops.explain(MIFA(16, device=x.device), [x, x]).path == "chunked"


def test_explain_knows_its_layers():
    with pytest.raises(TypeError, match=r"ops\.explain expected an MFA or MIFA, got Linear"):
        ops.explain(torch.nn.Linear(2, 2), torch.zeros(2, 2))


def test_mode_is_checked_and_restored():
    with pytest.raises(ValueError, match=r'ops\.use expected "auto", "reference" .* got \'yes\''), ops.use("yes"):
        pass
    mfa, x = MFA(16), torch.zeros(8, 16, 64, 64)
    with pytest.raises(KeyError), ops.use("reference"):
        raise KeyError
    assert ops.explain(mfa, x).path == "chunked"


def test_reference_mode_is_functional():
    """In float64 and at a size that auto fuses: the reference shares the gradient of ties, a fused operator does not."""
    mfa, x = perturb_(MFA(16, dtype=torch.float64)), torch.ones(8, 16, 60, 60, dtype=torch.float64, requires_grad=True)
    with ops.use("reference"):
        gate = mfa.gates(x)
    weights = (mfa.hifa.weights(), mfa.clia.weights(), mfa.global_scale, mfa.local_scale)
    expected = functional.mfa(positions(x, "b c ..."), *weights)
    assert_same_math(gate, expected)
    assert_same_math(*(torch.autograd.grad(a.sum(), x)[0] for a in (gate, expected)))


@pytest.mark.parametrize(("name", "more"), [("mfa", ("alpha", "way")), ("mifa", ("fused",))])
def test_signatures_are_those_of_functional(name, more):
    """The operators take what the equations take, and what was chosen."""
    ours, equations = (inspect.signature(getattr(module, name)) for module in (ops, functional))
    parameters = dict(ours.parameters)
    assert [parameters.pop(one).default for one in more] == [None] * len(more)
    assert list(parameters.values()) == list(equations.parameters.values())
    assert ours.return_annotation == equations.return_annotation


def test_a_choice_that_was_made_is_not_made_again(monkeypatch):
    mfa, mifa, x = MFA(8), MIFA(8), torch.randn(2, 8, 30)
    asked = []
    for module in (ops, operators):
        monkeypatch.setattr(module, "is_fused", lambda x, width, *_, **__: bool(asked.append(width)))
    for module in (ops, operators.choose):
        monkeypatch.setattr(module, "way", lambda x, width, *_: asked.append(width) or "reference")
    mfa(x)
    mifa([x, x])
    assert asked == [8, 8]
    ops.gate(x, torch.ones(2, 8))
    assert asked == [8, 8, 8]


def test_mifa_without_gradients_is_the_reference_on_a_cpu():
    mifa, xs = MIFA(16), [torch.randn(8, 16, 40, 40)] * 2
    assert ops.explain(mifa, xs).path == "chunked"
    with torch.no_grad():
        assert "without gradients, no memory can be saved" in ops.explain(mifa, xs).reason
