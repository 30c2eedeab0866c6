"""The script of a session on a GPU, without one: every command in it parses, and a step that fails stops no other."""

import os
import shlex
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks.cases import Options

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_session.sh"


def session(out, **settings):
    """What the script prints."""
    environment = {"PATH": os.environ["PATH"], "OUT": str(out), "PY": "python", **settings}
    run = subprocess.run(["bash", SCRIPT], env=environment, cwd=SCRIPT.parents[1], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_command_parses(device, tmp_path):
    commands = [shlex.split(line[1:]) for line in session(tmp_path, DRY="1", DEVICE=device).splitlines() if line[:1] == "+"]
    suites = [words[words.index("benchmarks") + 1 :] for words in commands if "benchmarks" in words]
    assert len(suites) >= 4
    for words in suites:
        words[words.index("--device") + 1] = "cpu"  # the only one here
        given = benchmarks.flags().parse_args(words)
        known = {case.op for group in benchmarks.SUITES[given.suite].cases(Options()) for case in group}
        assert all(any(fnmatch(op, pattern) for op in known) for pattern in given.op), words
    for words in commands:
        module = words[words.index("-m") + 1] if "-m" in words else ""
        assert module in ("benchmarks", "drifa_attn", "pytest", "benchmarks.hazards", "benchmarks.where"), words
        paths = [word for word in words if word.startswith("tests/")]
        assert all((SCRIPT.parents[1] / path).exists() for path in paths), words


def test_a_step_that_fails_stops_no_other(tmp_path):
    said = session(tmp_path, PY="false", STEPS="1 2 3 4")
    assert said.count("status 1 ") >= 5
    assert "s: done" in said
