"""The protocol that every arm goes through: its rate is chosen on validation, then it is trained and tested once a seed.

Within a seed all arms see the same samples in the same order, mirrored alike, lacking the same modalities, and their branches
and, where they read as much, their heads start alike.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor

import drifa_attn
from examples.drifa_net.metrics import scores
from examples.rows import Row, Rows
from examples.steps import kept

from .arms import added_flops, arms, built, deviations, groups, trained_weights
from .data import Collection, Part

CHOOSING = 1000  # the first of the seeds that rates are chosen with; the seeds of the test are 0, 1, ...
CALIBRATION = 256  # samples
ROW = ("arm", "seed", "rate", "part", "tasks", "balanced_accuracy", "nll", "without", "trained", "flops", "deviations", "torch")
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Protocol:
    """What all arms have in common.

    Attributes:
        seeds: of the test.
        choosing: of the choice of rates.
        samples: how many are drawn to train on, at most.
        steps: of training, each with a batch of so many samples.
        modality_dropout: in training, the probability that a present modality is dropped.
    """

    seeds: int
    choosing: int
    samples: int
    steps: int
    batch: int
    rates: tuple[float, ...]
    modality_dropout: float = 0.3


def total(protocol: Protocol, names: Sequence[str]) -> int:
    """How many runs a comparison of these arms has."""
    return len(names) * (protocol.seeds + protocol.choosing * len(protocol.rates))


def runs(collection: Collection, protocol: Protocol, names: Sequence[str], rows: Rows) -> Iterator[tuple[str, int]]:
    """Do what has no row yet; before each run what it is, and how many are finished."""
    finished = 0
    for name in names:
        for seed in range(CHOOSING, CHOOSING + protocol.choosing):
            for rate in protocol.rates:
                yield f"{collection.name}: {name}, rate {rate:g}", finished
                if not rows.find(arm=name, seed=seed, rate=rate):
                    rows.add(once(collection, protocol, name, seed, rate, on="validation"))
                finished += 1
    for seed in range(protocol.seeds):
        for name in names:
            yield f"{collection.name}: {name}, seed {seed}", finished
            if not rows.find(arm=name, seed=seed):
                rows.add(once(collection, protocol, name, seed, best(rows.find(arm=name), protocol), on="test"))
            finished += 1
    yield f"{collection.name}: finished", finished


def best(rows: Sequence[Row], protocol: Protocol) -> float:
    """The rate with the best balanced accuracy on validation, mean over tasks and seeds; of equal ones the likelier."""

    def worth(rate: float) -> tuple[float, float]:
        tried = [row for row in rows if row["part"] == "validation" and row["rate"] == rate]
        return mean(row["balanced_accuracy"] for row in tried), -mean(row["nll"] for row in tried)

    return max(protocol.rates, key=worth)


def once(collection: Collection, protocol: Protocol, name: str, seed: int, rate: float, *, on: str) -> Row:
    """One run of an arm, measured on one part of the collection."""
    parts = collection.divide(seed)
    chosen = torch.randperm(len(parts["train"]), generator=torch.Generator().manual_seed(seed))[: protocol.samples]
    train, held = parts["train"][chosen], parts[on]
    arm = arms(collection)[name]
    net = built(collection, arm, seed, protocol.modality_dropout)
    given, asked = gathered(collection, train, train, net), gathered(collection, held, train, net)
    first = {view: x[:CALIBRATION, 0] for view, x in given.items()}
    if arm.calibrates:
        drifa_attn.calibrate(net, first)
    fit(net, groups(net, rate), given, train.labels, protocol, seed)
    asked = {view: x[:, 0] for view, x in asked.items()}
    found = {task: scores(p, held.labels[task]) for task, p in predicted(net, asked).items()}
    return {
        "data": collection.name,
        "arm": name,
        "seed": seed,
        "rate": rate,
        "part": on,
        "tasks": found,
        "balanced_accuracy": mean(values["balanced_accuracy"] for values in found.values()),
        "nll": mean(values["nll"] for values in found.values()),
        "without": without(net, asked, held.labels),
        "trained": trained_weights(net),
        "flops": added_flops(net),
        "deviations": deviations(net, asked),
        "torch": torch.__version__,
    }


def gathered(collection: Collection, part: Part, train: Part, net: drifa_attn.Fused) -> Inputs:
    """What a network takes of a part, `n s ...`; vectors standardised by the samples that are trained on."""
    found = {}
    for name, rows in part.rows.items():
        if name in net.branches:
            view = collection.views[name]
            x = view.values[rows]
            if view.scaled:
                known = view.values[train.rows[name]]
                x = (x - known.mean(0)) / (known.std(0) + 1e-6)
            found[name] = x
    return found


def fit(
    net: drifa_attn.Fused,
    weights: list[dict],
    inputs: Inputs,
    labels: Mapping[str, Tensor],
    protocol: Protocol,
    seed: int,
) -> list[float]:
    """Train on inputs `n s ...`, each in one of its versions, with what the fusion adds to the loss; the seconds of a step."""
    optimizer = torch.optim.AdamW(weights)
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=protocol.steps)
    loss_of = drifa_attn.TaskLoss(labels)
    seconds = []
    net.train()
    for number, rows in enumerate(batches(len(next(iter(labels.values()))), protocol, seed)):
        start = time.perf_counter()
        torch.manual_seed(100_000 * seed + number)  # which modalities are dropped, in all arms alike
        versions = torch.randint(1_000_000, (len(rows),))
        logits = net({name: x[rows, versions % x.shape[1]] for name, x in inputs.items()})
        loss = loss_of(logits, {task: some[rows] for task, some in labels.items()}, net.losses())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        seconds.append(time.perf_counter() - start)
    net.eval()
    return seconds


def batches(count: int, protocol: Protocol, seed: int) -> Sequence[Tensor]:
    """The samples of every step: all of them in a new order, again and again."""
    chance = torch.Generator().manual_seed(seed)
    rounds = -(-protocol.steps * protocol.batch // count)
    order = torch.cat([torch.randperm(count, generator=chance) for _ in range(rounds)])
    return order[: protocol.steps * protocol.batch].split(protocol.batch)


@torch.inference_mode()
def predicted(net: drifa_attn.Fused, inputs: Inputs, size: int = 256) -> dict[str, Tensor]:
    """The probabilities of every task, a batch at a time; a network whose training diverged knows nothing."""
    some = range(0, len(next(iter(inputs.values()))), size)
    logits = [net({name: x[i : i + size] for name, x in inputs.items()}) for i in some]
    found = {task: torch.cat([one[task] for one in logits]).softmax(1) for task in net.heads}
    return {task: torch.where(p.isfinite(), p, 1 / p.shape[1]) for task, p in found.items()}


def without(net: drifa_attn.Fused, inputs: Inputs, labels: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """The balanced accuracy of every task with each modality missing, where others are left."""
    found = {}
    for missing in inputs if len(inputs) > 1 else ():
        probabilities = predicted(net, {name: x for name, x in inputs.items() if name != missing})
        found[missing] = {task: scores(p, labels[task])["balanced_accuracy"] for task, p in probabilities.items()}
    return found


def steps(collection: Collection, protocol: Protocol, names: Sequence[str], rounds: int = 8) -> dict[str, dict[str, float]]:
    """What a training step costs: milliseconds, the best of rounds in which arms take turns, and MB kept for backward."""
    train = collection.divide(0)["train"][: protocol.batch]
    one = Protocol(1, 1, protocol.batch, 2, len(train), protocol.rates, protocol.modality_dropout)
    ready, found = {}, {}
    for name in names:
        net = built(collection, arms(collection)[name], 0, protocol.modality_dropout)
        inputs = gathered(collection, train, train, net)
        found[name] = {"ms": float("inf"), "kept_mb": kept_mb(net.train(), inputs)}
        ready[name] = net, groups(net, 1e-4), inputs
    for name in list(names) * rounds:
        net, weights, inputs = ready[name]
        found[name]["ms"] = min(found[name]["ms"], 1000 * min(fit(net, weights, inputs, train.labels, one, 0)))
    return found


def kept_mb(net: drifa_attn.Fused, inputs: Inputs) -> float:
    """The MB that a forward pass in training keeps, with every modality there."""
    dropped, net.modality_dropout = net.modality_dropout, 0.0
    batch = {name: x[:, 0] for name, x in inputs.items()}
    size = kept(net, lambda: (net(batch), net.losses())) / 1e6
    net.modality_dropout = dropped
    return size
