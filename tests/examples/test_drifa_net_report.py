"""The table in the example's README is what its records say."""

import json

import pytest

from examples.drifa_net import report


def record(model, seed, accuracy):
    """The parts of a run's record that the table is made of."""
    values = {
        "samples": 10,
        "accuracy": accuracy,
        "balanced_accuracy": 0.5,
        "macro_f1": 0.5,
        "auroc": 0.5,
        "ece": 0.1,
        "nll": 1.0,
    }
    configuration = {"model": model, "seed": seed, "lr": 0.003, "epochs": 6, "batch_size": 64, "width": 16, "reduction": None}
    return {
        "configuration": {**configuration, "backbones": ["test_resnet"], "data": ["sipakmed_28"]},
        "data": {},
        "parameters": 1234567,
        "history": [{"validation": {"sipakmed_28": values}}, {"validation": {"sipakmed_28": {**values, "nll": 0.5}}}],
        "test": {"sipakmed_28": values},
    }


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Three finished runs, and results and README of their own."""
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    report.README.write_text(f"before\n{report.START}old\n{report.END}after\n")
    for model, seed, accuracy in (("fuse", 0, 0.8), ("fuse", 1, 0.9), ("concat", 0, 0.7)):
        folder = tmp_path / f"{model}-seed{seed}"
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps(record(model, seed, accuracy)))
    return sorted(path for path in tmp_path.iterdir() if path.is_dir())


def test_readme_gets_means_and_deviations_beside_the_plain_baseline(folders):
    report.main([*map(str, folders), "--trials", str(folders[0])])
    text = report.README.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[2].startswith("| plain baseline on the raw pixels |  | 0.872 |")
    assert rows[3].startswith("| `fuse`: test_resnet + test_resnet | 1,234,567 | 0.850 ± 0.071 | 0.500 ± 0.000 |")
    assert rows[4].startswith("| the same, concatenated: no attention | 1,234,567 | 0.700 | 0.500 |")
    assert json.loads((report.RESULTS / "learning_rates.json").read_text()) == [
        {"model": "concat", "lr": 0.003, "epochs": 6, "seed": 0, "validation": 0.5}
    ]
    report.main([])
    assert report.README.read_text() == text


def test_a_folder_without_a_record_is_refused(folders, capsys):
    with pytest.raises(SystemExit, match="2"):
        report.main([str(folders[0].parent)])
    assert "holds no run.json" in capsys.readouterr().err
    assert not report.RESULTS.exists()


def test_the_committed_table_is_of_the_committed_records():
    found = report.records()
    text = report.README.read_text().partition(report.START)[2].partition(report.END)[0]
    assert text == report.written(found)
    for runs in found.values():
        seeds = [run["configuration"]["seed"] for run in runs]
        assert len(set(seeds)) == len(seeds)
        same = {json.dumps({**run["configuration"], "seed": None}, sort_keys=True) for run in runs}
        assert len(same) == 1
        assert all("/" not in json.dumps(run) for run in runs)
