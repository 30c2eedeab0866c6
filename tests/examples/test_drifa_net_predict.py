"""A person with a CSV of paths trains, evaluates and predicts without writing Python."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState

from drifa_attn import Uncertainty
from examples.drifa_net import figures, predict, train
from examples.drifa_net.reading import reloaded
from tests._commands import refused, tree
from tests.examples.own_data import CLASSES, write_folder, write_table

ROOT = Path(__file__).parent.parent.parent
SMALL = ("--model", "fuse", "--backbones", "test_efficientnet", "--size", "16", "--batch-size", "16", "--lr", "0.005")


def command(name, *arguments):
    """What a command prints, run as a person runs it."""
    line = [sys.executable, "-m", f"examples.drifa_net.{name}", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_person_with_a_csv_of_paths_writes_no_python(tmp_path):
    table, new = write_table(tmp_path / "own"), write_table(tmp_path / "new", 30, seed=5)
    pd.read_csv(new, dtype=str).drop(columns=["diagnosis", "patient", "note"]).to_csv(new, index=False)
    cache = ("--cache", tmp_path / "cache")
    said = command("train", "--data", table, *SMALL, "--epochs", "4", "--seeds", 0, 1, "--output", tmp_path / "out", *cache)
    assert "columns: sample sample; images photo; labels diagnosis; record age, sex; group patient" in said
    assert "split by class and group" in said
    runs = [tmp_path / "out" / f"fuse-seed{seed}" for seed in (0, 1)]
    record = json.loads((runs[0] / "run.json").read_text())
    assert record["test"]["diagnosis"]["balanced_accuracy"] > 0.6
    assert str(tmp_path) not in json.dumps(record)
    said = command("evaluate", *runs, "--samples", 3, "--output", tmp_path / "worth", *cache)
    assert (tmp_path / "worth" / "uncertainty.png").is_file()
    said = command("predict", *runs, "--data", new, "--samples", 3, "--output", tmp_path / "told.csv", *cache)
    assert "3 samples have no photo: it is absent there." in said
    told, asked = pd.read_csv(tmp_path / "told.csv"), pd.read_csv(new)
    assert told["sample"].tolist() == asked["sample"].tolist()
    truth = np.array([CLASSES[i % 3] for i in range(30)])
    assert (told["diagnosis"] == truth).mean() > 0.6
    probabilities = told[[f"diagnosis: {name}" for name in sorted(CLASSES)]].to_numpy()
    assert np.allclose(probabilities.sum(1), 1, atol=1e-5)
    total, aleatoric, epistemic = (told[f"diagnosis {kind} uncertainty"] for kind in predict.KINDS)
    assert np.allclose(total, aleatoric + epistemic, atol=1e-5)
    assert np.allclose(total, -(probabilities * np.log(probabilities)).sum(1), atol=1e-4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on a table and one on two folders, the folder they lie in."""
    root = tmp_path_factory.mktemp("trained")
    table, left, right = write_table(root / "own"), write_folder(root / "left", 60), write_folder(root / "right", 60, seed=1)
    options = [*SMALL, "--epochs", "1", "--cache", str(root / "cache")]
    train.main(["--data", str(table), *options, "--output", str(root / "table")])
    AcceleratorState._reset_state(reset_partial_state=True)
    train.main(["--data", str(left), str(right), *options, "--output", str(root / "folders")])
    AcceleratorState._reset_state(reset_partial_state=True)
    train.main(["--size", "8", *SMALL[:4], "--epochs", "1", "--batch-size", "256", "--output", str(root / "digits")])
    AcceleratorState._reset_state(reset_partial_state=True)
    return root


def test_predictions_are_those_of_the_test_of_the_run(trained, tmp_path, monkeypatch):
    """Without dropout, on the same samples, in the order of the table."""
    folder = trained / "table" / "fuse-seed0"
    monkeypatch.setattr(predict, "ensemble", lambda nets, inputs, *_, **__: predict_once(nets[0], inputs))
    table = predict.main([str(folder), "--data", str(trained / "own/records.csv"), "--output", str(tmp_path / "x.csv")])
    record, data = reloaded(folder, [], trained / "cache")
    net = predict.restored(folder, record, data)
    by_name = table.set_index("sample")
    frame = pd.read_csv(trained / "own" / "records.csv")
    batch = next(iter(data.loader(data.test, 90)))
    inputs, present, labels = predict.named(batch, data, torch.device("cpu"))
    probs = net(inputs, present)["diagnosis"].softmax(1)
    columns = [f"diagnosis: {name}" for name in data.tasks["diagnosis"]]
    names = frame["sample"][data.test.images[1].chosen[data.test.order[:, 1]]]  # records are numbered as the table's rows
    for name, row, label in zip(names, probs, labels["diagnosis"], strict=True):
        assert by_name.loc[name, columns].tolist() == pytest.approx(row.tolist(), abs=1e-5)
        assert data.tasks["diagnosis"][label] == CLASSES[int(name[1:]) % 3]


