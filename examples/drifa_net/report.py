"""Put finished runs into `results/` and their table into the README.

From the repository's root:

    python -m examples.drifa_net.report outputs/final/*-seed* --trials outputs/trials/*/*-seed*
    python -m examples.drifa_net.report                       # the README's table again, from the records in results/

A record holds no image and no path. Trials are runs that chose a learning rate; of those, only what was tried is kept.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from examples.arguments import Parser, source
from examples.drifa_net.networks import MODELS
from examples.drifa_net.records import METRICS, read_record, run_folder
from examples.tables import markdown, mean_sd

HERE = Path(__file__).parent
RESULTS, README = HERE / "results", HERE / "README.md"
START, END = "<!-- results: written by report.py -->\n", "<!-- end of results -->\n"
# Extra trees or logistic regression on the raw pixels, the better of the two, on the same splits.
PLAIN = {"ham10000_28": {"accuracy": 0.698, "balanced_accuracy": 0.202}, "sipakmed_28": {"accuracy": 0.872}}

Record = Mapping[str, Any]


def together(runs: Iterable[Record]) -> dict[Path, Record]:
    """The records of the results, and these with them; a `ValueError` unless those of one model differ in their seed alone."""
    found: dict[Path, Record] = {path: read_record(path) for path in sorted(RESULTS.glob("*-seed*.json"))}
    new: dict[Path, Record] = {}
    for run in runs:
        configuration = run["configuration"]
        path = run_folder(RESULTS, configuration["model"], configuration["seed"]).with_suffix(".json")
        if path in new:
            raise ValueError(f"two of these runs would be {path.name}: give one of each model and seed.")
        new[path] = run
    found |= new
    kinds: dict[str, Any] = {}
    for path, run in found.items():
        if run["configuration"]["model"] not in MODELS:
            raise ValueError(f"{path.stem} is of a model that the table does not know: it knows {', '.join(MODELS)}.")
        kind = {**run["configuration"], "seed": None}, run["test"].keys()
        if kinds.setdefault(run["configuration"]["model"], kind) != kind:
            raise ValueError(f"{path.stem} differs from other runs of its model in more than the seed: give runs of one kind.")
        if run["test"].keys() != next(iter(found.values()))["test"].keys():
            raise ValueError(f"{path.stem} has other tasks, {', '.join(run['test'])}: give runs on the same data.")
    return found


def kept(runs: Mapping[Path, Record], trials: Sequence[Record]) -> None:
    """Write the records to the results, and what the trials tried."""
    RESULTS.mkdir(exist_ok=True)
    for path, record in runs.items():
        path.write_text(json.dumps(record, indent=1) + "\n")
    if trials:
        rows = [
            {name: record["configuration"][name] for name in ("model", "lr", "epochs", "seed")} | {"validation": lowest(record)}
            for record in trials
        ]
        rows.sort(key=lambda row: (row["model"], row["lr"]))
        (RESULTS / "learning_rates.json").write_text(json.dumps(rows, indent=1) + "\n")


def lowest(record: Record) -> float:
    """The lowest validation loss of a run: the mean of its tasks' NLL."""
    return min(mean(task["nll"] for task in epoch["validation"].values()) for epoch in record["history"])


def records() -> dict[str, list[Record]]:
    """The results by model, in the order of the table, each by seed."""
    found: dict[str, list[Record]] = {}
    for model in MODELS:
        for path in sorted(RESULTS.glob(f"{model}-seed*.json")):
            found.setdefault(model, []).append(read_record(path))
    return found


def name(configuration: Mapping[str, Any]) -> str:
    """A model in words."""
    if configuration["model"] == "drifa_net":
        reduction = configuration["reduction"]
        return f"DRIFA-Net, width {configuration['width']}" + (f", reduction {reduction}" if reduction else "")
    backbones = " + ".join(configuration["backbones"] * (1 if len(configuration["backbones"]) > 1 else 2))
    return f"`fuse`: {backbones}" if configuration["model"] == "fuse" else "the same, concatenated: no attention"


def table(found: Mapping[str, Sequence[Record]]) -> str:
    """The table of the README: a row for each model and task, with the plain baseline above."""
    first = next(iter(found.values()))[0]
    lines = []
    for task, values in first["test"].items():
        rows = []
        if task in PLAIN:
            cells = [f"{PLAIN[task][metric]:.3f}" if metric in PLAIN[task] else "" for metric in METRICS]
            rows.append(["plain baseline on the raw pixels", "", *cells])
        for runs in found.values():
            cells = [mean_sd([run["test"][task][metric] for run in runs]) for metric in METRICS]
            rows.append([name(runs[0]["configuration"]), f"{runs[0]['parameters']:,}", *cells])
        table = markdown(["", "parameters", *METRICS.values()], rows)
        lines += [f"**{task}**, {values['samples']} test images", "", table, ""]
    return "\n".join(lines)


def described(found: Mapping[str, Sequence[Record]]) -> str:
    """How the runs of the table were made."""
    runs = [run for several in found.values() for run in several]
    first = runs[0]["configuration"]
    rates = {model: several[0]["configuration"]["lr"] for model, several in found.items()}
    seeds = {model: len(several) for model, several in found.items()}
    counts = ", ".join(sorted({str(count) for count in seeds.values()}))
    text = f"Mean and standard deviation of {counts} seeds, {first['epochs']} epochs, batches of {first['batch_size']} pairs. "
    path = RESULTS / "learning_rates.json"
    if path.exists():
        rows = json.loads(path.read_text())
        tried = ", ".join(f"{lr:g}" for lr in sorted({row["lr"] for row in rows}))
        chosen = ", ".join(f"{model} {lr:g}" for model, lr in rates.items())
        text += f"Learning rates tried: {tried}, {rows[0]['epochs']} epochs, chosen by validation loss: {chosen}."
    return text


def written(found: Mapping[str, Sequence[Record]]) -> str:
    """What stands between the marks in the README."""
    return f"\n{described(found)}\n\n{table(found)}" if found else ""


def main(argv: Sequence[str] | None = None) -> None:
    """Keep what is given, then write the table."""
    parser = Parser("python -m examples.drifa_net.report", __doc__)
    parser.add_argument("runs", nargs="*", type=source, help="folders of finished runs")
    parser.add_argument("--trials", nargs="+", type=source, default=[], help="folders of runs that chose a learning rate")
    options = parser.parse_args(argv)
    with parser.explained():
        trials = [read_record(folder / "run.json") for folder in options.trials]
        kept(together(read_record(folder / "run.json") for folder in options.runs), trials)
    found = records()
    before, _, rest = README.read_text().partition(START)
    after = rest.partition(END)[2]
    README.write_text(f"{before}{START}{written(found)}{END}{after}")


if __name__ == "__main__":
    main()
