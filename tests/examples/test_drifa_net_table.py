"""A table of one's own: which column is what, what its cells become, and what is wrong with it."""

import re

import numpy as np
import pandas as pd
import pytest
import torch

from examples.drifa_net.data import IGNORE, Columns, load
from examples.drifa_net.table import found_columns, read_frame, samples_of
from examples.drifa_net.tabular import encoded, fitted
from tests.examples.own_data import CLASSES, rows_of, shown, write_folder, write_table

FOUND = Columns("sample", ("photo",), ("diagnosis",), ("age", "sex"), "patient", None)


@pytest.mark.parametrize("name", ["records.csv", "records.parquet"])
def test_columns_are_found_by_their_names_and_cells(name, tmp_path):
    samples, columns = samples_of(write_table(tmp_path, name=name), Columns())
    assert columns == FOUND
    assert samples.notes == (
        "columns: sample sample; images photo; labels diagnosis; record age, sex; group patient",
        "left out: note (90 different words)",
    )
    rows = list(rows_of())
    assert samples.tasks == {"diagnosis": tuple(sorted(CLASSES))}
    assert [samples.tasks["diagnosis"][k] for k in samples.targets["diagnosis"]] == [row["diagnosis"] for row in rows]
    assert samples.keys.tolist() == [row["sample"] for row in rows]
    assert samples.groups.tolist() == [row["patient"] for row in rows]
    for row, place in zip(rows, samples.rows["photo"], strict=True):
        assert (place < 0) == (row["photo"] is None)
        assert place < 0 or samples.branches["photo"].images[place] == tmp_path / row["photo"]
    assert (samples.rows["record"] == np.arange(90)).all()


def test_what_is_named_counts(tmp_path):
    path = write_table(tmp_path)
    given = Columns(images=("photo",), labels=("sex",), record=("age",), group="diagnosis")
    samples, columns = samples_of(path, given)
    assert columns == Columns("sample", ("photo",), ("sex",), ("age",), "diagnosis", None)
    assert samples.tasks == {"sex": ("female", "male")}
    samples, _ = samples_of(path, Columns(record=(), labels=("diagnosis", "sex")))
    assert list(samples.branches) == ["photo"]
    assert list(samples.tasks) == ["diagnosis", "sex"]
    assert samples_of(path, Columns(group="diagnosis"))[1].labels == ()  # it is the group already


@pytest.mark.parametrize(
    ("column", "why"),
    [
        ([f"word {i}" for i in range(90)], "90 different words"),
        (list(range(90)), "another number in every row"),
        (["x"] * 90, "the same in every row"),
        ([f"{CLASSES[i % 3]} in words" for i in range(90)], "it tells diagnosis"),
        ([i % 3 for i in range(90)], "it tells diagnosis"),
        (["a", "b"] * 45, ""),
        ([0.5 * i for i in range(90)], ""),
    ],
)
def test_a_record_takes_what_may_tell_something_and_not_the_answer(column, why, tmp_path):
    frame = pd.DataFrame(list(rows_of())).assign(more=[str(cell) for cell in column])
    columns, unused = found_columns(frame, Columns(), tmp_path, set())
    assert ("more" in columns.record) == (not why)
    assert not why or f"more ({why})" in unused


def test_cells_become_numbers_and_words():
    frame = pd.DataFrame({"age": ["40", "60", None, "1000"], "sex": ["m", "f", None, "x"], "smokes": ["1", "0", "1", "0"]})
    encoding = fitted(frame, "t", np.array([0, 1, 2]))
    assert encoding["sex"] == {"words": ["f", "m"]}
    assert encoding["age"] == {"mean": 50, "deviation": 10, "missing": True}
    values = encoded(frame, encoding, "t")
    assert values.dtype == torch.float32
    assert values[:3, :4].tolist() == [[-1, 0, 0, 1], [1, 0, 1, 0], [0, 1, 0, 0]]
    assert values[3, 2:4].tolist() == [0, 0]  # a word that training did not have
    assert values[:3, 4].tolist() == pytest.approx([0.5**0.5, -(2**0.5), 0.5**0.5])
    with pytest.raises(ValueError, match="t has no column 'age', which the run was trained with"):
        encoded(frame[["sex"]], encoding, "t")
    with pytest.raises(ValueError, match="column 'age' has cells that are no numbers"):
        encoded(frame.assign(age="old"), encoding, "t")


