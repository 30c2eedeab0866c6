"""Volumes of one's own: read, turned, scaled, cached, and trained on beside a record."""

import sys

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState

import drifa_attn
from examples.drifa_net import predict, train
from examples.drifa_net.augmentation import augment, shift
from examples.drifa_net.data import Columns, load
from examples.drifa_net.sources import read
from examples.drifa_net.sources.volumes import read_volume, resized
from examples.drifa_net.volume_net import volume_net
from tests._commands import refused
from tests.examples.own_data import save, shown
from tests.examples.volume_data import block, write_nifti, write_series

pytest.importorskip("nibabel", reason="needs the extra volumes: nibabel reads NIfTI")
pytest.importorskip("pydicom", reason="needs the extra volumes: pydicom reads DICOM")

PLACES = ("right", "front", "head")


def standing(values):
    """What a volume should be read as: `d h w` from feet to head, back to front, left to right."""
    return values.transpose(2, 1, 0).astype(np.float32)


# Reading


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SAR", "PIL", "LAI"])
@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz", "SCAN.NII.GZ"])
def test_nifti_of_any_orientation_is_turned_to_one(axes, name, tmp_path):
    values = block(1)
    assert np.array_equal(read_volume(write_nifti(tmp_path / name, values, axes)), standing(values))


def test_a_dicom_series_is_ordered_rescaled_and_turned(tmp_path):
    values = block(2) // 2 * 2  # what a slope of two can hold
    order = np.random.default_rng(0).permutation(values.shape[2])
    assert np.allclose(read_volume(write_series(tmp_path / "s", values, order=order)), standing(values))


