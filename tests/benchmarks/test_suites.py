"""Every suite on a tiny shape, in this process: that it runs, checks before it times, and makes rows of its failures."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks import growth, layers, net, ops, run, scaling, sites, wrap
from benchmarks.cases import Case, Options, Setup
from benchmarks.correctness import Reference
from benchmarks.rows import read
from benchmarks.run import measured

TINY = Options(seconds=0.001)
HERE = ("eager", "fused", "auto", "peers")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr("benchmarks.measure.FEWEST", 1)
    monkeypatch.setattr("benchmarks.measure.SHORTEST_BLOCK", 0)


def rows_of(suite, **options):
    """The rows of a suite without its roofline."""
    chosen = replace(TINY, **{"providers": HERE, **options})
    name = suite.__name__.rpartition(".")[2]
    rows = run.run(name, suite.cases(chosen), chosen, side=16)
    assert [row.op for row in rows[:3]] == ["roofline copy", "roofline matmul", "roofline conv"]
    assert all(row.suite == name for row in rows)
    return rows[3:]


def succeeded(rows):
    assert not [row.error for row in rows if row.error]
    for row in rows:
        assert 0 < row.p20 <= row.p50 <= row.p80
        assert row.params is not None
        assert row.bytes > 0
        assert row.mode == "forward" or row.kept is not None
    return {(row.op, row.provider, row.mode): row for row in rows}


def test_ops_runs():
    rows = succeeded(rows_of(ops, shapes=((2, 8, 4, 4),), modes=("forward", "backward", "full")))
    assert {(op, mode) for op, _, mode in rows} == {(op, mode) for op in ops.OPS for mode in ("forward", "backward", "full")}
    assert rows["mfa_stats", "fused", "full"].kept < rows["mfa_stats", "eager", "full"].kept / 5


def test_layers_runs():
    rows = succeeded(rows_of(layers, shapes=((2, 8, 4, 4),)))
    assert {op for op, _, _ in rows} == {*layers.OURS, *layers.PEERS}
    assert rows["MFA", "eager", "full"].flops == 3 * rows["MFA", "eager", "forward"].flops


def test_products_alone_are_those_of_the_layer():
    """In the reduced one too, its FLOPs are the layer's but for the pooled vectors, and no weight is idle."""
    rows = succeeded(rows_of(layers, ops=("MFA", "MFA, products alone"), shapes=((2, 8, 4, 4),)))
    alone, whole = rows["MFA, products alone", "peers", "forward"], rows["MFA", "eager", "forward"]
    assert alone.flops == 2 * 5 * 2 * 16 * 8 * 8
    assert whole.flops - alone.flops == 2 * 3 * 2 * 8 * 8
    reduced = layers.layer("MFA /16, products alone", 64)
    assert all(weight.grad is not None for weight in trained(reduced, torch.randn(2, 64, 9)))


def trained(module, x):
    sum(y.sum() for y in module(x[..., None])).backward()
    return list(module.parameters())


def test_sites_runs_in_the_threads_that_are_asked_for(monkeypatch):
    monkeypatch.setattr(sites, "SITES", ((16, 4), (32, 2)))
    before = torch.get_num_threads()
    found = rows_of(sites, shapes=((2, 16, 4, 4),), modes=("forward",), threads=before + 1)
    assert torch.get_num_threads() == before
    assert {row.threads for row in found} == {before + 1}
    rows = succeeded(found)
    assert {op for op, _, _ in rows} == {"MFA /16", "MFA /16, products alone", "SE", "ECA", "CBAM"}
    with pytest.raises(ValueError, match="Bx16x4x4"):
        list(sites.cases(replace(TINY, shapes=((2, 8, 4, 4),))))


def test_wrap_runs():
    ways = ("plain", "SE", "MFA", "MFA paper")
    chosen = tuple(f"resnet18 {way}" for way in ways)
    rows = succeeded(rows_of(wrap, ops=chosen, shapes=((2, 3, 32, 32),), providers=("auto", "peers"), modes=("forward",)))
    params = {op.partition(" ")[2]: row.params for (op, _, _), row in rows.items()}
    assert params["plain"] < params["SE"] < params["MFA paper"]
    assert params["plain"] < params["MFA"] < params["MFA paper"]


