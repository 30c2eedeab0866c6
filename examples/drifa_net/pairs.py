"""What a network sees in one split: images and records of each branch, paired, augmented, in an order of their own."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from examples.drifa_net.augmentation import Augmentation
from examples.drifa_net.sources import UNLABELLED
from examples.drifa_net.store import Rows

IGNORE = UNLABELLED  # the target of an image whose label is counted elsewhere; what `cross_entropy` and `TaskLoss` leave out


class Images(Dataset[Tensor | None]):
    """Some images of a collection as `3 h w`, or volumes as `1 d h w`, uint8; None where `chosen` is −1."""

    def __init__(self, rows: Rows, chosen: np.ndarray) -> None:
        self.rows, self.chosen = rows, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i: int) -> Tensor | None:
        return None if self.chosen[i] < 0 else self.rows.image(int(self.chosen[i]))


class Vectors(Dataset[Tensor | None]):
    """Some rows of records `n c` as `c` float32; None where `chosen` is −1."""

    def __init__(self, values: Tensor, chosen: np.ndarray) -> None:
        self.values, self.chosen = values, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i: int) -> Tensor | None:
        return None if self.chosen[i] < 0 else self.values[self.chosen[i]]


class Pairs(Dataset[tuple[list[Tensor | None], Tensor]]):
    """What each branch sees and one target a task, for one split.

    It has the length of the longest branch and an order of its own, drawn from `seed` and, in training, the epoch: a DataLoader
    takes it with `shuffle=False`, and a run resumed within an epoch skips what it has seen. In training every target counts; an
    epoch has each image of the longest branch once and those of the others as evenly as can be. Otherwise each image's target
    is there once, and IGNORE where the image is a partner only: a batch may have none of a task.

    Args:
        images: the images or records of each branch.
        labels: of each task, `n` classes: of the branch of that number, or of the sample if `paired`.
        seed: of order, pairing and augmentation, >= 0.
        training: whether epochs differ and images repeat as their targets do.
        paired: whether image i of all branches is one sample; then a branch may lack some.
        balanced: whether training draws samples of every class as often (of the first task, if paired), with repeats.
        augmentation: of each branch, of `3 h w` in [-1, 1] with a generator of its own for epoch, item and branch; None for
            none.

    Shape: item i -> a list of m `3 h w` or `1 d h w` float32 in [-1, 1], `c` of a record, or None, and targets `k` int64.
    Raises: ValueError: no image in a branch, or as many labels as do not fit.
    """

    def __init__(
        self,
        images: Sequence["Images | Vectors"],
        labels: Sequence[np.ndarray],
        *,
        seed: int,
        training: bool = False,
        paired: bool = False,
        balanced: bool = False,
        augmentation: Sequence[Augmentation | None] | None = None,
    ) -> None:
        sizes = [len(branch) for branch in images]
        expected = [sizes[0]] * len(labels) if paired and len(set(sizes)) == 1 else sizes
        if not all(sizes) or [len(task) for task in labels] != expected:
            raise ValueError(
                f"Pairs expected a label for each image, got {[len(t) for t in labels]} labels for {sizes} images."
            )
        self.images, self.labels, self.seed, self.training, self.paired = images, labels, seed, training, paired
        self.balanced, self.augmentation = balanced, augmentation or [None] * len(images)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the order, pairing and augmentation of an epoch (in training), before the loader's workers are started."""
        self.epoch = epoch if self.training else 0
        draw = np.random.default_rng([self.seed, self.epoch])
        sizes, length = [len(branch) for branch in self.images], len(self)
        if self.paired:
            order = np.tile(self.drawn(draw, 0, length)[:, None], len(sizes))
            targets = np.stack([task[order[:, 0]] for task in self.labels], 1)
        else:
            rounds = [
                np.concatenate([self.drawn(draw, k, n) for _ in range(-(-length // n))])[:length] for k, n in enumerate(sizes)
            ]
            order, columns = np.stack(rounds, 1), []
            for task, chosen in zip(self.labels, rounds, strict=True):
                counted = self.training | (np.arange(length) < len(task))
                columns.append(np.where(counted, task[chosen], IGNORE))
            targets = np.stack(columns, 1)
        self.order, self.targets = order, torch.from_numpy(targets.astype(np.int64))

    def drawn(self, draw: np.random.Generator, task: int, count: int) -> np.ndarray:
        """All of so many samples in an order of chance, or as many with every class of a task as often."""
        if not (self.balanced and self.training):
            return draw.permutation(count)
        known = np.flatnonzero(self.labels[task] != IGNORE)
        labels = self.labels[task][known]
        weights = 1 / np.bincount(labels)[labels]
        return known[draw.choice(len(known), count, p=weights / weights.sum())]

    def __len__(self) -> int:
        return max(len(branch) for branch in self.images)

    def __getitem__(self, i: int) -> tuple[list[Tensor | None], Tensor]:
        given = [branch[j] for branch, j in zip(self.images, self.order[i].tolist(), strict=True)]
        images = [x.float() / 127.5 - 1 if x is not None and x.dtype == torch.uint8 else x for x in given]
        for b, (image, augmentation) in enumerate(zip(images, self.augmentation, strict=True)):
            if augmentation is not None and image is not None:
                seed = np.random.SeedSequence([self.seed, self.epoch, i % len(self), b]).generate_state(1)[0]
                images[b] = augmentation(image, Generator().manual_seed(int(seed)))
        return images, self.targets[i]
