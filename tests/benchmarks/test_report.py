"""Rows, the targets, the tables and the plots, from made-up rows and from those that are committed."""

from dataclasses import replace

import pytest
import torch

import drifa_attn
from benchmarks import report, rows, scaling, selection
from benchmarks.__main__ import SUITES, main
from benchmarks.cases import Options
from benchmarks.plots import PLOTS, draw
from benchmarks.rows import RESULTS, Row, read, write
from benchmarks.targets import NO_GPU, TARGETS, Found, verdict

COMMITTED = sorted(RESULTS.rglob("*.csv"))
CPU, GPU = "CPU of a test", "GPU of a test"
ROW = Row("layers", "MFA", "eager", "forward", "8x64x56x56", "contiguous", "fp32", 10.0, 9.0, 11.0, 9.0, None, 5, 7, 3)
ROW = replace(ROW, device=CPU, torch="2", threads=2, commit="abc", utc="2026-01-01T00:00:00Z")


def target(start, gpu=False):
    (found,) = [t for t in TARGETS if t.what.startswith(start) and t.gpu == gpu and t.against == "eager"]
    return found


def judged(start, some, gpu=False):
    return verdict(target(start, gpu), Found(some))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_committed_rows_hold_the_schema(path):
    found = read(path)
    assert found
    for row in found:
        assert path.name == f"{rows.slug(row.device)}-{row.suite}.csv"
        assert row.suite in SUITES
        assert row.mode in ("forward", "backward", "full")
        assert row.sizes
        assert row.device
        assert row.torch
        assert row.commit
        assert row.threads >= 1
        assert bool(row.error) == (row.p50 is None)
        if not row.error:
            assert 0 < row.p20 <= row.p50 <= row.p80


def test_readme_is_what_the_committed_rows_give():
    readme = report.README.read_text()
    assert all(f"<!-- table: {name} -->" in readme for name in report.TABLES)
    if COMMITTED:
        assert report.filled(readme, Found(report.counted(report.newest()))) == readme


def test_the_newest_version_with_rows_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.newest() == tmp_path
    for version in ("0.9.0", "0.10.0"):
        write([ROW], tmp_path / version / "cpu-layers.csv")
    (tmp_path / "0.11.0").mkdir()
    assert report.newest().name == "0.10.0"


def test_rows_come_back_from_a_file_as_they_were(tmp_path):
    failed = replace(ROW, p50=None, p20=None, p80=None, peak=None, params=None, flops=None, bytes=None, error='no, "never"')
    write([ROW], tmp_path / "rows.csv")
    write([failed], tmp_path / "rows.csv")
    assert read(tmp_path / "rows.csv") == [ROW, failed]
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="columns"):
        read(tmp_path / "other.csv")


def test_a_met_target_says_so_and_a_missed_one_where():
    slow = replace(ROW, provider="auto", p50=13.0)
    fast = replace(slow, p50=8.0, shape="8x128x28x28")
    both = [ROW, slow, replace(ROW, shape=fast.shape), fast]
    assert judged("CPU forward of MFA", both[2:]) == ("0.8 (c=128 at 28x28)", "met")
    assert judged("CPU forward of MFA", both) == ("1.3 (c=64 at 56x56); 0.8 (c=128 at 28x28)", "missed at 1 of 2")
    assert judged("CPU forward of MFA", both[:2]) == ("1.3 (c=64 at 56x56)", "missed")
    assert judged("CPU forward of MFA", [ROW]) == ("no row yet: run `make bench`", "")
    assert judged("CPU forward of MFA", [ROW, replace(slow, p50=None, error="failed")])[1] == ""


def test_rows_of_one_device_are_never_compared_with_another():
    gpu = replace(ROW, provider="auto", p50=1.0, device=GPU)
    assert judged("CPU forward of MFA", [ROW, gpu])[1] == ""
    assert judged("CPU forward of MFA", [replace(ROW, device=GPU), gpu])[1] == ""
    assert judged("GPU forward, bf16, batch 64, c = 64", [ROW, gpu], gpu=True) == (NO_GPU, "")


def test_speedups_on_a_gpu_are_judged_by_their_width():
    eager = replace(ROW, dtype="bf16", device=GPU, shape="64x64x56x56")
    some = [eager, replace(eager, provider="auto", p50=2.5)]
    assert judged("GPU forward, bf16, batch 64, c = 64", some, gpu=True) == ("4 (c=64 at 56x56)", "met")
    assert judged("GPU forward, bf16, batch 64, c = 128", some, gpu=True) == (NO_GPU, "")


