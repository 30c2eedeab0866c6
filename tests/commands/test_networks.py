"""The weights of a network are data: nothing that a file says is run."""

import pytest
import timm
import torch

from drifa_attn.commands.networks import load_weights


class Trap:
    """What would make a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_file_that_would_run_code_is_refused(tmp_path):
    """With the default of the oldest timm too, which unpickles."""
    model = timm.create_model("test_efficientnet")
    torch.save({"state_dict": model.state_dict(), "trap": Trap(tmp_path / "sprung")}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth does not hold the weights of EfficientNet"):
        load_weights(model, tmp_path / "weights.pth")
    assert not (tmp_path / "sprung").exists()
