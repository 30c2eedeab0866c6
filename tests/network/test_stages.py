"""Where stages end: at the last block or layer of a resolution, and never at predictions."""

from functools import partial

import pytest
import timm
import torch
import torchvision
from torch import nn

import drifa_attn
from tests.networks import Net, conv


def sites(net, x=None, at="stage"):
    return [site.name for site in drifa_attn.plan(net.eval(), at, example_input=x).sites]


class Residual(nn.Conv2d):
    def forward(self, x):
        y = super().forward(x)
        return y + y.relu() * x.mean(1, keepdim=True)


class Plain(nn.Sequential):
    def __init__(self, c_in, c_out, kernel_size, padding):
        super().__init__(nn.Conv2d(c_in, c_out, kernel_size, padding=padding), nn.BatchNorm2d(c_out), nn.ReLU())


class UNet(nn.Module):
    """Two levels down and up again; the last layer gives two classes."""

    def __init__(self, level, last):
        super().__init__()
        for name, c_in, c_out in [("e1", 3, 8), ("e2", 8, 16), ("e3", 16, 32), ("d2", 48, 16), ("d1", 24, 8)]:
            self.add_module(name, level(c_in, c_out, 3, padding=1))
        self.out = last(8, 2, 3, padding=1)
        self.down, self.up = nn.MaxPool2d(2), nn.Upsample(scale_factor=2)

    def forward(self, x):
        b = self.e2(self.down(a := self.e1(x)))
        d = self.d2(torch.cat([self.up(self.e3(self.down(b))), b], 1))
        return self.out(self.d1(torch.cat([self.up(d), a], 1)))


@pytest.mark.parametrize("last", [Residual, nn.Conv2d])
@pytest.mark.parametrize("level", [Residual, Plain])
def test_a_u_net_has_every_level_down_and_up_but_no_logits(level, last):
    assert sites(UNet(level, last), torch.randn(1, 3, 32, 32)) == ["e1", "e2", "e3", "d2", "d1"]


def test_a_decoder_around_residual_blocks_has_levels_too():
    """The encoder alone has blocks; the layers of the decoder are the levels above it."""

    def run(net, x):
        a = net.e1(x)
        b = net.e2(nn.functional.max_pool2d(a, 2))
        up = nn.functional.interpolate(b, scale_factor=2.0)
        return net.out(net.d1(torch.cat([up, a], 1)))

    net = Net(run, e1=Residual(3, 8, 3, padding=1), e2=Residual(8, 16, 3, padding=1), d1=Plain(24, 8, 3, 1), out=conv(8, 2))
    assert sites(net, torch.randn(1, 3, 32, 32)) == ["e1", "e2", "d1"]


DENSENETS = {
    "timm": (partial(timm.create_model, "densenet121"), [64, 256, 512, 1024, 1024]),
    "torchvision": (partial(torchvision.models.densenet121, weights=None), [256, 512, 1024, 1024]),
}


@pytest.mark.parametrize(("build", "channels"), DENSENETS.values(), ids=DENSENETS)
def test_dense_networks_have_stages_at_their_joins(build, channels):
    with torch.device("meta"):
        net = build()
    assert [site.channels for site in drifa_attn.plan(net).sites] == channels


