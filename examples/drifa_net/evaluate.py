"""What an ensemble and Monte Carlo dropout are worth (Fig. 1B).

From the repository's root, after training the members:

    python -m examples.drifa_net.train --seeds 0 1 2 3 4
    python -m examples.drifa_net.evaluate outputs/drifa_net/drifa_net-seed*

The members are runs of one configuration that differ in their seed; the paper has five, and fewer do. On the test images, a
single pass of each member is compared with 30 Monte Carlo passes of each, with one pass of all of them together, and with 30
passes of all. `uncertainty.json` holds the numbers and `uncertainty.png` shows how far confidence can be believed and what it
buys to hand the most uncertain samples to a human.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from drifa_attn import Uncertainty, ensemble, mc_dropout
from examples.arguments import Parser, check_files, integer, output, source
from examples.drifa_net.data import IGNORE, Data
from examples.drifa_net.metrics import absent, abstention, reliability, risk_coverage, scores
from examples.drifa_net.networks import named, restored
from examples.drifa_net.reading import reloaded
from examples.drifa_net.records import read_record
from examples.tables import mean_sd

SINGLE, DROPOUT, ENSEMBLE, BOTH = "single pass", "Monte Carlo dropout", "ensemble", "ensemble + dropout"
COLOURS = {SINGLE: "#7f8c9b", DROPOUT: "#d98c3f", ENSEMBLE: "#2166ac", BOTH: "#b2182b"}
PAPER_MEMBERS = 5

Predictions = dict[str, tuple[Tensor, Tensor]]  # by task: probabilities `b k`, total uncertainty `b`


def parser() -> Parser:
    """The command's options."""
    whole = Parser("python -m examples.drifa_net.evaluate", __doc__)
    add = whole.add_argument
    add("members", nargs="+", type=source, help="folders of finished runs")
    add("--data", nargs="+", type=source, default=[], help="where their data is, if it has moved")
    add("--cache", type=output, default="outputs/cache", help="folder of decoded images (default: %(default)s)")
    add("--samples", type=integer(1), default=30, help="Monte Carlo passes of a member (default: %(default)s)")
    add("--batch-size", type=integer(1), default=256, help="(default: %(default)s)")
    add("--output", type=output, default="outputs/drifa_net", help="folder of the result (default: %(default)s)")
    return whole


def check_members(runs: Sequence[Mapping[str, Any]]) -> None:
    """Raise a `ValueError` unless the runs differ in their seed and in nothing else."""
    seeds = [run["configuration"]["seed"] for run in runs]
    if len(set(seeds)) < 2 or len(set(seeds)) < len(seeds):
        raise ValueError(f"an ensemble needs at least two members of different seeds, got seeds {seeds}.")
    first, *others = ({**run["configuration"], "seed": None} for run in runs)
    for other in others:
        for name, value in first.items():
            if other.get(name) != value:
                raise ValueError(f"the members differ in {name}: {value!r} and {other.get(name)!r}: give runs of one kind.")
    if any(run["data"] != runs[0]["data"] for run in runs):
        raise ValueError("the members were trained on data that has changed between them: train them again.")


def together(parts: Sequence[Mapping[str, Uncertainty]]) -> Predictions:
    """The predictions for a split from those of its batches."""
    return {
        task: (torch.cat([part[task].probs for part in parts]), torch.cat([part[task].total for part in parts]))
        for task in parts[0]
    }


@torch.no_grad()
def predictions(members: Sequence[nn.Module], data: Data, batch: int, samples: int) -> dict[str, list[Predictions]]:
    """What every way of predicting says about the test images; of single members one prediction each."""
    generator = torch.Generator().manual_seed(0)
    batches = [named(parts, data, torch.device("cpu"))[:2] for parts in data.loader(data.test, batch)]
    singles = []
    for member in members:
        logits = [member(*inputs) for inputs in batches]
        probs = {task: torch.cat([part[task] for part in logits]).softmax(1) for task in data.tasks}
        singles.append({task: (p, torch.special.entr(p).sum(1)) for task, p in probs.items()})
    return {
        SINGLE: singles,
        DROPOUT: [together([mc_dropout(m, inputs, samples, generator=generator) for inputs in batches]) for m in members],
        ENSEMBLE: [together([ensemble(members, inputs) for inputs in batches])],
        BOTH: [together([ensemble(members, inputs, samples, generator=generator) for inputs in batches])],
    }


def measured(probs: Tensor, total: Tensor, labels: Tensor) -> dict[str, float | int]:
    """All numbers of one prediction of one task."""
    kept = labels != IGNORE
    return {**scores(probs, labels), **abstention(probs[kept], labels[kept], total[kept])}


def draw_reliability(axes: Axes, found: Mapping[str, list[Predictions]], task: str, labels: Tensor, numbers: Any) -> None:
    """Accuracy against confidence, the marks as large as the share of the samples; below the diagonal is too confident."""
    kept = labels != IGNORE
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":")
    for way in (SINGLE, ENSEMBLE):
        probs = torch.cat([one[task][0][kept] for one in found[way]])
        confidence, accuracy, share = reliability(probs, labels[kept].repeat(len(found[way])), bins=10)
        ece = mean_sd([one["ece"] for one in numbers[way]])
        axes.plot(confidence, accuracy, color=COLOURS[way], linewidth=1.5, label=f"{way}: ECE {ece}")
        axes.scatter(confidence, accuracy, s=20 + 400 * share, color=COLOURS[way], alpha=0.6, linewidth=0)
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), title=f"{task}: can confidence be believed?")
    axes.legend(frameon=False, loc="upper left")