@torch.no_grad()
def predict_once(net, inputs):
    """One pass of a network as an uncertainty."""
    found = {}
    for task, logits in net(*inputs).items():
        p = logits.softmax(1)
        entropy = torch.special.entr(p).sum(1)
        found[task] = Uncertainty(p, entropy, entropy, torch.zeros_like(entropy), torch.zeros_like(p))
    return found


def test_folders_are_taken_in_the_order_of_training_and_may_lack_samples(trained, tmp_path, capsys):
    folder = trained / "folders" / "fuse-seed0"
    new = [tmp_path / "first", tmp_path / "second"]
    for path, source in zip(new, ("left", "right"), strict=True):
        path.mkdir()
        for image in list((trained / source).rglob("*.png")):
            shutil.copy(image, path / image.name)  # without classes
    (new[1] / "s007.png").unlink()
    table = predict.main([str(folder), "--data", *map(str, new), "--samples", "2", "--output", str(tmp_path / "x.csv")])
    assert table["sample"].tolist() == [f"s{i:03d}" for i in range(60)]
    said = capsys.readouterr().out
    assert "60 samples, paired by name, as s000: 59 of 60 samples are in all of first, second" in said
    assert "1 samples have no right: it is absent there." in said


@pytest.mark.parametrize(
    ("run", "data", "message"),
    [
        ("table", ["left"], "the run takes a table of photo, record, got"),
        ("table", ["own/records.csv", "left"], "the run takes a table of photo, record, got"),
        ("folders", ["left"], "the run takes a folder or .npz of left and a folder or .npz of right, got"),
        ("folders", ["own/records.csv"], "the run takes a folder or .npz of left and"),
        ("table", ["narrow.csv"], "narrow.csv has no column 'age'; it has sample, photo"),
        ("table", ["words.csv"], "column 'age' has cells that are no numbers"),
        ("table", ["gone.csv"], "1 of 1 files in column 'photo'"),
        ("folders", ["left", "left/mel/s000.png"], "s000.png is no npz archive"),
        ("digits", ["left", "own/records.csv"], "the run takes a folder or .npz of left and a folder or .npz of right"),
    ],
)
def test_what_does_not_fit_the_run_is_refused(run, data, message, trained, capsys, monkeypatch):
    monkeypatch.chdir(trained)
    (trained / "narrow.csv").write_text("sample,photo\na,own/photos/s000.png\n")
    (trained / "words.csv").write_text("sample,photo,age,sex\na,own/photos/s000.png,old,male\n")
    (trained / "gone.csv").write_text("sample,photo,age,sex\na,nowhere.png,50,male\n")
    monkeypatch.setattr(predict, "predicted", None)
    before = tree(trained / run)
    given = [f"{run}/fuse-seed0", "--data", *data, "--cache", "cache"]
    assert message in refused(capsys, predict.main, given, silent=False)
    assert tree(trained / run) == before


def test_runs_of_other_data_are_no_ensemble(trained, capsys):
    runs = [trained / "table" / "fuse-seed0", trained / "folders" / "fuse-seed0"]
    said = refused(capsys, predict.main, [*runs, "--data", trained / "left"])
    assert "folders/fuse-seed0 was trained on other data than" in said


# What figures and evaluate read again


def test_data_that_has_moved_is_named_and_found_where_it_is(trained, tmp_path, capsys):
    shutil.copytree(trained / "table", tmp_path / "table")
    folder = tmp_path / "table" / "fuse-seed0"
    sources = json.loads((folder / "sources.json").read_text())
    assert sources == {"data": [str(trained / "own" / "records.csv")]}
    (folder / "sources.json").write_text(json.dumps({"data": [str(tmp_path / "gone" / "records.csv")]}))
    said = refused(capsys, figures.main, [folder])
    assert "gone/records.csv, which" in said
    assert "is not there any more: say where it is by --data" in said
    _, data = reloaded(folder, [trained / "own" / "records.csv"], trained / "cache")
    assert data.branches == ("photo", "record")
    said = refused(capsys, figures.main, [folder, "--data", trained / "left"])
    assert "was trained on other data, ['records.csv'], not ['left']: give those by --data" in said
    (folder / "sources.json").write_text("text")
    assert "sources.json is damaged" in refused(capsys, figures.main, [folder])


def test_data_that_has_changed_is_refused(trained, tmp_path, capsys):
    shutil.copytree(trained / "own", tmp_path / "own")
    table = tmp_path / "own" / "records.csv"
    frame = pd.read_csv(table, dtype=str)
    frame.iloc[:-1].to_csv(table, index=False)
    said = refused(capsys, figures.main, [trained / "table" / "fuse-seed0", "--data", table, "--cache", trained / "cache"])
    assert "records.csv has changed since" in said
