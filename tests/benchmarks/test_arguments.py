"""Every argument of every command of the benchmarks, with bad values of every kind: one line, status 2, nothing measured."""

import json
from dataclasses import replace

import pytest

import drifa_attn
from benchmarks import __main__ as command
from benchmarks import kernels, matrix, rows
from benchmarks.rows import NAMES, Row, read, write
from tests._commands import make_unwritable, refused, tree

ROW = Row("layers", "MFA", "eager", "forward", "8x64x56x56", "contiguous", "fp32", 10.0, 9.0, 11.0, 9.0, None, 5, 7, 3)


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch):
    for module, name in (
        (command, "run"),
        (kernels, "attempt"),
        (matrix, "plans_of"),
    ):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("it began"))
    monkeypatch.setattr("benchmarks.selection.bench", lambda *_: pytest.fail("it began"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("zzz", "invalid choice: 'zzz'"),
        ("layers extra", "unrecognized arguments: extra"),
        ("layers --device zzz", "argument --device: this machine has cpu"),
        ("layers --device meta", "argument --device: this machine has cpu"),
        ("layers --device cuda:99", "argument --device: this machine has cpu"),
        ("layers --dtype fp8", "invalid choice: 'fp8'"),
        ("layers --layout zzz", "invalid choice: 'zzz'"),
        ("layers --provider zzz", "invalid choice: 'zzz'"),
        ("layers --provider", "expected at least one argument"),
        ("ops --provider auto", "--provider auto computes none of what ops is to measure"),
        ("net --provider eager peers", "--provider peers computes none of what net is to measure"),
        ("layers --op zzz", "--op 'zzz' is nothing that layers measures by these providers: it has MFA by eager, "),
        ("layers --op MFA zzz*", "--op 'zzz*' is nothing that layers measures"),
        ("layers --op SE --provider eager", "--op 'SE' is nothing that layers measures by these providers"),
        ("layers --op", "expected at least one argument"),
        ("layers --shape 8", "argument --shape: expected four sizes >= 1"),
        ("layers --shape 8x64x56", "argument --shape: expected four sizes >= 1"),
        ("layers --shape 2x0x3x3", "argument --shape: expected four sizes >= 1"),
        ("layers --shape 2x-1x3x3", "argument --shape: expected four sizes >= 1"),
        ("layers --shape axbxcxd", "argument --shape: expected four sizes >= 1"),
        ("layers --shape 8x64x56x56 nan", "got 'nan'"),
        ("wrap --shape 1x4x32x32", "--shape 1x4x32x32 has 4 channels: these networks take images of 3"),
        ("layers --mode zzz", "invalid choice: 'zzz'"),
        ("layers --seconds nan", "argument --seconds: expected a number > 0, got 'nan'"),
        ("layers --seconds inf", "argument --seconds: expected a number > 0, got 'inf'"),
        ("layers --seconds 0", "argument --seconds: expected a number > 0, got '0'"),
        ("layers --seconds -1", "argument --seconds: expected a number > 0, got '-1'"),
        ("layers --seconds soon", "argument --seconds: expected a number > 0, got 'soon'"),
        ("bench --device zzz", "argument --device: this machine has cpu"),
        ("bench --limit nan", "argument --limit: expected a number > 0, got 'nan'"),
        ("bench --limit -5", "argument --limit: expected a number > 0, got '-5'"),
        ("report extra", "unrecognized arguments: extra"),
    ],
)
def test_a_bad_argument_of_a_suite_is_one_line(arguments, message, capsys):
    assert message in refused(capsys, command.main, arguments.split())


DATA = "age,sex\n50,male\n"
HEADER = ",".join(NAMES) + "\n"
CSVS = {
    "a data set": (DATA, "line 1, holds no row of a benchmark: it has the columns ['age', 'sex'], not "),
    "no text": ("\udcff\udcfe\n", "holds no row of a benchmark: "),
    "rows of 0.1.0": (",".join(rows.BEFORE) + "\n", "its rows are of 0.1.0"),
    "columns in another order": (",".join(reversed(NAMES)) + "\n", "it has the columns ['utc', "),
    "a row cut short": (HEADER + "layers,MFA\n", "line 2, holds no row of a benchmark: it has more or fewer cells"),
    "a word for a number": (HEADER + ",".join(["x"] * len(NAMES)) + "\n", "line 2, holds no row of a benchmark: "),
    "an end within a row": (HEADER.strip(), "ends within a row"),
}


