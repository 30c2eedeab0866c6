"""What stands around the package: the workflows, the oldest versions, the third parties, the citation."""

import re
import sys
from pathlib import Path

import pytest

import drifa_attn

yaml = pytest.importorskip("yaml")
tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")  # pytest brings the latter

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read(path):
    return yaml.safe_load(path.read_text())


def jobs():
    return {f"{path.stem}, {name}": job for path in WORKFLOWS for name, job in read(path)["jobs"].items()}


def made(job):
    """The targets of the Makefile that a job makes, those of its matrix written out."""
    for step in job.get("steps", []):
        for target in re.findall(r"^make (.+)$", step.get("run", ""), re.MULTILINE):
            name = re.fullmatch(r"\$\{\{ matrix\.(\w+) \}\}", target)
            yield from job["strategy"]["matrix"][name[1]] if name else target.split()


def test_workflows_make_targets_that_exist():
    asked = {target for job in jobs().values() for target in made(job)}
    assert asked >= {"lint", "test", "test-oldest", "dist"}
    assert asked <= TARGETS


def test_the_pythons_of_the_matrix_are_those_of_the_classifiers():
    (matrix,) = [job["strategy"]["matrix"] for job in jobs().values() if "strategy" in job]
    told = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert matrix["python"] == told
    steps = [step for job in jobs().values() for step in job.get("steps", [])]
    used = {step["with"]["python-version"] for step in steps if "setup-python" in step.get("uses", "")}
    assert used <= {*told, "${{ matrix.python }}"}


def test_only_the_job_that_publishes_may_do_more_than_read():
    assert all(read(path)["permissions"] == {"contents": "read"} for path in WORKFLOWS)
    allowed = {name: job["permissions"] for name, job in jobs().items() if "permissions" in job}
    assert allowed == {"release, publish": {"id-token": "write"}}
    assert jobs()["release, publish"]["needs"] == "ci"
    assert read(ROOT / ".github" / "workflows" / "release.yml")[True]["push"] == {"tags": ["v*"]}  # YAML reads `on` as true


def test_the_oldest_versions_are_the_lower_bounds():
    tested = dict(re.findall(r"^(\w+)==(\S+)$", (ROOT / "tests" / "oldest.txt").read_text(), re.MULTILINE))
    bounds = dict(one.split(">=") for one in PROJECT["dependencies"])
    assert {name: tested[name].removesuffix(".0") for name in bounds} == bounds
    assert set(tested) == {*bounds, "torchvision"}


def test_hooks_are_what_lint_runs():
    (hooks,) = [repo["hooks"] for repo in read(ROOT / ".pre-commit-config.yaml")["repos"]]
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    told = [" ".join(word for word in line.split() if word not in (".", "--check")) for line in recipe.splitlines()]
    ran = [hook["entry"].replace(".venv/bin/", "$(BIN)/").replace(" --force-exclude", "") for hook in hooks]
    assert ran == told


def test_the_citation_is_of_this_version():
    cited = read(ROOT / ".github" / "CITATION.cff")
    assert cited["version"] == drifa_attn.__version__
    assert cited["preferred-citation"]["url"] == "https://arxiv.org/abs/2412.01248"


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda path: path.stem)
def test_issue_forms_ask(path):
    form = read(path)
    assert {"name", "description", "body"} <= set(form)
    names = [field["id"] for field in form["body"]]
    assert len(set(names)) == len(names)
    assert any(field.get("validations", {}).get("required") for field in form["body"])


def test_every_third_party_has_a_line():
    table = (ROOT / ".github" / "THIRD_PARTY.md").read_text()
    rows = re.findall(r"^\| ([\w-]+) \| [^|]+ \| [^|]+ \|$", table, re.MULTILINE)
    named = [*PROJECT["dependencies"], *(one for extra in PROJECT["optional-dependencies"].values() for one in extra)]
    required = {re.match(r"[\w-]+", one)[0] for one in named} - {PROJECT["name"]}
    assert set(rows) - {"package", "---"} == required
    assert len(rows) == len(set(rows))
