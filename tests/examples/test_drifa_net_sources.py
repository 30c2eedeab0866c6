"""The collections as their publishers ship them, in small: real files in folders of their own."""

import csv
import io
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from examples.drifa_net import sources
from examples.drifa_net.sources import READERS, halves, read
from examples.drifa_net.store import decoded
from tests.examples.collections import BRAIN, KINDS, LESIONS, build, picture, write_archive


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_collection_is_told_by_its_folder(kind, tmp_path):
    root = build(kind, tmp_path)
    collection = read(root)
    assert collection.name == kind
    expected = read(root, kind)
    assert list(map(str, collection.images)) == list(map(str, expected.images))
    assert set(READERS) == {*KINDS, "npz", "folder"}


def test_collection_is_found_in_the_folder_it_was_unpacked_to(kind, tmp_path):
    inner = tmp_path / "archive" / "The collection"
    root = build(kind, inner)
    (tmp_path / "archive" / ".DS_Store").touch()
    assert root == inner
    for given in (None, kind):
        assert read(tmp_path, given).source == inner


def test_ham10000_is_read(tmp_path):
    collection = read(build("ham10000", tmp_path))
    assert collection.classes == ("bkl", "mel", "nv")
    assert dict(zip(*np.unique(collection.labels, return_counts=True), strict=True)) == {0: 12, 1: 12, 2: 12}
    with (tmp_path / "HAM10000_metadata.csv").open() as lines:
        rows = {row["image_id"]: row for row in csv.DictReader(lines)}
    for path, label, lesion in zip(collection.images, collection.labels, collection.groups, strict=True):
        assert (rows[path.stem]["dx"], rows[path.stem]["lesion_id"]) == (collection.classes[label], lesion)
    assert {path.parent.name for path in collection.images} == {"HAM10000_images_part_1", "HAM10000_images_part_2"}
    assert len(set(collection.groups)) == 3 * LESIONS
    assert (collection.split, collection.notes) == (None, ())
    picture(99).save(tmp_path / "HAM10000_images_part_1" / "ISIC_extra.jpg")
    collection = read(tmp_path)
    assert len(collection) == 36
    assert collection.notes == ("1 images that HAM10000_metadata.csv does not name are left out",)


def test_sipakmed_is_read(tmp_path):
    collection = read(build("sipakmed", tmp_path))
    assert collection.classes == ("Metaplastic", "Parabasal")
    for path, label, slide in zip(collection.images, collection.labels, collection.groups, strict=True):
        name = collection.classes[label]
        assert path.parts[-4:-1] == (f"im_{name}", f"im_{name}", "CROPPED")
        assert slide == f"{name}/{path.name[:3]}"  # slide 001 of one class is not that of another
    assert len(collection) == 2 * 8 * 2
    assert len(set(collection.groups)) == 2 * 8


def test_brain_mri_is_read(tmp_path):
    collection = read(build("brain_mri", tmp_path))
    assert collection.classes == ("glioma", "notumor")
    folders = [(path.parent.parent.name, path.parent.name) for path in collection.images]
    assert folders == [
        ({0: "Training", 2: "Testing"}[split], collection.classes[label])
        for split, label in zip(collection.split.tolist(), collection.labels, strict=True)
    ]
    assert np.bincount(collection.split).tolist() == [2 * BRAIN, 0, 8]
    assert collection.groups is None
    assert "patients are not known" in collection.notes[0]


def test_iq_othnccd_is_read(tmp_path):
    collection = read(build("iq_othnccd", tmp_path))
    assert collection.classes == ("benign", "malignant", "normal")
    starts = {"benign": "Bengin", "malignant": "Malignant", "normal": "Normal"}
    for path, label in zip(collection.images, collection.labels, strict=True):
        assert path.name.startswith(starts[collection.classes[label]])
    assert np.bincount(collection.labels).tolist() == [60, 62, 64]
    assert collection.notes == (
        "patients are not known: blocks of 10 neighbouring file numbers stay together",
        "left out: Test cases",
    )
    for path, label, block in zip(collection.images, collection.labels, collection.groups, strict=True):
        number = int(re.search(r"\((\d+)\)", path.name)[1])
        assert block == f"{collection.classes[label]}/{(number - 1) // 10}"