def test_both_forms_of_one_volume_are_one(tmp_path):
    values = block(0) // 2 * 2
    nifti, series = write_nifti(tmp_path / "a.nii.gz", values), write_series(tmp_path / "a", values)
    assert np.array_equal(read_volume(nifti), read_volume(series))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: (p / "x.nii").write_bytes(b"text"), "x.nii is no readable volume"),
        (
            lambda p: write_nifti(p / "x.nii", np.zeros((4, 4, 4, 2), np.int16)),
            r"has axes of \(4, 4, 4, 2\): a volume has three",
        ),
        (lambda p: write_nifti(p / "x.nii", np.full((4, 4, 4), np.nan, np.float32)), "has no finite value"),
        (lambda p: (p / "x.nii").mkdir(), "it holds no DICOM file with an image"),
        (
            lambda p: (write_series(p / "x.nii", block(), order=[0, 1, 5]), 0),
            "slices are missing between 2.0 and 10.0 mm",
        ),
        (lambda p: (write_series(p / "x.nii", block(), order=[0, 1, 1, 2]), 0), "two of its slices lie at one place"),
        (
            lambda p: (
                (write_series(p / "x.nii", block(), uid="1.9"), write_series(p / "y", block(), order=[7]))[1]
                and (p / "y" / "000.dcm").rename(p / "x.nii" / "other.dcm")
            ),
            "it holds several series: give each a folder",
        ),
        (lambda p: (p / "x.nii").mkdir() or (p / "x.nii" / "a.dcm").write_bytes(b"text"), "x.nii is no readable volume"),
    ],
)
def test_what_is_no_volume_is_named(make, message, tmp_path):
    make(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_volume(tmp_path / "x.nii")


def test_a_window_or_percentiles_make_black_and_white(tmp_path):
    values = np.full((8, 8, 8), -1000, np.float32)
    values[4:], values[6:] = 40, 3000
    path = write_nifti(tmp_path / "ct.nii.gz", values)
    windowed = resized(path, (8, 8, 8), (-160, 240))
    assert windowed.shape == (8, 8, 8)
    assert windowed[0, 0].tolist() == [0] * 4 + [round(255 * 200 / 400)] * 2 + [255] * 2
    own = resized(path, (8, 8, 8), None)[0, 0]
    assert own.tolist() == [0] * 4 + [round(255 * 1040 / 4000)] * 2 + [255] * 2


def test_a_volume_is_averaged_where_it_shrinks_and_filled_where_it_grows(tmp_path):
    values = np.zeros((4, 16, 2), np.float32)
    values[:, ::4] = 100
    small = resized(write_nifti(tmp_path / "x.nii", values), (4, 4, 4), (0, 100))
    assert small.shape == (4, 4, 4)
    assert (np.abs(small.astype(int) - 255 / 4) <= 1).all()


# Data


def write_table(folder, count=36, *, series=False):
    """A table of volumes whose class is the place of their block, with an age; every ninth has no volume."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        path = f"scans/s{i:02d}" if series else f"scans/s{i:02d}.nii.gz"
        if i % 9 != 4:
            (write_series if series else write_nifti)(folder / path, block(i % 3, i))
        rows.append({"sample": f"s{i:02d}", "scan": None if i % 9 == 4 else path, "label": PLACES[i % 3], "age": 40.5 + i % 7})
    pd.DataFrame(rows).to_csv(folder / "scans.csv", index=False)
    return folder / "scans.csv"


def test_a_table_of_volumes_is_read_scaled_and_cached(tmp_path, monkeypatch):
    table = write_table(tmp_path / "own")
    data = load([table], size=8, window=(0, 400), cache=tmp_path / "cache", augmentation=False)
    assert data.shapes == {"scan": (1, 8, 8, 8), "record": (1,)}
    said = str(data)
    assert "8x8x8 voxels" in said
    assert "values from 0 to 400 are black to white" in said
    assert data.report["inputs"]["branches"]["scan"] == {
        "kind": "volume", "size": [8, 8, 8], "column": "scan", "window": [0.0, 400.0],
    }  # fmt: skip
    inputs, present, targets = next(iter(data.loader(data.test, 36)))
    assert inputs["scan"].shape[1:] == (1, 8, 8, 8)
    for x, there, label in zip(inputs["scan"], present[:, 0], targets[:, 0], strict=True):
        if there:
            means = [x[0, :, :, 6:].mean(), x[0, :, 6:].mean(), x[0, 6:].mean()]  # right, front, head
            assert PLACES[int(np.argmax(means))] == data.tasks["label"][label]
    monkeypatch.setattr("examples.drifa_net.store.resized", lambda *_: pytest.fail("it was read again"))
    again = load([table], size=8, window=(0, 400), cache=tmp_path / "cache", augmentation=False)
    assert again.report == data.report
    with pytest.raises(pytest.fail.Exception, match="read again"):
        load([table], size=8, window=(0, 300), cache=tmp_path / "cache")


def test_series_are_folders_of_a_column_or_of_a_class(tmp_path):
    table = write_table(tmp_path / "own", 36, series=True)
    data = load([table], size=4, columns=Columns(images=("scan",)))
    assert data.shapes["scan"] == (1, 4, 4, 4)
    for i in range(24):
        write_series(tmp_path / "classes" / PLACES[i % 2] / f"1.2.{i}", block(i % 2, i))
    found = read(tmp_path / "classes")
    assert found.deep
    assert found.classes == ("front", "right")
    assert sorted(found.keys) == sorted(f"1.2.{i}" for i in range(24))
    assert load([tmp_path / "classes"], size=4).shapes == {"classes": (1, 4, 4, 4)}


def test_volumes_pair_with_images_by_name(tmp_path):
    for i in range(30):
        write_nifti(tmp_path / "scans" / PLACES[i % 3] / f"s{i:02d}.nii.gz", block(i % 3, i))
        save(shown(i % 3, i), tmp_path / "photos" / PLACES[i % 3] / f"s{i:02d}.png")
    data = load([tmp_path / "scans", tmp_path / "photos"], size=8)
    assert data.report["pairing"].startswith("by name, as s00: 30 of 30 samples are in all of scans, photos")
    assert data.shapes == {"scans": (1, 8, 8, 8), "photos": (3, 8, 8)}


def test_the_same_volume_in_two_splits_is_found(tmp_path):
    table = write_table(tmp_path / "own", 36)
    frame = pd.read_csv(table, dtype=str)
    frame["split"] = ["train"] * 18 + ["validation"] * 9 + ["test"] * 9
    frame.loc[27, "scan"] = frame["scan"][0]
    frame.to_csv(table, index=False)
    with pytest.raises(ValueError, match="1 test images that show the same as one of an earlier part: .*s00.nii.gz"):
        load([table], size=8)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            lambda f: f.assign(scan=["scans/s00.nii.gz", *["photo.png"] * 8]),
            {},
            "photo.png is an image: a branch reads one",
        ),
        (lambda f: f.assign(scan="scans/s00.dcm"), {}, "s00.dcm is one file of a DICOM series: name the folder"),
        (lambda f: f.assign(scan="gone.nii"), {}, "files in column 'scan' of .* are missing"),
        (lambda f: f, {"window": (5, 5)}, r"load expected window as two numbers, low < high, got \(5, 5\)"),
        (lambda f: f.assign(scan="photo.png"), {"window": (0, 5)}, "window is of the values of volumes, but no source has any"),
    ],
)
def test_what_is_wrong_with_a_table_of_volumes_is_named(change, options, message, tmp_path):
    table = write_table(tmp_path, 9)
    save(shown(0, 0), tmp_path / "photo.png")
    (tmp_path / "scans" / "s00.dcm").write_bytes(b"x")
    change(pd.read_csv(table, dtype=str)).to_csv(table, index=False)
    with pytest.raises(ValueError, match=message):
        load([table], size=4, **options)


@pytest.mark.parametrize("place", ["a", "b"])
def test_images_and_volumes_in_one_folder_are_refused(place, tmp_path):
    write_nifti(tmp_path / "a" / "x.nii", block())
    save(shown(0, 0), tmp_path / place / "y.png")
    with pytest.raises(ValueError, match=r"x.nii is a volume and .*y.png is an image"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["nibabel", "pydicom"])
def test_what_to_install_is_said(name, tmp_path, monkeypatch):
    table = write_table(tmp_path, 9, series=True)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf'need the package {name}: pip install "drifa-attn\[volumes\]"'):
        load([table], size=4, columns=Columns(images=("scan",)))


def test_augmentation_moves_volumes_whole():
    x = torch.arange(10.0**3).view(1, 10, 10, 10)
    moved = shift(x, torch.Generator().manual_seed(3))
    assert moved.shape == x.shape
    step = (moved - x)[0, 3:7, 3:7, 3:7]
    assert (step == step[0, 0, 0]).all()
    assert any(not torch.equal(shift(x, torch.Generator().manual_seed(k))[0, 1:-1, 5, 5], x[0, 1:-1, 5, 5]) for k in range(5))
    turned = augment(x, torch.Generator().manual_seed(1))
    assert turned.shape == x.shape


# Networks


@pytest.mark.parametrize("fusion", ["mifa", "mttu", "caf"])
def test_the_network_of_volumes_goes_through_fuse(fusion):
    branches = {"scan": volume_net(), "other": volume_net()}
    examples = dict.fromkeys(branches, torch.zeros(2, 1, 16, 16, 16))
    net = drifa_attn.fuse(branches, {"task": 2}, fusion=fusion, example_inputs=examples)
    assert [stage["scan"].module for stage in net.stages] == ["stage1", "stage2", "stage3"]  # behind is one position
    x = {name: torch.randn(3, 1, 16, 16, 16) for name in branches}
    net(x)["task"].sum().backward()
    assert all(p.grad is not None for p in net.branches.parameters())
    assert sum(p.numel() for p in volume_net().parameters()) == pytest.approx(0.9e6, rel=0.1)


def test_a_person_with_volumes_trains_and_predicts(tmp_path, capsys):
    table = write_table(tmp_path / "own", 45)
    cache = ["--cache", str(tmp_path / "cache")]
    given = [
        "--data",
        str(table),
        "--model",
        "fuse",
        "--size",
        "16",
        "--window",
        "0",
        "400",
        "--epochs",
        "6",
        "--batch-size",
        "8",
    ]
    (record,) = train.main([*given, "--lr", "0.005", "--output", str(tmp_path / "out"), *cache])
    AcceleratorState._reset_state(reset_partial_state=True)
    assert record["test"]["label"]["accuracy"] > 0.6
    assert "values from 0 to 400 are black to white" in " ".join(capsys.readouterr().out.split())
    run = tmp_path / "out" / "fuse-seed0"
    new = write_table(tmp_path / "new", 9)
    pd.read_csv(new, dtype=str).drop(columns="label").to_csv(new, index=False)
    told = predict.main([str(run), "--data", str(new), "--samples", "2", *cache])
    assert (told["label"].to_numpy() == np.array(PLACES)[np.arange(9) % 3])[[0, 1, 2, 3, 5, 6, 7, 8]].mean() > 0.6
    frame = pd.read_csv(new, dtype=str).assign(scan="photo.png")
    frame.to_csv(new, index=False)
    save(shown(0, 0), new.parent / "photo.png")
    said = refused(capsys, predict.main, [run, "--data", new, *cache])
    assert "the run takes volumes for scan, got images: give volumes." in said


def test_the_paper_s_network_reads_no_volumes(tmp_path, capsys):
    table = write_table(tmp_path / "own", 36)
    given = ["--data", table, "--record", "--size", "8", "--batch-size", "8", "--output", tmp_path / "out"]
    said = refused(capsys, train.main, given, silent=False)
    assert "--model drifa_net reads images alone, not scan: give --model fuse" in said
    AcceleratorState._reset_state(reset_partial_state=True)
