"""Folders of one's own, and how several sources of the same samples are paired."""

import shutil

import numpy as np
import pytest
from PIL import Image

from examples.drifa_net.data import load
from examples.drifa_net.samples import alone, joined, part_name
from examples.drifa_net.sources import Collection, read
from tests.examples.collections import write_archive
from tests.examples.own_data import CLASSES, shown, write_folder

# Folders


def test_a_folder_a_class_is_read_whatever_is_hidden_in_it(tmp_path):
    root = write_folder(tmp_path / "images")
    (root / ".ipynb_checkpoints").mkdir()
    shown(0, 1).save(root / ".ipynb_checkpoints" / "s000.png")
    shown(0, 1).save(root / "mel" / "._s000.png")
    (root / "notes.txt").touch()
    (root / "nv" / "deeper").mkdir()
    (root / "nv" / "s001.png").rename(root / "nv" / "deeper" / "s001.PNG")
    collection = read(root)
    assert (collection.name, collection.classes, len(collection)) == ("images", ("bkl", "mel", "nv"), 60)
    for path, label in zip(collection.images, collection.labels, strict=True):
        assert collection.classes[label] in path.parts
        assert CLASSES[int(path.stem[1:]) % 3] == collection.classes[label]
    assert (collection.split, collection.groups) == (None, None)


@pytest.mark.parametrize("parts", [["train", "val", "test"], ["Training", "Testing"]])
def test_folders_of_a_split_are_the_split(parts, tmp_path):
    collection = read(write_folder(tmp_path / "images", 60, parts=parts))
    numbers = {"train": 0, "val": 1, "test": 2, "Training": 0, "Testing": 2}
    assert collection.split.tolist() == [numbers[path.parts[-3]] for path in collection.images]
    assert collection.classes == ("bkl", "mel", "nv")


def test_a_folder_is_found_in_the_one_it_was_unpacked_to(tmp_path):
    write_folder(tmp_path / "archive" / "flowers")
    (tmp_path / "archive" / "__MACOSX").mkdir()
    assert read(tmp_path / "archive").source == tmp_path / "archive" / "flowers"


def test_images_beside_class_folders_are_refused(tmp_path):
    root = write_folder(tmp_path / "images")
    shown(0, 0).save(root / "loose.png")
    with pytest.raises(ValueError, match=r"has images beside its class folders, the first loose\.png"):
        read(root)
    shutil.rmtree(root / "mel")
    shutil.rmtree(root / "nv")
    (root / "loose.png").unlink()
    with pytest.raises(ValueError, match="needs images of at least two classes, got bkl"):
        read(root)


def test_images_without_classes_need_a_table(tmp_path):
    for i in range(4):
        (tmp_path / "flat").mkdir(exist_ok=True)
        shown(0, i).save(tmp_path / "flat" / f"{i}.png")
    assert read(tmp_path / "flat").classes == ()
    with pytest.raises(ValueError, match="flat: nothing in .*flat says what a sample is"):
        load([tmp_path / "flat"])


def test_images_of_more_than_eight_bits_are_stretched_not_cut(tmp_path):
    values = np.array([[1000, 1500], [2000, 3000]])
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "a.png")
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "b.tif")
    Image.fromarray(np.full((2, 2), 700, np.uint16)).save(tmp_path / "c.png")
    collection = read(tmp_path)
    for i in (0, 1):
        pixels = np.asarray(collection.open(i))
        assert pixels[..., 0].tolist() == [[0, 64], [128, 255]]
        assert (pixels == pixels[..., :1]).all()
    assert not np.asarray(collection.open(2)).any()


# Pairing


def test_two_folders_of_the_same_samples_are_paired_by_name(tmp_path):
    left, right = write_folder(tmp_path / "left", 60), write_folder(tmp_path / "right", 60, seed=1)
    (right / "mel" / "s003.png").unlink()
    (left / "nv" / "s004.png").unlink()
    data = load([left, right], size=8, augmentation=False)
    assert data.branches == ("left", "right")
    assert data.tasks == {"label": ("bkl", "mel", "nv")}  # they agree: one task
    said = "by name, as s000: 58 of 60 samples are in all of left, right, 1 besides in left, 1 besides in right"
    assert data.report["pairing"] == said
    for key in ("train", "validation", "test"):
        inputs, present, targets = next(iter(data.loader(getattr(data, key), 60)))
        for branch, x in enumerate(inputs.values()):
            has = present[:, branch]
            assert [CLASSES[k] for k in x[has].mean((2, 3)).argmax(1)] == [data.tasks["label"][k] for k in targets[has, 0]]


