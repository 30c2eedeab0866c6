"""What is drawn without moving what the user draws from."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from drifa_attn.network.randomness import forked, seed_from, sources
from tests._compare import assert_same_bits

X = torch.zeros(1)


def test_sources_are_those_of_every_device(monkeypatch):
    """On devices that this machine need not have."""
    two, apple = (torch.Generator(), torch.Generator()), torch.Generator()
    monkeypatch.setattr(torch.cuda, "default_generators", two)
    monkeypatch.setattr(torch.mps, "_get_default_mps_generator", lambda: apple)
    held = [SimpleNamespace(device=torch.device(name)) for name in ("cuda:1", "meta", "mps:0")]
    model = SimpleNamespace(parameters=lambda: held[:1], buffers=lambda: held[1:2])
    assert sources(model, beside=[X, held[2]]) == [torch.default_generator, two[1], apple]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("seed", [None, 3])
def test_what_is_drawn_within_moves_nothing(seed, fails, monkeypatch):
    """The generators of other devices too."""
    other = torch.Generator().manual_seed(5)
    monkeypatch.setattr(torch.cuda, "default_generators", (other,))
    model = SimpleNamespace(parameters=lambda: [X, SimpleNamespace(device=torch.device("cuda:0"))], buffers=list)
    torch.manual_seed(1)
    states = torch.get_rng_state(), other.get_state()
    try:
        with forked(seed, model):
            drawn = torch.rand(3), torch.rand(3, generator=other)
            assert not fails
    except AssertionError:
        assert fails
    for now, before in zip((torch.get_rng_state(), other.get_state()), states, strict=True):
        assert_same_bits(now, before)
    expected = torch.rand(3), torch.rand(3, generator=other)  # goes on from where the generators are
    if seed is not None:
        expected = (torch.rand(3, generator=torch.Generator().manual_seed(seed)),) * 2
    for now, before in zip(drawn, expected, strict=True):
        assert_same_bits(now, before)


def test_a_seed_is_drawn_from_a_generator():
    one, two = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    seeds = [seed_from("wrap", one) for _ in range(2)]
    assert seeds == [seed_from("wrap", two) for _ in range(2)]
    assert len({*seeds, seed_from("wrap", torch.Generator().manual_seed(1))}) == 3
    assert seed_from("wrap", None) is None
    with pytest.raises(TypeError, match=r"wrap expected a torch\.Generator, got 0: torch\.Generator\(\)\.manual_seed"):
        seed_from("wrap", 0)
    with forked(None, nn.Linear(2, 2)):
        pass
