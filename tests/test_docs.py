"""What README and docs/ say: their code runs, their numbers are those that were measured, their commands exist."""

import ast
import csv
import json
import pkgutil
import re
import shlex
import sys
import warnings
from pathlib import Path
from statistics import mean, stdev

import pytest
import timm
import torch

import drifa_attn
from drifa_attn.commands.main import parsers
from drifa_attn.fusion import FUSIONS
from drifa_attn.wrapping import table
from examples import quickstart
from tests._process import run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {"README.md": README, **{f"docs/{path.name}": path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}}
NEEDED = {"torch", "timm", "drifa_attn"}


def blocks(language, page="README.md"):
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def everywhere(language):
    """The blocks of all pages, each with the name of its page and its place there."""
    found = [(page, i, code) for page in PAGES for i, code in enumerate(blocks(language, page), 1)]
    return [pytest.param(page, code, id=f"{page}-{i}") for page, i, code in found]


def packages(code):
    """The packages that a block imports and that the library itself does not need."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            names |= {name.partition(".")[0] for name in modules}
    return names - NEEDED


def commands(target):
    """The lines that a target of the Makefile runs, with its environment's programs left to the path."""
    recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    return [line.strip().replace("$(BIN)/", "") for line in recipe.splitlines()]


@pytest.mark.parametrize(("page", "code"), everywhere("python"))
def test_code_of_the_pages_runs(page, code, tmp_path, monkeypatch):
    """Nothing is downloaded; what a block imports besides is skipped where it is missing, and may warn where it is not."""
    others = [pytest.importorskip(name) for name in packages(code)]
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **options: create(name, **options))
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        if others:
            warnings.simplefilter("ignore")
        exec(compile(code, page, "exec"), {})


def test_training_takes_no_more_than_fifteen_lines():
    assert all(len(list(filter(str.strip, code.splitlines()))) < 15 for code in blocks("python", "docs/train.md"))
    assert {"lightning", "accelerate", "transformers"} == set().union(*map(packages, blocks("python", "docs/train.md")))


def test_the_plan_of_the_readme_is_the_plan():
    with torch.device("meta"):
        model = timm.create_model("resnet50")
    assert f"{drifa_attn.plan(model)}\n" in blocks("text")


@pytest.mark.parametrize(("target", "extra"), [("demo", "examples"), ("test", "dev")])
def test_plain_lines_are_those_of_the_makefile(target, extra):
    plain = " && ".join([f'pip install -e ".[{extra}]"', *commands(target)])
    assert f"| `make {target}` | `{plain}` |" in README


DRIFA = [line for page in PAGES for block in blocks("sh", page) for line in block.splitlines() if line.startswith("drifa-attn")]


@pytest.mark.parametrize("line", DRIFA)
def test_command_lines_parse(line, tmp_path, monkeypatch):
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
    cells = [measured(arm, name) for name in ("sipakmed_64", "ham10000_64")]
    assert f"| {row} | {' | '.join(cells)} |" in README.replace("**" + cells[0] + "**", cells[0]).replace(
        "**" + cells[1] + "**", cells[1]
    )


def test_the_quickstart_says_in_words_when_gates_do_not_attend():
    assert "constants" not in quickstart.verdict({"a": 0.031, "b": 0.001})
    told = quickstart.verdict({"a": 0.029, "b": 0.001})
    assert told.endswith("That is below 0.03 everywhere: these gates are constants and hardly attend to the image.")


def test_every_page_is_in_the_site_and_every_public_name_on_the_page_of_names():
    named = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(f"docs/{name}" for name in named) == sorted(set(PAGES) - {"README.md"})
    pictures = {f"plot.{name}" for name in drifa_attn.plot.__all__}
    shown = re.findall(r"^::: (\S+)\n    options: \{heading: drifa_attn\.([\w.]+),", PAGES["docs/api.md"], re.MULTILINE)
    assert {name for _, name in shown} == {*drifa_attn.__all__, "fusion.Refiner", "fusion.Readout", *pictures}
    for path, name in shown:
        assert pkgutil.resolve_name(path.rpartition(".")[0] + ":" + path.rpartition(".")[2]) is pkgutil.resolve_name(
            f"drifa_attn:{name}"
        )


def test_costs_are_those_of_the_plans():
    with torch.device("meta"):
        model = timm.create_model("resnet50")
    rows = re.findall(r"^\| `wrap\(model(?:, )?(.*?)\)` \| (.*) \|$", PAGES["docs/where.md"], re.MULTILINE)
    assert len(rows) == 7
    for options, told in rows:
        chosen = eval(f"plan(model, {options})", {"plan": drifa_attn.plan, "model": model})
        parts = sum(site.params for site in chosen.sites), sum(site.flops for site in chosen.sites)
        shares = [table.share(*pair) for pair in zip(parts, (chosen.params, chosen.flops), strict=True)]
        assert told.split(" | ") == [str(len(chosen.sites)), *shares], options


def measured(arm, name):
    """An arm's balanced accuracy on the test images of a collection, in per cent, as a table shows it."""
    path = ROOT / "examples" / "does_it_help" / "results" / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = [100 * one["balanced_accuracy"] for one in rows if one["arm"] == arm and one["part"] == "test"]
    assert len(found) == 5
    return f"{mean(found):.1f} ± {stdev(found):.1f}"


