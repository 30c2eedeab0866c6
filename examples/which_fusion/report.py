"""Tables and pictures from finished runs: every arm against `concat`, and what is left without a modality."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.markdown import Markdown

from examples.paired import difference, verdict
from examples.rows import Row, read_rows
from examples.tables import markdown, mean_sd

from .arms import BASELINE, VARIANTS
from .protocol import ROW

METRICS = {"balanced_accuracy": "balanced accuracy", "macro_f1": "macro-F1", "auroc": "AUROC", "ece": "ECE"}
Runs = dict[str, dict[int, Row]]  # arm, seed


def files(name: str) -> list[str]:
    """The files that hold the rows of a collection and what is made of them."""
    return [f"{name}{end}" for end in (".jsonl", "-steps.json", ".md", ".png")]


def tested(path: Path) -> Runs:
    """The rows of the test by arm and seed, the arm with the best balanced accuracy first; arms with all their seeds alone."""
    found: Runs = {}
    for row in read_rows(path, ROW, ("samples", "steps", "batch", "rates", "choosing", "modality_dropout")):
        if row["part"] == "test":
            found.setdefault(row["arm"], {})[row["seed"]] = row
    found = {arm: rows for arm, rows in found.items() if len(rows) >= next(iter(rows.values()))["protocol"]["seeds"]}
    return dict(sorted(found.items(), key=lambda item: -mean(row["balanced_accuracy"] for row in item[1].values())))


def tasks_of(runs: Runs) -> list[str]:
    """The tasks of a collection."""
    return list(next(iter(next(iter(runs.values())).values()))["tasks"])


def points(
    rows: Mapping[int, Row], task: str, missing: str | None = None, metric: str = "balanced_accuracy"
) -> dict[int, float]:
    """What an arm scored in a task, in per cent by seed; with all modalities, or without one. {} where it has no such score."""
    if missing is None:
        return {seed: 100 * row["tasks"][task][metric] for seed, row in rows.items()}
    return {seed: 100 * row["without"][missing][task] for seed, row in rows.items() if missing in row["without"]}


def missing_of(runs: Runs) -> list[str]:
    """The modalities that were left out."""
    return list(dict.fromkeys(name for rows in runs.values() for row in rows.values() for name in row["without"]))


def against(runs: Runs, arm: str, task: str, missing: str | None = None) -> tuple[float, float, float] | None:
    """The paired difference of an arm to `concat`, in points."""
    return difference(*(points(runs.get(name, {}), task, missing) for name in (arm, BASELINE)))


def scores_table(runs: Runs, task: str) -> str:
    """One line for each arm, the best first."""
    lines = []
    for arm, rows in runs.items():
        gap = against(runs, arm, task)
        told = "–" if arm == BASELINE or gap is None else f"{gap[0]:+.1f} ({gap[1]:+.1f} to {gap[2]:+.1f}), {verdict(gap)}"
        lines.append(
            [
                f"**{arm}**" if arm == BASELINE else arm,
                *(mean_sd(list(points(rows, task, metric=metric).values()), 1) for metric in METRICS),
                told,
                *(
                    mean_sd(list(found.values()), 1) if (found := points(rows, task, name)) else "–"
                    for name in missing_of(runs)
                ),
            ]
        )
    lost = [f"balanced accuracy without {name}" for name in missing_of(runs)]
    return markdown(["arm", *METRICS.values(), f"balanced accuracy − {BASELINE} (95 % interval)", *lost], lines)


def costs_table(runs: Runs, costs: Mapping[str, Mapping[str, float]]) -> str:
    """What each arm costs: the cheapest step first."""

    def ratio(arm: str, what: str) -> str:
        return f"{costs[arm][what] / costs[BASELINE][what]:.2f}" if {arm, BASELINE} <= set(costs) else "–"

    lines = []
    for arm in sorted(runs, key=lambda arm: costs.get(arm, {}).get("ms", float("inf"))):
        some = list(runs[arm].values())
        moved = {site: mean(row["deviations"][site] for row in some) for site in some[0]["deviations"]}
        lines.append(
            [
                f"**{arm}**" if arm == BASELINE else arm,
                f"{some[0]['rate']:g}",
                f"{some[0]['trained']:,}",
                f"{some[0]['flops'] / 1e6:.2f} M",
                ratio(arm, "ms"),
                ratio(arm, "kept_mb"),
                ", ".join(f"{value:.3f}" for value in moved.values()) or "–",
            ]
        )
    header = ["arm", "rate", "weights trained", "FLOPs added a sample", f"time of a step, {BASELINE} = 1"]
    return markdown([*header, f"memory of a step, {BASELINE} = 1", "deviation of gains, by stage and modality"], lines)


def text(name: str, runs: Runs, measured: Mapping[str, Any]) -> str:
    """The whole report on one collection."""
    row = next(iter(next(iter(runs.values())).values()))
    protocol, seeds = row["protocol"], min(len(rows) for rows in runs.values())
    parts = ", ".join(f"{part} {count}" for part, count in measured.get("parts", {}).items())
    trained = min(protocol["samples"], measured.get("parts", {}).get("train", protocol["samples"]))
    classes = ", ".join(f"{task} ({len(names)} classes)" for task, names in measured.get("tasks", {}).items())
    tables = [part for task in tasks_of(runs) for part in (f"## Task {task}", scores_table(runs, task))]
    return "\n\n".join(
        [
            f"# {name}",
            f"{measured.get('what', '')} Tasks: {classes or ', '.join(tasks_of(runs))}. Samples: {parts or '–'}.".strip(),
            f"{trained} training samples, drawn anew by each seed; {protocol['steps']} steps of {protocol['batch']} samples; "
            f"modality dropout {protocol['modality_dropout']:g}; {seeds} seeds (mean ± standard deviation over seeds, in per "
            "cent). The rate of each arm is the best of "
            f"{', '.join(f'{rate:g}' for rate in protocol['rates'])} on validation samples, with {protocol['choosing']} "
            "seed(s) that the test does not use; what refines between the branches gets five times as much. torch "
            f"{row['torch']}, {measured.get('threads', 1)} thread(s) of a shared machine.",
            f"Arms are sorted by balanced accuracy. Differences to **{BASELINE}** are paired by seed, with bootstrap intervals "
            "of their mean; few seeds make these narrower than they should be.",
            *tables,
            "## Costs",
            costs_table(runs, measured.get("arms", {})),
            f"![{name}]({name}.png)\n",
        ]
    )


def colour(arm: str) -> str:
    """The colour of an arm."""
    if arm in VARIANTS:
        return "#9e9ac8"
    return "#b2182b" if arm.startswith("mifa") else "#4d4d4d" if arm.endswith(" alone") or arm == BASELINE else "#2166ac"


def draw_differences(axes: Axes, runs: Runs, task: str) -> None:
    """Each arm against `concat`: mean, interval, and every seed."""
    for y, arm in enumerate(runs):
        found = against(runs, arm, task)
        if found is None:
            continue
        one, two = points(runs[arm], task), points(runs[BASELINE], task)
        each = [one[seed] - two[seed] for seed in one if seed in two]
        axes.plot(each, [y] * len(each), "o", color=colour(arm), alpha=0.3, markersize=4)
        axes.plot(found[1:], [y, y], color=colour(arm), linewidth=3)
        axes.plot(found[0], y, "D", color=colour(arm), markersize=6)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_title(f"{task}: points above {BASELINE}", loc="left", size=11)
    axes.set_xlabel("balanced accuracy: mean, 95 % interval, each seed")


def draw_missing(axes: Axes, runs: Runs, task: str) -> None:
    """Balanced accuracy with all modalities and without each."""
    marks = [None, *missing_of(runs)]
    for missing, mark, shade in zip(marks, "osD^v<>", ("#1b1b1b", "#d95f02", "#1b9e77", "#7570b3", "#e7298a"), strict=False):
        found = {y: mean(some.values()) for y, arm in enumerate(runs) if (some := points(runs[arm], task, missing))}
        label = f"without {missing}" if missing else "all"
        axes.plot(list(found.values()), list(found), mark, color=shade, markersize=6, label=label)
    axes.set_title(f"{task}: what is left without a modality", loc="left", size=11)
    axes.set_xlabel("balanced accuracy, mean of seeds")


def draw(name: str, runs: Runs, path: Path) -> None:
    """Two panels for each task."""
    tasks = tasks_of(runs)
    figure = Figure(figsize=(13, len(tasks) * (0.32 * len(runs) + 1.6) + 0.4), layout="constrained")
    for row, task in zip(figure.subplots(len(tasks), 2, squeeze=False), tasks, strict=True):
        draw_differences(row[0], runs, task)
        draw_missing(row[1], runs, task)
        for axes, labels in zip(row, (list(runs), [""] * len(runs)), strict=True):
            axes.set_yticks(range(len(runs)), labels)
            axes.set_ylim(len(runs) - 0.4, -0.6)
            axes.grid(axis="both", color="#dddddd")
            axes.set_axisbelow(True)
            axes.spines[["top", "right", "left"]].set_visible(False)
    handles, labels = figure.axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower right", ncols=len(labels))
    figure.suptitle(f"{name} (red: MIFA, blue: other fusions, grey: none, violet: variants)", size=13)
    figure.savefig(path, dpi=110)


def stored(folder: Path) -> dict[str, tuple[Runs, Mapping[str, Any]]]:
    """The rows of the test and the costs of a step of every collection in a folder; a `ValueError` if a file is damaged."""
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        measured = folder / f"{path.stem}-steps.json"
        if runs := tested(path):
            found[path.stem] = runs, read_costs(measured) if measured.exists() else {}
    return found


def read_costs(path: Path) -> dict[str, Any]:
    """What was measured of the steps of a collection; a `ValueError` if the file is damaged."""
    try:
        found = json.loads(path.read_text())
        found["arms"] = {arm: {what: float(one[what]) for what in ("ms", "kept_mb")} for arm, one in found["arms"].items()}
        for name in ("what", "tasks", "parts", "threads"):
            found[name]
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: delete it, and the costs are measured again.") from error
    return found


def report(folder: Path, console: Console) -> None:
    """Write the table and the picture of every collection that has rows in a folder."""
    for name, (runs, measured) in stored(folder).items():
        found = text(name, runs, measured)
        (folder / f"{name}.md").write_text(found)
        draw(name, runs, folder / f"{name}.png")
        console.print(Markdown(found))
        console.print(f"Written to {folder / name}.md and a picture beside it.")
