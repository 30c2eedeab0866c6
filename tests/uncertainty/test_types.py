"""What README and docs/ show of uncertainty and losses type-checks."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests._process import run

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_code_of_the_pages_type_checks(tmp_path):
    pages = "".join((ROOT / page).read_text() for page in ("README.md", "docs/modalities.md", "docs/uncertainty.md"))
    found = re.findall(r"```python\n(.*?)```", pages, re.DOTALL)
    blocks = [block for block in found if "mc_dropout" in block or "TaskLoss" in block]
    assert len(blocks) >= 3
    for number, block in enumerate(blocks):
        (tmp_path / f"block_{number}.py").write_text(block)
    assert "Success" in run(sys.executable, "-m", "mypy", *sorted(tmp_path.glob("*.py")), cwd=ROOT)
    wrong = blocks[-1].replace('"age": "regression"', '"age": "value"') + "\ndrifa_attn.mc_dropout(net, inputs).mean\n"
    (tmp_path / "wrong.py").write_text(wrong)  # or everything would pass
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run(sys.executable, "-m", "mypy", tmp_path / "wrong.py", cwd=ROOT)
    assert 'Item "Uncertainty" of "Uncertainty | Any" has no attribute "mean"' in caught.value.stdout
    assert "Dict entry 1 has incompatible type" in caught.value.stdout
