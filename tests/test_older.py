"""The networks that are built for older versions of timm are those of the newest one."""

import pytest
import timm
import torch

from tests import older


@pytest.mark.parametrize("build", [older.test_resnet, older.test_convnext], ids=lambda build: build.__name__)
def test_a_network_of_the_oldest_version_is_the_later_one(build):
    """The same tensors give the same output; where timm lacks the network, the two are one."""
    later, mine = timm.create_model(build.__name__, num_classes=3).eval(), build(False, num_classes=3).eval()
    mine.load_state_dict(later.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(mine(x), later(x))
    assert mine.pretrained_cfg["input_size"] == later.pretrained_cfg["input_size"]
    assert [info["num_chs"] for info in mine.feature_info] == [info["num_chs"] for info in later.feature_info]


def test_a_network_that_cannot_be_built_skips():
    with pytest.raises(pytest.skip.Exception, match="has no MambaOut"):
        older.test_mambaout(False)
