"""How many kernels a layer launches on a GPU, counted on meta tensors: more than these is a decision."""

import pytest
import torch
from torch import nn

from drifa_attn.ops import chunked
from tests._triton import skip_without_triton

skip_without_triton()
from benchmarks import launches  # noqa: E402  (the kernels import triton, which may be missing)

# label -> the most launches of the fused operators, forward and backward
MOST = {
    "dense c=64, 56²": (3, 8),
    "dense c=128, 28²": (3, 26),
    "reduced c=64 (d=8), 112²": (3, 11),
    "reduced c=256 (d=16), 56²": (3, 11),
    "reduced c=2048 (d=128), 7²": (3, 31),
    "reduced c=256 (d=16), 56², float32": (3, 29),
    "dense c=256, 56², layer-wise": (27, 60),
}


@pytest.mark.parametrize("label", launches.LAYERS)
def test_launches_of_a_layer(label):
    forward, backward = launches.launches(label, "fused")
    most_forward, most_backward = MOST[label]
    assert sum(forward) <= most_forward
    assert sum(backward) <= most_backward


def test_every_layer_has_a_bound():
    assert set(MOST) == set(launches.LAYERS)


def test_what_computes_is_counted_and_what_only_looks_is_not():
    x = torch.empty(2, 3, 4, device="meta", requires_grad=True)
    y, counter = launches.counted(lambda: torch.cat([x.mT.detach() * 2, x.mT[:1]]).exp_().view(3, 4, 3).contiguous(), chunked)
    assert counter.aten == {"mul": 1, "cat": 1, "exp_": 1}
    _, counter = launches.counted(lambda: x.detach().bfloat16().mT.contiguous().reshape(-1), chunked)
    assert counter.aten == {"_to_copy": 1, "clone": 1}  # they hide in operators that are made of others
    forward, backward = launches.step(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).to("meta"), (5, 3, 4), "auto", chunked)
    assert (forward, backward) == ((1, 0), (3, 0))  # addmm; two products and the sum for the bias
