import subprocess
import sys
from functools import partial

import pytest
import torch

from benchmarks import measure
from drifa_attn import MFA

CPU = torch.device("cpu")
MAP = 256 * 1024 * 4  # bytes of the map below


def test_memory_counts_what_is_live_at_once_and_at_the_end():
    x = torch.randn(256, 1024)

    def run():
        a = x.sigmoid()
        b = a + 1
        del a
        return b * 2

    assert measure.memory(run, CPU) == pytest.approx((2 * MAP, MAP), rel=1e-3)


def test_memory_sees_into_custom_ops():
    @torch.library.custom_op("drifa_attn_test::three_maps", mutates_args=())
    def three_maps(x: torch.Tensor) -> torch.Tensor:
        a, b = x + 1, x + 2
        return a * b

    x = torch.randn(256, 1024)
    assert measure.memory(lambda: three_maps(x), CPU).peak == pytest.approx(3 * MAP, rel=1e-3)


def test_kept_is_what_autograd_saves_besides_input_weights_and_output():
    x = torch.randn(256, 1024, requires_grad=True)
    assert measure.kept(lambda x: x.sigmoid().sigmoid(), (x,), CPU) == pytest.approx(MAP, rel=1e-3)
    assert measure.kept(lambda x: x * 2, (x,), CPU) < 100


def test_alternating_calls_are_timed_each_and_ordered():
    small, large = torch.randn(8, 8), torch.randn(512, 512)
    fast, slow = measure.alternate([lambda: small @ small, lambda: large @ large], 0.02)
    assert fast.p50 < slow.p50
    assert all(t.p20 <= t.p50 <= t.p80 for t in (fast, slow))


def test_every_round_has_an_order_of_its_own(monkeypatch):
    monkeypatch.setattr(measure, "SHORTEST_BLOCK", 0)
    monkeypatch.setattr(measure, "FEWEST", 9)
    called = []
    measure.alternate([partial(called.append, name) for name in "abc"], 0)
    rounds = ["".join(called[i : i + 3]) for i in range(3, len(called), 3)]  # the first three tell how long a call takes
    assert {*map("".join, map(sorted, rounds))} == {"abc"}
    assert len(rounds) == 9
    assert len({*rounds}) > 1


LOOP = """
import resource, torch
from benchmarks import measure
measure.keep_freed_memory()
x = torch.randn(2**20)
def run():
    y, z = x * 2, x * 3
    del y
    return z * 2
for _ in range(5): run()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20): run()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of the C library of Linux")
def test_freed_memory_is_kept():
    """Left alone, most processes take 3000 pages from the system again in every pass, and some none."""
    child = subprocess.run([sys.executable, "-c", LOOP], capture_output=True, check=True)
    assert int(child.stdout) < 200


def test_percentiles_are_those_of_the_samples():
    assert measure.quantiles([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == pytest.approx((3.5, 2.0, 5.0))


def test_flops_and_bytes_are_those_of_the_equations():
    b, c, n = 2, 16, 64
    x = torch.randn(b, c, n, requires_grad=True)
    layer = MFA(c)
    flops, moved = measure.cost(layer, (x,), "forward")
    assert flops == 10 * b * n * c**2 + 2 * b * (2 * c + c) * c  # five convolutions; HIFA's and CLIA's dense layers
    weights = sum(p.numel() for p in layer.parameters())
    assert moved == 4 * (2 * b * c * n + weights)
    full = measure.cost(layer, (x,), "full")
    assert full.flops == flops + measure.cost(layer, (x,), "backward").flops == 3 * flops