@pytest.mark.parametrize("colour", [True, False])
@pytest.mark.parametrize("key", [None, "lesion_id", "slide", "group"])
def test_archive_round_trip(colour, key, tmp_path):
    arrays = write_archive(tmp_path / "cells.npz", colour=colour, key=key, split=key is None)
    collection = read(tmp_path / "cells.npz")
    assert (collection.name, collection.classes) == ("cells", ("a", "b"))
    assert np.array_equal(collection.labels, arrays["labels"])
    assert collection.labels.dtype == np.int64
    if key == "slide":  # the number alone is not unique
        arrays["slide"] = np.array([f"{'ab'[label]}/{n}" for label, n in zip(arrays["labels"], arrays["slide"], strict=True)])
    for array, name in ((collection.groups, key), (collection.split, "split")):
        assert (array is None) == (name not in arrays)
        assert array is None or np.array_equal(array, arrays[name])
    size = arrays["images"].shape[1:3]
    image = decoded(collection, size, None).image(3)
    pixels = arrays["images"][3] if colour else np.stack([arrays["images"][3]] * 3, -1)
    assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1))
    assert (image.dtype, image.is_contiguous()) == (torch.uint8, True)


def test_image_is_the_file_at_the_size_asked_for(kind, tmp_path):
    collection = read(build(kind, tmp_path))
    with Image.open(collection.images[5]) as file:
        pixels = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)
        smaller = torch.from_numpy(np.array(file.convert("RGB").resize((10, 14), Image.Resampling.BILINEAR))).permute(2, 0, 1)
    assert torch.equal(decoded(collection, tuple(pixels.shape[1:]), None).image(5), pixels)
    assert torch.equal(decoded(collection, (14, 10), None).image(5), smaller)


def test_halves_are_two_views_of_each_digit():
    from sklearn.datasets import load_digits

    left, right, parity = halves()
    pixels, digits = load_digits(return_X_y=True)
    assert np.array_equal(left.labels, digits)
    assert np.array_equal(parity, digits % 2)
    whole = np.concatenate([left.images, right.images], 2)
    assert np.abs(whole / 255 * 16 - pixels.reshape(-1, 8, 8)).max() < 0.05


def edit_table(old, new):
    def change(root):
        table = root / "HAM10000_metadata.csv"
        table.write_text(re.sub(old, new, table.read_text(), count=1))

    return change


def remove(pattern):
    def change(root):
        for path in list(root.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def rename(path, name):
    return lambda root: (root / path).rename((root / path).with_name(name))


def rewrite_table(name, separator):
    """HAM10000's table under another name, with other separators."""

    def change(root):
        with (root / "HAM10000_metadata.csv").open(newline="") as lines:
            rows = list(csv.reader(lines))
        (root / "HAM10000_metadata.csv").unlink()
        with (root / name).open("w", newline="") as lines:
            csv.writer(lines, delimiter=separator, quoting=csv.QUOTE_NONNUMERIC).writerows(rows)

    return change


def move(pattern, place):
    """Put what a pattern finds where a function of its path, relative to the root, says."""

    def change(root):
        for path in sorted(root.glob(pattern), reverse=True):
            target = root / place(path.relative_to(root))
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)

    return change


def hide(root):
    """What programs leave in folders, with images and tables in it."""
    deepest = next(path for path in sorted(root.rglob("*.*")) if path.suffix in (".jpg", ".bmp"))
    for folder in (root / "__MACOSX", deepest.parent / ".ipynb_checkpoints"):
        folder.mkdir()
        shutil.copy(deepest, folder / deepest.name)
    shutil.copy(deepest, deepest.with_name(f"._{deepest.name}"))
    (root / ".DS_Store").touch()
    (root / "._HAM10000_metadata.csv").write_bytes(b"\x00\x05\x16\x07")


