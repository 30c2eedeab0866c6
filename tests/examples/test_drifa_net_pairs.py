"""How DRIFA-Net's images are paired and augmented."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Generator

from drifa_attn.fusion.terms import IGNORED
from examples.drifa_net.augmentation import SHIFT, augment, shift
from examples.drifa_net.data import IGNORE, Images, Pairs, load
from examples.drifa_net.sources import Collection, read
from examples.drifa_net.store import decoded
from tests._compare import assert_same_bits
from tests.examples.collections import KINDS, build


def numbered(*counts, seed=0):
    """A collection a branch whose image i has the grey level i, so that an item says which images it holds."""
    images, labels = [], []
    for count in counts:
        collection = Collection(
            "grey", None, np.arange(max(count, 1), dtype=np.uint8)[:, None, None], np.arange(max(count, 1)) % 3, ("a", "b", "c")
        )
        images.append(Images(decoded(collection, (1, 1), None), np.arange(count)))
        labels.append(collection.labels[:count])
    return images, labels


def seen(pairs):
    """Which image of each branch every item holds `n m`, and its targets `n k`."""
    items = [pairs[i] for i in range(len(pairs))]
    pixels = torch.tensor([[image.mean() for image in images] for images, _ in items])
    return ((pixels + 1) * 127.5).round().long(), torch.stack([targets for _, targets in items])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each kind's folder, not to be changed."""
    return {kind: build(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


# Pairing


@pytest.mark.parametrize("counts", [(10, 10), (23, 7), (7, 23), (5, 12, 30), (9,)])
def test_evaluation_counts_every_image_once(counts):
    images, labels = numbered(*counts)
    pairs = Pairs(images, labels, seed=3)
    assert len(pairs) == max(counts)
    shown, targets = seen(pairs)
    for branch, count in enumerate(counts):
        counted = targets[:, branch] != IGNORE
        assert sorted(shown[counted, branch].tolist()) == list(range(count))
        assert set(shown[~counted, branch].tolist()) <= set(range(count))
        assert torch.equal(targets[counted, branch], shown[counted, branch] % 3)
    assert IGNORE == IGNORED


def test_evaluation_stays_and_follows_the_seed():
    images, labels = numbered(23, 7)
    first, other = Pairs(images, labels, seed=0), Pairs(images, labels, seed=1)
    before = first.order.copy()
    first.set_epoch(5)
    assert np.array_equal(first.order, before)
    assert not np.array_equal(other.order, before)


@pytest.mark.parametrize("counts", [(10, 10), (23, 7), (5, 12, 30)])
def test_training_covers_the_longest_and_repeats_the_others_evenly(counts):
    images, labels = numbered(*counts)
    pairs = Pairs(images, labels, seed=3, training=True)
    for epoch in range(3):
        pairs.set_epoch(epoch)
        shown, targets = seen(pairs)
        assert torch.equal(targets, shown % 3)
        for branch, count in enumerate(counts):
            times = Counter(shown[:, branch].tolist())
            assert set(times) == set(range(count))
            assert set(times.values()) <= {max(counts) // count, -(-max(counts) // count)}


def test_training_pairs_anew_every_epoch():
    images, labels = numbered(100, 100)
    pairs = Pairs(images, labels, seed=3, training=True)
    epochs = []
    for epoch in (0, 1, 0):
        pairs.set_epoch(epoch)
        epochs.append({tuple(pair) for pair in pairs.order.tolist()})
    assert epochs[0] == epochs[2]
    assert len(epochs[0] & epochs[1]) < 10  # one is expected to come again by chance
    correlation = np.corrcoef(pairs.order.T)[0, 1]
    assert abs(correlation) < 0.3


def test_paired_views_stay_together():
    images, labels = numbered(20, 20)
    for training in (False, True):
        pairs = Pairs(images, [*labels, labels[0] % 2], seed=0, training=training, paired=True)
        shown, targets = seen(pairs)
        assert torch.equal(shown[:, 0], shown[:, 1])
        assert sorted(shown[:, 0].tolist()) == list(range(20))
        assert torch.equal(targets, torch.stack([shown[:, 0] % 3, shown[:, 0] % 3, shown[:, 0] % 3 % 2], 1))


@pytest.mark.parametrize(
    ("counts", "tasks", "paired"), [((5, 6), (5, 5), False), ((5, 6), (5,), True), ((5, 0), (5, 0), False)]
)
def test_labels_that_do_not_fit_are_refused(counts, tasks, paired):
    images, _ = numbered(*counts)
    with pytest.raises(ValueError, match=r"a label for each image, got \[5.*\] labels for \[5, [60]\] images"):
        Pairs(images, [np.zeros(n, np.int64) for n in tasks], seed=0, paired=paired)


# Augmentation


def test_augmentation_is_for_training_alone(folders):
    paths = [folders["ham10000"], folders["iq_othnccd"]]
    with_it, without = (load(paths, size=12, pair="chance", augmentation=moved) for moved in (True, False))
    for key in ("validation", "test"):
        for (a, x), (b, y) in zip(getattr(with_it, key), getattr(without, key), strict=True):
            assert_same_bits(torch.stack(a), torch.stack(b))
            assert torch.equal(x, y)
    changed = [not torch.equal(a[0], b[0]) for (a, _), (b, _) in zip(with_it.train, without.train, strict=True)]
    assert sum(changed) > len(changed) / 2
    images, targets = without.train[4]
    for branch, image in enumerate(images):
        source = without.train.images[branch]
        place = source.chosen[without.train.order[4, branch]]
        collection = read(paths[branch])
        assert_same_bits(image, decoded(collection, (12, 12), None).image(place).float() / 127.5 - 1)
        assert targets[branch] == collection.labels[place]


def test_augmentation_follows_seed_epoch_and_item(folders):
    def first(seed, epoch, item):
        data = load([folders["brain_mri"]], size=12)  # one split and order for all
        data.train.seed = seed
        data.train.epoch = epoch
        return data.train[item][0][0]

    assert_same_bits(first(0, 0, 3), first(0, 0, 3))
    others = [first(seed, epoch, 3) for seed, epoch in ((0, 1), (0, 2), (1, 0), (2, 0))]
    assert any(not torch.equal(first(0, 0, 3), other) for other in others[:2])
    assert any(not torch.equal(first(0, 0, 3), other) for other in others[2:])
    data = load([folders["brain_mri"]], size=12)
    assert_same_bits(data.train[-1][0][0], data.train[len(data.train) - 1][0][0])


def test_augment_reaches_every_flip_and_turn():
    image = torch.arange(16.0).view(1, 4, 4)  # too small to be shifted
    results = {tuple(augment(image, Generator().manual_seed(seed)).flatten().tolist()) for seed in range(100)}
    expected = {tuple(torch.rot90(i, k, (1, 2)).flatten().tolist()) for i in (image, image.flip(2)) for k in range(4)}
    assert results == expected
    assert torch.equal(image.flatten(), torch.arange(16.0))


def test_augment_keeps_the_shape_of_what_is_no_square():
    image = torch.rand(3, 8, 6)
    results = [augment(image, Generator().manual_seed(seed)) for seed in range(20)]
    assert {result.shape for result in results} == {image.shape}
    assert {tuple(result[0, 0].tolist()) for result in results} == {
        tuple(row.tolist()) for row in (image[0, 0], image[0, 0].flip(0), image[0, -1], image[0, -1].flip(0))
    }


def test_shift_moves_by_a_tenth_at_most_and_repeats_the_edge():
    image = torch.rand(2, 20, 30)
    rows, columns = torch.arange(20), torch.arange(30)
    expected = {
        (y, x): image[:, (rows + y).clamp(0, 19)][:, :, (columns + x).clamp(0, 29)] for y in range(-2, 3) for x in range(-3, 4)
    }
    reached = set()
    for seed in range(300):
        moved = shift(image, Generator().manual_seed(seed))
        (where,) = [place for place, other in expected.items() if torch.equal(moved, other)]
        reached.add(where)
    assert reached == set(expected)
    assert SHIFT == 0.1
