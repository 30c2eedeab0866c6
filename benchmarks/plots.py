"""The plots: latency against shape, memory, the roofline, and how cost grows. Each is of one device."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .rows import Row, slug
from .scaling import AXES, along, exponent

COLOURS = {
    "eager": "#7f8c9b",
    "compile": "#e08214",
    "fused": "#2166ac",
    "auto": "#b2182b",
    "auto-compile": "#762a83",
    "peers": "#4d9221",
}
LABELS = {
    "eager": "eager",
    "compile": "torch.compile",
    "fused": "fused or chunked",
    "auto": "drifa_attn (auto)",
    "auto-compile": "drifa_attn (auto), torch.compile",
    "peers": "timm",
}
MODES = {"forward": "forward", "full": "forward and backward"}


def place(row: Row) -> str:
    """A shape as a label."""
    return f"{row.sizes[1]}\n{'×'.join(map(str, row.sizes[2:]))}"


def by_shape(ax: Axes, rows: Sequence[Row], field: str, title: str) -> None:
    """One group of bars a shape, by channels, one bar a provider; the whiskers of times are the 20th and 80th percentile."""
    size_of = {row.shape: row.sizes[1:] for row in rows}
    shapes = sorted({row.shape for row in rows}, key=lambda shape: size_of[shape])
    providers = [name for name in COLOURS if any(row.provider == name for row in rows)]
    width = 0.8 / max(len(providers), 1)
    for i, provider in enumerate(providers):
        mine = [row for row in rows if row.provider == provider]
        xs = [shapes.index(row.shape) + (i - (len(providers) - 1) / 2) * width for row in mine]
        heights = [getattr(row, field) for row in mine]
        spread = [[row.p50 - row.p20 for row in mine], [row.p80 - row.p50 for row in mine]] if field == "p50" else None
        ax.bar(xs, heights, width * 0.92, yerr=spread, color=COLOURS[provider], label=LABELS[provider], error_kw={"lw": 1})
    ax.set_xticks(range(len(shapes)), [place(next(row for row in rows if row.shape == shape)) for shape in shapes])
    ax.set_yscale("log")
    ax.set_title(title)
    ax.set_xlabel("channels, positions")
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)


def latency(rows: Sequence[Row]) -> Figure:
    """MFA's time at each shape."""
    figure = Figure((12, 4.5), layout="constrained")
    for ax, (mode, title) in zip(figure.subplots(1, 2), MODES.items(), strict=True):
        by_shape(ax, [row for row in rows if row.suite == "layers" and row.op == "MFA" and row.mode == mode], "p50", title)
        ax.set_ylabel("milliseconds")
    legend(figure)
    return figure


def memory(rows: Sequence[Row]) -> Figure:
    """MFA's memory at each shape: at most during forward, and kept for backward."""
    figure = Figure((12, 4.5), layout="constrained")
    mine = [row for row in rows if row.suite == "layers" and row.op == "MFA"]
    left, right = figure.subplots(1, 2)
    by_shape(left, [row for row in mine if row.mode == "forward"], "peak", "forward: peak above the input")
    by_shape(right, [row for row in mine if row.mode == "full"], "kept", "kept for backward, besides the input")
    for ax in (left, right):
        ax.set_ylabel("MiB")
    legend(figure)
    return figure


def legend(figure: Figure) -> None:
    """One legend for all axes, each entry once."""
    entries = {}
    for ax in figure.axes:
        handles, labels = ax.get_legend_handles_labels()
        entries.update(zip(labels, handles, strict=True))
    if entries:
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=len(entries), frameon=False)


def roofline(rows: Sequence[Row]) -> Figure:
    """What MFA computes a second against its FLOPs a byte, under what the device was measured to do at most."""
    figure = Figure((8, 5.5), layout="constrained")
    ax = figure.subplots()
    copies = [row.bytes / row.p50 * 1e3 for row in rows if row.op == "roofline copy"]
    products = [row.flops / row.p50 * 1e3 for row in rows if row.op in ("roofline matmul", "roofline conv")]
    mine = [row for row in rows if row.suite == "layers" and row.op == "MFA" and row.mode == "forward"]
    intensities = [row.flops / row.bytes for row in mine]
    if not (copies and products and mine):
        return figure
    bandwidth, rate = max(copies), max(products)
    xs = [min(*intensities, rate / bandwidth) / 2, rate / bandwidth, max(*intensities, rate / bandwidth) * 2]
    ax.plot(xs, [min(bandwidth * x, rate) / 1e9 for x in xs], color="black", lw=1.5)
    ax.annotate(
        f"{rate / 1e9:,.0f} GFLOP/s, product",
        (xs[-1], rate / 1e9),
        xytext=(0, 6),
        textcoords="offset points",
        ha="right",
    )
    ax.annotate(
        f"{bandwidth / 1e9:,.1f} GB/s, copy", (xs[0], bandwidth * xs[0] / 1e9), xytext=(8, -16), textcoords="offset points"
    )
    for provider in COLOURS:
        points = [(row.flops / row.bytes, row.flops / row.p50 / 1e6) for row in mine if row.provider == provider]
        if points:
            ax.scatter(*zip(*points, strict=True), color=COLOURS[provider], label=LABELS[provider], s=45, zorder=3)
    for row in {row.shape: row for row in mine}.values():
        top = max(r.flops / r.p50 / 1e6 for r in mine if r.shape == row.shape)
        label = f"c={row.sizes[1]}"
        ax.annotate(label, (row.flops / row.bytes, top), xytext=(0, 7), textcoords="offset points", ha="center", size=8)
    ax.set(xscale="log", yscale="log", xlabel="FLOPs a byte that has to move", ylabel="GFLOP/s", title="MFA forward")
    ax.margins(y=0.12)
    ax.grid(alpha=0.3, which="both")
    legend(figure)
    return figure


