"""`wrap` draws its weights without moving what the user draws from."""

import copy

import pytest
import timm
import torch

from drifa_attn import add_dropout, attention_parameters, load_attention, plan, save_attention, wrap
from tests._compare import assert_same_bits

X = torch.zeros(1, 3, 32, 32)
WAYS = {
    "mfa": {},
    "se": {"attention": "se"},
    "a callable": {"attention": lambda channels: torch.nn.Conv2d(channels, channels, 1)},
    "paper": {"variant": "paper"},
}


def network(seed=0):
    torch.manual_seed(seed)
    return timm.create_model("test_resnet", num_classes=4)


def weights(model):
    """The weights of the attention that are random."""
    return [p for p in attention_parameters(model) if p.ndim > 1 and p.any()]


def same(one, other):
    return [torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True)]


@pytest.mark.parametrize("way", WAYS)
def test_the_global_state_stays(way, tmp_path):
    model = network()
    state = torch.get_rng_state()
    for change in (plan, wrap):
        change(model, **WAYS[way])
        assert_same_bits(torch.get_rng_state(), state)
    if way != "a callable":
        save_attention(model, tmp_path / "file")
        fresh = network()
        load_attention(fresh, tmp_path / "file")
        assert_same_bits(torch.get_rng_state(), state)
    add_dropout(model, 0.1)
    assert_same_bits(torch.get_rng_state(), state)
    if way == "mfa":  # and when it raises
        with pytest.raises(ValueError, match="reduction"):
            wrap(network(), reduction=0)
        assert_same_bits(torch.get_rng_state(), state)


@pytest.mark.parametrize("way", WAYS)
def test_the_seed_decides_the_weights(way):
    one, other, third = network(), network(), network()
    for model, seed in ((one, 5), (other, 5), (third, 6)):
        torch.manual_seed(seed)
        wrap(model, **WAYS[way])
    assert weights(one)
    assert all(same(one, other))
    assert not any(same(one, third))


def test_no_two_sites_and_no_two_networks_start_alike():
    """Also where nothing is drawn between them."""
    one, other = network(0), network(1)
    wrap(one)
    wrap(other)
    assert not any(same(one, other))
    drawn = [w for w in weights(one) if w.ndim == 2]
    assert len({tuple(w.flatten()[:8].tolist()) for w in drawn}) == len(drawn)


def test_a_generator_decides_the_weights_of_copies():
    base = network()
    alike = [wrap(copy.deepcopy(base)) for _ in range(2)]
    assert all(same(*alike))
    generator, state = torch.Generator().manual_seed(0), torch.get_rng_state()
    one, two = (wrap(copy.deepcopy(base), generator=generator) for _ in range(2))
    assert_same_bits(torch.get_rng_state(), state)
    assert not any(same(one, two))
    torch.manual_seed(9)
    assert all(same(wrap(network(3), generator=torch.Generator().manual_seed(0)), one))
    with pytest.raises(TypeError, match=r"wrap expected a torch\.Generator, got 3"):
        wrap(base, generator=3)
    wrap(base)  # it was untouched


@pytest.mark.cuda
def test_the_state_of_a_gpu_stays(device):
    one, other = (network().cuda() for _ in range(2))
    state = torch.cuda.get_rng_state()
    for model in (one, other):
        torch.manual_seed(5)
        torch.cuda.set_rng_state(state)
        wrap(model)
        assert torch.equal(torch.cuda.get_rng_state(), state)
    assert all(same(one, other))
    assert {w.device.type for w in weights(one)} == {"cuda"}


def test_what_is_built_in_inference_mode_trains():
    net = network()
    with torch.inference_mode():
        wrap(net)
    assert not any(parameter.is_inference() for parameter in attention_parameters(net))
    net.eval()(X).sum().backward()
    assert all(parameter.grad is not None for parameter in attention_parameters(net))
