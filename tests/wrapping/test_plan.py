import re
import threading
from collections import Counter
from dataclasses import replace
from functools import partial
from html import escape

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from drifa_attn import MFA, plan, wrap
from drifa_attn.attention import Spec
from drifa_attn.network.copies import meta_clone
from drifa_attn.wrapping.table import count, share
from tests._wrapping import refused
from tests.networks import MAPS, TOKENS, Net, built, conv, planned

IMAGE = torch.empty(2, 8, 16, 16)


def on_meta(build, **options):
    with torch.device("meta"):
        return build(**options)


def names(chosen):
    return [site.name for site in chosen.sites]


class Block(nn.Module):
    def __init__(self, c_in=8, c_out=8):
        super().__init__()
        self.conv, self.norm = conv(c_in, c_out), nn.BatchNorm2d(c_out)
        self.project = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        return self.norm(self.conv(x)).relu() + self.project(x)


# Where -------------------------------------------------------------------------------------------------------------------

RESNET18 = [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
PROJECTED = [f"layer{i}.0" for i in (2, 3, 4)]
CONVS = [f"{block}.{conv}" for block in RESNET18 for conv in ("conv1", "conv2", "downsample.0")[: 2 + (block in PROJECTED)]]
PAPER = [f"{block}{inside}" for block in RESNET18 for inside in (".conv1", ".conv2", "")]


def is_second_norm(name, module):
    return isinstance(module, nn.BatchNorm2d) and name.endswith("bn2")


WAYS = {
    "block": ({"at": "block"}, RESNET18),
    "conv": ({"at": "conv"}, CONVS),
    "regex": ({"at": r"layer[23]\.\d"}, RESNET18[2:6]),
    "a name": ({"at": "layer4.1"}, ["layer4.1"]),
    "names": ({"at": ["layer4.1", "maxpool", "layer1.0.bn1"]}, ["maxpool", "layer1.0.bn1", "layer4.1"]),
    "predicate": ({"at": is_second_norm}, [f"{block}.bn2" for block in RESNET18]),
    "paper": ({"variant": "paper"}, PAPER),
}


@pytest.mark.parametrize("build", [partial(timm.create_model, "resnet18"), torchvision.models.resnet18], ids=["timm", "tv"])
@pytest.mark.parametrize(("arguments", "expected"), WAYS.values(), ids=WAYS)
def test_plan_selects_what_was_asked_for_in_calling_order(arguments, expected, build):
    assert names(plan(on_meta(build), **arguments)) == expected


def test_paper_variant_is_dense_with_paper_init():
    model = torchvision.models.resnet18()
    chosen = plan(model, variant="paper")
    assert (chosen.spec, len(chosen.sites)) == (Spec("mfa", {"reduction": None, "init": "paper"}), 16 + 8)
    for site in chosen.sites:
        assert site.params == sum(p.numel() for p in MFA(site.channels).parameters())
    attentions = [m for m in wrap(model, variant="paper").modules() if isinstance(m, MFA)]
    assert all(m.reduction is None and m.init == "paper" for m in attentions)
    assert Counter(m.channels for m in attentions) == {64: 6, 128: 6, 256: 6, 512: 6}


def test_convolutions_outside_blocks_unnormed_or_at_one_position_are_left_out():
    squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Sigmoid())
    block = Net(lambda net, x: x + net.norm(net.a(x)) * net.squeeze(x) + net.b(x), a=conv(), b=conv(), norm=nn.BatchNorm2d(8))
    block.squeeze = squeeze
    stem = nn.Sequential(conv(), nn.BatchNorm2d(8))
    chosen = plan(Net(lambda net, x: net.block(net.stem(x)), stem=stem, block=block), "conv", example_input=IMAGE)
    assert names(chosen) == ["block.a"]


UNREAD, CLASS_TOKEN = (
    "the network's result does not depend on this output",
    "the network reads only the class token of this output",
)

STATED = {
    "vit_b_16": (torchvision.models.vit_b_16, "stage", 11, 1),
    "vit_b_16 blocks": (torchvision.models.vit_b_16, "block", 11, 1),
    "vgg11": (torchvision.models.vgg11, "stage", 5, 0),
    "fcn_resnet50": (partial(torchvision.models.segmentation.fcn_resnet50, weights_backbone=None), "block", 16, 0),
    "fcn_resnet50 stages": (partial(torchvision.models.segmentation.fcn_resnet50, weights_backbone=None), "stage", 4, 0),
}