class Growing(nn.Module):
    """A dense layer that gives all features, as some libraries write it."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)

    def forward(self, x):
        return torch.cat([x, self.conv(x)], 1)


def test_dense_layers_that_grow_are_one_stage_a_resolution():
    layers = [nn.Conv2d(3, 8, 3, padding=1), *map(Growing, (8, 12, 16)), nn.AvgPool2d(2), *map(Growing, (20, 24))]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(28, 2))
    assert sites(net, torch.randn(1, 3, 16, 16)) == ["3", "6"]


def test_a_dilated_network_keeps_the_stages_where_its_width_doubles():
    widths = [(3, 8), (8, 8), (8, 16), (16, 16), (16, 32)]
    blocks = [Residual(c_in, c_out, 3, padding=1) for c_in, c_out in widths]
    net = nn.Sequential(*blocks[:2], nn.MaxPool2d(2), *blocks[2:], nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(1, 3, 16, 16)
    net(x)
    assert sites(net, x) == ["1", "4", "5"]


def test_tables_are_no_stages():
    net = Net(
        lambda net, ids: net.out(net.mix(net.table(ids)).mean(1)),
        table=nn.Embedding(9, 8),
        mix=nn.Sequential(nn.Linear(8, 8), nn.ReLU()),
        out=nn.Linear(8, 2),
    )
    assert "table" not in sites(net, torch.zeros(2, 5, dtype=torch.long))


# Predictions -------------------------------------------------------------------------------------------------------------


class Head(nn.Conv2d):
    """Boxes from several maps: decoded and raw in eval mode, raw alone in training."""

    def forward(self, features):
        raw = {"boxes": torch.cat([super(Head, self).forward(f).flatten(2) for f in features], -1)}
        return raw if self.training else (torch.cat([raw["boxes"], raw["boxes"].sigmoid()], 1), raw)


def detector():
    def run(net, x):
        a = net.a(x).relu()
        return net.head([a, net.b(a).relu()])

    return Net(run, a=nn.Conv2d(3, 16, 3, 2, 1), b=nn.Conv2d(16, 16, 3, 2, 1), head=Head(16, 7, 1))


def test_a_detector_has_stages_before_its_head():
    net, x = detector(), torch.randn(2, 3, 32, 32)
    assert sites(net, x) == ["a", "b"]
    drifa_attn.wrap(net.eval(), example_input=x)
    net.train()(x)


def test_a_head_has_no_blocks_and_the_message_says_so():
    with pytest.raises(ValueError, match=r"(?s)no place for attention with at='block'.*head \(Head\): it gives predictions"):
        drifa_attn.plan(detector().eval(), "block", example_input=torch.randn(2, 3, 32, 32))


def test_a_tensor_that_training_does_not_have_is_refused_by_name():
    net, x = detector().eval(), torch.randn(2, 3, 32, 32)
    keys = set(net.state_dict())
    with pytest.raises(ValueError, match=r"no attention can go at 'head\[.*\]': in training mode the module's output has no"):
        drifa_attn.wrap(net, ["head"], example_input=x)
    assert set(net.state_dict()) == keys


def test_a_tensor_that_is_missing_later_is_named():
    f = Net(lambda net, x: {"map": net.f(x)} if net.is_dict else net.f(x), f=conv(3, 8))
    f.is_dict = True
    net, x = Net(lambda net, x: net.f(x), f=f).eval(), torch.randn(2, 3, 8, 8)
    drifa_attn.wrap(net, ["f"], example_input=x)
    f.is_dict = False
    with pytest.raises(ValueError, match=r"attention at 'f\[map\]' expected a tensor there, but Net gave Tensor"):
        net(x)


# Residuals in other words ------------------------------------------------------------------------------------------------

SPELLINGS = {
    "plus": lambda x, h: x + h,
    "minus": lambda x, h: x - h,
    "lerp": lambda x, h: torch.lerp(x, h, 0.5),
    "addcmul": lambda x, h: torch.addcmul(x, h, h),
    "stack": lambda x, h: torch.stack([x, h]).sum(0),
}


@pytest.mark.parametrize("shape", [(2, 8, 6, 6), (2, 8)], ids=["maps", "vectors"])
@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_residual_blocks_are_found_however_they_add(spelling, shape):
    layer = conv if len(shape) > 2 else partial(nn.Linear, 8, 8)
    blocks = [Net(lambda net, x: spelling(x, net.f(x).relu()), f=layer()) for _ in range(3)]
    net = nn.Sequential(nn.Sequential(*blocks), nn.Flatten(), nn.Linear(8 * 36 if len(shape) > 2 else 8, 2))
    assert sites(net, torch.randn(shape), at="block") == ["0.0", "0.1", "0.2"]


# Batches that are folded -------------------------------------------------------------------------------------------------


class Bag(nn.Module):
    """A bag of patches `b n c h w`, folded into the batch."""

    def __init__(self):
        super().__init__()
        self.cnn, self.score, self.fc = timm.create_model("test_resnet", num_classes=0), nn.Linear(96, 1), nn.Linear(96, 2)

    def forward(self, bag):
        f = self.cnn(bag.flatten(0, 1)).unflatten(0, bag.shape[:2])
        return self.fc((self.score(f).softmax(1) * f).sum(1))


def test_a_folded_batch_is_a_batch(tmp_path):
    net, x = Bag().eval(), torch.randn(2, 3, 3, 64, 64)
    plan = drifa_attn.plan(net, example_input=x)
    assert [site.name for site in plan.sites] == [f"cnn.{name}" for name in ("act1", "layer1", "layer2", "layer3", "layer4")]
    assert {site.folded for site in plan.sites} == {3}
    alone = drifa_attn.plan(net.cnn, example_input=x[0])
    assert [site.flops for site in plan.sites] == [3 * site.flops for site in alone.sites]  # for a sample of the whole
    before = net(x)
    drifa_attn.wrap(net, example_input=x)
    assert torch.equal(net(x), before)
    drifa_attn.save_attention(net, tmp_path / "bag.safetensors")
    fresh = Bag().eval()
    fresh.load_state_dict({k: v for k, v in net.state_dict().items() if "drifa_attn" not in k})
    again = drifa_attn.load_attention(fresh, tmp_path / "bag.safetensors", example_input=x)
    assert torch.equal(again(x), before)


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower = timm.create_model("test_resnet", num_classes=0)

    def forward(self, a, b):
        return (self.tower(a) - self.tower(b)).abs()


def test_a_shared_tower_comes_back_from_its_file_and_shows_every_run(tmp_path):
    net, a, b = Siamese().eval(), torch.randn(2, 3, 64, 64), torch.randn(2, 3, 64, 64)
    drifa_attn.wrap(net.tower)
    for parameter in drifa_attn.attention_parameters(net):
        nn.init.normal_(parameter, std=0.3)
    one, two = (drifa_attn.gates(net.tower, x) for x in (a, b))
    both = drifa_attn.gates(net, a, b)
    assert {name: len(gates) for name, gates in both.items()} == {f"tower.{name}": 2 for name in one}
    for name in one:
        assert torch.equal(both[f"tower.{name}"][0], one[name])
        assert torch.equal(both[f"tower.{name}"][1], two[name])
    drifa_attn.save_attention(net, tmp_path / "siamese.safetensors")
    fresh = Siamese().eval()
    fresh.load_state_dict({k: v for k, v in net.state_dict().items() if "drifa_attn" not in k})
    again = drifa_attn.load_attention(fresh, tmp_path / "siamese.safetensors", example_input=(a, b))
    assert torch.equal(again(a, b), net(a, b))


def test_windows_whose_number_moves_with_the_image_are_no_batch():
    def run(net, x):
        windows = x.unflatten(2, (-1, 4)).unflatten(4, (-1, 4)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        return net.f(windows).mean((2, 3)).unflatten(0, (len(x), -1)).mean(1)

    found = pytest.raises(ValueError, drifa_attn.plan, Net(run, f=conv(3, 8)), ["f"], example_input=torch.randn(2, 3, 16, 16))
    assert "is not the batch" in str(found.value)
