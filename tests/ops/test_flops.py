"""A counter of FLOPs sees the products inside the fused ops, whichever of the two was imported first."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from drifa_attn import MFA, MIFA, ops
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
    """Forward as many as the plain equations have; backward what is computed anew as well, but only a row for each maximum."""
    layer, x, forward, backward = LAYERS[name]
    d, squeezes = (D, len(listed(x))) if "reduced" in name else (C, 0)
    with ops.fused("0"):
        _, plain = counted(lambda: layer(x))
    with ops.fused("1"):
        y, ours = counted(lambda: layer(x))
        _, back = counted(lambda: sum(one.sum() for one in listed(y)).backward())
    assert sum(ours.values()) == sum(plain.values())
    op = "mfa_stats" if "mfa" in name else "mifa_stats"
    assert ours[op] == 2 * B * N * (forward * d * d + squeezes * d * C)
    sparse = 2 * 2 * B * d * d if op == "mfa_stats" else 0
    assert back[f"{op}_backward"] == 2 * B * N * (backward * d * d + 3 * squeezes * d * C) + sparse


@pytest.mark.parametrize("first", ["drifa_attn", "torch.utils.flop_counter"])
def test_formulas_are_there_in_either_order_of_imports(first):
    code = f"""
import {first}, sys, torch
finders = len(sys.meta_path)
import drifa_attn
from torch.utils.flop_counter import FlopCounterMode, flop_registry
assert torch.ops.drifa_attn.mfa_stats in flop_registry
assert len(sys.meta_path) == finders - ({first!r} == "drifa_attn"), sys.meta_path
with FlopCounterMode(display=False) as counter, drifa_attn.ops.fused("1"):
    drifa_attn.MFA(8)(torch.zeros(2, 8, 30))
print(counter.get_total_flops())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 2 * 2 * 30 * 5 * 8 * 8