SHIPPED = {
    "ham10000": {
        "a table with tabs": rewrite_table("HAM10000_metadata.tab", "\t"),
        "a table without an ending": rewrite_table("HAM10000_metadata", ","),
        "a table in lower case": rewrite_table("ham10000_metadata.csv", ","),
        "folders one level deeper": move("*_part_?/*.jpg", lambda path: path.parent / path.parent.name / path.name),
        "folders in lower case": move("*_part_?", lambda path: str(path).lower()),
        "both parts in one": move("*_part_?/*.jpg", lambda path: f"HAM10000_images_part_1/{path.name}"),
        "JPG": move("*_part_?/*.jpg", lambda path: path.with_suffix(".JPG")),
        "hidden": hide,
    },
    "sipakmed": {
        "cropped": move("*/*/CROPPED", lambda path: path.with_name("cropped")),
        "no inner folder": move("*/*/CROPPED", lambda path: f"{path.parts[0]}/CROPPED"),
        "BMP": move("*/*/CROPPED/*.bmp", lambda path: path.with_suffix(".BMP")),
        "hidden": hide,
    },
    "brain_mri": {
        "lower case": move("*ing", lambda path: str(path).lower()),
        "train and test": move("*ing", lambda path: str(path).lower().removesuffix("ing")),
        "classes in capitals": move("*/*", lambda path: path.with_name(path.name.title())),
        "hidden": hide,
    },
    "iq_othnccd": {
        "benign": move("Bengin cases", lambda path: "Benign cases"),
        "lower case": move("* cases", lambda path: str(path).lower()),
        "no test cases": remove("Test cases"),
        "JPEG": move("*/*.jpg", lambda path: path.with_suffix(".JPEG")),
        "hidden": hide,
    },
}


@pytest.mark.parametrize(
    ("kind", "change"),
    [(kind, change) for kind, changes in SHIPPED.items() for change in changes.values()],
    ids=[f"{kind}: {name}" for kind, changes in SHIPPED.items() for name in changes],
)
def test_what_publishers_ship_and_unpacking_makes_of_it_is_read(kind, change, tmp_path):
    plain, root = read(build(kind, tmp_path / "plain")), build(kind, tmp_path / "changed")
    change(root)
    found = read(root)
    assert (found.name, found.classes) == (kind, plain.classes)
    expected, got = (
        {path.stem: (label, group) for path, label, group in zip(one.images, one.labels, groups_of(one), strict=True)}
        for one in (plain, found)
    )
    assert got == expected
    assert len(found) == len(plain)


def groups_of(collection):
    return range(len(collection)) if collection.groups is None else collection.groups


def test_cells_of_another_format_are_read(tmp_path):
    root = build("sipakmed", tmp_path)
    for path in list(root.glob("*/*/CROPPED/*.bmp")):
        with Image.open(path) as image:
            image.save(path.with_suffix(".png"))
        path.unlink()
    assert len(read(root)) == 2 * 8 * 2


def test_a_slice_without_a_number_is_refused(tmp_path):
    root = build("iq_othnccd", tmp_path)
    picture(0).save(root / "Normal cases" / "another.jpg")
    with pytest.raises(ValueError, match=r"another\.jpg has no number in its name, so its neighbours are unknown"):
        read(root)


MISSING, WRONG = FileNotFoundError, ValueError


@pytest.mark.parametrize(
    ("kind", "change", "error", "message"),
    [
        ("ham10000", remove("*.csv"), MISSING, r"HAM10000_metadata \(\.csv, \.tab or neither\) is missing: download"),
        (
            "ham10000",
            remove("*_part_2"),
            MISSING,
            r"18 of 36 images of .* are not in any folder of .*, the first ISIC_0000001\.jpg",
        ),
        ("ham10000", edit_table("lesion_id", "lesion"), WRONG, "needs the columns lesion_id, image_id, dx, got lesion, image"),
        ("ham10000", edit_table("(?s).*", ""), WRONG, "needs the columns .*, got none"),
        ("ham10000", edit_table(r"(ISIC_\d+),\w+", r"\1,"), WRONG, r"line 2 of .*HAM10000_metadata\.csv has no dx"),
        ("ham10000", edit_table("ISIC_0000001", "ISIC_0000000"), WRONG, "names ISIC_0000000 more than once"),
        ("sipakmed", remove("im_Parabasal/*/CROPPED"), WRONG, "class 'Parabasal' of .* holds no image"),
        ("sipakmed", remove("im_Parabasal"), WRONG, "at least two classes, got Metaplastic: unpack the others"),
        (
            "sipakmed",
            rename("im_Parabasal/im_Parabasal/CROPPED/001_01.bmp", "cell.bmp"),
            WRONG,
            r"cell\.bmp is not named <slide>",
        ),
        ("brain_mri", remove("Testing"), MISSING, "Testing/ is missing: unpack the whole"),
        ("brain_mri", remove("Testing/glioma"), WRONG, r"only one has \['glioma'\]"),
        ("brain_mri", remove("*/glioma/*"), WRONG, "class 'glioma' of .* holds no image"),
        ("iq_othnccd", remove("Normal cases"), MISSING, "Normal cases/ is missing: unpack the whole"),
        ("iq_othnccd", remove("Bengin cases/*"), WRONG, "class 'benign' of .* holds no image"),
    ],
)
def test_wrong_folder_names_what_is_wrong(kind, change, error, message, tmp_path):
    root = build(kind, tmp_path)
    change(root)
    with pytest.raises(error, match=message) as raised:
        read(root)
    assert str(root) in str(raised.value)