def test_attention_is_charged_what_it_adds_to_the_plain_network():
    plain = replace(ROW, suite="wrap", op="resnet50 plain", provider="peers", mode="full", peak=100.0, shape="8x3x224x224")
    eager = replace(plain, op="resnet50 MFA block", provider="eager", peak=200.0)
    ours = replace(eager, provider="auto", peak=120.0)
    assert judged("attention's share", [plain, eager, ours]) == ("0.2 (resnet50, batch 8)", "met")
    assert judged("attention's share", [eager, ours])[1] == ""


def against(against, some, gpu=False):
    return [verdict(t, Found(some)) for t in TARGETS if t.against == against and t.gpu == gpu]


def test_overhead_is_what_wrap_adds_over_what_se_adds():
    plain = replace(ROW, suite="wrap", op="resnet50 plain", provider="peers", p50=50.0, shape="1x3x224x224", device=GPU)
    some = [plain, replace(plain, op="resnet50 SE", p50=52.0), replace(plain, op="resnet50 MFA", provider="auto", p50=56.0)]
    assert against("SE, same sites", some, gpu=True) == [("3 (batch 1)", "missed")]


def test_a_training_step_is_held_to_the_plain_network():
    plain = replace(ROW, suite="wrap", op="resnet50 plain", provider="peers", mode="full", p50=100.0, shape="4x3x224x224")
    some = [plain, replace(plain, op="resnet50 MFA", provider="auto", p50=108.0)]
    assert against("plain", some) == [("1.08 (batch 4)", "met")]
    assert against("plain", some[1:]) == [("no row yet: run `make bench`", "")]


def test_the_sites_are_held_to_se_at_each_batch():
    se = replace(ROW, suite="sites", op="SE", provider="peers", p50=1.0, shape="1x64x112x112")
    one, eight = se, replace(se, p50=8.0, shape="8x64x112x112")
    ours = {"op": "MFA /16", "provider": "auto"}
    some = [one, eight, replace(one, p50=4.0, **ours), replace(eight, p50=24.0, **ours)]
    assert against("SE there", some) == [("4 (batch 1)", "missed"), ("3 (batch 8)", "met")]
    assert "| 1 | MFA /16 | auto | 4 | 4.00 |" in report.sites(Found(some))
    compiled = [
        replace(row, provider=provider, process="own", p50=2 * row.p50)
        for row, provider in ((some[0], "compile"), (some[2], "auto-compile"))
    ]
    assert against("SE there, compiled", some) == [("no row yet: run `make bench`", "")]
    assert against("SE there, compiled", [*some, compiled[0], replace(compiled[1], p50=10.0)]) == [("5 (batch 1)", "met")]
    assert against("SE there", some + compiled) == against("SE there", some)
    assert "| 8 | SE | peers | 8 | 1.00 |" in report.sites(Found(some))


def test_what_the_library_takes_stands_beside_its_products_alone():
    some = [replace(ROW, provider="auto", p50=12.0), replace(ROW, op="MFA, products alone", provider="peers", p50=10.0)]
    assert "| c=64 at 56x56 | forward | 12 | 10 | 1.20 |" in report.floors(Found(some))
    assert report.floors(Found(some[:1])).count("\n") == 1


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_exponent_is_the_power_a_cost_grows_with(power):
    sizes = [1, 2, 4, 8]
    assert scaling.exponent(sizes, [3 * size**power for size in sizes]) == pytest.approx(power)
    with pytest.raises(ValueError, match="two sizes"):
        scaling.exponent([2, 2], [1, 1])


def growing(suite="scaling", **of):
    """Rows along the batch whose time is linear and whose memory is quadratic."""
    sizes = (1, 2, 4)
    base = replace(ROW, suite=suite, **{"op": "MFA by batch", "provider": "auto", **of})
    return [replace(base, shape=f"{b}x8x4x4", p50=2.0 * b, p20=1.9 * b, p80=2.1 * b, peak=3.0 * b * b) for b in sizes]


def test_tables_show_exponents_failures_and_the_share_of_the_roofline():
    ceilings = [
        replace(ROW, op="roofline copy", provider="peers", bytes=1000, p50=1.0),
        replace(ROW, op="roofline matmul", provider="peers", flops=1000, p50=1.0),
    ]
    measured = replace(ROW, flops=5000, bytes=1000)  # five milliseconds of products at least, and it took ten
    failed = replace(ROW, provider="compile", p50=None, error="no compiler")
    found = Found([*growing(), *ceilings, measured, failed])
    assert "| 1, 2, 4 | 1.00 | 2.00 |" in report.scaling(found)
    assert "| FLOPs | 5 | 50% |" in report.roofline(found)
    assert "MFA, compile | forward | 8x64x56x56 | fp32 | no compiler |" in report.failures(found)
    assert report.failures(Found([ROW])) == "None."


