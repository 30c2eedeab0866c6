"""What happens to a collection before DRIFA-Net sees it: split, cleaned, augmented, paired."""

import json
import pickle
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from examples.drifa_net.data import IGNORE, load
from examples.drifa_net.samples import alone
from examples.drifa_net.sources import Collection, read
from examples.drifa_net.splits import SPLITS, divide, drop_duplicates
from examples.drifa_net.store import decoded
from tests._compare import assert_same_bits
from tests.examples.collections import KINDS, build, picture, write_archive


def split_of(data, branch=0):
    """The collection's split as `load` made it, -1 where an image was dropped."""
    split = np.full(len(data.test.images[branch].rows), -1)
    for part, key in enumerate(SPLITS):
        chosen = getattr(data, key).images[branch].chosen
        assert (split[chosen] == -1).all()
        split[chosen] = part
    return split


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each kind's folder, not to be changed."""
    return {kind: build(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


# Splits


@pytest.mark.parametrize("kind", KINDS)
def test_split_covers_the_collection_and_every_class(kind, folders):
    data = load([folders[kind]], size=8)
    split, collection = split_of(data), read(folders[kind])
    assert set(split.tolist()) == {0, 1, 2}
    for part in range(3):
        assert set(collection.labels[split == part].tolist()) == set(range(len(collection.classes)))
    assert data.tasks == {kind: collection.classes}
    assert (data.heads, data.branches) == ((len(collection.classes),), (kind,))


@pytest.mark.parametrize("kind", ["ham10000", "sipakmed", "iq_othnccd"])
@pytest.mark.parametrize("seed", range(5))
def test_no_lesion_or_slide_or_block_is_in_two_splits(kind, seed, folders):
    data = load([folders[kind]], size=8, seed=seed)
    split, groups = split_of(data), read(folders[kind]).groups
    homes = {(group, part) for group, part in zip(groups.tolist(), split.tolist(), strict=True)}
    assert len(homes) == len(set(groups.tolist()))
    assert len(set(groups.tolist())) < len(groups)
    assert data.report["branches"][kind]["split"] == "by class and group"


@pytest.mark.parametrize("grouped", [False, True])
def test_split_is_stratified(grouped):
    labels = np.repeat([0, 1], [400, 80])
    groups = np.arange(480) // 2 if grouped else None
    collection = Collection("many", None, np.zeros((480, 1, 1), np.uint8), labels, ("a", "b"), groups)
    split = divide(alone(collection), 0)
    for part, share in ((2, 0.2), (1, 0.1)):
        counts = np.bincount(labels[split == part])
        assert np.abs(counts - share * np.array([400, 80])).max() <= 2


def test_split_follows_the_seed(folders):
    first, again, other = (split_of(load([folders["ham10000"]], size=8, seed=seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_publishers_test_set_stays(folders):
    data = load([folders["brain_mri"]], size=8)
    split, stored = split_of(data), read(folders["brain_mri"]).split
    assert np.array_equal(split == 2, stored == 2)
    assert (split[stored == 0] == 1).sum() == 24 // 8
    assert data.report["branches"]["brain_mri"]["split"] == "as given, validation drawn"


def test_publishers_whole_split_stays(tmp_path):
    arrays = write_archive(tmp_path / "cells.npz", split=True)
    data = load([tmp_path / "cells.npz"])
    assert np.array_equal(split_of(data), arrays["split"])
    assert data.report["branches"]["cells"]["split"] == "as given"


def test_a_given_split_through_a_group_is_refused_or_mended(tmp_path):
    arrays = write_archive(tmp_path / "cells.npz", key="group", split=True)
    arrays["split"][:8] = [0, 1, 0, 2, 0, 0, 0, 0]
    np.savez(tmp_path / "cells.npz", **arrays)
    message = r"its split has 2 groups \(2 samples\) in more than one part: 0, 1. Mend it, or drop them by --leaks drop"
    with pytest.raises(ValueError, match=message):
        load([tmp_path / "cells.npz"])
    split = split_of(load([tmp_path / "cells.npz"], leaks="drop"))
    assert split[:8].tolist() == [0, -1, 0, -1, 0, 0, 0, 0]
    assert (split[8:] >= 0).all()


def test_a_given_split_through_an_image_is_refused_or_mended(tmp_path):
    arrays = write_archive(tmp_path / "cells.npz", split=True)
    test = np.flatnonzero(arrays["split"] == 2)[3]
    arrays["images"][test] = arrays["images"][0]
    np.savez(tmp_path / "cells.npz", **arrays)
    with pytest.raises(ValueError, match=rf"1 test images that show the same as one of an earlier part: image {test} of"):
        load([tmp_path / "cells.npz"])
    data = load([tmp_path / "cells.npz"], leaks="drop")
    assert split_of(data)[test] == -1
    assert f"dropped: image {test} of" in str(data)
    assert str(tmp_path) not in json.dumps(data.report)


def keep(path, pattern, count):
    """Delete all but the first so many files of a pattern."""
    for extra in sorted(path.glob(pattern))[count:]:
        extra.unlink()


@pytest.mark.parametrize("count", [1, 2])
def test_class_of_one_or_two_images_is_refused(count, tmp_path):
    root = build("iq_othnccd", tmp_path)
    keep(root, "Bengin cases/*", 0)
    for number in range(count):
        picture(number).save(root / "Bengin cases" / f"Bengin case ({number + 1}).jpg")
    message = rf"iq_othnccd: class 'benign' of .* has but {count} of at least 3 images \(.*Bengin case \(1\)\.jpg.*\): add some"
    with pytest.raises(ValueError, match=message):
        load([root])


def test_class_without_an_image_is_refused(tmp_path):
    arrays = write_archive(tmp_path / "cells.npz")
    np.savez(tmp_path / "cells.npz", **arrays | {"classes": ["a", "b", "c"]})
    with pytest.raises(ValueError, match=r"class 'c' of .*cells\.npz has but 0 of at least 3 images \(none\)"):
        load([tmp_path / "cells.npz"])


def test_too_few_images_or_lesions_are_refused(tmp_path):
    root = build("sipakmed", tmp_path)
    keep(root, "im_Parabasal/*/CROPPED/00[2-9]_*.bmp", 0)
    for cell in range(3, 7):
        picture(cell).save(root / f"im_Parabasal/im_Parabasal/CROPPED/001_{cell:02d}.bmp")
    with pytest.raises(ValueError, match=r"to test \(no fold has all .*'Parabasal', has 6 images: add some of other groups"):
        load([root])
    few = {"images": np.zeros((6, 2, 2), np.uint8), "labels": [0, 0, 0, 1, 1, 1], "classes": ["a", "b"]}
    np.savez(tmp_path / "few.npz", **few)
    with pytest.raises(
        ValueError, match=r"few\.npz cannot give one of 5 parts to test \(.*n_splits.* 'a', has 3 images: add some,"
    ):
        load([tmp_path / "few.npz"])


@pytest.mark.parametrize("parts", [[0, 1], [1, 2], [0]])
def test_split_without_training_or_test_is_refused(parts, tmp_path):
    arrays = write_archive(tmp_path / "cells.npz", split=True)
    np.savez(tmp_path / "cells.npz", **arrays | {"split": np.resize(parts, 40)})
    with pytest.raises(ValueError, match=r"the split of .*cells\.npz needs images of 0 \(train\) and 2 \(test\)"):
        load([tmp_path / "cells.npz"])


def test_training_without_a_class_is_refused_and_a_test_without_one_is_said(tmp_path):
    arrays = write_archive(tmp_path / "cells.npz", split=True)
    arrays["split"][(arrays["split"] == 2) & (arrays["labels"] == 1)] = 0
    np.savez(tmp_path / "cells.npz", **arrays)
    data = load([tmp_path / "cells.npz"])
    assert "  cells: test has no b: metrics leave out what is absent" in str(data).splitlines()
    arrays["split"][arrays["labels"] == 1] = 2
    np.savez(tmp_path / "cells.npz", **arrays)
    with pytest.raises(ValueError, match=r"the train split of .*cells\.npz has no image of class 'b' of cells"):
        load([tmp_path / "cells.npz"])


# Duplicates


def test_duplicates_of_training_images_are_dropped(tmp_path):
    root = build("brain_mri", tmp_path)
    training = root / "Training" / "glioma" / "Tr-gl_0000.jpg"
    testing = root / "Testing" / "notumor"  # under another label even
    shutil.copy(training, testing / "copy.jpg")
    with Image.open(training) as image:
        image.convert("RGB").save(testing / "saved again.jpg", quality=90)
        image.save(testing / "another format.png")
        image.rotate(90).save(testing / "turned.jpg")
    twin = root / "Testing" / "glioma" / "Te-gl_0000.jpg"
    shutil.copy(twin, twin.with_name("twin.jpg"))
    with pytest.raises(ValueError, match="3 test images that show the same as one of an earlier part"):
        load([root], size=8, seed=1)
    data = load([root], size=8, seed=1, leaks="drop")
    collection = read(root)
    test = {collection.images[i].name for i in data.test.images[0].chosen}
    assert not test & {"copy.jpg", "saved again.jpg", "another format.png", "twin.jpg"}
    assert test >= {"turned.jpg", "Te-gl_0000.jpg", "Te-no_0003.jpg"}
    assert len(test) == 9
    assert data.report["branches"]["brain_mri"]["duplicates"] == {"validation": 0, "test": 4}
    assert "dropped as duplicates: 4 of test" in str(data)


def thumbnails(images):
    """Grey images as vectors."""
    collection = Collection("copies", None, images, np.zeros(len(images), np.int64), ("a",))
    return decoded(collection, images.shape[1:], None).thumbnails()


def test_duplicates_are_looked_for_in_the_order_of_the_splits():
    images = np.stack([np.asarray(picture(seed, size=32).convert("L")) for seed in (0, 1, 2, 0, 1, 3, 1, 3, 3, 4, 0)])
    split = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 0])
    found = drop_duplicates([(np.arange(11), thumbnails(images))], split)
    assert found == {"validation": {"leaked": [3, 4], "repeated": []}, "test": {"leaked": [6, 7, 8], "repeated": []}}
    assert split.tolist() == [0, 0, 0, -1, -1, 1, -1, -1, -1, 2, 0]


@pytest.mark.parametrize(("change", "dropped"), [(2, 1), (3, 0)])
def test_duplicates_are_alike_to_within_rounding(change, dropped):
    draw = np.random.default_rng(0)
    image = draw.integers(50, 200, (32, 32), np.uint8)
    other = image.copy()
    other[7, 9] += change
    views = [(np.arange(2), thumbnails(np.stack([image, other])))]
    assert len(drop_duplicates(views, np.array([0, 2]))["test"]["leaked"]) == dropped


def test_a_sample_of_several_images_is_a_repeat_only_if_all_of_them_are():
    images = thumbnails(np.stack([np.asarray(picture(seed, size=32).convert("L")) for seed in range(4)]))
    split = np.array([2, 2, 2])
    views = [(np.arange(3), images[[0, 0, 0]]), (np.arange(3), images[[1, 2, 1]])]
    assert drop_duplicates(views, split)["test"] == {"leaked": [], "repeated": [2]}
    split = np.array([0, 2, 2])
    assert drop_duplicates(views, split)["test"]["leaked"] == [1, 2]  # one image of training is enough


def test_unreadable_image_is_named_when_data_is_loaded(tmp_path):
    root = build("iq_othnccd", tmp_path)
    broken = root / "Malignant cases" / "Malignant case (4).jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(ValueError, match=rf"{re.escape(str(broken))} is no readable image"):
        load([root])


# Loading


def test_collections_become_branches_and_tasks(folders, tmp_path):
    write_archive(tmp_path / "cells.npz", key="slide")
    data = load(
        [folders["ham10000"], tmp_path / "cells.npz", folders["ham10000"]],
        kinds=[None, "npz", "ham10000"],
        size=16,
        pair="chance",
    )
    assert data.branches == ("ham10000", "cells", "ham10000-2")
    assert data.tasks == {"ham10000": ("bkl", "mel", "nv"), "cells": ("a", "b"), "ham10000-2": ("bkl", "mel", "nv")}
    assert data.heads == (3, 2, 3)
    for key in SPLITS:
        images, targets = next(iter(DataLoader(getattr(data, key), 4)))
        assert [tuple(x.shape) for x in images] == [(4, 3, 16, 16)] * 3
        assert {x.dtype for x in images} == {torch.float32}
        assert max(x.abs().max() for x in images) <= 1
        assert min(x.min() for x in images) < -0.5
        assert (tuple(targets.shape), targets.dtype) == ((4, 3), torch.int64)


@pytest.mark.parametrize("names", [(), ("ham10000", "iq_othnccd")])
def test_training_alone_changes_with_the_epoch(names, folders):
    data = load([folders[name] for name in names], size=8, pair="chance")
    assert (data.train.targets != IGNORE).all()
    for key in SPLITS:
        pairs = getattr(data, key)
        before = pairs.order.copy()
        pairs.set_epoch(1)
        assert np.array_equal(pairs.order, before) == (key != "train")


def test_report_counts_what_there_is(folders):
    data = load([folders["ham10000"], folders["brain_mri"]], size=8, seed=4, pair="chance")
    report = json.loads(json.dumps(data.report))
    assert report["seed"] == 4
    for branch, (name, said) in enumerate(report["branches"].items()):
        assert (name, said["source"], said["size"]) == (data.branches[branch], folders[name].name, [8, 8])
        for key in SPLITS:
            images = getattr(data, key).images[branch]
            collection = read(folders[name])
            counts = Counter(collection.classes[label] for label in collection.labels[images.chosen])
            assert said["images"][key] == counts
    lines = str(data).splitlines()
    assert re.fullmatch(r"ham10000: train \d+, validation \d+, test \d+; 8x8 px; split by class and group", lines[1])
    assert lines[0] == "pairing: by chance, again in every epoch"
    assert lines[-1] == "  patients are not known: slices of one may be in several splits"


def test_size_is_the_archives_own_or_as_asked(folders, tmp_path):
    write_archive(tmp_path / "cells.npz")
    shapes = [
        tuple(load([path], size=size).test[0][0][0].shape)
        for path, size in ((tmp_path / "cells.npz", None), (tmp_path / "cells.npz", 9), (folders["sipakmed"], None))
    ]
    assert shapes == [(3, 12, 10), (3, 9, 9), (3, 128, 128)]


def test_data_travels_to_workers(folders):
    data = load([folders["iq_othnccd"], folders["sipakmed"]], size=8, pair="chance")
    data.train.set_epoch(2)
    there = pickle.loads(pickle.dumps(data.train))
    for i in (0, 5):
        assert_same_bits(torch.stack(there[i][0]), torch.stack(data.train[i][0]))


def test_digits_are_two_views_and_two_tasks():
    data = load()
    assert (data.branches, data.heads) == (("left", "right"), (10, 2))
    assert data.tasks["parity"] == ("even", "odd")
    assert [len(getattr(data, key)) for key in SPLITS] == [1257, 180, 360]
    assert (
        sum((np.concatenate([getattr(data, key).images[0].chosen for key in SPLITS])[:, None] == np.arange(1797)).sum(0))
        == 1797
    )
    images, targets = next(iter(DataLoader(data.test, 360)))
    assert [tuple(x.shape) for x in images] == [(360, 3, 32, 16)] * 2
    assert torch.equal(targets[:, 0] % 2, targets[:, 1])
    assert (targets != IGNORE).all()
    again = load(seed=0, size=16)
    assert_same_bits(again.test.targets, data.test.targets)
    assert tuple(again.test[0][0][1].shape) == (3, 16, 8)


def test_digits_are_shifted_but_never_turned(monkeypatch):
    plain, moved = load(augmentation=False), load()
    for i in range(5):
        images = [((image + 1) * 127.5).round() for image in plain.train[i][0]]
        for image, other in zip(images, moved.train[i][0], strict=True):
            other = ((other + 1) * 127.5).round()
            inner = other[:, 6:-6, 3:-3]
            assert any(torch.equal(inner, image[:, 6 + y : 26 + y, 3 + x : 13 + x]) for y in range(-3, 4) for x in range(-1, 2))
    assert_same_bits(torch.stack(plain.test[0][0]), torch.stack(moved.test[0][0]))


@pytest.mark.parametrize(
    ("paths", "options", "message"),
    [
        ([], {"size": 0}, "size to be an integer >= 1, got 0"),
        ([], {"size": 32.0}, r"size to be an integer >= 1, got 32\.0"),
        ([], {"size": 33}, "an even size for the halves of the digits, got 33"),
        ([], {"seed": -1}, "seed to be an integer >= 0, got -1"),
        ([], {"seed": None}, "seed to be an integer >= 0, got None"),
        ("HAM10000", {}, r"list of paths, one for each branch, got 'HAM10000': write \['HAM10000'\]"),
        (["a"], {"pair": "luck"}, r"pair to be one of \('sample', 'chance'\), got 'luck'"),
        (["a"], {"leaks": "keep"}, r"leaks to be one of \('refuse', 'drop'\), got 'keep'"),
        (["a"], {"flips": "some"}, r"flips to be one of \(None, 'none', 'any'\), got 'some'"),
        (["a", "b"], {"kinds": ["npz"]}, r"a kind or None for each of 2 paths, got \['npz'\]"),
    ],
)
def test_options_are_checked(paths, options, message):
    with pytest.raises(ValueError, match=f"load expected .*{message}"):
        load(paths, **options)


def test_reading_twice_gives_the_same(folders):
    first, again = (load([folders["ham10000"], folders["sipakmed"]], size=8, seed=7, pair="chance") for _ in range(2))
    assert first.report == again.report
    for key in SPLITS:
        for (a, x), (b, y) in zip(getattr(first, key), getattr(again, key), strict=True):
            assert_same_bits(torch.stack(a), torch.stack(b))
            assert torch.equal(x, y)
