"""What is left of a diagnosis when some of its modalities are missing: `python examples/missing_modalities.py`.

Views of the same samples are branches of one fused network: small MLPs, fused by MIFA after each of their two stages. It is
trained on samples that have every view, with and without modality dropout, and tested on every subset of the views. Beside it
stand the same branches without MIFA, and logistic regression: one model with what is missing set to its mean, and a model of
its own for every subset, which no single network has to beat.

Without `--data` the views are the upper, middle and lower rows of scikit-learn's scanned digits. An archive (npz) holds
`labels` (n) and a view (n, features) a name, or `train_…` and `test_…` of each; views without a `test_…` are missing there.
"""

import copy
import itertools
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import sklearn
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import drifa_attn
from examples.arguments import Parser, check_files, output, source
from examples.drifa_net.sources.npz import arrays_of
from examples.tables import markdown, mean_sd

STEPS, RATE, BATCH, WIDTH = 150, 5e-3, 128, 64  # chosen for time and convergence on training samples
FOLDS, SEEDS = 5, 3
# name: (modality dropout, with MIFA)
NETWORKS = {
    "MIFA": (0.0, True),
    "MIFA, modality dropout": (0.5, True),
    "no MIFA, modality dropout": (0.5, False),
}
OWN, FILLED = "regression for each subset", "regression, means filled in"
STYLES = {
    "MIFA": ("#92c5de", "o"),
    "MIFA, modality dropout": ("#2166ac", "o"),
    "no MIFA, modality dropout": ("#b2182b", "D"),
    FILLED: ("#b8b8b8", "s"),
    OWN: ("#4d4d4d", "|"),
}

Views = dict[str, np.ndarray]  # by name, sample feature
Scores = dict[str, dict[str, list[float]]]  # method, subset, one score a seed


@dataclass
class Samples:
    """Views of the same samples and their classes."""

    views: Views
    labels: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> "Samples":
        return Samples({name: view[rows] for name, view in self.views.items()}, self.labels[rows])


def embedded() -> dict[str, np.ndarray]:
    """The digits of scikit-learn as three views: rows 1 to 3, 4 and 5, 6 to 8 of each image."""
    images, labels = load_digits(return_X_y=True)
    upper, middle, lower = np.split(images, [24, 40], axis=1)
    return {"labels": labels, "upper": upper, "middle": middle, "lower": lower}


def read(path: Path | None, names: Sequence[str] | None = None) -> tuple[Samples, Samples | None]:
    """The samples of an archive, or the embedded ones, and its test samples if it has some; of the views named, or of all."""
    arrays = arrays_of(path) if path else embedded()
    where = str(path or "the digits")
    prefix = "train_" if "train_labels" in arrays else ""
    labels = labels_of(where, arrays, f"{prefix}labels")
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"{where} has one class alone: it needs at least two.")
    if counts.min() < FOLDS:
        rare, count = classes[counts.argmin()], counts.min()
        raise ValueError(f"class {rare} of {where} has {count} samples: {FOLDS} folds need at least as many of each.")
    views = views_of(where, arrays, prefix, len(labels))
    if unknown := [name for name in names or () if name not in views]:
        raise ValueError(f"{where} has no view {unknown[0]!r} of {len(labels)} samples: it has {', '.join(views) or 'none'}.")
    samples = Samples({name: views[name] for name in names or views}, np.searchsorted(classes, labels))
    if len(samples.views) < 2:
        raise ValueError(f"{where} has {len(samples.views)} views ({', '.join(samples.views)}): fusion needs at least two.")
    check_finite(where, samples.views)
    return samples, tests(where, arrays, samples, classes) if "test_labels" in arrays else None