@pytest.mark.parametrize(("build", "at", "sites", "skipped"), STATED.values(), ids=STATED)
def test_torchvision_networks_are_planned_on_meta(build, at, sites, skipped):
    chosen = plan(on_meta(build), at)
    assert (len(chosen.sites), len(chosen.skipped)) == (sites, skipped)
    layout, prefix = (TOKENS, 1) if build is torchvision.models.vit_b_16 else (MAPS, 0)
    assert {(site.layout, site.num_prefix_tokens) for site in chosen.sites} == {(layout, prefix)}


@pytest.mark.parametrize(("at", "number"), [("stage", 4), ("block", 16)])
def test_a_detector_is_planned_at_its_backbone_without_the_pyramid(at, number):
    detector = on_meta(torchvision.models.detection.fasterrcnn_resnet50_fpn, weights=None, weights_backbone=None)
    chosen = plan(detector.backbone, at)
    assert len(chosen.sites) == number
    assert all(name.startswith("body.layer") for name in names(chosen))
    with pytest.raises(ValueError, match=r"FasterRCNN could not be traced .* such as a detector's \.backbone"):
        plan(detector)


# Cost --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet", "vit", "swin", "densenet", "torchvision video"])
@pytest.mark.parametrize("arguments", [{}, {"at": "block", "reduction": None}, {"reduction": 4, "init": "paper"}])
def test_plan_states_the_true_cost(name, arguments):
    model, x = built(name)
    chosen = plan(model, example_input=x, **arguments)
    before = sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter:
        meta_clone(model)(x.to("meta"))  # there every product counts; torch 2.6 does not count the CPU's fused attention
    assert (chosen.params, chosen.flops) == (before, counter.get_total_flops() // len(x))
    wrap(model, example_input=x, **arguments)
    assert sum(site.params for site in chosen.sites) == sum(p.numel() for p in model.parameters()) - before
    with FlopCounterMode(display=False) as counter:
        meta_clone(model)(x.to("meta"))
    added = counter.get_total_flops() / len(x) - chosen.flops
    assert sum(site.flops for site in chosen.sites) == pytest.approx(added, rel=1e-6)
    assert all(site.flops > 0 for site in chosen.sites)


def test_dense_blocks_of_a_resnet50_cost_what_the_docs_say():
    model = on_meta(torchvision.models.resnet50)
    dense, reduced = plan(model, "block", reduction=None), plan(model, "block")
    shares = [
        f"{100 * sum(getattr(s, what) for s in p.sites) / getattr(p, what):.1f}" for p in (dense, reduced) for what in KINDS
    ]
    assert shares == ["630.3", "403.6", "12.5", "6.6"]
    assert all(site.params == 8 * site.channels**2 + 9 * site.channels + 1 for site in dense.sites)


KINDS = ("params", "flops")


def test_print_shows_every_site_every_skip_and_the_totals():
    chosen = planned("coat", "block")
    lines = str(chosen).splitlines()
    assert lines[0] == "CoaT, at='block', attention=mfa(reduction=16, init=\"identity\")"
    assert lines[1].split() == ["site", "features", "layout", "channels", "params", "FLOPs"]
    for line, site in zip(lines[2:], chosen.sites, strict=False):
        words = line.split()
        assert words[:2] == [site.name, "×".join(map(str, site.shape))]
        assert f"{site.layout}, {site.num_prefix_tokens} prefix tokens  " in line
        assert words[-2:] == f"{count(site.params)} {count(site.flops)}".split()[-2:] or len(words) > 6
    params, flops = (sum(getattr(site, what) for site in chosen.sites) for what in KINDS)
    assert lines[2 + len(chosen.sites)] == (
        f"{len(chosen.sites)} sites add {count(params)} parameters ({share(params, chosen.params)} of {count(chosen.params)}) "
        f"and {count(flops)} FLOPs per sample ({share(flops, chosen.flops)} of {count(chosen.flops)})"
    )
    assert lines[3 + len(chosen.sites) :] == [f"skipped {name}: {reason}" for name, reason in chosen.skipped]
    assert chosen.skipped


def test_numbers_are_written_for_people():
    written = [count(n) for n in (0, 999, 1000, 25_557_032, 4.1e9, 2.5e12)]
    assert written == ["0", "999", "1.00 k", "25.56 M", "4.10 G", "2.50 T"]
    assert (share(5, 200), share(5, 0)) == ("+2.5 %", "all")


def test_a_notebook_shows_what_print_shows():
    chosen = plan(timm.create_model("test_resnet"), r"layer[12](\.0)?")
    html = chosen._repr_html_()
    rows = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", html)]
    title, *lines = str(chosen).splitlines()
    assert [line.split() for line in lines[: len(rows)]] == [" ".join(row).split() for row in rows]
    assert f"<p>{escape(title)}</p>" in html
    assert html.endswith(f"<p>{'<br>'.join(map(escape, lines[len(rows) :]))}</p>")
    assert chosen.skipped
    assert "<regex>" not in replace(chosen, at="<regex>")._repr_html_()


# What is left out, and why -----------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Two maps for one; `used` of them is read by the network."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Block(), Block()

    def forward(self, x):
        return self.a(x), self.b(x)


def shared(net, x):
    return net.head(net.once(net.twice(net.twice(x))).mean((2, 3)))


def discarded(net, x):
    net.dead(x)
    return net.head(net.live(x).mean((2, 3)))


def class_token(net, x):
    x = net.patch(x).flatten(2).mT
    x = torch.cat([net.token.expand(len(x), -1, -1), x], 1)
    for layer in net.layers:
        x = layer(x)
    return net.head(x[:, 0])


def transformer():
    layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3))
    net = Net(class_token, patch=nn.Conv2d(8, 8, 2, 2), layers=layers, head=nn.Linear(8, 2))
    net.token = nn.Parameter(torch.zeros(1, 1, 8))
    return net


