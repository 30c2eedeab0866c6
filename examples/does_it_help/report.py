"""Tables and pictures from finished runs: paired differences with intervals, and how much the gates attend."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.markdown import Markdown

from examples import paired
from examples.rows import read_rows
from examples.tables import markdown, mean_sd

from .arms import ARMS
from .protocol import ROW

BASELINE, ATTENDS = "head only", 0.03
# (arm, the arm it is compared with, the question)
PAIRS = [
    *((arm, BASELINE, "against the head alone") for arm in ARMS if arm != BASELINE),
    ("MFA", "constant", "does the gate have to look at the image?"),
    ("MFA", "MFA, uncalibrated", "does calibration help?"),
    ("MFA", "SE", "the paper's attention or SE?"),
    ("norms + MFA", "norms", "does MFA add to the norms?"),
    ("norms + SE", "norms", "does SE add to the norms?"),
    ("all + MFA", "all", "does MFA add to full fine-tuning?"),
    ("all + SE", "all", "does SE add to full fine-tuning?"),
]
Runs = dict[str, dict[int, Mapping[str, Any]]]  # arm, seed


def files(name: str) -> list[str]:
    """The files that hold the rows of a collection and what is made of them."""
    return [f"{name}{end}" for end in (".jsonl", "-steps.json", ".md", "-differences.png", "-gates.png")]


def tested(path: Path) -> Runs:
    """The rows of the test, by arm and seed."""
    found: Runs = {}
    for row in read_rows(path, ROW, ("sites",)):
        if row["part"] == "test":
            found.setdefault(row["arm"], {})[row["seed"]] = row
    return {arm: found[arm] for arm in ARMS if arm in found}


def difference(runs: Runs, arm: str, other: str) -> tuple[float, float, float] | None:
    """The mean difference in balanced accuracy over seeds that both arms have, in points, and its bootstrap 95 % interval."""
    one, two = ({s: 100 * row["balanced_accuracy"] for s, row in runs.get(name, {}).items()} for name in (arm, other))
    return paired.difference(one, two)


def table(runs: Runs, steps: Mapping[str, float]) -> str:
    """One line for each arm; `steps` has the milliseconds of a training step."""
    header = ["arm", "balanced accuracy", "macro-F1", "ECE", "rate", "weights trained", "time of a step, head alone = 1"]
    lines = []
    for arm, rows in runs.items():
        some = list(rows.values())
        sites = [mean(site) for site in zip(*(row["deviations"] for row in some), strict=True)]
        scores = [[100 * row[metric] for row in some] for metric in ("balanced_accuracy", "macro_f1", "ece")]
        lines.append(
            [
                arm,
                *(mean_sd(values, 1) for values in scores),
                f"{some[0]['rate']:g}",
                f"{some[0]['trained']:,}",
                f"{steps[arm] / steps[BASELINE]:.1f}" if {arm, BASELINE} <= set(steps) else "–",
                f"{mean(row['kept_mb'] for row in some):.1f} MB",
                ", ".join(f"{site:.3f}" for site in sites) or "–",
            ]
        )
    return markdown([*header, "kept for backward", "deviation of the gain over images, by site"], lines)


def pairs(runs: Runs) -> str:
    """One line for each question."""
    lines = []
    for arm, other, question in PAIRS:
        found = difference(runs, arm, other)
        if found:
            low, high = found[1:]
            told = paired.verdict(found)
            lines.append([f"{arm} − {other}: {question}", f"{found[0]:+.1f}", f"{low:+.1f} to {high:+.1f}", told])
    return markdown(["", "points of balanced accuracy", "95 % interval", ""], lines)


def text(name: str, runs: Runs, steps: Mapping[str, float]) -> str:
    """The whole report on one collection."""
    row = next(iter(next(iter(runs.values())).values()))
    protocol, seeds = row["protocol"], min(len(rows) for rows in runs.values())
    return "\n\n".join(
        [
            f"# {name}",
            f"{protocol['network']}, attention at {', '.join(protocol['sites'])}; {protocol['images']} training images, "
            f"{protocol['epochs']} epochs, {seeds} seeds (mean ± standard deviation over seeds, in per cent). The rate of each "
            f"arm is the best of {', '.join(f'{rate:g}' for rate in protocol['rates'])} on the validation images, with a seed "
            f"that the test does not use. torch {row['torch']}, one CPU.",
            table(runs, steps),
            "Paired differences over the same seeds, with bootstrap intervals of their mean. Few seeds make these intervals "
            "narrower than they should be:",
            pairs(runs),
            f"![differences]({name}-differences.png)",
            f"![gates]({name}-gates.png)\n",
        ]
    )


def draw_differences(name: str, runs: Runs, path: Path) -> None:
    """Each arm against the head alone: mean, interval, and every seed."""
    arms = [arm for arm in runs if arm != BASELINE and difference(runs, arm, BASELINE)]
    figure = Figure(figsize=(9, 0.42 * len(arms) + 1.6), layout="constrained")
    axes = figure.subplots()
    for y, arm in enumerate(arms):
        center, low, high = difference(runs, arm, BASELINE)  # type: ignore[misc]
        colour = "#b2182b" if "MFA" in arm else "#2166ac" if ARMS[arm].wrap and arm != "constant" else "#4d4d4d"
        seeds = set(runs[arm]) & set(runs[BASELINE])
        each = [100 * (runs[arm][s]["balanced_accuracy"] - runs[BASELINE][s]["balanced_accuracy"]) for s in seeds]
        axes.plot(each, [y] * len(each), "o", color=colour, alpha=0.3, markersize=5)
        axes.plot([low, high], [y, y], color=colour, linewidth=3)
        axes.plot(center, y, "D", color=colour, markersize=7)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(arms)), arms)
    axes.invert_yaxis()
    axes.set_xlabel("points of balanced accuracy above the head alone: mean, 95 % interval, each seed")
    axes.set_title(f"{name}: what each arm gains (red: with MFA, blue: other attention, grey: none)", loc="left")
    axes.grid(axis="x", color="#dddddd")
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=130)


def draw_gates(name: str, runs: Runs, path: Path) -> None:
    """How much the gates of each arm attend, site by site."""
    arms = [arm for arm, rows in runs.items() if all(row["deviations"] for row in rows.values())]
    sites = next(iter(next(iter(runs.values())).values()))["protocol"]["sites"]
    figure = Figure(figsize=(9, 0.5 * len(arms) + 1.8), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(sites)
    for i, (site, colour) in enumerate(zip(sites, ("#fdae61", "#d7604c", "#7f1d3a") * len(sites), strict=False)):
        values = [mean(row["deviations"][i] for row in runs[arm].values()) for arm in arms]
        bars = axes.barh([y + (i - 1) * height for y in range(len(arms))], values, height, color=colour, label=site)
        axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
    axes.axvline(ATTENDS, color="black", linewidth=1, linestyle=":")
    axes.set_yticks(range(len(arms)), arms)
    axes.invert_yaxis()
    axes.set_xlabel("standard deviation of a channel's gain over the test images, mean over channels")
    axes.set_title(f"{name}: how much the gates attend (left of the dotted line: hardly)", loc="left")
    axes.legend(frameon=False, loc="lower right", title="site")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def stored(folder: Path) -> dict[str, tuple[Runs, dict[str, float]]]:
    """The rows of the test and the times of a step of every collection in a folder; a `ValueError` if a file is damaged."""
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        timed = folder / f"{path.stem}-steps.json"
        try:
            times = {arm: float(time) for arm, time in json.loads(timed.read_text()).items()} if timed.exists() else {}
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{timed} is damaged: delete it, and the times are measured again.") from error
        if runs := tested(path):
            found[path.stem] = runs, times
    return found


def report(folder: Path, console: Console) -> None:
    """Write the table and the pictures of every collection that has rows in a folder."""
    for name, (runs, times) in stored(folder).items():
        found = text(name, runs, times)
        (folder / f"{name}.md").write_text(found)
        draw_differences(name, runs, folder / f"{name}-differences.png")
        draw_gates(name, runs, folder / f"{name}-gates.png")
        console.print(Markdown(found))
        console.print(f"Written to {folder / name}.md and two pictures beside it.")
