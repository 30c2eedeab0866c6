"""Where sites are found."""

import re

import pytest
import torch
from torch import nn

import drifa_attn
from drifa_attn.network.features import feature as feature_of
from drifa_attn.network.features import leftovers
from drifa_attn.network.inputs import default_shapes, resized
from drifa_attn.network.site import Site
from drifa_attn.network.survey import feature_entries, survey
from drifa_attn.network.trace import MOST_PREFIX
from tests.networks import MAPS, NETWORKS, TOKENS, Net, built, conv, planned
from tests.older import later


@pytest.mark.parametrize("name", later(NETWORKS, "crossvit", "tnt"))
def test_stages_are_the_known_ones(name):
    known, sites = NETWORKS[name], planned(name, "stage").sites
    assert [f"{site.channels}x{site.positions}" for site in sites] == known.stages.split()
    assert {(site.layout, site.num_prefix_tokens) for site in sites} == {(known.layout, known.num_prefix_tokens)}


@pytest.mark.parametrize("name", later(NETWORKS, "tnt"))
def test_blocks_are_the_known_ones(name):
    known, sites = NETWORKS[name], planned(name, "block").sites
    number, names = known.blocks
    assert len({site.name for site in sites}) == len(sites) == number
    assert all(re.fullmatch(names, site.name) for site in sites)
    assert {(site.layout, site.num_prefix_tokens) for site in sites} == {
        known.of_blocks or (known.layout, known.num_prefix_tokens)
    }


# Which axis holds the channels -------------------------------------------------------------------------------------------


def feature(net, shape, name="f", path=(), **options):
    return feature_of(survey(net, torch.empty(shape)), name, path, **options)


def fixed(net, x):
    """A network that takes one size of image."""
    assert x.shape[2:] == (8, 8), "one size"
    return net.f(x)


class Widened(nn.Module):
    """The channels last, at the size of the image."""

    def __init__(self, last):
        super().__init__()
        self.last = last

    def forward(self, x):
        return self.last(x.permute(0, 2, 3, 1))


IMAGES = {
    "map": (conv(3, 5), (2, 3, 8, 8), MAPS, 5),
    "square map": (conv(3, 8), (2, 3, 8, 8), MAPS, 8),  # as many channels as rows
    "channels last": (Widened(nn.Linear(3, 5)), (2, 3, 8, 8), TOKENS, 5),
    "square channels last": (Widened(nn.Linear(3, 8)), (2, 3, 8, 8), TOKENS, 8),
}
OTHERS = {
    "sequence": (nn.Conv1d(3, 5, 1), (2, 3, 7), MAPS, 5),
    "volume": (nn.Conv3d(3, 5, 1), (2, 3, 4, 5, 6), MAPS, 5),
    "vector": (nn.Linear(6, 5), (2, 6), MAPS, 5),
    "tokens": (nn.Sequential(nn.Linear(6, 5), nn.ReLU()), (2, 7, 6), TOKENS, 5),
}


@pytest.mark.parametrize(
    ("kind", "forward"), [*((kind, lambda net, x: net.f(x)) for kind in IMAGES | OTHERS), *((kind, fixed) for kind in IMAGES)]
)
def test_channels_are_found_in_every_layout(kind, forward):
    last, shape, layout, channels = (IMAGES | OTHERS)[kind]
    site = feature(Net(forward, f=last), shape)
    assert (site.layout, site.channels, site.num_prefix_tokens) == (layout, channels, 0)
    assert site.shape[0 if layout == MAPS else -1] == channels


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (Net(lambda net, x: x.mean()), r"no floating-point feature: \(\)"),
        (Net(lambda net, x: x.flatten(1).argmax(1, keepdim=True)), r"no floating-point feature: \(2, 1\)"),
        (Net(lambda net, x: x.flatten(0, 2)[:7]), r"first axis of its output \(7, 8\) is not the batch"),
        (Net(lambda net, x: x.movedim(0, 1)), r"first axis of its output \(3, 2, 8, 8\) is not the batch"),
        (
            Net(lambda net, x: x.permute(0, 2, 1, 3)),
            r"which axis of its output \(2, 8, 3, 8\) .* undecided: name it in layouts=",
        ),
    ],
    ids=["scalar", "integers", "batch cut", "batch second", "channels in the middle"],
)
def test_what_is_no_feature_is_named(f, reason):
    found = feature(Net(lambda net, x: net.f(x), f=f), (2, 3, 8, 8))
    assert isinstance(found, str)
    assert re.search(reason, found), found


def test_undecided_axes_take_a_layout():
    net = Net(lambda net, x: net.f(x) * 2, f=Net(lambda net, x: x.flatten(2).softmax(-1)[:, :, :5]))
    assert "undecided" in feature(net, (2, 7, 4, 4))
    assert [feature(net, (2, 7, 4, 4), layout=layout).channels for layout in (MAPS, TOKENS)] == [7, 5]


# Prefix tokens -----------------------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Patches of any grid, and prefix tokens before them."""

    def __init__(self, prefix, patch):
        super().__init__()
        self.patch, self.prefix = patch, nn.Parameter(torch.zeros(1, prefix, 8))

    def forward(self, x):
        x = self.patch(x).flatten(2).mT
        return torch.cat([self.prefix.expand(len(x), -1, -1), x], 1)