def tests(where: str, arrays: dict[str, np.ndarray], samples: Samples, classes: np.ndarray) -> Samples:
    """The test samples of an archive, of the views that are trained on."""
    labels = labels_of(where, arrays, "test_labels")
    if other := set(labels.tolist()) - set(classes.tolist()):
        raise ValueError(f"{where} has test samples of class {min(other)}, which no training sample has: leave them out.")
    found = views_of(where, arrays, "test_", len(labels))
    views = {name: found[name] for name in samples.views if name in found}
    if not views:
        raise ValueError(f"{where} has test labels but none of the views at test: add some, or leave the labels out.")
    check_finite(where, views)
    for name, view in views.items():
        if view.shape[1:] != samples.views[name].shape[1:]:
            raise ValueError(f"view {name!r} of {where} has other features at test than in training.")
    return Samples(views, np.searchsorted(classes, labels))


def labels_of(where: str, arrays: dict[str, np.ndarray], key: str) -> np.ndarray:
    """The class of each sample, as an archive numbers it."""
    if key not in arrays:
        raise ValueError(f"{where} holds no labels: it needs an array 'labels', or 'train_labels' and 'test_labels'.")
    if arrays[key].ndim != 1 or arrays[key].dtype.kind not in "iub" or not len(arrays[key]):
        raise ValueError(f"{where} needs an integer for each sample as {key}, got {arrays[key].dtype} {arrays[key].shape}.")
    return arrays[key].astype(np.int64)


def views_of(where: str, arrays: dict[str, np.ndarray], prefix: str, samples: int) -> Views:
    """Every array with this prefix that has a row of numbers for each sample."""
    return {
        key.removeprefix(prefix): array.astype(np.float32)
        for key, array in arrays.items()
        if key.startswith(prefix) and array.ndim == 2 and len(array) == samples and array.dtype.kind in "fiu" and array.size
    }


def check_finite(where: str, views: Views) -> None:
    """Raise a `ValueError` unless all values of these views are numbers."""
    for name, view in views.items():
        if not np.isfinite(view).all():
            raise ValueError(f"view {name!r} of {where} holds values that are not finite: leave those samples out.")


def standardised(training: Samples, test: Samples) -> tuple[Samples, Samples]:
    """Both by the training samples' mean and deviation."""
    parts = []
    for part in (training, test):
        views = {
            name: (view - training.views[name].mean(0)) / (training.views[name].std(0) + 1e-6)
            for name, view in part.views.items()
        }
        parts.append(Samples(views, part.labels))
    return parts[0], parts[1]


def subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Every subset of the views but the empty one, the smallest first."""
    return [subset for size in range(1, len(names) + 1) for subset in itertools.combinations(names, size)]


def branch(features: int) -> nn.Module:
    """The backbone of one view: two stages."""

    def stage(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, WIDTH), nn.LayerNorm(WIDTH), nn.GELU(), nn.Dropout(0.2))

    return nn.Sequential(OrderedDict(stage1=stage(features), stage2=stage(WIDTH)))


def fused(samples: Samples, seed: int) -> drifa_attn.Fused:
    """The network for these views."""
    torch.manual_seed(seed)
    names = list(samples.views)
    backbones = {name: branch(view.shape[1]) for name, view in samples.views.items()}
    at = [dict.fromkeys(names, "stage1"), dict.fromkeys(names, "stage2")]
    return drifa_attn.fuse(backbones, {"class": int(samples.labels.max()) + 1}, at=at, dropout=0.2)


def tensors(samples: Samples) -> tuple[dict[str, Tensor], Tensor]:
    """The samples as the network takes them."""
    return {name: torch.from_numpy(view) for name, view in samples.views.items()}, torch.from_numpy(samples.labels)


def train(net: drifa_attn.Fused, samples: Samples, *, steps: int, seed: int) -> None:
    """Train the whole network on samples that have every view."""
    views, labels = tensors(samples)
    torch.manual_seed(seed)  # order, dropout and modality dropout
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    order = torch.cat([torch.randperm(len(labels)) for _ in range(-(-steps * BATCH // len(labels)))])
    net.train()
    for rows in order[: steps * BATCH].split(BATCH):
        loss = cross_entropy(net({name: view[rows] for name, view in views.items()})["class"], labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval()


@torch.inference_mode()
def network_score(net: drifa_attn.Fused, test: Samples, subset: Sequence[str]) -> float:
    """Balanced accuracy with these views alone."""
    views, _ = tensors(test)
    logits = net({name: views[name] for name in subset})["class"]
    return float(balanced_accuracy_score(test.labels, logits.argmax(1)))


def regression(samples: Samples, names: Sequence[str]) -> LogisticRegression:
    """Logistic regression on these views, one after the other."""
    return LogisticRegression(max_iter=2000).fit(np.hstack([samples.views[name] for name in names]), samples.labels)


def measured(net: drifa_attn.Fused, training: Samples, test: Samples, *, steps: int, seed: int) -> dict[str, dict[str, float]]:
    """The score of every method for every subset of the views that the test samples have; the network is copied."""
    training, test = standardised(training, test)
    names = list(training.views)
    scores: dict[str, dict[str, float]] = {}
    for method, (rate, with_mifa) in NETWORKS.items():
        twin = copy.deepcopy(net)
        twin.modality_dropout = rate
        with nullcontext() if with_mifa else drifa_attn.disabled(twin):
            train(twin, training, steps=steps, seed=seed)
            scores[method] = {" + ".join(s): network_score(twin, test, s) for s in subsets(list(test.views))}
    whole = regression(training, names)
    scores[FILLED], scores[OWN] = {}, {}
    for subset in subsets(list(test.views)):
        means = np.zeros((len(test.labels), 1), np.float32)  # they are standardised
        filled = [test.views[n] if n in subset else means.repeat(training.views[n].shape[1], 1) for n in names]
        scores[FILLED][" + ".join(subset)] = float(balanced_accuracy_score(test.labels, whole.predict(np.hstack(filled))))
        own = regression(training, subset).predict(np.hstack([test.views[name] for name in subset]))
        scores[OWN][" + ".join(subset)] = float(balanced_accuracy_score(test.labels, own))
    return scores


def runs(
    samples: Samples, test: Samples | None, seeds: int, steps: int
) -> Iterator[tuple[str, int, dict[str, dict[str, float]]]]:
    """All folds of all seeds, and the test samples for every seed: (protocol, seed, scores)."""
    for seed in range(seeds):
        net = fused(samples, seed)
        folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
        for training, rest in folds.split(samples.labels, samples.labels):
            yield "folds", seed, measured(net, samples[training], samples[rest], steps=steps, seed=seed)
        if test is not None:
            yield "test", seed, measured(net, samples, test, steps=steps, seed=seed)


def gathered(results: Sequence[tuple[str, int, dict[str, dict[str, float]]]]) -> dict[str, Scores]:
    """By protocol, method and subset one score a seed: the mean of its folds."""
    found: dict[str, Scores] = {}
    for protocol in dict.fromkeys(protocol for protocol, *_ in results):
        seeds = sorted({seed for p, seed, _ in results if p == protocol})
        each = [[scores for p, s, scores in results if (p, s) == (protocol, seed)] for seed in seeds]
        found[protocol] = {
            method: {subset: [mean(fold[method][subset] for fold in folds) for folds in each] for subset in each[0][0][method]}
            for method in each[0][0]
        }
    return found


def table(result: dict[str, Any]) -> str:
    """The results as Markdown, from what the JSON holds and nothing else."""
    views = ", ".join(f"{name} ({features})" for name, features in result["views"].items())
    lines = [f"## {result['data']}: {result['samples']} samples, {result['classes']} classes; views (features): {views}"]
    for protocol, scores in result["scores"].items():
        where = f"{result['folds']}-fold cross-validation" if protocol == "folds" else f"{result['test_samples']} test samples"
        lines.append(f"\nBalanced accuracy, {where}, mean and standard deviation over {result['seeds']} seeds.\n")
        subsets = next(iter(scores.values()))
        rows = [[subset, *(mean_sd(by_subset[subset]) for by_subset in scores.values())] for subset in subsets]
        lines.append(markdown(["views present", *scores], rows))
    return "\n".join(lines) + "\n"


def draw(result: dict[str, Any]) -> Figure:
    """Every subset a row, every method a mark; bars are one standard deviation over the seeds."""
    protocols = result["scores"]
    heights = [len(next(iter(scores.values()))) + 1.5 for scores in protocols.values()]
    figure = Figure(figsize=(9, 1.5 + 0.55 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(protocols), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (protocol, scores) in zip(panels, protocols.items(), strict=True):
        rows = list(next(iter(scores.values())))
        for i, (method, by_subset) in enumerate(scores.items()):
            colour, mark = STYLES[method]
            y = [row + 0.14 * (i - (len(scores) - 1) / 2) for row in range(len(rows))]
            x = [mean(by_subset[subset]) for subset in rows]
            bars = [stdev(by_subset[subset]) if result["seeds"] > 1 else 0 for subset in rows]
            size = 11 if mark == "|" else 6
            axes.errorbar(x, y, xerr=bars, fmt=mark, color=colour, markersize=size, markeredgewidth=2, label=method)
        axes.axvline(1 / result["classes"], color="black", linewidth=0.8, linestyle=":")
        axes.text(1 / result["classes"], -0.62, " chance", fontsize=8, va="top")
        axes.hlines([row + 0.5 for row in range(len(rows) - 1)], 0, 1, color="#dddddd", linewidth=0.8)
        where = f"{result['folds']}-fold cross-validation" if protocol == "folds" else f"{result['test_samples']} test samples"
        axes.set(yticks=range(len(rows)), yticklabels=rows, xlim=(0, 1.01), ylim=(len(rows) - 0.4, -0.7), title=where)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel(f"balanced accuracy, {result['seeds']} seeds")
    panels[-1].legend(frameon=False, loc="upper center", bbox_to_anchor=(0.45, -0.16 * 7 / heights[-1]), ncols=3)
    figure.suptitle(f"{result['data']}: one network, whatever views a sample has", size=14)
    return figure


def main(argv: list[str] | None = None) -> None:
    """Measure, write the JSON, the table and the picture."""
    parser = Parser("python examples/missing_modalities.py", __doc__)
    parser.add_argument("--data", type=source, help="an npz archive; without it scikit-learn's digits")
    parser.add_argument("--views", nargs="+", metavar="NAME", help="views to use; all by default")
    parser.add_argument("--output", type=output, default="outputs", help="folder for the results")
    parser.add_argument("--fast", action="store_true", help="one seed and five steps: seconds, and no result")
    options = parser.parse_args(argv)
    name = options.data.stem if options.data else "scikit-learn digits"
    files = [f"missing_modalities_{name.replace(' ', '_')}.{suffix}" for suffix in ("json", "md", "png")]
    with parser.explained():
        samples, test = read(options.data, options.views)
        check_files(options.output, files)
    seeds, steps = (1, 5) if options.fast else (SEEDS, STEPS)
    console = Console(highlight=False)
    total = seeds * (FOLDS + (test is not None))
    found = list(track(runs(samples, test, seeds, steps), total=total, description="folds and seeds", console=console))
    result: dict[str, Any] = {
        "data": name,
        "samples": len(samples.labels),
        "test_samples": len(test.labels) if test else 0,
        "classes": len(set(samples.labels.tolist())),
        "views": {name: view.shape[1] for name, view in samples.views.items()},
        "folds": FOLDS,
        "seeds": seeds,
        "steps": steps,
        "versions": {"drifa_attn": drifa_attn.__version__, "torch": torch.__version__, "scikit-learn": sklearn.__version__},
        "scores": gathered(found),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    numbers, text, picture = (options.output / file for file in files)
    numbers.write_text(json.dumps(result, indent=1) + "\n")
    text.write_text(table(result))
    draw(result).savefig(picture, dpi=110)
    console.print(Markdown(table(result)))
    console.print(f"Written to {options.output}: {', '.join(files)}")


if __name__ == "__main__":
    main()
