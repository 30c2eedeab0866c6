"""Every way of dropout is on in Monte Carlo passes, and nothing else."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import ParallelScalingBlock
from torch import nn

from drifa_attn import add_dropout, ensemble, mc_dropout, wrap
from tests._compare import assert_same_bits, assert_same_math
from tests._uncertainty import X, assert_same_result, modes, net, seeded, spread
from tests.networks import Net, built
from tests.older import needs_later_torch


def of_timm(name, size, **options):
    return lambda: (timm.create_model(name, pretrained=False, num_classes=5, **options), torch.randn(2, 3, size, size))


def unfused(name, size, **options):
    def build():
        model, x = of_timm(name, size, **options)()
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        return model, x

    return build


def of_torch(module, *shape):
    """A sequence model with a linear head on its first output's last step."""
    head = nn.Linear(8, 5)
    return lambda: (Net(lambda net, x: net.head(first(net.body(x))[:, -1]), body=module(), head=head), torch.randn(2, *shape))


def first(output):
    return output[0] if isinstance(output, tuple) else output


def attending(**options):
    def build():
        attention, head = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True), nn.Linear(8, 5)
        net = Net(lambda net, x: net.head(net.attention(x, x, x, **options)[0][:, 0]), attention=attention, head=head)
        return net, torch.randn(2, 4, 8)

    return build


class Halved(nn.Dropout):
    """Dropout of one's own."""

    def forward(self, x):
        return x * torch.bernoulli(torch.full_like(x, 0.5)) if self.training else x


def layer():
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)


def functional(drop):
    """A functional call that the mode of its module switches, on a map."""
    return lambda: (Net(lambda net, x: drop(x, net.training).flatten(1)), torch.randn(2, 5, 4, 4))


ON = {
    "timm resnet": of_timm("test_resnet", 64, drop_rate=0.3),
    "timm efficientnet": of_timm("test_efficientnet", 64, drop_rate=0.3),
    "timm densenet": of_timm("densenet121", 64, drop_rate=0.3, growth_rate=8, block_config=(2, 2)),
    "timm mambaout": of_timm("test_mambaout", 64, drop_rate=0.3),
    "timm vit head": of_timm("test_vit", 80, img_size=80, drop_rate=0.3),
    "timm vit projections": of_timm("test_vit", 80, img_size=80, proj_drop_rate=0.3),
    "timm vit positions": of_timm("test_vit", 80, img_size=80, pos_drop_rate=0.3),
    "timm vit attention": of_timm("test_vit", 80, img_size=80, attn_drop_rate=0.3),
    "timm vit unfused attention": unfused("test_vit", 80, img_size=80, attn_drop_rate=0.3),
    "timm vit parallel attention": of_timm("test_vit", 80, img_size=80, attn_drop_rate=0.3, block_fn=ParallelScalingBlock),
    "nn.MultiheadAttention": attending(),
    "nn.MultiheadAttention without weights": attending(need_weights=False),
    "nn.TransformerEncoderLayer": of_torch(layer, 4, 8),
    "a subclass of nn.Dropout": of_torch(Halved, 4, 8),
    "F.dropout": functional(lambda x, training: F.dropout(x, 0.3, training)),
    "F.dropout1d": functional(lambda x, training: F.dropout1d(x.flatten(2), 0.3, training)),
    "F.dropout2d": functional(lambda x, training: F.dropout2d(x, 0.3, training=training)),
    "F.dropout3d": functional(lambda x, training: F.dropout3d(x[..., None], 0.3, training)),
    "F.alpha_dropout": functional(lambda x, training: F.alpha_dropout(x, 0.3, training)),
    "F.feature_alpha_dropout": functional(lambda x, training: F.feature_alpha_dropout(x, 0.3, training)),
    "torch.dropout": functional(lambda x, training: torch.dropout(x, 0.3, training)),
    "torch.feature_dropout": functional(lambda x, training: torch.feature_dropout(x, p=0.3, train=training)),
}
OFF = {
    "a rate of zero": of_timm("test_resnet", 64),
    "stochastic depth": of_timm("test_resnet", 64, drop_path_rate=0.5),
    "patch dropout": of_timm("test_vit", 80, img_size=80, patch_drop_rate=0.5),
    "inside an RNN": of_torch(lambda: nn.LSTM(8, 8, 2, dropout=0.5, batch_first=True), 4, 8),
}


@pytest.mark.parametrize("kind", ON)
def test_dropout_of_every_kind_is_on(kind):
    model, x = ON[kind]()
    nothing_at_zero_(model)
    before = modes(model)
    assert spread(mc_dropout(model, x, 8)) > 0
    assert modes(model) == before
    model.eval()
    with torch.no_grad():
        assert_same_bits(model(x), model(x))


def nothing_at_zero_(model):
    """A head or a residual scale that starts at zero would hide what is dropped before it."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize("kind", OFF)
def test_what_is_no_dropout_stays_off_and_a_model_without_any_is_refused(kind):
    model, x = OFF[kind]()
    before = modes(model)
    with pytest.raises(
        ValueError, match=r"mc_dropout found no active dropout in the model: drifa_attn\.add_dropout\(model, 0\.1\)"
    ):
        mc_dropout(model, x, 8)
    assert modes(model) == before


def test_a_member_without_dropout_is_named():
    with pytest.raises(ValueError, match="ensemble, member 1, found no active dropout"):
        ensemble([net(), net(p=0.0)], X, passes=2)


def test_wrapped_networks_work():
    model, x = built("resnet")
    wrap(model)
    with pytest.raises(ValueError, match="no active dropout"):
        mc_dropout(model, x)
    assert spread(mc_dropout(add_dropout(model, 0.3), x, 4)) > 0


IN_PLACE = pytest.param("in place", marks=needs_later_torch("compiles no nn.Sequential in place"))


@pytest.mark.parametrize("way", ["whole", IN_PLACE, "a part"])
def test_compiled_networks_run_as_they_are_and_stay_compiled(way):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    model = net().eval()
    plain = mc_dropout(model, X, 4, generator=seeded())
    if way == "in place":
        model.compile(backend=backend)
    elif way == "whole":
        model = torch.compile(model, backend=backend)
    else:
        model = nn.Sequential(torch.compile(model, backend=backend))
    with torch.no_grad():
        expected = model(X)
        assert_same_result(mc_dropout(model, X, 4, generator=seeded()), plain)
        assert len(graphs) == 1
        assert_same_bits(model(X), expected)
        assert_same_math(ensemble([model, copy.deepcopy(net())], X).probs.sum(1), torch.ones(5))
    assert len(graphs) == 1
