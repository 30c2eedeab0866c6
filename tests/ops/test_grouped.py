"""MFA in groups of samples: the equations' values for any group, and only where nothing needs more than values."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drifa_attn import MFA, functional, ops
from drifa_attn.ops import choose, grouped
from tests._compare import assert_no_worse, assert_same_math
from tests.cases import perturb_


def built(channels=8, **options):
    torch.manual_seed(0)
    mfa = MFA(channels, **options).eval()
    perturb_(mfa)
    return mfa


@given(
    b=st.integers(1, 5),
    n=st.integers(2, 40),
    reduction=st.sampled_from([None, 1, 2]),
    layout=st.sampled_from(["b c ...", "b ... c"]),
    cache=st.sampled_from([1, 600, 2**19]),
)
def test_groups_of_any_size_give_the_gate(b, n, reduction, layout, cache):
    mfa = built(16, reduction=reduction, init="identity", layout=layout)
    x = torch.randn(b, 16, n) if layout == "b c ..." else torch.randn(b, n, 16)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "CACHE", cache)
        found = mfa.gates(x)
        assert ops.explain(mfa, x).path == "grouped"
        with ops.use("reference"):
            assert ops.explain(mfa, x).path == "reference"
            plain = mfa.gates(x)
            exact = mfa.double().gates(x.double())
    assert_no_worse(found, plain, exact, 2)


@given(
    b=st.integers(1, 3),
    channels=st.sampled_from([8, 16, 24, 40]),
    n=st.integers(7, 12),
    layout=st.sampled_from(["b c ...", "b ... c"]),
)
def test_long_channels_are_squeezed_some_at_a_time(b, channels, n, layout):
    mfa = built(channels, reduction=2, init="identity", layout=layout)
    x = torch.randn(b, channels, n) if layout == "b c ..." else torch.randn(b, n, channels)
    sizes = []

    def product(linear, part):
        sizes.append(part.shape[-2])
        return plain(linear, part)

    plain = grouped.product
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "CACHE", 1)
        patch.setattr(grouped, "LONG", 8)
        patch.setattr(grouped, "product", product)
        found = mfa.gates(x)
        with ops.use("reference"):
            exact = mfa.double().gates(x.double())
    assert_same_math(found, exact.float(), rel=1e-5)
    assert sizes[0] == (min(channels, grouped.ROWS) if n >= 8 and layout == "b c ..." else channels)


def test_double_is_computed_in_double():
    mfa, x = built(reduction=1, init="identity").double(), torch.randn(2, 8, 30).double()
    with torch.no_grad():
        found = mfa(x)
        with ops.use("reference"):
            assert_same_math(found, mfa(x))


def test_autocast_lowers_nothing():
    mfa, x = built(), torch.randn(2, 8, 30)
    with torch.no_grad():
        expected = mfa.gates(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(mfa.gates(x), expected)


@torch.no_grad()
@pytest.mark.parametrize(
    ("channels", "reduction", "side", "path"),
    [
        (64, 8, 112, "grouped"),  # eight wide, whatever the size of the map
        (2048, 16, 7, "grouped"),  # 128 wide and a small map
        (64, None, 56, "chunked"),
        (128, None, 28, "chunked"),
        (256, None, 7, "reference"),
        (2048, None, 3, "chunked"),
    ],
)
def test_wide_attention_is_not_grouped(channels, reduction, side, path):
    """Each group reads all weights again: beyond a width that costs more than the cache saves."""
    mfa = MFA(channels, reduction=reduction, device="meta").to_empty(device="cpu")
    assert ops.explain(mfa, torch.empty(8, channels, side, side)).path == path


@pytest.mark.parametrize(
    ("channels", "reduction", "batch", "side", "path"),
    [
        (1024, 16, 4, 14, "reference"),  # a reduced map is a small part of what is kept, and costs time
        (256, 16, 4, 56, "reference"),
        (64, 8, 4, 112, "chunked"),
        (64, None, 4, 14, "chunked"),
        (64, None, 1, 14, "reference"),
    ],
)
def test_reduced_attention_is_fused_in_training_only_where_it_is_as_fast(channels, reduction, batch, side, path):
    mfa = MFA(channels, reduction=reduction, device="meta").to_empty(device="cpu")
    assert ops.explain(mfa, torch.empty(batch, channels, side, side)).path == path


def test_what_needs_more_than_values_takes_another_way():
    mfa, x = built(), torch.randn(2, 8, 30)
    assert ops.explain(mfa, x).path != "grouped"  # gradients
    with torch.no_grad():
        assert ops.explain(mfa, x).path == "grouped"
        assert ops.explain(mfa, x, torch.ones(2, 30).bool()).path == "reference"
        assert ops.explain(mfa.bfloat16(), x.bfloat16()).path == "reference"
        assert ops.explain(mfa.float(), torch.randn(2, 8, 2**20)).path == "chunked"
        assert ops.explain(mfa, x[:, :, :1]).path == "reference"
        assert ops.explain(mfa, x[:0]).path == "reference"
        mfa.hifa.conv2.register_forward_hook(lambda *_: None)
        assert ops.explain(mfa, x).path == "reference"


@pytest.mark.parametrize(("channels", "is_grouped"), [(8, True), (choose.WIDE, True), (2 * choose.WIDE, False)])
def test_compiled_code_without_gradients_holds_the_products_of_groups(channels, is_grouped):
    """As far as they are narrow: `baddbmm` where the equations have convolutions."""
    graphs = []

    def keep(graph, example):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    mfa, x = built(channels), torch.randn(2, channels, 3)
    with torch.no_grad():
        found = torch.compile(mfa, fullgraph=True, backend=keep)(x)
        assert_same_math(found, mfa(x))
    called = {getattr(node.target, "__name__", str(node.target)) for node in graphs[0].graph.nodes}
    assert ("baddbmm" in called, "conv1d" in called) == (is_grouped, not is_grouped), called


@pytest.mark.parametrize("b", [1, 3])
def test_compiled_code_has_no_sizes_in_it(b):
    """Neither the batch nor the positions choose what the graph is: one that was compiled for any serves any."""
    torch._dynamo.reset()
    mfa = built(reduction=1, init="identity")
    compiled = torch.compile(mfa, fullgraph=True, backend="aot_eager")
    x = torch.randn(b, 8, 30)
    if b > 1:
        torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(x, 2)
    with torch.no_grad():
        assert_same_math(compiled(x), mfa(x))
        with torch.compiler.set_stance("fail_on_recompile"):
            other = torch.randn(5 if b > 1 else 1, 8, 2**17)
            assert_same_math(compiled(other), mfa(other))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_vmap_and_traces_see_the_equations(monkeypatch):
    monkeypatch.setattr(grouped, "mfa", None)
    mfa, x = built(), torch.randn(2, 8, 30)
    with torch.no_grad():
        assert torch.vmap(mfa)(x[:, None]).shape == (2, 1, 8, 30)
        assert torch.jit.trace(mfa, x, check_trace=False)(x).shape == x.shape
        assert torch.export.export(mfa, (x,), strict=False).module()(x).shape == x.shape


def test_maps_stay_small():
    """Of the largest maps there is one group's, not the batch's."""
    mfa, x = built(8), torch.randn(64, 8, 4096)
    sizes = []

    def product(linear, part):
        sizes.append(part.numel() * part.element_size())
        return functional.lin(part, linear)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "product", product)
        mfa.gates(x)
    assert max(sizes) <= grouped.CACHE < x.numel() * 4