def alias():
    net = Net(shared, once=Block(), twice=Block(), head=nn.Linear(8, 2))
    net.again = net.twice
    return net


HEAD = {"head": nn.Linear(8, 2)}
LEFT_OUT = {
    "called twice": (lambda: Net(shared, once=Block(), twice=Block(), **HEAD), ["once"], "twice", "it is called 2 times"),
    "shared": (alias, ["once"], "twice", "it is called 2 times in one forward"),
    "discarded": (lambda: Net(discarded, dead=Block(), live=Block(), **HEAD), ["live"], "dead", UNREAD),
    "discarded leaf": (
        lambda: Net(lambda net, x: net.head(net.two(x)[1].mean((2, 3))), two=Branches(), **HEAD),
        ["two.b"],
        "two.a",
        "the network's result does not depend on this output",
    ),
    "patch tokens": (transformer, ["layers.0", "layers.1"], "layers.2", CLASS_TOKEN),
}


@pytest.mark.parametrize(("build", "kept", "left_out", "reason"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_plan_skips_and_names(build, kept, left_out, reason):
    chosen = plan(build(), "block", example_input=IMAGE)
    assert names(chosen) == kept
    assert [name for name, _ in chosen.skipped] == [left_out]
    assert reason in chosen.skipped[0][1]
    assert f"skipped {left_out}: {reason}" in str(chosen)


def test_only_the_live_leaf_of_an_output_is_a_site():
    net = Net(lambda net, x: net.head(net.two(x)[1].mean((2, 3))), two=Branches(), **HEAD)
    chosen = plan(net, ["two"], example_input=IMAGE)
    assert names(chosen) == ["two[1]"]
    assert chosen.skipped == (("two", "[0] the network's result does not depend on this output"),)


# Layouts, inputs ---------------------------------------------------------------------------------------------------------


def test_layouts_decide_where_the_trace_cannot():
    f = Net(lambda net, x: x.flatten(2).softmax(-1)[:, :, :5])
    net = Net(lambda net, x: net.f(net.conv(x)), conv=conv(3, 9), f=f)
    x = torch.empty(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"which axis of its output \(2, 9, 5\) .* name it in layouts="):
        plan(net, ["f"], example_input=x)
    for layout, channels in ((MAPS, 9), (TOKENS, 5)):
        (site,) = plan(net, ["f"], example_input=x, layouts={"f": layout}).sites
        assert (site.layout, site.channels) == (layout, channels)


INPUTS = {
    "a tensor": (lambda net, x: net.block(x), torch.empty(3, 8, 9, 9)),
    "arguments": (lambda net, x, scale: net.block(x) * scale, (torch.empty(3, 8, 9, 9), torch.empty(3, 1, 1, 1))),
    "keywords": (lambda net, *, image: net.block(image), {"image": torch.empty(3, 8, 9, 9)}),
    "a list": (lambda net, images: net.block(torch.cat(images, 1)), ([torch.empty(3, 4, 9, 9)] * 2,)),
    "nested": (lambda net, batch: net.block(batch["x"][0]), ({"x": [torch.empty(3, 8, 9, 9)], "n": 3},)),
    "one sample": (lambda net, x: net.block(x), torch.empty(1, 8, 9, 9)),
    "token ids": (lambda net, ids: net.block(net.embed(ids).mT[..., None]), torch.zeros(3, 9, dtype=torch.long)),
}


@pytest.mark.parametrize(("forward", "example_input"), INPUTS.values(), ids=INPUTS)
def test_example_input_is_whatever_the_network_takes(forward, example_input):
    net = Net(forward, block=Block(), embed=nn.Embedding(10, 8))
    assert [(site.name, site.channels) for site in plan(net, ["block"], example_input=example_input).sites] == [("block", 8)]


def test_a_network_without_weights_is_planned():
    (site,) = plan(nn.Sequential(nn.AvgPool2d(2), nn.ReLU()), ["0"], example_input=IMAGE, layouts={"0": MAPS}).sites
    assert (site.channels, site.shape) == (8, (8, 8, 8))


def test_networks_of_any_make_are_planned():
    mlp = nn.Sequential(nn.Linear(9, 33), nn.ReLU(), nn.Linear(33, 17), nn.ReLU(), nn.Linear(17, 3))
    assert [site.channels for site in plan(mlp).sites] == [33, 17]
    assert [site.channels for site in plan(mlp, r"\d").sites] == [33, 33, 17, 17, 3]
    plain = nn.Sequential(conv(3, 8), nn.ReLU(), nn.MaxPool2d(2), conv(8, 12), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 64, 2))
    assert [site.channels for site in plan(plain, example_input=torch.empty(1, 3, 16, 16)).sites] == [8, 12]
    net = Net(lambda net, x: net.head(net.blocks(x).mean((2, 3))), blocks=nn.Sequential(Block(), Block(8, 12), Block(12, 12)))
    net.head = nn.Linear(12, 2)
    assert names(plan(net, "block", example_input=IMAGE)) == ["blocks.0", "blocks.1", "blocks.2"]
    assert [site.channels for site in plan(net, example_input=IMAGE).sites] == [8, 12]
    assert names(plan(net, "conv", example_input=IMAGE)) == ["blocks.0.conv", "blocks.1.conv", "blocks.2.conv"]


# Planning is looking -----------------------------------------------------------------------------------------------------


class Caching(nn.Module):
    """A network that keeps tensors of its forward, as timm's attention biases do."""

    def __init__(self):
        super().__init__()
        self.blocks, self.cache = nn.Sequential(Block(), Block()), {}

    def forward(self, x):
        return self.blocks(x) * self.cache.setdefault(x.device, torch.ones((), device=x.device))


@pytest.mark.parametrize("name", ["resnet", "vit", "regnet", "coat", "caching"])
def test_plan_touches_nothing(name):
    model, x = (Caching(), IMAGE) if name == "caching" else built(name)
    model.train()
    torch.manual_seed(3)
    rng = torch.get_rng_state()
    before = {key: (tensor, tensor._version) for key, tensor in model.state_dict(keep_vars=True).items()}
    modules = [(n, id(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()]
    plan(model, "block", example_input=x)
    assert torch.equal(torch.get_rng_state(), rng)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[key] is tensor and tensor._version == version for key, (tensor, version) in before.items())
    assert modules == [
        (n, id(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()
    ]
    assert not getattr(model, "cache", None)


# Bad arguments ---------------------------------------------------------------------------------------------------------

BAD_IMAGE = {"example_input": torch.randn(2, 5, 64, 64)}
BAD_ARGUMENTS = [
    (
        {"at": "stages"},
        ValueError,
        r"at='stages' matched 0 of 70 modules of ResNet: use \"stage\", \"block\", \"conv\" or a regex",
    ),
    ({"at": "layer9.*"}, ValueError, r"at='layer9\.\*' matched 0 of 70 modules of ResNet.*, for example .*layer"),
    ({"at": "layer"}, ValueError, "at='layer' matched 0 .* regex for whole names, for example layer"),
    ({"at": "layer("}, ValueError, r"at='layer\(' is no regex \(missing \)"),
    ({"at": []}, ValueError, r"at= names no module of ResNet: \[\]"),
    ({"at": ["layer1", "layer44"]}, ValueError, r"at= names no module of ResNet: \['layer44'\], for example layer4"),
    ({"at": ["layer1", 4]}, (TypeError, ValueError), r"at= .*4"),
    ({"at": ["maxpool", ""]}, ValueError, r"at= names no module of ResNet: \[''\]"),
    ({"at": lambda name, module: False}, ValueError, "the predicate at= selected 0 of 70 modules of ResNet"),
    ({"at": None}, TypeError, "at expected a string, a list of module names or a predicate, got None"),
    ({"at": {"layer1"}}, TypeError, r"at expected .*, got \{'layer1'\}"),
    ({"reduction": 0}, ValueError, "wrap expected reduction to be an integer >= 1, got 0"),
    ({"reduction": 2.0}, ValueError, "got 2.0"),
    ({"reduction": True}, ValueError, "got True"),
    ({"init": "zero"}, ValueError, 'wrap expected init "paper" or "identity", got \'zero\''),
    ({"variant": "papers"}, ValueError, "variant expected None or \"paper\", got 'papers'"),
    ({"variant": "paper", "at": "block"}, ValueError, 'variant="paper" sets at, attention, reduction and init itself'),
    ({"variant": "paper", "reduction": None}, ValueError, 'variant="paper" sets at, attention, reduction and init itself'),
    ({"variant": "paper", "init": "paper"}, ValueError, 'variant="paper" sets at, attention, reduction and init itself'),
    ({"layouts": {"layer1": "b h w c"}}, ValueError, r"layouts.* expected layout \"b c \.\.\.\" or .*, got 'b h w c'"),
    ({"at": ["layer1"], "layouts": {"fc": "b c ..."}}, ValueError, "layouts names 'fc', which at= does not select"),
    ({"example_input": "cat.jpg"}, TypeError, "example_input expected a tensor, a tuple .*, got 'cat.jpg'"),
    ({"example_input": (3, 224, 224)}, TypeError, r"example_input expected a tensor, .* got \(3, 224, 224\)"),
    (BAD_IMAGE, ValueError, r"ResNet could not be traced .* inputs \[\(2, 5, 64, 64\)\] .*: check example_input="),
    (BAD_IMAGE | {"example_input": {"y": torch.randn(2)}}, ValueError, "unexpected keyword argument 'y'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused_with_what_was_given(arguments, error, message):
    model, x = built("resnet")
    for function in (plan, wrap):
        with refused(model, x, error, message):
            function(model, **{"example_input": x} | arguments)


@pytest.mark.parametrize("at", [r"layer[12](\.0)?", lambda name, _: name in ("layer1", "layer1.0", "layer2", "layer2.0")])
def test_a_container_and_its_last_step_are_one_site(at):
    """Two names for one tensor: the outermost has it, and the plan says why the other has none."""
    chosen = plan(timm.create_model("test_resnet"), at)
    assert [site.module for site in chosen.sites] == ["layer1", "layer2"]
    assert ("layer1.0", "it gives the same tensor as layer1") in chosen.skipped


def test_two_names_that_were_written_for_one_tensor_are_refused():
    with pytest.raises(ValueError, match="at= names 'layer1' and 'layer1.0', which give the same tensor: name one of them"):
        plan(timm.create_model("test_resnet"), ["layer1", "layer1.0"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: m.append(nn.LazyLinear(2)), r"3 \(LazyLinear\) is lazy: run the network once, then wrap it"),
        (
            lambda m: setattr(m[0], "lock", threading.Lock()),
            r"0 \(Conv2d\) keeps 'lock', a lock, which cannot be copied: take it off",
        ),
        (lambda m: setattr(m, "each", (i for i in ())), "the network itself .Sequential. keeps 'each', a generator, which"),
    ],
)
def test_the_advice_for_what_cannot_be_copied_fits(spoil, message):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten())
    spoil(model)
    with pytest.raises(ValueError, match=message):
        plan(model, example_input=torch.randn(2, 3, 32, 32))
