"""The networks that are built for older versions of timm are those of the newest one."""

import pytest
import timm
import torch

from tests import older


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (older.test_resnet, {}),
        (older.test_resnet, {"channels": (32, 64, 96, 192)}),
        (older.test_resnet, {"layers": (1, 2, 2, 1)}),
        (older.test_convnext, {}),
    ],
)
def test_a_network_of_the_oldest_version_is_the_later_one(build, options):
    """The same tensors give the same output; where timm lacks the network, the two are one."""
    later = timm.create_model(build.__name__, num_classes=3, **options).eval()
    mine = build(False, num_classes=3, **options).eval()
    mine.load_state_dict(later.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(mine(x), later(x))
    assert mine.pretrained_cfg["input_size"] == later.pretrained_cfg["input_size"]
    assert [info["num_chs"] for info in mine.feature_info] == [info["num_chs"] for info in later.feature_info]


def test_a_network_that_cannot_be_built_skips():
    with pytest.raises(pytest.skip.Exception, match="has no MambaOut"):
        older.test_mambaout(False)