def test_net_runs_and_trains(monkeypatch):
    from examples.drifa_net import model

    monkeypatch.setattr(model, "DrifaNet", partial(model.DrifaNet, width=8))
    rows = succeeded(rows_of(net, shapes=((2, 3, 32, 32),), providers=("eager", "auto")))
    step, forward = rows["DRIFA-Net", "auto", "full"], rows["DRIFA-Net", "auto", "forward"]
    assert step.params == sum(p.numel() for p in model.DrifaNet().parameters())
    assert step.flops > 2 * forward.flops
    assert step.peak > forward.peak


def test_scaling_grows_one_axis_at_a_time():
    rows = rows_of(scaling, shapes=((1, 8, 2, 2),), providers=("auto",), modes=("forward",))
    for axis in scaling.AXES:
        mine = [row for row in rows if row.op.endswith(axis)]
        assert [scaling.along(row, axis) / scaling.along(mine[0], axis) for row in mine] == list(scaling.STEPS)
        for other in set(scaling.AXES) - {axis}:
            assert len({scaling.along(row, other) for row in mine}) == 1


def test_growth_measures_networks_and_verbs_along_one_axis(monkeypatch):
    """Two fusions' worth of rows; a verb is called and neither checked nor trained."""
    monkeypatch.setattr(growth, "STEPS", (1, 2))
    chosen = (
        "wrap by depth",
        "fuse concat by modalities",
        "plan by depth",
        "save_attention by width",
        "load_attention by depth",
        "calibrate by depth",
    )
    rows = rows_of(growth, ops=chosen, shapes=((2, 3, 32, 32),), providers=("auto",))
    assert not [row.error for row in rows if row.error]
    assert {(row.op, row.mode) for row in rows} == {
        *((op, mode) for op in chosen[:2] for mode in ("forward", "full")),
        *((op, "forward") for op in chosen[2:]),
    }
    for op in chosen:
        sizes = [scaling.along(row, op.rpartition(" ")[2]) for row in rows if row.op == op and row.mode == "forward"]
        assert sizes[1] == 2 * sizes[0]
    by_depth = [row for row in rows if row.op == "wrap by depth" and row.mode == "full"]
    assert by_depth[0].flops < by_depth[1].flops
    assert {growth.Size().grown("depth", 4).label("depth"), growth.Size().label("batch")} == {"4*4x3x64x64", "4x3x64x64"}


def test_growth_covers_every_fusion_and_the_verbs():
    ops = {case.op for group in growth.cases(TINY) for case in group}
    for fusion in growth.FUSIONS:
        assert {f"fuse {fusion} by {axis}" for axis in ("batch", "side", "width", "modalities", "depth")} <= ops
    assert {"wrap by depth", "plan by depth", "calibrate by batch", "save_attention by depth", "load_attention by depth"} <= ops


def test_the_losses_of_a_fusion_are_part_of_what_is_measured(monkeypatch):
    """In training they are computed, and shift all logits alike; in evaluation they are not."""
    xs = [torch.randn(4, 3, 32, 32) for _ in range(2)]
    model = growth.fused("gloria", growth.Size(batch=4, side=32))
    monkeypatch.setattr(model.net, "losses", lambda: {"one": torch.tensor(2.0), "other": torch.tensor(3.0)})
    monkeypatch.setattr(model.net, "forward", lambda _: {"task": torch.ones(4, 3)})
    assert torch.equal(model.eval()(xs)[0], torch.ones(4, 3))
    assert torch.equal(model.train()(xs)[0], torch.full((4, 3), 6.0))