def test_numbers_of_the_recipe_are_those_of_the_rows():
    arms = {
        "head only": "head only",
        "MFA, calibrated, and head": "MFA",
        "MFA, not calibrated, and head": "MFA, uncalibrated",
        "LoRA, rank 1, and head": "LoRA",
        "norms and head": "norms",
        "norms, MFA and head": "norms + MFA",
        "all weights": "all",
        "all weights and MFA": "all + MFA",
    }
    for row, arm in arms.items():
        told = " | ".join(measured(arm, name) for name in ("sipakmed_64", "ham10000_64"))
        assert f"| {row} | {told} |" in PAGES["docs/train.md"], row


def test_times_of_a_whole_network_are_those_of_the_rows():
    with (ROOT / "benchmarks" / "results" / "0.2.0" / "cpu-amd-epyc-wrap.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = {"plain": "plain", "SE at the same sites": "SE", "CBAM at the same sites": "CBAM", "MFA, `wrap(model)`": "MFA"}
    for row, name in names.items():
        provider = "auto" if name == "MFA" else "peers"
        found = [one for one in rows if (one["op"], one["provider"]) == (f"resnet50 {name}", provider)]
        forward, step = (next(one for one in found if one["mode"] == mode) for mode in ("forward", "full"))
        times = [f"{float(one['p50']):.3g} ms" for one in (forward, step)]
        told = [row, *times, f"{int(forward['params']):,}", table.count(int(forward["flops"]))]
        assert f"| {' | '.join(told)} |" in PAGES["docs/speed.md"]


def test_every_picture_is_made_by_the_code_above_it_and_is_small():
    page = PAGES["docs/pictures.md"]
    made = re.findall(r"plot\.(\w+)\(.*\)\.savefig\(\"(\w+)\.png\"\)", page)
    assert sorted(name for name, _ in made) == drifa_attn.plot.__all__
    assert all(name == file for name, file in made)
    assert re.findall(r"!\[.+\]\(images/(\w+)\.png\)", page) == [file for _, file in made]
    sizes = {path.stem: path.stat().st_size for path in (ROOT / "docs" / "images").iterdir()}
    assert set(sizes) == {file for _, file in made}
    assert max(sizes.values()) < 100_000
    shown = {(ROOT / page).parent / target for page in PAGES for target in re.findall(r"!\[.*?\]\((.*?)\)", PAGES[page])}
    assert not [target for target in shown if not target.exists()]


@pytest.mark.slow
def test_the_notebook_runs_without_stored_outputs(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(ROOT / "docs" / "first_steps.ipynb", 4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(f"import sys; sys.path.insert(0, {str(ROOT)!r})"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the kernel's own process
        nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    said = "".join(output.get("text", "") for output in outputs)
    assert "equal bit for bit: True" in said
    assert "the same answers: True" in said
    right = re.findall(r"(?:right on test images|upper and lower): ([\d.]+)%", said)
    assert len(right) == 2
    assert all(float(share) > 80 for share in right)
    shown = [set(output["data"]) for output in outputs if "data" in output]
    assert sum("text/html" in kinds for kinds in shown) == 1
    assert sum("image/png" in kinds for kinds in shown) == 3
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    pytest.importorskip("mkdocs")
    run(sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path, cwd=ROOT)
    assert (tmp_path / "api.html").read_text().count('id="drifa_attn') > 50


def test_the_readme_renders_where_there_is_no_repository():
    """A package index shows README without the files beside it: links are absolute, and paths that are named exist.

    Pictures are left out there, see `pyproject.toml`.
    """
    assert all(target.startswith("https://") for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)]*)\)", README))
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", README)
    assert pictures
    assert all(picture.startswith("docs/images/") and (ROOT / picture).exists() for picture in pictures)
    assert not re.search(r"^\[.*\]:|<(a|img)\b", README, re.MULTILINE)
    paths = re.findall(r"`((?:docs|examples|benchmarks)/[\w./]*)`", README)
    assert len(paths) > 10
    assert not [path for path in paths if not (ROOT / path).exists()]


@pytest.mark.parametrize(("page", "code"), everywhere("python"))
def test_a_download_is_announced_with_the_offline_form(page, code):
    lines = [line for line in code.splitlines() if "pretrained=True" in line and not line.lstrip().startswith("#")]
    assert all("downloads" in line and "pretrained=" in line.partition("#")[2] for line in lines), page


def test_the_header_says_parameters_flops_and_time():
    with (ROOT / "benchmarks" / "results" / "0.2.0" / "cpu-amd-epyc-wrap.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["shape"] == "1x3x224x224" and row["mode"] == "forward"]
    plain, mfa = (
        next(row for row in rows if (row["op"], row["provider"]) == pair)
        for pair in (("resnet50 plain", "peers"), ("resnet50 MFA", "auto"))
    )
    more = [table.share(float(mfa[key]) - float(plain[key]), float(plain[key])) for key in ("params", "flops", "p50")]
    told = f"**{more[0]} parameters, {more[1]} FLOPs, and +{float(more[2][1:-2]):.0f} % time**"
    assert f"{told} for one image on two CPU cores, {float(mfa['p50']):.1f} ms" in README
    assert f"takes {float(plain['p50']):.1f}" in README


def test_every_fusion_stands_in_the_table():
    told = re.findall(r"^\| (.*?) \|", PAGES["docs/fusions.md"], re.MULTILINE)
    assert {name for cell in told for name in re.findall(r'`"(\w+)"`', cell)} == set(FUSIONS)