def test_what_grows_faster_than_its_work_is_named():
    """Time that is linear in the batch is what it should be, and so is time that is linear in the depth; its square is not."""
    linear = growing("growth", op="wrap by batch", mode="full")
    steep = [replace(linear[0], op="plan by depth", shape=f"{n}*1x3x4x4", p50=float(n * n)) for n in (1, 2, 4)]
    wide = [replace(row, op="wrap by width") for row in steep]
    found = Found([*linear, *steep, *wide])
    assert report.steep(found).count("\n") == 2
    assert "| plan by depth | full | 1, 2, 4 | 2.00 |" in report.steep(found)
    assert report.steep(Found(linear)) == "None."
    assert "| wrap by batch | auto | full | 1, 2, 4 | 1.00 | 2.00 |" in report.growth(found)
    assert "| 1.00 | – |" in report.growth(Found([replace(row, peak=0.0) for row in linear]))


def test_only_the_marked_places_are_filled():
    text = "before\n<!-- table: failures -->\nold\n<!-- end -->\nafter\n"
    once = report.filled(text, Found([ROW]))
    assert once == "before\n<!-- table: failures -->\nNone.\n<!-- end -->\nafter\n"
    assert report.filled(once, Found([ROW])) == once


def test_plots_of_each_device_are_drawn(tmp_path):
    some = [ROW, replace(ROW, provider="auto", mode="full", kept=1.0), *growing(), *growing("growth")]
    some += [replace(row, device=GPU) for row in growing()]
    paths = draw(some, tmp_path)
    assert [path.name for path in paths] == [*(f"cpu-of-a-test-{plot}.png" for plot in PLOTS), "gpu-of-a-test-scaling.png"]
    assert all(path.stat().st_size > 5000 for path in paths)


def test_bench_overwrites_what_it_measures_and_nothing_else(monkeypatch, tmp_path):
    monkeypatch.setattr(selection, "RESULTS", tmp_path)
    monkeypatch.setattr(selection, "on_cpu", lambda start: [("net", start), ("net", start)])
    monkeypatch.setattr(selection, "run", lambda suite, groups, options: write([ROW], options.csv))
    device = torch.device("cpu")
    folder, name = tmp_path / drifa_attn.__version__, rows.slug(rows.device_name(device))
    for suite in ("net", "growth"):
        write([ROW] * 5, folder / f"{name}-{suite}.csv")
    assert selection.bench(device, {"net": SUITES["net"]}, 0.0) == folder
    assert {suite: len(read(folder / f"{name}-{suite}.csv")) for suite in ("net", "growth")} == {"net": 2, "growth": 5}


@pytest.mark.parametrize("plan", [selection.on_cpu, selection.on_gpu])
def test_selection_holds_what_every_target_is_read_from(plan):
    """Rows with made-up numbers, one for each case the selection names, leave no target of that device open."""
    gpu = plan is selection.on_gpu
    start = Options(dtype="bf16" if gpu else "fp32")
    made = []
    for suite, options in plan(start):
        sized = options
        if gpu and not options.shapes:  # the suites' own shapes for a GPU, which is not here
            sized = replace(options, shapes=next(iter(GPU_SHAPES[suite])))
        for group in SUITES[suite].cases(sized):
            for case in group:
                if options.wants(case.op, case.provider):
                    base = replace(ROW, suite=suite, op=case.op, provider=case.provider, shape=case.shape, dtype=start.dtype)
                    base = replace(base, device=GPU if gpu else CPU, kept=1.0)
                    cost = {"plain": 1.0, "SE": 2.0}.get(case.op.rpartition(" ")[2], 4.0 if case.provider == "eager" else 3.0)
                    made += [replace(base, mode=mode, p50=cost, peak=cost) for mode in options.modes]
    found = Found(made)
    either = [t for t in TARGETS if t.gpu == gpu]
    assert either
    assert not [t.what for t in either if not t.measure(found)]


GPU_SHAPES = {
    "sites": [((64, 64, 112, 112),)],
    "wrap": [((64, 3, 224, 224),)],
    "net": [((64, 3, 128, 128),)],
    "scaling": [((32, 64, 28, 28),)],
}


def test_command_lists_the_suites_and_runs_one(capsys, tmp_path):
    main([])
    listed = capsys.readouterr().out
    assert all(name in listed for name in SUITES)
    flags = "--device cpu --op none --shape 2x4x3x3 --mode forward --provider peers --seconds 0.001"
    main(["layers", *flags.split(), "--csv", str(tmp_path / "rows.csv")])
    (*_, row) = read(tmp_path / "rows.csv")
    assert (row.op, row.shape, row.mode, row.dtype, row.error) == ("none", "2x4x3x3", "forward", "fp32", "")
