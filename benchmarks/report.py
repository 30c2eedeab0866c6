"""The tables of `README.md` and the plots, from the CSVs of the newest version that was measured."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from .layers import ALONE
from .plots import draw
from .rows import RESULTS, Row, read
from .scaling import along, exponent
from .targets import OURS, TARGETS, Found, at, of_se, verdict

README = Path(__file__).parent / "README.md"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; numbers are right-aligned by its caller's header, which ends in a colon there."""
    names = [name.rstrip(":") for name in header]
    rule = ["---:" if name.endswith(":") else "---" for name in header]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [names, rule, *rows])


def number(value: float | None) -> str:
    """Three digits of a number, or a dash where there is none."""
    return "–" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def device_of(row: Row) -> str:
    """The device, as a column."""
    return row.device if row.on_gpu else f"{row.device}, {row.threads} thread{'s' * (row.threads > 1)}"


def targets(found: Found) -> str:
    """Whether each target is met."""
    rows = [(t.what, t.against, t.target, *verdict(t, found)) for t in TARGETS]
    return table(("what", "against", "target", "measured", "met?"), rows)


def versions(found: Found) -> str:
    """What the rows were measured with."""
    seen = {}
    for row in found.rows:
        seen[device_of(row), row.torch, row.triton, row.timm, row.commit] = row.utc[:10]
    return table(("device", "torch", "triton", "timm", "commit", "date"), [(*key, day) for key, day in seen.items()])


def compared(found: Found, suite: str, columns: Sequence[tuple[str, str, str]]) -> str:
    """One line for each device, shape, op and provider; columns are (title, mode, field)."""
    lines: dict[tuple[str, ...], dict[tuple[str, str], float]] = {}
    for row in found.all(suite=suite):
        if row.op.startswith("roofline"):
            continue
        key = device_of(row), row.dtype, row.shape, row.op, row.provider
        for _, mode, field in columns:
            if row.mode == mode:
                lines.setdefault(key, {})[mode, field] = getattr(row, field)
    header = ("device", "dtype", "shape", "what", "provider", *(f"{title}:" for title, _, _ in columns))
    return table(header, [(*key, *(number(values.get((m, f))) for _, m, f in columns)) for key, values in lines.items()])


def layers(found: Found) -> str:
    """Layers beside their peers."""
    return compared(found, "layers", LAYER_COLUMNS)


LAYER_COLUMNS = (
    ("forward ms", "forward", "p50"),
    ("step ms", "full", "p50"),
    ("forward peak MiB", "forward", "peak"),
    ("kept MiB", "full", "kept"),
    ("parameters", "forward", "params"),
)
NETWORK_COLUMNS = (
    ("forward ms", "forward", "p50"),
    ("step ms", "full", "p50"),
    ("step peak MiB", "full", "peak"),
    ("kept MiB", "full", "kept"),
    ("parameters", "forward", "params"),
    ("FLOPs", "forward", "flops"),
)


def networks(found: Found) -> str:
    """Whole backbones."""
    return compared(found, "wrap", NETWORK_COLUMNS)


def net(found: Found) -> str:
    """DRIFA-Net."""
    return compared(found, "net", NETWORK_COLUMNS)


def ops(found: Found) -> str:
    """The ops alone."""
    return compared(found, "ops", LAYER_COLUMNS[:4])


def scaling(found: Found, suite: str = "scaling") -> str:
    """The exponents of time and memory along each axis."""
    lines = [
        (device_of(g[0]), g[0].dtype, g[0].op, g[0].provider, g[0].mode, sizes_of(g), *(slope(g, f) for f in ("p50", "peak")))
        for g in grown(found, suite)
    ]
    return table(("device", "dtype", "what", "provider", "mode", "sizes", "time exponent:", "peak exponent:"), lines)


def growth(found: Found) -> str:
    """The same of whole networks and of verbs."""
    return scaling(found, "growth")


def steep(found: Found) -> str:
    """What grows faster than its work: by more than a tenth than batch, pixels, weights, modalities, or blocks."""
    if not found.all(suite="growth"):
        return "No rows yet: `python -m benchmarks growth --csv FILE` measures some."
    lines = []
    for group in grown(found, "growth"):
        axis = axis_of(group[0])
        if (found_slope := float(slope(group, "p50"))) > 1.1 * SQUARED.get(axis, 1):
            lines.append((device_of(group[0]), group[0].op, group[0].mode, sizes_of(group), f"{found_slope:.2f}"))
    return table(("device", "what", "mode", "sizes", "time exponent:"), lines) if lines else "None."


SQUARED = {"side": 2, "width": 2}  # an image has as many pixels as its side squared, a network as many weights as its width