@pytest.mark.parametrize(("network", "side"), [("swin_tiny_patch4_window7_224", 7), ("vit_small_patch16_224", 14)])
def test_peers_read_channels_last_features_and_tokens(network, side):
    """SE on a permuted view is SE: the adapter gives what the layer gives on `b c h w`, prefix tokens untouched."""
    prefix = 1 if network.startswith("vit") else 0
    on = wrap.OnLayout(layers.peer("SE", 6), "b ... c", prefix).eval()
    maps = torch.randn(2, 6, side, side)
    expected = on.attention(maps).permute(0, 2, 3, 1)
    if prefix:
        first = torch.randn(2, 1, 6)
        out = on(torch.cat([first, maps.permute(0, 2, 3, 1).flatten(1, 2)], 1))
        assert torch.equal(out[:, :1], first)
        torch.testing.assert_close(out[:, 1:], expected.flatten(1, 2))
    else:
        torch.testing.assert_close(on(maps.permute(0, 2, 3, 1)), expected)


class Wrong(nn.Module):
    """Right in float64, five per cent off in float32."""

    def forward(self, x):
        return x if x.dtype == torch.float64 else 1.05 * x


def fail():
    raise RuntimeError("no\nsuch thing")


def built(module):
    return Setup(module, (torch.randn(2, 3, requires_grad=True),))


def test_failures_are_rows_beside_the_others(tmp_path):
    group = [
        Case("wrong", "peers", "2x3", partial(built, Wrong())),
        Case("broken", "peers", "2x3", fail),
        Case("right", "peers", "2x3", partial(built, nn.Identity())),
    ]
    options = replace(TINY, modes=("forward",), csv=tmp_path / "new" / "rows.csv")
    rows = {row.op: row for row in run.run("layers", [group], options, side=16)}
    assert rows["wrong"].error.startswith("ValueError: wrong: output 0 is off by 5.0e-02 relative to float64")
    assert rows["broken"].error == "RuntimeError: no such thing"
    assert rows["wrong"].p50 is rows["broken"].peak is None
    assert rows["right"].p50 > 0
    assert rows["right"].error == ""
    assert {row.op: row.error for row in read(options.csv)} == {op: row.error for op, row in rows.items()}


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad if grad.dtype == torch.float64 else -grad


class WrongBackward(nn.Module):
    def forward(self, x):
        return WrongGradient.apply(x)


def test_a_wrong_gradient_is_never_timed():
    group = [Case("wrong", "peers", "2x3", partial(built, WrongBackward()))]
    rows = run.run("layers", [group], replace(TINY, modes=("full",)), side=16)
    assert rows[-1].error.startswith("ValueError: wrong: gradient 0 is off by 2.0e+00")


def test_a_compiler_that_is_missing_is_a_row(monkeypatch):
    monkeypatch.setattr(run, "IS_CHILD", True)  # so that this process compiles, where the compiler can be taken away
    options = {"shapes": ((2, 8, 3, 3),), "ops": ("MFA",), "providers": ("compile", "eager"), "modes": ("forward",)}
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}):
        eager, compiled = sorted(rows_of(layers, **options), key=lambda row: row.error)
    assert (eager.provider, eager.error) == ("eager", "")
    assert compiled.provider == "compile"
    assert "compiler" in compiled.error.lower()
    assert compiled.p50 is None


def test_what_the_time_limit_cuts_off_is_a_row():
    rows = rows_of(layers, shapes=((2, 8, 3, 3),), ops=("MFA",), deadline=0.0)
    assert rows
    assert {row.error for row in rows} == {"not measured: the time limit was reached"}


def test_a_compiled_row_comes_from_a_process_of_its_own(monkeypatch):
    """Nothing is compiled here; a plain network and a wrapped one do not give the same row."""
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled in this process"))
    options = Options(providers=("compile",), modes=("forward",), seconds=0.01)
    case = Case("MFA", "compile", "1x8x4x4", partial(layers.setup, "MFA", (1, 8, 4, 4), options))
    (row,) = measured("layers", [case], "forward", options, Reference())
    assert (row.process, row.error) == ("own", "")
    assert row.p50 > 0
    assert not row.is_void
    assert replace(row, process="").is_void
