"""A counter of FLOPs sees the products inside the fused operators, whichever of the two was imported first."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from drifa_attn import MFA, MIFA, ops
from drifa_attn.network.trace import FlopCount
from tests.cases import listed

B, N, C, D = 3, 50, 24, 12
XS = [torch.randn(B, C, N, requires_grad=True) for _ in range(2)]
LAYERS = {
    "mfa": (MFA(C), XS[0], 5, 12),
    "mfa-reduced": (MFA(C, reduction=2), XS[0], 5, 12),
    "mifa": (MIFA(C), XS, 2, 6),
    "mifa-reduced": (MIFA(C, reduction=2), XS, 2, 6),
}


def counted(run):
    with FlopCounterMode(display=False) as counter:
        result = run()
    return result, {str(name).rpartition(".")[2]: flops for name, flops in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("name", LAYERS)
def test_products_are_counted(name):
    """Forward as many as in the reference equations; backward also what is recomputed, but for a maximum one row only."""
    layer, x, forward, backward = LAYERS[name]
    d, squeezes = (D, len(listed(x))) if "reduced" in name else (C, 0)
    with ops.use("reference"):
        _, plain = counted(lambda: layer(x))
    with ops.use("fused"):
        y, ours = counted(lambda: layer(x))
        _, back = counted(lambda: sum(one.sum() for one in listed(y)).backward())
    assert sum(ours.values()) == sum(plain.values())
    op = "mfa_gain" if "mfa" in name else "mifa_stats"
    tail = 2 * B * (3 * d * d + squeezes * d * C) if op == "mfa_gain" else 0
    assert ours[op] == 2 * B * N * (forward * d * d + squeezes * d * C) + tail
    sparse = 2 * 2 * B * d * d if op == "mfa_gain" else 0
    assert back[f"{op}_backward"] == 2 * B * N * (backward * d * d + 3 * squeezes * d * C) + sparse + 3 * tail


@pytest.mark.parametrize("mode", ["fused", "reference"])
def test_the_counter_of_the_network_room_agrees(mode):
    layer, x, forward, _ = LAYERS["mfa"]
    with ops.use(mode), FlopCount() as ours:
        layer(x)
    with ops.use(mode), FlopCounterMode(display=False) as counter:
        layer(x)
    assert ours.total == counter.get_total_flops() > 2 * B * N * forward * C * C


def test_a_counter_that_is_imported_and_made_late_counts_too():
    """Also a counter that copied the formulas before a fused operator ran. The import system of Python is left alone."""
    expected = 2 * 2 * (30 * 5 + 3) * 8 * 8
    code = f"""
import sys, einops, torch
finders = list(sys.meta_path)
import drifa_attn
assert sys.meta_path == finders
assert "torch.utils.flop_counter" not in sys.modules
mfa, x = drifa_attn.MFA(8), torch.zeros(2, 8, 30)
einops.rearrange(x, "b c n -> b c n")
is_imported = "torch._dynamo" in sys.modules
assert is_imported == (einops.__version__ == "0.8.0"), "einops imports the compiler"
with drifa_attn.ops.use("fused"):
    mfa(x)
    assert is_imported == ("torch._dynamo" in sys.modules), "the first fused call imports the compiler, which takes seconds"
    from torch.utils.flop_counter import FlopCounterMode
    early = FlopCounterMode(display=False)
    mfa(x)
    for counter in (early, FlopCounterMode(display=False)):
        with counter:
            mfa(x)
        assert counter.get_total_flops() == {expected}, counter.get_total_flops()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