def draw_risk(axes: Axes, found: Mapping[str, list[Predictions]], task: str, labels: Tensor) -> None:
    """Errors among the samples that are kept, against their share; single members thin."""
    kept = labels != IGNORE
    for way, several in found.items():
        for k, one in enumerate(several):
            curve = 100 * risk_coverage(one[task][0][kept], labels[kept], one[task][1][kept])
            coverage = 100 * torch.arange(1, len(curve) + 1) / len(curve)
            start = len(curve) // 20  # the error of the first few samples is noise
            width = 0.8 if len(several) > 1 else 2
            axes.plot(coverage[start:], curve[start:], color=COLOURS[way], linewidth=width, label=way if k == 0 else None)
    axes.axvline(90, color="black", linewidth=0.8, linestyle=":")
    axes.annotate("nine tenths", (89, 0.5), xycoords=axes.get_xaxis_transform(), rotation=90, ha="right", va="center", size=8)
    axes.set(xlabel="samples decided, per cent", ylabel="errors among them, per cent", title=f"{task}: risk and coverage")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="upper left")


def draw_abstention(axes: Axes, task: str, numbers: Mapping[str, list[dict[str, float]]]) -> None:
    """The accuracy on all samples and without the most uncertain tenth."""
    for row, (way, several) in enumerate(numbers.items()):
        before, after = (100 * mean(one[name] for one in several) for name in ("accuracy_all", "accuracy_kept"))
        axes.plot([before, after], [row, row], color=COLOURS[way], linewidth=2)
        axes.scatter([before], [row], s=60, facecolor="white", edgecolor=COLOURS[way], linewidth=2, zorder=3)
        axes.scatter([after], [row], s=60, color=COLOURS[way], zorder=3)
        axes.annotate(f"{before:.1f} → {after:.1f}", ((before + after) / 2, row - 0.15), ha="center", va="bottom")
    axes.set(yticks=range(len(numbers)), yticklabels=list(numbers), ylim=(len(numbers) - 0.5, -0.7))
    axes.set(xlabel="accuracy, per cent", title=f"{task}: all (○), certain nine tenths (●)")
    axes.margins(x=0.15)


def draw(path: Path, found: Mapping[str, list[Predictions]], labels: Mapping[str, Tensor], result: Mapping[str, Any]) -> None:
    """The picture: one row a task."""
    figure = Figure(figsize=(16, 4.6 * len(labels)), layout="constrained")
    rows = figure.subplots(len(labels), 3, squeeze=False)
    for row, (task, values) in zip(rows, labels.items(), strict=True):
        draw_reliability(row[0], found, task, values, result["tasks"][task])
        draw_risk(row[1], found, task, values)
        draw_abstention(row[2], task, result["tasks"][task])
        for axes in row:
            axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{result['members']} members of {result['model']}, {result['samples']} Monte Carlo passes each", size=15)
    figure.savefig(path, dpi=130)


def shown(result: Mapping[str, Any]) -> list[Table]:
    """The numbers, one table a task; of single members their mean and standard deviation."""
    names = {name: name for name in ("accuracy", "ece", "nll", "brier", "aurc")} | {"accuracy_kept": "certain 90 %"}
    tables = []
    for task, ways in result["tasks"].items():
        table = Table("", *names.values(), title=task)
        for way, several in ways.items():
            table.add_row(way, *(mean_sd([one[name] for one in several]) for name in names))
        tables.append(table)
    return tables


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Predict, measure, draw; returns what the JSON holds."""
    whole = parser()
    options = whole.parse_args(argv)
    with whole.explained():
        check_files(options.output, ["uncertainty.json", "uncertainty.png"])
        runs = [read_record(folder / "run.json") for folder in options.members]
        check_members(runs)
        _, data = reloaded(options.members[0], options.data, options.cache)
        members = [restored(folder, run, data) for folder, run in zip(options.members, runs, strict=True)]
    console = Console(highlight=False, soft_wrap=True)
    if len(members) < PAPER_MEMBERS:
        console.print(f"{len(members)} members; the paper's ensemble has {PAPER_MEMBERS}.")
    found = predictions(members, data, options.batch_size, options.samples)
    labels = dict(zip(data.tasks, data.test.targets.unbind(1), strict=True))
    for task, classes in data.tasks.items():
        if names := absent(labels[task], classes):
            console.print(f"{task}: no test sample is {', '.join(names)}; means over the classes leave it out.", markup=False)
    result = {
        "model": runs[0]["configuration"]["model"],
        "data": runs[0]["configuration"]["data"],
        "seeds": [run["configuration"]["seed"] for run in runs],
        "members": len(members),
        "samples": options.samples,
        "tasks": {
            task: {way: [measured(*one[task], labels[task]) for one in several] for way, several in found.items()}
            for task in data.tasks
        },
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "uncertainty.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(options.output / "uncertainty.png", found, labels, result)
    for table in shown(result):
        console.print(table)
    console.print(f"{options.output / 'uncertainty.json'}, {options.output / 'uncertainty.png'}")
    return result


if __name__ == "__main__":
    main()
