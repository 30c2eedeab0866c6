"""Batch norms: statistics that move under frozen weights, norms that are replaced, and norms that stay in eval mode."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

import drifa_attn
from tests.networks import Net, conv


def trained(net, x):
    """The network after two steps that move statistics alone."""
    net.train()
    with torch.no_grad():
        for _ in range(2):
            net(x)
    return net.eval()


def wrapped():
    torch.manual_seed(2)
    return drifa_attn.wrap(timm.create_model("test_resnet", num_classes=3))


X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 + 1


def fresh():
    torch.manual_seed(2)
    return timm.create_model("test_resnet", num_classes=3)


def test_a_file_brings_back_the_network_whose_statistics_moved(tmp_path):
    net = trained(drifa_attn.freeze_backbone(wrapped()), X)
    drifa_attn.save_attention(net, tmp_path / "a.safetensors", classifier=True)
    again = drifa_attn.load_attention(fresh(), tmp_path / "a.safetensors").eval()
    assert torch.equal(again(X), net(X))
    drifa_attn.save_attention(net, tmp_path / "b.safetensors", classifier=True, batch_norm=False)
    assert not torch.equal(drifa_attn.load_attention(fresh(), tmp_path / "b.safetensors").eval()(X), net(X))


def test_statistics_that_did_not_move_are_left_out(tmp_path):
    net = wrapped()
    sizes = {}
    for name, options in {"still": {}, "all": {"batch_norm": True}}.items():
        drifa_attn.save_attention(net, tmp_path / name, **options)
        sizes[name] = (tmp_path / name).stat().st_size
    trained(net, X)
    drifa_attn.save_attention(net, tmp_path / "moved")
    assert sizes["still"] < sizes["all"]
    assert (tmp_path / "moved").stat().st_size == sizes["all"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_a_copy_remembers_what_moved(copied, tmp_path):
    net = copied(trained(wrapped(), X))
    drifa_attn.save_attention(net, tmp_path / "a.safetensors", classifier=True)
    assert torch.equal(drifa_attn.load_attention(fresh(), tmp_path / "a.safetensors").eval()(X), net(X))


def test_unwrapping_leaves_no_note():
    net = fresh()
    before = {name: set(vars(module)) for name, module in net.named_modules()}
    drifa_attn.unwrap(drifa_attn.wrap(net))
    assert {name: set(vars(module)) for name, module in net.named_modules()} == before


@pytest.mark.parametrize("copied", [lambda net: net, copy.deepcopy], ids=["itself", "copy"])
def test_frozen_norms_can_stay_in_eval_mode(copied):
    net = copied(drifa_attn.freeze_backbone(wrapped(), batch_norm=True))
    before = {name: buffer.clone() for name, buffer in net.named_buffers() if "running" in name}
    trained(net, X)
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers() if "running" in name)
    net.train()
    assert all(module.training for module in net.modules() if not isinstance(module, nn.BatchNorm2d))
    drifa_attn.freeze_backbone(net).train()
    assert all(module.training for module in net.modules())


# Norms that others replace -----------------------------------------------------------------------------------------------


def test_a_sequential_that_ends_in_a_norm_carries_its_attention_itself():
    stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8))
    net, x = nn.Sequential(stem, nn.Flatten(), nn.Linear(8 * 900, 2)).eval(), torch.randn(2, 3, 32, 32)
    before = net(x)
    drifa_attn.wrap(net, example_input=x)
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert torch.equal(net(x), before)
    for parameter in drifa_attn.attention_parameters(net):
        nn.init.normal_(parameter, std=0.5)
    assert not torch.equal(net(x), before)


def test_attention_that_nothing_runs_any_more_is_told():
    net, x = Net(lambda net, x: net.norm(net.f(x)), f=conv(3, 8), norm=nn.BatchNorm2d(8)).eval(), torch.randn(2, 3, 8, 8)
    drifa_attn.wrap(net, ["norm"], example_input=x)
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    with pytest.raises(ValueError, match=r"'norm\.drifa_attn', which nothing runs any more: .* Convert first, then wrap"):
        drifa_attn.gates(net, x)