def test_training_alone_decides_how_a_record_is_encoded(tmp_path):
    frame = pd.DataFrame(list(rows_of(missing=False)))
    frame["split"] = ["train", "validation", "test"] * 30
    frame["diagnosis"] = np.repeat(CLASSES, 30)
    frame["age"] = np.where(frame["split"] == "train", np.arange(90) % 2, 1000)
    frame.drop(columns=["photo", "patient"]).to_csv(tmp_path / "t.csv", index=False)
    data = load([tmp_path / "t.csv"])
    encoding = data.report["inputs"]["branches"]["record"]["encoding"]
    assert encoding["age"] == {"mean": 0.5, "deviation": 0.5, "missing": False}
    assert [len(getattr(data, key)) for key in ("train", "validation", "test")] == [30, 30, 30]
    assert data.report["branches"]["record"]["split"] == "as given"


def test_missing_cells_are_absent_modalities_and_missing_labels_do_not_count(tmp_path):
    path = write_table(tmp_path)
    frame = pd.read_csv(path, dtype=str)
    frame.loc[10:19, "diagnosis"] = None
    frame["second"] = ["yes", "no"] * 45
    frame.loc[5:14, "second"] = None
    frame.loc[[3, 13, 20], ["age", "sex"]] = None
    frame.to_csv(path, index=False)
    data = load([path], size=8, columns=Columns(labels=("diagnosis", "second"), record=("age", "sex")), augmentation=False)
    notes = data.report["branches"]["photo"]["notes"]
    assert "5 samples with no label are left out" in notes  # 10 to 14 have neither
    assert "1 samples with no modality are left out" in notes  # 3: neither image nor record
    seen = 0
    for key in ("train", "validation", "test"):
        inputs, present, targets = next(iter(data.loader(getattr(data, key), 90)))
        assert list(inputs) == ["photo", "record"]
        assert (inputs["photo"][~present[:, 0]] == 0).all()
        assert (inputs["record"][~present[:, 1]] == 0).all()
        assert present.any(1).all()
        assert ((targets != IGNORE).any(1)).all()
        seen += len(targets)
        label = inputs["photo"].mean((2, 3)).argmax(1)  # the brighter channel is the class
        both = present[:, 0] & (targets[:, 0] != IGNORE)
        names = [data.tasks["diagnosis"][k] for k in targets[both, 0]]
        assert names == [CLASSES[k] for k in label[both]]
    assert seen == 90 - 5 - 1


def spoilt(**changes):
    """A table that is changed: a function of its folder."""

    def change(folder):
        path = write_table(folder)
        frame = pd.read_csv(path, dtype=str).assign(**changes)
        frame.to_csv(path, index=False)
        return path

    return change


def of_text(text, name="t.csv"):
    def write(folder):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(text)
        return folder / name

    return write


