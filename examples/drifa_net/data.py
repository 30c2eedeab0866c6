"""Collections of medical images as DRIFA-Net eats them: split, cleaned, augmented, paired. (INTERFACE FIRST; bodies follow.)

data = load(["HAM10000/", "SIPaKMeD/"], seed=0)          # one path a branch; none: scikit-learn's digits in two halves
net = DrifaNet(data.heads, branches=len(data.branches))
for epoch in range(epochs):
    data.train.set_epoch(epoch)                          # new pairing, order and augmentation; DataLoader(shuffle=False)
    for images, targets in DataLoader(data.train, 32):   # list of m `b 3 h w` float32 in [-1, 1], `b k` int64
        ...
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Generator, Tensor
from torch.utils.data import Dataset

IGNORE = -100  # the target of an image whose label was counted before; what `cross_entropy` ignores by default


class Pairs(Dataset[tuple[list[Tensor], Tensor]]):
    """One image a branch and one target a task, for one of the three splits.

    len(pairs) is the length of the longest branch. The order is the dataset's own (drawn from seed and, in training, epoch), so
    a DataLoader takes it with `shuffle=False`, and a run resumed in the middle of an epoch skips what it has seen.
    Item i -> (images, targets): images a list of m `3 h w` float32 in [-1, 1], targets `k` int64.
    In training every target counts, each image of the longest branch once an epoch, the shorter branches' evenly repeated.
    In evaluation each image's target counts exactly once and is IGNORE where the image is only there as a partner: gather
    logits and targets over the split and leave those targets out (a batch may have none of a task: a mean over it is NaN).
    """

    def set_epoch(self, epoch: int) -> None:
        """Draw the pairing of this epoch (training; evaluation keeps one). Before the loader's workers start; no persistent ones."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, i: int) -> tuple[list[Tensor], Tensor]:
        raise NotImplementedError


@dataclass(frozen=True)
class Data:
    """What a run trains on."""

    branches: tuple[str, ...]  # a name each: "ham10000", "sipakmed", "left", ...
    tasks: dict[str, tuple[str, ...]]  # name of each task -> its classes, in the order of targets' columns
    train: Pairs
    validation: Pairs
    test: Pairs
    report: dict[str, Any]  # for a run's JSON and its first lines: source, counts a split and class, duplicates dropped, notes

    @property
    def heads(self) -> tuple[int, ...]:
        """Classes of each task, as DrifaNet takes them."""
        return tuple(len(classes) for classes in self.tasks.values())


def load(
    paths: Sequence[str | Path] = (),
    *,
    kinds: Sequence[str | None] | None = None,
    size: int | None = None,
    seed: int = 0,
    augmentation: bool = True,
    cache: bool = True,
) -> Data:
    """Read one collection a branch (each its own task), or the digits where no path is given (two views, two tasks).

    Args:
        paths: a folder or an .npz each.
        kinds: "ham10000", "sipakmed", "brain_mri", "iq_othnccd" or "npz" for each path; None to find it out.
        size: height and width of the images; None: 32 for the digits (halves are size x size/2), an archive's own, else 128.
        seed: of splits, pairing and augmentation.
        augmentation: flips, turns and shifts of training images.
        cache: keep decoded images in memory.
    """
    raise NotImplementedError


def augment(image: Tensor, generator: Generator) -> Tensor:
    """A random flip, quarter turn and small shift of `c h w`."""
    raise NotImplementedError


Augmentation = Callable[[Tensor, Generator], Tensor]
