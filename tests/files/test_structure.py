"""A network that is made as the saved one is not read again: `load_attention` takes the places from the file."""

import json

import pytest
import torch
from torch import nn

from drifa_attn import calibrate, freeze_backbone, load_attention, save_attention, unwrap, wrap
from drifa_attn.files import recipe
from drifa_attn.files.structure import structure
from drifa_attn.wrapping.inject import detach, slotted
from tests._compare import assert_same_bits
from tests._files import edited, metadata
from tests._wrapping import EVERY, refinements, wrapped
from tests.networks import built


@pytest.fixture
def surveys(monkeypatch):
    """The networks that were surveyed while a file was loaded."""
    seen, own = [], recipe.survey

    def counted(network, *args, **kwargs):
        seen.append(network)
        return own(network, *args, **kwargs)

    monkeypatch.setattr(recipe, "survey", counted)
    return seen


@EVERY
@torch.no_grad()
def test_the_same_network_is_not_read_again(name, tmp_path, surveys):
    """And carries its attention where a survey would put it."""
    model, x = wrapped(name, "block")
    save_attention(model, tmp_path / "attention.safetensors")
    fresh, _ = built(name)
    load_attention(fresh, tmp_path / "attention.safetensors")
    assert not surveys
    assert_same_bits(fresh(x), model(x))
    assert list(slotted(fresh)) == list(slotted(model))
    assert list(fresh.state_dict()) == list(model.state_dict())


CHANGES = {
    "a setting": lambda model: setattr(model.layer1[0].conv1, "dilation", [1, 1]),
    "a flag": lambda model: setattr(model, "drop_rate", 0.5),
    "another class": lambda model: setattr(model.layer1[0], "act1", nn.GELU()),
    "another head": lambda model: model.reset_classifier(3),
    "a hook": lambda model: model.layer1.register_forward_hook(lambda *_: None),
    "a forward": lambda model: setattr(model.layer1, "forward", model.layer1.forward),
    "one more module": lambda model: model.add_module("extra", nn.Identity()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_a_network_that_differs_in_anything_is_read(change, tmp_path, surveys):
    model, x = wrapped("resnet")
    save_attention(model, tmp_path / "attention.safetensors")
    fresh, _ = built("resnet")
    change(fresh)
    load_attention(fresh, tmp_path / "attention.safetensors")
    assert len(surveys) == 1
    assert [hook.site for hook in refinements(fresh)] == [hook.site for hook in refinements(model)]


def test_what_is_no_part_of_the_structure_does_not_count():
    """Weights, types, modes, and whatever this library puts into a network."""
    model, x = built("resnet")
    before = structure(model, [])
    wrap(model)
    calibrate(model, torch.randn(16, 3, 64, 64))
    freeze_backbone(model, batch_norm=True)
    model.train()(x)
    assert structure(model.double(), []) == before
    assert structure(model, list(slotted(model))) != before
    unwrap(model)
    assert structure(model, []) == before


def test_places_that_were_changed_in_a_file_are_not_believed(tmp_path, surveys):
    model, x = wrapped("resnet")
    file = tmp_path / "attention.safetensors"
    save_attention(model, file)
    known = json.loads(metadata(file)["drifa_attn"])["known"]
    homes = known["homes"]
    changed = [[["layer9", "layer9"], *homes[1:]], homes[1:], [], [["layer1"], *homes[1:]], [[1, 2], *homes[1:]], "layer1"]
    for wrong in [*(known | {"homes": homes} for homes in changed), {"homes": homes}, 5]:
        edited(file, known=wrong)
        fresh, _ = built("resnet")
        load_attention(fresh, file)
        assert surveys.pop() is fresh
        assert_same_bits(fresh(x), model(x))
        detach(fresh)


def test_a_file_without_places_is_read_as_before(tmp_path, surveys):
    model, x = wrapped("resnet")
    save_attention(model, tmp_path / "attention.safetensors")
    edited(tmp_path / "attention.safetensors", known=None)
    fresh, _ = built("resnet")
    load_attention(fresh, tmp_path / "attention.safetensors")
    assert surveys == [fresh]
    assert_same_bits(fresh(x), model(x))