@pytest.mark.parametrize(
    ("make", "columns", "message"),
    [
        (write_table, {"labels": ("dx",)}, "has no column 'dx'; it has sample, photo, diagnosis, age"),
        (write_table, {"labels": ("sex",), "group": "sex"}, "the column 'sex' is named for two things"),
        (write_table, {"labels": ("note",)}, "column 'note' of .* has 90 different labels in 90 rows"),
        (write_table, {"split": "sex"}, "column 'sex' of .* has 'female' in line 2: it needs train, validation or test"),
        (write_table, {"images": ("note",)}, "90 of 90 files in column 'note' of .* are missing, the first .*seen on day 0"),
        (spoilt(photo="gone.png"), {}, "90 of 90 files in column 'photo'"),
        (spoilt(sample=None), {"sample": "sample"}, "line 2 has no 'sample': mend it"),
        (of_text(""), {}, r"t\.csv is no table that can be read"),
        (of_text("a,b\n"), {}, "needs rows, and columns of different names, got 0 rows"),
        (of_text("a,a \n1,2\n"), {}, "needs rows, and columns of different names"),
        (of_text("words", "t.parquet"), {}, r"t\.parquet is no table that can be read"),
        (of_text("age,sex\n1,m\n2,f\n"), {}, "says what a sample is: put images into a folder a class, or give a table with"),
    ],
)
def test_what_is_wrong_with_a_table_is_named(make, columns, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load([make(tmp_path / "own")], size=8, columns=Columns(**columns))


def test_words_are_kept_as_they_are(tmp_path):
    (tmp_path / "t.csv").write_text("sample,grade\n001,2\n002,10\n010,2\n011,10\n,\n")
    frame = read_frame(tmp_path / "t.csv")
    assert frame["sample"].iloc[0] == "001"
    (tmp_path / "t.csv").write_text("sample;age\n001;1,5\n")
    assert read_frame(tmp_path / "t.csv").to_numpy().tolist() == [["001", "1,5"]]
    (tmp_path / "t.csv").write_text("sample,label\n" + "".join(f"{i:03d},{(2, 10)[i % 2]}\n" for i in range(8)))
    samples, _ = samples_of(tmp_path / "t.csv", Columns())
    assert samples.tasks == {"label": ("2", "10")}  # numbers in their order


# With folders


def test_a_table_and_a_folder_are_paired_by_the_names_of_the_images(tmp_path):
    folder = tmp_path / "pictures"
    for i in range(0, 80):
        (folder).mkdir(exist_ok=True)
        shown(i % 3, i).save(folder / f"s{i:03d}.png")
    frame = pd.DataFrame(list(rows_of())).drop(columns=["photo", "sample"])
    frame["file"] = [f"s{i:03d}.png" for i in range(90)]
    frame.to_csv(tmp_path / "records.csv", index=False)
    data = load([folder, tmp_path / "records.csv"], size=8)
    assert data.branches == ("pictures", "record")
    assert data.tasks == {"diagnosis": tuple(sorted(CLASSES))}
    assert data.report["pairing"] == (
        "by name, as s000: 80 of 90 samples are in all of pictures, records, 0 besides in pictures, 10 besides in records"
    )
    assert str(data).startswith("pairing: by name")
    inputs, present, targets = next(iter(data.loader(data.train, 90)))
    label = inputs["pictures"].mean((2, 3)).argmax(1)
    has = present[:, 0]
    assert [data.tasks["diagnosis"][k] for k in targets[has, 0]] == [CLASSES[k] for k in label[has]]
    assert not has.all()


def test_the_classes_of_a_folder_count_where_the_table_has_none(tmp_path):
    folder = write_folder(tmp_path / "images", 90)
    frame = pd.DataFrame(list(rows_of())).drop(columns=["photo", "diagnosis"])
    frame.to_csv(tmp_path / "records.csv", index=False)
    data = load([folder, tmp_path / "records.csv"], size=8)
    assert data.tasks == {"images": ("bkl", "mel", "nv")}
    frame["sample"] = [f"other {i}" for i in range(90)]
    frame.to_csv(tmp_path / "records.csv", index=False)
    with pytest.raises(ValueError, match=r"no column names the images of images \(as 's002'\): name one by --sample"):
        load([folder, tmp_path / "records.csv"], size=8)


def test_two_tables_or_chance_with_a_table_are_refused(tmp_path):
    path = write_table(tmp_path)
    with pytest.raises(ValueError, match="one table is read: join them into one"):
        load([path, path])
    with pytest.raises(ValueError, match=re.escape("records.csv: the rows of a table pair its samples")):
        load([path], pair="chance")
    with pytest.raises(ValueError, match=r"columns are named \(dx\), but no table is given"):
        load([write_folder(tmp_path / "images")], columns=Columns(labels=("dx",)))
