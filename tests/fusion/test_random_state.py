"""`fuse` draws its weights without moving what the user draws from."""

import pytest
import timm
import torch

from drifa_attn import fuse
from tests._compare import assert_same_bits

TASKS = {"lesion": 3}


def backbones(seed=0, **options):
    torch.manual_seed(seed)
    return {name: timm.create_model("test_resnet", **options) for name in "ab"}


def weights(net):
    """The new weights that are random."""
    return [p for p in [*net.refiners.parameters(), *net.heads.parameters()] if p.ndim > 1 and p.any()]


def same(one, other):
    return [torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True)]


def test_the_global_states_stay(monkeypatch):
    """Those of other devices too: `torch.manual_seed` would set them, and before a device is used those that it starts with."""
    two = backbones(drop_rate=0.5)
    monkeypatch.setattr(torch, "manual_seed", lambda _: pytest.fail("all devices are seeded"))
    state = torch.get_rng_state()
    fuse(two, TASKS, dropout=0.1)
    assert_same_bits(torch.get_rng_state(), state)
    with pytest.raises(TypeError, match="reduction"):
        fuse(two, TASKS, fusion_options={"reduction": 4, "unknown reduction": 3})
    assert_same_bits(torch.get_rng_state(), state)


def test_the_seed_decides_the_weights_and_networks_differ():
    nets = []
    two, twins, others = backbones(), backbones(), backbones(1)
    for given, seed in ((two, 5), (twins, 5), (others, 5), (backbones(), 6)):
        torch.manual_seed(seed)
        nets.append(fuse(given, TASKS))
    assert weights(nets[0])
    assert all(same(nets[0], nets[1]))
    assert not any(same(nets[0], nets[2]))
    assert not any(same(nets[0], nets[3]))


def test_a_generator_decides_the_weights():
    generator = torch.Generator().manual_seed(0)
    one, two = (fuse(backbones(), TASKS, generator=generator) for _ in range(2))
    assert not any(same(one, two))
    torch.manual_seed(9)
    assert all(same(fuse(backbones(1), TASKS, generator=torch.Generator().manual_seed(0)), one))
    with pytest.raises(TypeError, match=r"fuse expected a torch\.Generator, got 3"):
        fuse(backbones(), TASKS, generator=3)