def grown(found: Found, suite: str) -> list[list[Row]]:
    """The rows of a suite along one axis each, of two sizes at least."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in found.all(suite=suite):
        if " by " in row.op:
            groups.setdefault((device_of(row), row.dtype, row.op, row.provider, row.mode), []).append(row)
    return [rows for rows in groups.values() if len({along(row, axis_of(row)) for row in rows}) > 1]


def axis_of(row: Row) -> str:
    """The axis a row grows along."""
    return row.op.rpartition(" ")[2]


def sizes_of(rows: Sequence[Row]) -> str:
    """The sizes of rows along their axis."""
    return ", ".join(f"{along(row, axis_of(row)):g}" for row in rows)


def slope(rows: Sequence[Row], field: str) -> str:
    """The exponent of a cost; a dash where it is nothing at some size."""
    costs = [getattr(row, field) for row in rows]
    return f"{exponent([along(row, axis_of(row)) for row in rows], costs):.2f}" if all(costs) else "–"


def roofs(found: Found) -> dict[tuple[str, str], tuple[float, float]]:
    """The best bytes and FLOPs a second of each device and dtype."""
    best: dict[tuple[str, str], tuple[float, float]] = {}
    for row in found.rows:
        if row.op.startswith("roofline"):
            key, seconds = (row.device, row.dtype), row.p50 / 1000
            bandwidth, rate = best.get(key, (0.0, 0.0))
            is_copy = row.op == "roofline copy"
            best[key] = (max(bandwidth, row.bytes / seconds), rate) if is_copy else (bandwidth, max(rate, row.flops / seconds))
    return best


def roofline(found: Found) -> str:
    """How near MFA comes to the time that its bytes and FLOPs need at least."""
    roof = roofs(found)
    lines = []
    for row in found.all(suite="layers", op="MFA"):
        bandwidth, rate = roof[row.device, row.dtype]
        floor = 1000 * max(row.bytes / bandwidth, row.flops / rate)
        bound = "bytes" if row.bytes / bandwidth > row.flops / rate else "FLOPs"
        lines.append(
            (device_of(row), row.dtype, at(row), row.provider, row.mode, bound, number(floor), f"{floor / row.p50:.0%}")
        )
    return table(("device", "dtype", "shape", "provider", "mode", "bound by", "floor ms:", "reached:"), lines)


def sites(found: Found) -> str:
    """The five sites of ResNet-50, each attention against SE, compiled ones against SE compiled."""
    lines = []
    for row in found.all(suite="sites", mode="forward"):
        for ratio in of_se(row, found):
            known = device_of(row), row.dtype, str(row.sizes[0]), row.op, row.provider
            lines.append((*known, number(row.p50), f"{ratio.value:.2f}"))
    return table(("device", "dtype", "batch:", "what", "provider", "forward ms:", "of SE's:"), lines)


def floors(found: Found) -> str:
    """What the library takes, and what its equations' products alone take, at each shape."""
    lines = []
    for ours in found.all(suite="layers", op="MFA", provider=OURS):
        same = {"mode": ours.mode, "shape": ours.shape, "device": ours.device, "dtype": ours.dtype}
        for alone in found.all(suite="layers", op=f"MFA{ALONE}", **same):
            ratio = f"{ours.p50 / alone.p50:.2f}"
            lines.append((device_of(ours), ours.dtype, at(ours), ours.mode, number(ours.p50), number(alone.p50), ratio))
    return table(("device", "dtype", "shape", "mode", "MFA ms:", "its products alone ms:", "ratio:"), lines)


def failures(rows: Found) -> str:
    """What has no numbers, and why."""
    lines = [(device_of(r), f"{r.op}, {r.provider}", r.mode, r.shape, r.dtype, r.error) for r in rows.failed]
    return table(("device", "what", "mode", "shape", "dtype", "error"), lines) if lines else "None."


TABLES: dict[str, Callable[[Found], str]] = {
    "targets": targets,
    "versions": versions,
    "layers": layers,
    "ops": ops,
    "sites": sites,
    "floors": floors,
    "networks": networks,
    "net": net,
    "scaling": scaling,
    "steep": steep,
    "growth": growth,
    "roofline": roofline,
    "failures": failures,
}


def filled(readme: str, found: Found) -> str:
    """A text whose marked places hold the tables of these rows."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]](found)}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", fill, readme, flags=re.DOTALL)


def stored(folder: Path) -> list[Row]:
    """All rows of a folder."""
    return [row for path in sorted(folder.glob("*.csv")) for row in read(path)]


def counted(folder: Path) -> list[Row]:
    """The rows of a folder that tables, plots and targets use."""
    return [row for row in stored(folder) if not row.is_void]


def newest() -> Path:
    """The folder of the newest version of which there are rows: a new version is not measured before its number is written."""
    folders = [path for path in RESULTS.glob("*.*.*") if any(path.glob("*.csv"))]
    return max(folders, key=lambda path: [int(part) for part in path.name.split(".")], default=RESULTS)


def report() -> None:
    """Draw the plots and write the tables."""
    folder = newest()
    rows = counted(folder)
    if not rows:
        raise ValueError(f"{folder} holds no rows: python -m benchmarks bench measures some.")
    for path in draw(rows, folder):
        print(path)
    README.write_text(filled(README.read_text(), Found(rows)))
    print(README)