def test_sources_that_do_not_agree_are_tasks_of_their_own(tmp_path):
    left, right = write_folder(tmp_path / "left", 60), write_folder(tmp_path / "right", 60)
    (right / "mel").rename(right / "other")
    data = load([left, right], size=8)
    assert data.tasks == {"left": ("bkl", "mel", "nv"), "right": ("bkl", "nv", "other")}


def test_archives_are_paired_by_their_key_and_never_by_chance_unasked(tmp_path):
    paths = []
    for name, order in (("a", np.arange(40)), ("b", np.random.default_rng(0).permutation(40))):
        paths.append(tmp_path / f"{name}.npz")
        arrays = write_archive(paths[-1], count=40, size=(8, 8))
        arrays["images"] = (np.zeros((40, 8, 8, 3), np.uint8) + 6 * np.arange(40, dtype=np.uint8)[:, None, None, None])[order]
        np.savez(paths[-1], **arrays | {"labels": arrays["labels"][order]})
    with pytest.raises(ValueError, match=r"a: nothing says which samples .*a\.npz holds, .* or give --pair chance"):
        load(paths)
    for path, order in zip(paths, (np.arange(40), np.random.default_rng(0).permutation(40)), strict=True):
        arrays = dict(np.load(path))
        np.savez(path, **arrays, sample=np.array([f"sample {i}" for i in order]))
    data = load(paths, augmentation=False)
    assert data.report["pairing"].startswith("by name, as sample 0: 40 of 40 samples are in all of a, b")
    inputs, present, _ = next(iter(data.loader(data.train, 40)))
    assert present.all()
    assert (inputs["a"] == inputs["b"]).all()
    assert load(paths, pair="chance").report["pairing"] == "by chance, again in every epoch"


def test_sources_without_a_common_sample_are_refused(tmp_path):
    left, right = write_folder(tmp_path / "left"), write_folder(tmp_path / "right")
    for path in sorted(right.rglob("*.png")):
        path.rename(path.with_name(f"other {path.name}"))
    with pytest.raises(ValueError, match="left has no sample in common .* first are 's002' in left, 'other s002' in right"):
        load([left, right])
    assert load([left, right], size=8, pair="chance").branches == ("left", "right")


def collection(name, keys, labels=None, **options):
    images = np.zeros((len(keys), 2, 2), np.uint8)
    labels = np.zeros(len(keys), np.int64) if labels is None else np.array(labels)
    return alone(Collection(name, None, images, labels, ("x", "y"), names=np.array(keys), **options))


def test_groups_and_splits_of_both_sources_must_agree():
    a = collection("a", ["1", "2", "3"], groups=np.array(["g", "g", "h"]), split=np.array([0, 0, 2]))
    b = collection("b", ["2", "3", "4"], groups=np.array(["g", "h", "i"]), split=np.array([0, 2, 2]))
    both = joined([a, b])
    assert both.keys.tolist() == ["1", "2", "3", "4"]
    assert both.groups.tolist() == ["g", "g", "h", "i"]
    assert both.split.tolist() == [0, 0, 2, 2]
    assert both.rows["b"].tolist() == [-1, 0, 1, 2]
    with pytest.raises(ValueError, match="a, c do not agree on the group of 1 samples"):
        joined([a, collection("c", ["1", "2"], groups=np.array(["z", "g"]))])
    with pytest.raises(ValueError, match="a, c: 1 samples have no split"):
        joined([a, collection("c", ["1", "9"])])
    with pytest.raises(ValueError, match="c: None has '1' more than once"):
        joined([a, collection("c", ["1", "1"])])


def test_no_sample_need_be_in_all_of_three_sources():
    both = joined([collection("a", ["1", "2"]), collection("b", ["2", "3"]), collection("c", ["3", "4"])])
    assert {name: rows.tolist() for name, rows in both.rows.items()} == {
        "a": [0, 1, -1, -1],
        "b": [-1, 0, 1, -1],
        "c": [-1, -1, 0, 1],
    }
    with pytest.raises(ValueError, match="c has no sample in common with another source"):
        joined([collection("a", ["1", "2"]), collection("b", ["2", "3"]), collection("c", ["8"])])


def test_names_are_those_that_a_network_can_have():
    assert part_name("photo.path") == "photo_path"
    assert part_name("left eye") == "left_eye"
    assert part_name("type") == "type_"
    assert part_name("a", ["a"]) == "a-2"
    assert part_name("a", ["a", "a-2"]) == "a-3"