@pytest.mark.parametrize(("text", "message"), CSVS.values(), ids=CSVS)
def test_rows_are_appended_to_rows_alone(text, message, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    path.write_text(text, errors="surrogateescape")
    before = tree(tmp_path)
    said = refused(capsys, command.main, ["layers", "--csv", path])
    assert message in said
    assert str(path) in said
    assert tree(tmp_path) == before


@pytest.mark.parametrize("path", ["", ".", "..", "folder", "file/rows.csv", "locked/new/rows.csv", "x" * 300 + "/rows.csv"])
def test_a_file_that_cannot_be_written_is_refused_first(path, tmp_path, capsys, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "locked").mkdir()
    (tmp_path / "file").write_text("")
    make_unwritable(monkeypatch, "locked")
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    for main, flag in ((command.main, ["layers", "--csv"]), (kernels.main, ["--out"])):
        said = refused(capsys, main, [*flag, path])
        assert f"argument {flag[-1]}: " in said
    assert tree(tmp_path) == before


def test_rows_go_to_a_new_an_empty_and_an_old_file(tmp_path):
    for name in ("new/rows.csv", "empty.csv"):
        path = tmp_path / name
        if name == "empty.csv":
            path.touch()
        for count in (1, 2):
            rows.check_appendable(path)
            write([ROW], path)
            assert read(path) == [ROW] * count


def test_a_run_without_one_measured_row_ends_with_status_1(monkeypatch, capsys):
    lost = replace(ROW, error="RuntimeError: no memory")
    monkeypatch.setattr(command, "run", lambda *_: [replace(ROW, op="roofline copy"), lost])
    with pytest.raises(SystemExit, match="1"):
        command.main(["layers"])
    assert "no row could be measured" in capsys.readouterr().err
    monkeypatch.setattr(command, "run", lambda *_: [ROW, lost])
    command.main(["layers"])


def test_a_report_of_nothing_and_of_damaged_rows_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("benchmarks.report.RESULTS", tmp_path)
    assert "holds no rows: python -m benchmarks bench measures some" in refused(capsys, command.main, ["report"])
    (tmp_path / drifa_attn.__version__).mkdir()
    (tmp_path / drifa_attn.__version__ / "cpu-layers.csv").write_text(DATA)
    assert "cpu-layers.csv, line 1, holds no row of a benchmark" in refused(capsys, command.main, ["report"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("extra", "unrecognized arguments: extra"),
        ("--capability 75", "argument --capability: invalid choice: 75"),
        ("--capability new", "argument --capability: invalid int value: 'new'"),
        ("--capability", "expected at least one argument"),
        ("--only zzz", "--only 'zzz' is in no label; one is 'mfa 16 @ 784 nhwc bfloat16'"),
        ("--jobs 0", "argument --jobs: expected an integer >= 1, got '0'"),
        ("--jobs -1", "argument --jobs: expected an integer >= 1, got '-1'"),
        ("--jobs 1.5", "argument --jobs: expected an integer >= 1, got '1.5'"),
    ],
)
def test_a_bad_argument_of_kernels_is_one_line(arguments, message, capsys):
    assert message in refused(capsys, kernels.main, arguments.split())


def missing(*_):
    raise ModuleNotFoundError("No module named 'no_such_triton'")


def test_kernels_without_triton_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "launches", missing)
    assert "No module named 'no_such_triton'" in refused(capsys, kernels.main, [])


def test_a_part_of_the_kernels_does_not_replace_the_whole_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(kernels, "launches", lambda *_: ["one"])
    monkeypatch.setattr(kernels, "ProcessPoolExecutor", NoPool)
    monkeypatch.setattr(kernels, "table", lambda results: "the table")
    monkeypatch.setattr(kernels, "report", lambda results, chosen: "the report")
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "kernels.py"))
    for part in (["--only", "mfa"], ["--capability", "80"]):
        kernels.main(part)
        assert list(tmp_path.iterdir()) == []
    kernels.main(["--only", "mfa", "--out", str(tmp_path / "part.md")])
    kernels.main([])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels.md", "part.md"]
    assert capsys.readouterr().out.count("the table") == 4


class NoPool:
    """A pool of processes in which nothing runs."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def map(self, function, items):
        return items


def test_matrix_takes_no_argument(capsys):
    assert "unrecognized arguments: --zzz" in refused(capsys, matrix.main, ["--zzz"])


GOOD = json.dumps(["ghostnet", {"versions": matrix.VERSIONS}])
MATRIX = {
    "a line cut short": (f"{GOOD}\n{GOOD[:20]}\n", "line 2, is damaged"),
    "another list": ("[1, 2, 3]\n", "line 1, is damaged"),
    "no versions": ('["ghostnet", {}]\n', "line 1, is damaged"),
    "other versions": (json.dumps(["ghostnet", {"versions": {"timm": "0"}}]) + "\n", "is of {'timm': '0'}, this is "),
}


@pytest.mark.parametrize(("text", "message"), MATRIX.values(), ids=MATRIX)
def test_matrix_goes_on_from_its_own_rows_alone(text, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(matrix, "DONE", tmp_path / "matrix.jsonl")
    monkeypatch.setattr(matrix, "REPORT", tmp_path / "coverage.md")
    matrix.DONE.write_text(text)
    before = tree(tmp_path)
    assert message in refused(capsys, matrix.main, [])
    assert tree(tmp_path) == before


def test_matrix_where_its_folder_is_a_file_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "outputs").write_text("")
    monkeypatch.setattr(matrix, "DONE", tmp_path / "outputs" / "matrix.jsonl")
    assert "cannot be written: Not a directory" in refused(capsys, matrix.main, [])