@pytest.mark.parametrize("prefix", [0, 1, 5, MOST_PREFIX])
@pytest.mark.parametrize(
    ("patch", "shape"),
    [(nn.Conv2d(3, 8, 2, 2), (2, 3, 8, 12)), (nn.Conv1d(3, 8, 2, 2), (2, 3, 64)), (nn.Conv3d(3, 8, 2, 2), (2, 3, 4, 8, 8))],
    ids=["image", "signal", "video"],
)
def test_prefix_tokens_are_those_beyond_the_grid(prefix, patch, shape):
    net = Net(
        lambda net, x: net.head(net.f(net.tokens(x))), tokens=Tokens(prefix, patch), f=nn.Linear(8, 8), head=nn.Linear(8, 2)
    )
    site = feature(net, shape)
    assert (site.layout, site.num_prefix_tokens, site.channels) == (TOKENS, prefix, 8)


def test_a_sentence_beside_an_image_has_no_prefix_tokens():
    """It stays as long when the image grows, even where the lengths would fit."""
    net = Net(
        lambda net, x, words: net.text(net.table(words)).mean(1) + net.patch(x).mean((2, 3)),
        patch=nn.Conv2d(3, 8, 2, 2),
        table=nn.Embedding(9, 8),
        text=nn.Linear(8, 8),
    )
    plan = drifa_attn.plan(net, at=["text"], example_input=(torch.randn(2, 3, 4, 4), torch.zeros(2, 6, dtype=torch.long)))
    assert [(site.layout, site.num_prefix_tokens) for site in plan.sites] == [(TOKENS, 0)]


def test_leftovers_are_small_and_never_negative():
    assert sorted(leftovers(50, {49, 50, 51, 34, 33})) == [0, 1, MOST_PREFIX]


# Inputs ------------------------------------------------------------------------------------------------------------------


def test_default_shapes_come_from_the_network():
    stated = Net(lambda net, x: net.f(x), f=nn.Conv2d(4, 8, 3))
    assert next(default_shapes(stated)) == (4, 224, 224)
    stated.pretrained_cfg = {"input_size": (4, 32, 48)}
    assert next(default_shapes(stated)) == (4, 32, 48)
    stated.img_size = (40, 24)
    assert next(default_shapes(stated)) == (4, 40, 24)
    assert next(default_shapes(nn.Sequential(nn.Linear(7, 2)))) == (7,)
    assert next(default_shapes(nn.Sequential(nn.Conv3d(2, 8, 3)))) == (2, 16, 112, 112)


def test_resized_adds_a_sample_and_moves_every_image_axis():
    assert resized(torch.empty(2, 3, 32, 32), batch=2, axes=0).shape == (3, 3, 32, 32)
    larger = resized(torch.empty(2, 3, 4, 32, 32), batch=2, axes=3).shape
    assert larger[:2] == (3, 3)
    assert all(a > b for a, b in zip(larger[2:], (4, 32, 32), strict=True))
    assert larger[3] != larger[4]
    assert resized(torch.zeros(2, 9, dtype=torch.long), batch=2, axes=3).shape == (3, 9)  # token ids keep their length


@pytest.mark.parametrize("name", later(["resnet", "densenet", "crossvit"], "crossvit"))
def test_feature_entries_are_modules_of_a_part_too(name):
    model, _ = built(name)
    entries = list(feature_entries(model))
    assert entries
    part = nn.ModuleDict({"backbone": model, "head": nn.Linear(2, 2)})
    assert [(f"backbone.{module}", channels) for module, channels in entries] == list(feature_entries(part))
    assert all(part.get_submodule(module) for module, _ in feature_entries(part))
    assert not list(feature_entries(nn.Linear(2, 2)))


# Notes -------------------------------------------------------------------------------------------------------------------


def one_input(net, x):
    """A network that takes a single batch size."""
    if x.shape[0] != 2:
        raise RuntimeError("two samples, please")
    return net.f(x)


def test_a_second_forward_that_fails_is_noted():
    found = survey(Net(one_input, f=conv(3, 5)), torch.empty(2, 3, 8, 8))
    (note,) = found.notes
    assert re.search("only one forward worked.*RuntimeError: two samples, please", note)
    assert found.second is None


def test_a_network_of_one_image_size_needs_no_note():
    found = survey(Net(fixed, f=conv(3, 5)), torch.empty(2, 3, 8, 8))
    assert (found.notes, found.is_resized, found.second is None) == ((), False, False)


def test_what_is_known_of_a_module_decides():
    net = Net(lambda net, x: net.f(x) * 2, f=Net(lambda net, x: x.flatten(2).softmax(-1)[:, :, :5]))
    x = torch.empty(2, 7, 4, 4)
    assert survey(net, x).found["f"].sites == []
    by_channels, by_layout = (survey(net, x, channels={"f": [7]}), survey(net, x, layouts={"f": TOKENS}))
    assert [site.channels for site in by_channels.found["f"].sites] == [7]
    assert [site.channels for site in by_layout.found["f"].sites] == [5]


def test_what_is_prepared_is_the_copy():
    """It is changed before it runs; the network is not."""
    net = Net(lambda net, x: net.f(x), f=nn.Linear(4, 5))
    found = survey(net, torch.empty(2, 4), prepare=lambda clone: setattr(clone, "f", nn.Linear(4, 3, device="meta")))
    assert isinstance(found.found["f"].sites[0], Site)
    assert (found.found["f"].sites[0].channels, net.f.out_features) == (3, 5)
