"""How far a reader must follow the features through MFA: the files that a forward visits, and its jumps between them."""

import sys
from pathlib import Path

import pytest
import torch

import drifa_attn
from drifa_attn import MFA, ops

ROOT = str(Path(drifa_attn.__file__).parent)
LAYERS = {
    "paper": ({}, (16, 8, 8)),
    "reduced identity": ({"reduction": 2, "init": "identity"}, (16, 8, 8)),
    "tokens": ({"layout": "b ... c", "num_prefix_tokens": 1}, (65, 16)),
}


def walk(run):
    """The files of the package whose functions are called, in the order of the calls."""
    files = []

    def note(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(ROOT):
            files.append(frame.f_code.co_filename)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return files


@pytest.mark.parametrize(("mode", "most"), [("reference", 6), ("fused", 15)])
@pytest.mark.parametrize("name", LAYERS)
def test_a_forward_visits_few_files_and_jumps_little(mode, most, name):
    """A jump is a call into another file of the package than the one that the call before went into."""
    options, shape = LAYERS[name]
    mfa, x = MFA(16, **options), torch.randn(2, *shape, requires_grad=True)
    with ops.use(mode):
        files = walk(lambda: mfa(x))
    assert files[0].endswith("mfa.py")
    assert len(set(files)) <= 6, sorted(set(files))
    jumps = sum(one != other for one, other in zip(files, files[1:], strict=False))
    assert jumps <= most, files
