"""Images are decoded once, whatever happens in between."""

import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from examples.drifa_net import store
from examples.drifa_net.sources import Collection, read
from examples.drifa_net.store import decoded
from tests._compare import assert_same_bits
from tests.examples.collections import picture
from tests.examples.own_data import shown, write_folder


@pytest.fixture
def opened(monkeypatch):
    """The images that were decoded, by the names of their files."""
    names, before = [], Collection.open

    def counting(self, i, at_least=None):
        names.append(self.images[i].name)
        return before(self, i, at_least)

    monkeypatch.setattr(Collection, "open", counting)
    return names


def same(rows, others):
    """Whether two sets of rows hold the same images and thumbnails."""
    for i in range(len(rows)):
        assert_same_bits(rows.image(i), others.image(i))
    assert np.array_equal(rows.thumbnails(), others.thumbnails())


def test_a_cache_gives_what_decoding_gives_and_decodes_once(tmp_path, opened):
    collection, cache = read(write_folder(tmp_path / "images", 30)), tmp_path / "cache"
    first, plain = decoded(collection, (8, 6), cache), decoded(collection, (8, 6), None)
    assert first.image(3).shape == (3, 8, 6)
    same(first, plain)
    opened.clear()
    same(decoded(collection, (8, 6), cache), plain)
    assert opened == []
    decoded(collection, (4, 4), cache)  # another size is another cache
    assert len(opened) == 30


def test_content_is_what_counts_not_its_place(tmp_path, opened):
    folder, cache = write_folder(tmp_path / "images", 12), tmp_path / "cache"
    decoded(read(folder), (8, 8), cache)
    shutil.move(folder, tmp_path / "moved")
    shutil.copy(tmp_path / "moved" / "nv" / "s001.png", tmp_path / "moved" / "mel" / "again.png")
    shown(2, 77).save(tmp_path / "moved" / "mel" / "s000.png")  # another image under an old name
    opened.clear()
    collection = read(tmp_path / "moved")
    rows = decoded(collection, (8, 8), cache)
    assert opened == ["s000.png"]
    same(rows, decoded(collection, (8, 8), None))


def test_what_was_decoded_before_a_kill_is_kept(tmp_path, opened, monkeypatch):
    collection, cache = read(write_folder(tmp_path / "images", 30)), tmp_path / "cache"
    monkeypatch.setattr(store, "CHUNK", 8)
    monkeypatch.setattr(store, "keep", dying := Dying(store.keep, 2))
    with pytest.raises(KeyboardInterrupt):
        decoded(collection, (8, 8), cache)
    monkeypatch.setattr(store, "keep", dying.keep)
    opened.clear()
    rows = decoded(collection, (8, 8), cache)
    assert len(opened) == 30 - 2 * 8
    same(rows, decoded(collection, (8, 8), None))


class Dying:
    """Writes so many chunks, then is killed before it has written the keys of one."""

    def __init__(self, keep, count):
        self.keep, self.left = keep, count

    def __call__(self, folder, keys, rows):
        self.keep(folder, keys, rows)
        if self.left == 0:
            newest = max(folder.glob("*.keys.npy"), key=lambda path: path.stat().st_mtime_ns)
            newest.unlink()
            raise KeyboardInterrupt
        self.left -= 1


@pytest.mark.parametrize("kind", ["rows", "keys"])
def test_damaged_files_of_a_cache_are_made_again(kind, tmp_path):
    collection, cache = read(write_folder(tmp_path / "images", 12)), tmp_path / "cache"
    decoded(collection, (8, 8), cache)
    (path,) = cache.glob(f"*/*.{kind}.npy")
    path.write_bytes(path.read_bytes()[:150])
    same(decoded(collection, (8, 8), cache), decoded(collection, (8, 8), None))


def test_rows_travel_as_their_paths(tmp_path):
    collection = read(write_folder(tmp_path / "images", 12))
    rows = decoded(collection, (32, 32), tmp_path / "cache")
    rows.image(0)
    packed = pickle.dumps(rows)
    assert len(packed) < 32 * 32 * 3
    same(pickle.loads(packed), rows)


def test_large_photographs_are_decoded_in_part_and_look_the_same(tmp_path):
    picture(0, size=24).resize((600, 450), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", quality=95)
    collection = Collection("x", None, [tmp_path / "a.jpg"], np.zeros(1, np.int64), ("a",))
    assert collection.open(0, at_least=64).size == (150, 113)
    assert collection.open(0).size == (600, 450)
    with Image.open(tmp_path / "a.jpg") as image:
        whole = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1).astype(float)
    apart = np.abs(decoded(collection, (32, 32), None).image(0).numpy() - whole)
    assert (apart.mean() < 1, apart.max() < 9) == (True, True)  # of 255


def test_arrays_are_resized_in_memory(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 9, 7), np.uint8)
    collection = Collection("x", None, images, np.zeros(5, np.int64), ("a",))
    rows = decoded(collection, (9, 7), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    assert torch.equal(rows.image(2), torch.from_numpy(images[2]).expand(3, -1, -1))
