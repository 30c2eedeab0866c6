"""The protocol that every arm goes through: its rate is chosen on validation images, then it is trained and tested once a seed.

Within a seed all arms see the same training images, in the same order, flipped alike, and start from the same head.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from examples.drifa_net.metrics import scores
from examples.rows import Row, Rows
from examples.steps import kept

from .arms import ARMS, adapted, batched, deviations, groups, refined, trained_weights
from .data import Collection, Part
from .networks import pretrained

CHOOSING = 1000  # the seed that rates are chosen with; the seeds of the test are 0, 1, ...
CALIBRATION = 256  # images
ROW = ("arm", "seed", "rate", "part", "balanced_accuracy", "macro_f1", "ece", "trained", "kept_mb", "deviations", "torch")


@dataclass(frozen=True)
class Protocol:
    """What all arms have in common."""

    network: str
    sites: tuple[str, ...]
    seeds: int
    images: int
    epochs: int
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    batch: int = 32


def runs(collection: Collection, protocol: Protocol, arms: Sequence[str], rows: Rows) -> Iterator[tuple[str, int]]:
    """Do what has no row yet; before each run what it is, and how many are finished."""
    finished = 0
    for arm in arms:
        for rate in protocol.rates:
            yield f"{collection.name}: {arm}, rate {rate:g}", finished
            if not rows.find(arm=arm, seed=CHOOSING, rate=rate):
                rows.add(once(collection, protocol, arm, CHOOSING, rate, on="validation"))
            finished += 1
    for seed in range(protocol.seeds):
        for arm in arms:
            tried = [row for row in rows.find(arm=arm, seed=CHOOSING) if row["rate"] in protocol.rates]
            rate = max(tried, key=lambda row: row["balanced_accuracy"])["rate"]
            yield f"{collection.name}: {arm}, seed {seed}", finished
            if not rows.find(arm=arm, seed=seed):
                rows.add(once(collection, protocol, arm, seed, rate, on="test"))
            finished += 1
    yield f"{collection.name}: finished", finished


def once(collection: Collection, protocol: Protocol, name: str, seed: int, rate: float, *, on: str) -> Row:
    """One run of an arm, measured on one part of the collection."""
    arm = ARMS[name]
    drawn = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(collection.parts["train"]), generator=drawn)[: protocol.images]
    train, held = collection.parts["train"][rows], collection.parts[on]
    torch.manual_seed(seed)
    model = pretrained(protocol.network, len(collection.classes))
    before, behind = adapted(model, arm, protocol.sites, train.images[:CALIBRATION])
    flipped = batched(before, torch.cat([train.images, train.images.flip(-1)]))
    inputs = Part(flipped.reshape(2, len(train), *flipped.shape[1:]).transpose(0, 1), train.labels)
    head = model.get_classifier()
    optimizer = torch.optim.AdamW(groups(behind, head, arm, rate))
    fit(behind, optimizer, inputs, protocol, seed, learns_statistics=arm.tunes == "all")
    features = batched(before, held.images)
    behind.eval()
    return {
        "data": collection.name,
        "arm": name,
        "seed": seed,
        "rate": rate,
        "part": on,
        **scores(batched(behind, features).softmax(1), held.labels),
        "trained": trained_weights(behind),
        "kept_mb": kept(behind, lambda: behind(inputs.images[: protocol.batch, 0])) / 1e6,
        "deviations": deviations(behind, features) if refined(behind) else [],
        "torch": torch.__version__,
    }


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Part,
    protocol: Protocol,
    seed: int,
    *,
    learns_statistics: bool,
) -> list[float]:
    """Train on inputs `b 2 ...`, each image and its mirror image; the seconds of every step."""
    chance = torch.Generator().manual_seed(seed)
    steps = protocol.epochs * (len(inputs) // protocol.batch)
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps)
    seconds = []
    for _ in range(protocol.epochs):
        model.train(learns_statistics)  # batch norms of a frozen network keep their statistics
        order = torch.randperm(len(inputs), generator=chance)
        sides = torch.randint(2, (len(inputs),), generator=chance)
        for rows in order.split(protocol.batch)[: len(inputs) // protocol.batch]:
            start = time.perf_counter()
            loss = cross_entropy(model(inputs.images[rows, sides[rows]]), inputs.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            seconds.append(time.perf_counter() - start)
    return seconds


def steps(collection: Collection, protocol: Protocol, arms: Sequence[str], rounds: int = 8) -> dict[str, float]:
    """The milliseconds of a training step of every arm, the best of several rounds in which the arms take turns."""
    whole = collection.parts["train"]
    train = whole[torch.arange(min(CALIBRATION, len(whole)))]
    ready = {}
    for name in arms:
        model = pretrained(protocol.network, len(collection.classes))
        before, behind = adapted(model, ARMS[name], protocol.sites, train.images)
        optimizer = torch.optim.AdamW(groups(behind, model.get_classifier(), ARMS[name], 1e-3))
        ready[name] = behind, optimizer, Part(batched(before, train.images)[:, None], train.labels)
    found: dict[str, list[float]] = {name: [] for name in arms}
    for name in list(arms) * rounds:
        behind, optimizer, inputs = ready[name]
        single = Part(inputs.images.expand(-1, 2, *inputs.images.shape[2:]), inputs.labels)
        one = replace(protocol, epochs=1)
        found[name] += fit(behind, optimizer, single, one, 0, learns_statistics=ARMS[name].tunes == "all")
    return {name: 1000 * min(seconds) for name, seconds in found.items()}
