"""Grad-CAM with attention off and on: the numbers, what it leaves alone, and what it refuses."""

import sys
from contextlib import nullcontext

import pytest
import timm
import torch
from torch import nn

import drifa_attn
from drifa_attn import plot

pytest.importorskip("matplotlib")

pytest.importorskip("pytorch_grad_cam")

from drifa_attn.plot import evidence  # noqa: E402 - after what it needs
from tests._plot import moved, words  # noqa: E402


@pytest.fixture(scope="module")
def wrapped():
    return moved()


def by_hand(model, x, target, site):
    """Grad-CAM of a class, by its equation, at the output of a module."""
    kept = []
    handle = model.get_submodule(site).register_forward_hook(lambda *args: kept.append(args[2]))
    logits = model(x.clone().requires_grad_())
    handle.remove()
    (slope,) = torch.autograd.grad(logits[torch.arange(len(x)), target].sum(), kept[0])
    found = (slope.mean((2, 3), keepdim=True) * kept[0]).sum(1).relu().detach()
    return logits.softmax(1).detach(), found


def test_cam_is_that_of_its_equation_with_attention_off_and_on(wrapped):
    model, x = wrapped
    model.eval()
    classes = torch.tensor([1, 4, 0])
    found = evidence.evidence("plot.cam", model, x, "layer2", classes)
    assert found.classes.equal(classes)
    pooled = nn.functional.adaptive_avg_pool2d
    for told, context in ((found.on, nullcontext()), (found.off, drifa_attn.disabled(model))):
        with context:
            probs, maps = by_hand(model, x, classes, "layer2")
        assert torch.allclose(told[0], probs[torch.arange(3), classes], atol=1e-5)
        least = maps.amin((1, 2), keepdim=True)
        expected = (maps - least) / (maps.amax((1, 2), keepdim=True) - least).clamp(min=1e-7)
        assert (pooled(told[1], expected.shape[1:]) - expected).abs().mean() < 0.1  # theirs is of the size of the image
    assert (found.on[1] - found.off[1]).abs().mean() > 0.01


def test_cam_leaves_the_network_as_it_was(wrapped):
    model, x = wrapped
    model.train()
    model.bn1.eval()
    model(x).sum().backward()
    model.conv1[0].weight.requires_grad_(False)
    before = {
        name: (p.clone(), p.requires_grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()
    }
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    plot.cam(model, x)
    with pytest.raises(ValueError, match="from 0 to 4"):
        plot.cam(model, x, [9, 9, 9])
    assert modes == [module.training for module in model.modules()]
    assert all(tensor.equal(state[name]) for name, tensor in model.state_dict().items())
    for name, parameter in model.named_parameters():
        value, wants, gradient = before[name]
        assert (parameter.requires_grad, parameter.grad is None) == (wants, gradient is None)
        assert gradient is None or parameter.grad.equal(gradient)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model.conv1[0].weight.requires_grad_(True)
    model.zero_grad()


@pytest.mark.parametrize(("name", "size"), [("test_vit", 160), ("test_convnext", 64), ("test_resnet", 64)])
def test_cam_reads_maps_and_tokens(name, size):
    model, x = drifa_attn.wrap(timm.create_model(name, num_classes=5)), torch.randn(2, 3, size, size)
    figure = plot.cam(model, x, names=list("abcde"))
    assert "Grad-CAM with attention off and on: they differ by 0.000 on average" in words(figure)  # before training
    assert sum(bool(axes.images) for axes in figure.axes) == 2 * 4
    assert sum(text in {"class a", "class b", "class c", "class d", "class e"} for text in words(figure)) == 2


def test_cam_takes_the_last_site_with_enough_positions_for_these_images(wrapped, monkeypatch):
    model, _ = wrapped
    taken, real = [], evidence.gradcam
    monkeypatch.setattr(evidence, "gradcam", lambda *args: (taken.append(args[3][0].name), real(*args))[1])
    for size in (32, 64, 160):
        plot.cam(model, torch.randn(1, 3, size, size))
    assert taken == ["layer2", "layer2", "layer3", "layer3", "layer4", "layer4"]


def test_cam_with_an_activation_that_works_in_place():
    torch.manual_seed(0)
    found = []
    for inplace in (False, True):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(inplace), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
        drifa_attn.wrap(net, at=["0"], example_input=torch.zeros(2, 3, 8, 8))
        found.append(evidence.evidence("plot.cam", net, torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8).sin()))
    assert found[0].on[1].equal(found[1].on[1])
    assert found[0].on[1].max() > 0


def test_what_cam_cannot_read_is_refused(wrapped):
    model, x = wrapped
    plain = timm.create_model("test_resnet")
    for arguments, options, message in (
        (("resnet50", x), {}, "plot.cam expected an nn.Module, got str"),
        ((plain, x), {}, r"plot.cam found no site in ResNet: drifa_attn.wrap\(model\) makes them"),
        ((model, x[0]), {}, r"a batch of images \(b, c, h, w\)"),
        ((model, x.long()), {}, "got torch.int64"),
        ((model, x), {"site": "zz"}, "got site='zz', where no attention is; there is some at act1, layer1"),
        ((model, x), {"classes": [0, 1]}, "from 0 to 4 for each of 3 images, got \\[0, 1\\]"),
        ((model, x), {"images": torch.rand(3, 9, 9)}, r"expected images of shape \(3, 64, 64\)"),
        ((model, x), {"images": 255 * torch.ones(3, 64, 64)}, "from 255 to 255"),
        ((model, x), {"names": ["a"], "classes": [1, 1, 1]}, "got 1 names and a class 1"),
        ((model, x[:, :, :2, :2]), {"site": "layer4"}, "one position is no map"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            plot.cam(*arguments, **options)


def test_cam_needs_grad_cam_and_says_so(wrapped, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    with pytest.raises(ImportError, match=r'plot.cam needs grad-cam: pip install "drifa-attn\[plots\]"'):
        plot.cam(*wrapped)