def scaling(rows: Sequence[Row]) -> Figure:
    """Time along each axis of the scaling suite."""
    figure = Figure((14, 4), layout="constrained")
    for ax, axis in zip(figure.subplots(1, len(AXES)), AXES, strict=True):
        mine = [row for row in rows if row.suite == "scaling" and row.op.endswith(f" by {axis}")]
        for provider in COLOURS:
            for mode, style in (("forward", "--"), ("full", "-")):
                points = sorted((along(row, axis), row.p50) for row in mine if (row.provider, row.mode) == (provider, mode))
                if points:
                    label = f"{LABELS[provider]}, {MODES[mode]}"
                    ax.plot(*zip(*points, strict=True), style, marker="o", ms=4, color=COLOURS[provider], label=label)
        sizes = sorted({along(row, axis) for row in mine})
        ax.set(xscale="log", yscale="log", xlabel=axis, title=mine[0].op if mine else axis)
        ax.set_xticks(sizes, [f"{size:g}" for size in sizes])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    figure.axes[0].set_ylabel("milliseconds")
    legend(figure)
    return figure


GROWTH = {
    "batch": "samples",
    "side": "pixels a side",
    "width": "channels",
    "modalities": "modalities",
    "depth": "blocks a stage",
}


def growth(rows: Sequence[Row]) -> Figure:
    """Time along each axis of the growth suite, a training step of a network or a call of a verb, with its slope."""
    figure = Figure((17, 13), layout="constrained")
    panels = figure.subplots(2, 3).flat
    mine = [row for row in rows if row.suite == "growth" and " by " in row.op]
    verbs = {row.op for row in mine if row.mode == "forward"} - {row.op for row in mine if row.mode == "full"}
    names = list(dict.fromkeys(row.op.partition(" by ")[0] for row in mine))
    for (axis, title), ax in zip(GROWTH.items(), panels, strict=False):  # in this order no panel is lost
        for i, name in enumerate(names):
            op = f"{name} by {axis}"
            mode = "forward" if op in verbs else "full"
            points = sorted((along(row, axis), row.p50) for row in mine if (row.op, row.mode) == (op, mode))
            if len(points) > 1:
                label = f"{name}: {exponent(*zip(*points, strict=True)):.2f}"
                style = "--" if op in verbs else "-"
                ax.plot(*zip(*points, strict=True), style, marker="o", ms=3, color=colormaps["tab20"](i % 20), label=label)
        ax.set(xscale="log", yscale="log", xlabel=title, ylabel="milliseconds", title=f"by {axis}")
        sizes = sorted({along(row, axis) for row in mine if row.op.endswith(f" by {axis}")})
        ax.set_xticks(sizes, [f"{size:g}" for size in sizes])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        if ax.lines:
            ax.legend(loc="upper left", bbox_to_anchor=(0, -0.12), ncols=3, fontsize=8, frameon=False, title="what: slope")
    for ax in panels:
        ax.axis("off")
    return figure


# What is drawn, and the suite it is drawn from.
PLOTS: dict[str, tuple[str, Callable[[Sequence[Row]], Figure]]] = {
    "latency": ("layers", latency),
    "memory": ("layers", memory),
    "roofline": ("layers", roofline),
    "scaling": ("scaling", scaling),
    "growth": ("growth", growth),
}


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """The plots of every device, next to its CSVs, as far as there are rows. Returns their files."""
    paths = []
    for device in dict.fromkeys(row.device for row in rows):
        mine = [row for row in rows if row.device == device and not row.error]
        for name, (suite, plot) in PLOTS.items():
            if any(row.suite == suite for row in mine):
                figure = plot(mine)
                figure.suptitle(device, size=10, color="#555555")
                paths.append(folder / f"{slug(device)}-{name}.png")
                figure.savefig(paths[-1], dpi=130)
    return paths