def test_wrong_path_names_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: name the folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no collection \(ham10000, sipakmed, brain_mri, iq_othnccd\)"):
        read(tmp_path)
    (tmp_path / "only.txt").touch()
    with pytest.raises(ValueError, match="holds no collection"):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"only\.txt is no folder: sipakmed is read"):
        read(tmp_path / "only.txt", "sipakmed")
    with pytest.raises(ValueError, match=r"kind to be one of ham10000, .*, folder, got 'isic'"):
        read(tmp_path, "isic")
    with pytest.raises(ValueError, match="at least two classes, got none"):
        read(tmp_path, "sipakmed")
    build("ham10000", tmp_path)
    build("sipakmed", tmp_path)
    with pytest.raises(ValueError, match="looks like ham10000 and sipakmed: give the folder of one of them"):
        read(tmp_path)
    assert read(tmp_path, "sipakmed").name == "sipakmed"


@pytest.mark.parametrize("content", [b"", b"not an image", picture(0, "whole")[:400]], ids=["empty", "text", "half"])
def test_unreadable_image_is_named(content, tmp_path):
    collection = read(build("brain_mri", tmp_path))
    collection.images[3].write_bytes(content)
    path = re.escape(str(collection.images[3]))
    with pytest.raises(ValueError, match=rf"{path} is no readable image \(.*\): unpack it again"):
        collection.open(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, r"has no array 'images', only \['classes', 'labels'\]"),
        ({"labels": None}, "has no array 'labels'"),
        ({"classes": None}, "has no array 'classes'"),
        ({"images": np.zeros((4, 8, 8, 3), np.float32)}, r"of uint8, got \(4, 8, 8, 3\) of float32"),
        ({"images": np.zeros((4, 8, 8, 4), np.uint8)}, r"got \(4, 8, 8, 4\) of uint8"),
        ({"images": np.zeros((4, 8), np.uint8)}, r"got \(4, 8\)"),
        ({"images": np.zeros((0, 8, 8), np.uint8)}, r"got \(0, 8, 8\)"),
        ({"labels": np.zeros(5, np.int64)}, "an integer label for each of its 4 images"),
        ({"labels": np.zeros(4)}, "an integer label for each"),
        ({"labels": np.array([0, 1, 2, 0])}, "labels beyond its 2 classes"),
        ({"labels": np.array([0, 1, -1, 0])}, "labels beyond its 2 classes"),
        ({"classes": np.array("ab")}, "needs classes to list their names"),
        ({"slide": np.zeros(3)}, "needs one 'slide' an image"),
        ({"split": np.zeros(3)}, "split 0, 1 or 2 for each image"),
        ({"split": np.array([0, 1, 2, 3])}, "split 0, 1 or 2 for each image"),
        ({"classes": np.array(["a", "b"], object)}, "is no npz archive of plain arrays"),
    ],
)
def test_wrong_archive_names_what_is_wrong(change, message, tmp_path):
    good = {"images": np.zeros((4, 8, 8), np.uint8), "labels": np.array([0, 1, 0, 1]), "classes": np.array(["a", "b"])}
    path = tmp_path / "wrong.npz"
    np.savez(path, **{name: array for name, array in (good | change).items() if array is not None})
    with pytest.raises(ValueError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)


def test_file_that_is_no_archive_is_named(tmp_path):
    single = io.BytesIO()
    np.save(single, np.zeros(3))
    for content in (b"", b"PK\x03\x04 but no more", b"text", single.getvalue()):
        (tmp_path / "wrong.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"wrong\.npz is no npz archive of plain arrays"):
            read(tmp_path / "wrong.npz")


def test_every_collection_says_where_it_is_from_and_under_what_licence():
    entries = re.findall(r"^- `(\w+)`: (.*?)(?=^- |^$)", sources.__doc__, re.MULTILINE | re.DOTALL)
    assert [kind for kind, _ in entries] == list(READERS)
    for kind, text in entries[:4]:
        assert re.search(r"CC BY-NC 4\.0|CC BY 4\.0|CC0 1\.0|no formal licence", text), kind
        assert re.search(r"doi:10\.|\.html|kaggle\.com/", text), kind
