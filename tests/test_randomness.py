"""What is drawn without moving what the user draws from."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from drifa_attn.randomness import forked, seed_from, seed_of, sources
from tests._compare import assert_same_bits

X = torch.zeros(1)


def test_sources_are_those_of_every_device(monkeypatch):
    """On devices that this machine need not have."""
    two, apple = (torch.Generator(), torch.Generator()), torch.Generator()
    monkeypatch.setattr(torch.cuda, "default_generators", two)
    monkeypatch.setattr(torch.mps, "_get_default_mps_generator", lambda: apple)
    held = [SimpleNamespace(device=torch.device(name)) for name in ("cuda:1", "meta", "xla:0", "mps:0")]
    model = SimpleNamespace(parameters=lambda: held[:1], buffers=lambda: held[1:3])
    assert sources(model, beside=[X, held[3]]) == [torch.default_generator, two[1], apple]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("seed", [None, 3])
def test_what_is_drawn_within_moves_nothing(seed, fails, monkeypatch):
    """The generators of other devices too."""
    other = torch.Generator().manual_seed(5)
    monkeypatch.setattr(torch.cuda, "default_generators", (other,))
    elsewhere = SimpleNamespace(device=torch.device("cuda:0"))
    network = SimpleNamespace(parameters=list, buffers=lambda: [elsewhere])
    states = torch.get_rng_state(), other.get_state()
    expected = torch.rand(3, generator=torch.Generator().manual_seed(seed or seed_of([network])))
    with pytest.raises(RuntimeError) if fails else nullcontext(), forked(seed, network):
        assert_same_bits(torch.rand(3), expected)
        assert_same_bits(torch.rand(3, generator=other), expected)
        if fails:
            raise RuntimeError
    for now, before in zip((torch.get_rng_state(), other.get_state()), states, strict=True):
        assert_same_bits(now, before)


def test_a_seed_is_drawn_from_a_generator():
    one, two = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    seeds = [seed_from("wrap", one) for _ in range(2)]
    assert seeds == [seed_from("wrap", two) for _ in range(2)]
    assert len({*seeds, seed_from("wrap", torch.Generator().manual_seed(1))}) == 3
    assert seed_from("wrap", None) is None
    with pytest.raises(TypeError, match=r"wrap expected a torch\.Generator, got 0: torch\.Generator\(\)\.manual_seed"):
        seed_from("wrap", 0)


def test_a_seed_is_made_of_the_state_and_of_any_weight():
    network, same = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)) for _ in range(2))
    same.load_state_dict(network.state_dict())
    state = torch.get_rng_state()
    seed = seed_of([network])
    assert seed == seed_of([same]) == seed_of([same.to(memory_format=torch.channels_last)])
    assert_same_bits(torch.get_rng_state(), state)
    with torch.no_grad():
        same[1].bias.add_(1)
    assert seed_of([same]) != seed
    assert len({seed_of(nets) for nets in ([network], [same], [network, same], [same, network])}) == 4
    torch.rand(1)
    assert seed_of([network]) != seed


def test_weights_without_numbers_are_no_obstacle():
    torch.manual_seed(0)
    odd = nn.ParameterList([torch.zeros(0, 3), torch.zeros((), device="meta"), torch.zeros(2, dtype=torch.complex64)])
    lazy = nn.LazyLinear(3)
    expected = seed_of([])
    assert [seed_of([one]) for one in (odd, lazy, odd)] == [expected] * 3
    assert seed_of([nn.ParameterList([torch.tensor(1.0)])]) != expected
