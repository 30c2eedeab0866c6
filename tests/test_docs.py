"""What the README says: its code runs, its numbers are those that were measured, its commands are those of the Makefile."""

import json
import re
import shlex
import sys
from pathlib import Path
from statistics import mean, stdev

import pytest
import timm
import torch

import drifa_attn
from drifa_attn.commands.main import parsers
from examples import quickstart
from tests._process import run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(target):
    """The lines that a target of the Makefile runs, with its environment's programs left to the path."""
    recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    return [line.strip().replace("$(BIN)/", "") for line in recipe.splitlines()]


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[0])
def test_code_of_the_readme_runs(code, tmp_path, monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **options: create(name, **options))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def test_the_plan_of_the_readme_is_the_plan():
    with torch.device("meta"):
        model = timm.create_model("resnet50")
    assert f"{drifa_attn.plan(model)}\n" in blocks("text")


@pytest.mark.parametrize(("target", "extra"), [("demo", "examples"), ("test", "dev")])
def test_plain_lines_are_those_of_the_makefile(target, extra):
    plain = " && ".join([f'pip install -e ".[{extra}]"', *commands(target)])
    assert f"| `make {target}` | `{plain}` |" in README


@pytest.mark.parametrize("line", [line for block in blocks("sh") for line in block.splitlines()])
def test_command_lines_of_the_readme_parse(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("attention.safetensors", "image.jpg"):
        (tmp_path / file).touch()
    program, *arguments = shlex.split(line, comments=True)
    assert program == "drifa-attn"
    assert parsers()[0].parse_args(arguments).command == arguments[0]


def test_totals_are_those_of_the_coverage_table():
    table = (ROOT / "benchmarks" / "coverage.md").read_text()
    totals = re.findall(r"\*\*(\d+ of \d+ \w+)\*\*", table)
    assert len(totals) == 3
    assert all(f"**{total}**" in README for total in totals)
    rows = [line.split(" | ") for line in table.splitlines() if " | exact | " in line]
    assert totals[0] == f"{len(rows)} of {len(rows)} families"
    assert totals[2] == f"{sum(row[5] != '0' for row in rows)} of {len(rows)} backbones"
    planned, known = (sum(int(row[-2].split("/")[i]) for row in rows) for i in (0, 1))
    assert totals[1] == f"{planned} of {known} architectures"


def test_the_version_stands_in_the_changelog():
    assert f"## {drifa_attn.__version__} " in (ROOT / "CHANGELOG.md").read_text()


def test_every_layer_stands_in_the_table_with_its_file():
    for name in ("HIFA", "CLIA", "MFA", "MGIFA", "MLIFA", "MIFA", "RRA"):
        file = f"{getattr(drifa_attn, name).__module__.rpartition('.')[2]}.py"
        assert re.search(rf"\| Fig\. \w+, .* \| `{name}` \| `{file}` \| `", README)


def test_the_quickstart_goes_through(tmp_path):
    printed = run(sys.executable, "-W", "error", "-m", "examples.quickstart", "--fast", "--output", tmp_path, cwd=ROOT)
    assert printed.count("equal bit for bit: True") == 2
    assert "palace; daisy" in printed
    assert "Standard deviation of a channel's gain over the test images, by site: blocks.0 0." in printed
    files = {f"quickstart.{suffix}" for suffix in ("png", "pt", "safetensors")}
    assert {path.name for path in tmp_path.iterdir()} == files | {"quickstart-gradcam.png"}


@pytest.mark.parametrize(
    ("row", "arm"),
    [
        ("head only", "head only"),
        ("one learned constant per channel, no attention", "constant"),
        ("**MFA, calibrated**", "MFA"),
        ("MFA, not calibrated", "MFA, uncalibrated"),
        ("LoRA, rank 1", "LoRA"),
    ],
)
def test_the_evidence_of_the_readme_is_that_of_the_rows(row, arm):
    cells = []
    for name in ("sipakmed_64", "ham10000_64"):
        path = ROOT / "examples" / "does_it_help" / "results" / f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found = [100 * one["balanced_accuracy"] for one in rows if one["arm"] == arm and one["part"] == "test"]
        assert len(found) == 5
        cells.append(f"{mean(found):.1f} ± {stdev(found):.1f}")
    assert f"| {row} | {' | '.join(cells)} |" in README.replace("**" + cells[0] + "**", cells[0]).replace(
        "**" + cells[1] + "**", cells[1]
    )


def test_the_quickstart_says_in_words_when_gates_do_not_attend():
    assert "constants" not in quickstart.verdict({"a": 0.031, "b": 0.001})
    told = quickstart.verdict({"a": 0.029, "b": 0.001})
    assert told.endswith("That is below 0.03 everywhere: these gates are constants and hardly attend to the image.")
