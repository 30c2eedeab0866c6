"""The coverage table, and how it is made: on two families here, on all by `make matrix`."""

import json
import re

import pytest

from benchmarks import matrix

TABLE = matrix.REPORT.read_text()


def test_the_committed_table_has_a_row_for_every_family():
    rows = [line.split(" | ") for line in TABLE.splitlines() if " | exact | " in line]
    assert [row[0].removeprefix("| ") for row in rows] == matrix.FAMILIES or len(rows) > 90  # another timm has other families
    assert all(len(row) == 8 and re.match(r"\d+/\d+$", row[6]) for row in rows)


@pytest.mark.filterwarnings("ignore")
def test_a_run_measures_keeps_what_is_done_and_writes_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "FAMILIES", ["ghostnet", "levit"])
    monkeypatch.setattr(
        matrix.timm, "list_models", lambda module: {"ghostnet": ["ghostnet_050"], "levit": ["levit_128s"]}[module]
    )
    monkeypatch.setattr(matrix, "REPORT", tmp_path / "coverage.md")
    monkeypatch.setattr(matrix, "DONE", tmp_path / "outputs" / "matrix.jsonl")
    monkeypatch.setattr(matrix.torch, "set_num_threads", lambda _: None)
    matrix.main([])
    written = matrix.REPORT.read_text()
    assert "**2 of 2 families**" in written
    assert "**2 of 2 architectures**" in written
    assert "**2 of 2 backbones**" in written
    assert "| levit | levit_128s | " in written
    assert len(matrix.DONE.read_text().splitlines()) == 2
    kept = json.loads(matrix.DONE.read_text().splitlines()[0])
    matrix.DONE.write_text(json.dumps([kept[0], kept[1] | {"fused": {"fused": 0, "reason": "kept"}}]) + "\n")
    monkeypatch.setattr(matrix, "FAMILIES", ["ghostnet"])
    matrix.main([])
    assert "Not fused: ghostnet: kept" in matrix.REPORT.read_text()


def test_what_does_not_hold_is_an_error():
    with pytest.raises(ValueError, match="the keys are others"):
        matrix.demand(False, "the keys are others")
