"""`calibrate` of whole networks: wrapped, fused, and with attention of their own."""

import copy

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import drifa_attn
from drifa_attn import MFA, calibrate, disabled, fuse, gains, wrap
from drifa_attn.wrapping.inject import placed
from tests import older
from tests._compare import assert_same_bits
from tests._fusion import TASKS, given
from tests._wrapping import EVERY
from tests.networks import Net, built


def network(**options):
    torch.manual_seed(0)
    return wrap(timm.create_model("test_resnet", num_classes=4), **options).eval()


def batch(n=16, size=32):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def assert_near(actual, expected, bound):
    """Equal but for rounding, where some of the values are zero themselves."""
    assert torch.allclose(actual.double(), expected.double(), rtol=bound, atol=bound)


def many(x, n=16):
    """As many samples of an input of the test networks, all different."""
    shape = (n, *x.shape[1:])
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) if x.is_floating_point() else x[:1].expand(shape)


@EVERY
@torch.no_grad()
def test_one_pass_calibrates_every_site_and_changes_no_bit(name):
    model, x = built(name)
    model, x = wrap(model, example_input=x), many(x)
    expected, modes = model(x), [m.training for m in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items() if "drifa_attn" not in key}
    assert calibrate(model, x) is model
    assert_same_bits(model(x), expected)
    assert [m.training for m in model.modules()] == modes
    for key, value in state.items():
        assert_same_bits(model.state_dict()[key], value)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(parameter.requires_grad for parameter in drifa_attn.attention_parameters(model))
    for site, attention in placed(model):
        assert attention.is_start()
        assert (attention.global_center != 0).all(), site.name
        assert (attention.global_spread > 1e-3).float().mean() > 0.9, site.name


@torch.no_grad()
def test_the_statistics_are_those_of_the_batch():
    model, x = network(), batch(20)
    calibrate(model, x)
    seen = {}
    handles = [
        attention.register_forward_pre_hook(lambda m, args, name=site.name: seen.__setitem__(name, (m, args[0])))
        for site, attention in placed(model)
    ]
    model(x)
    for handle in handles:
        handle.remove()
    twin = network()
    for (_, own), (mfa, features) in zip(placed(twin), seen.values(), strict=True):
        own.calibrate(features)
        for a, b in zip(own.state_dict().values(), mfa.state_dict().values(), strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("way", ["tensor", "tuple", "dict", "autocast", "channels_last", "training", "disabled", "inference"])
@torch.no_grad()
def test_a_batch_may_come_in_any_form(way):
    model, x, twin = network(), batch(), network()
    calibrate(twin, x)
    given = {"tuple": (x,), "dict": {"x": x}, "channels_last": x.to(memory_format=torch.channels_last)}.get(way, x)
    if way == "training":
        model.train()
    if way == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            calibrate(model, given)
    elif way == "disabled":
        with disabled(model):
            calibrate(model, given)
    elif way == "inference":
        with torch.inference_mode():
            calibrate(model, given)
    else:
        calibrate(model, given)
    assert model.training == (way == "training")
    assert_same_bits(model.eval()(x), twin(x))
    for (_, a), (_, b) in zip(placed(model), placed(twin), strict=True):
        for key, value in a.state_dict().items():
            assert_near(value, b.state_dict()[key], 0.1 if way == "autocast" else 1e-3)


@torch.no_grad()
def test_calibrating_twice_changes_nothing():
    model, x = network(), batch()
    calibrate(model, x)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    calibrate(model, x)
    for key, value in model.state_dict().items():
        assert_near(value, before[key], 1e-3)


@torch.no_grad()
def test_attention_of_own_code_is_calibrated():
    torch.manual_seed(0)
    model = Net(lambda net, x: net.b(net.a(x).relu()), a=MFA(8, init="identity"), b=MFA(8, init="identity", reduction=2)).eval()
    x = torch.randn(16, 8, 5, 5)
    expected = model(x)
    calibrate(model, x)
    assert_same_bits(model(x), expected)
    assert (model.b.global_spread != 1).all()


@torch.no_grad()
def test_a_layer_that_runs_twice_is_fitted_to_its_first_features():
    mfa, x = MFA(8, init="identity"), torch.randn(16, 8, 5)
    twin = copy.deepcopy(mfa)
    calibrate(Net(lambda net, x: net.a(net.a(x) * 100), a=mfa), x)
    twin.calibrate(x)
    for a, b in zip(mfa.state_dict().values(), twin.state_dict().values(), strict=True):
        assert_same_bits(a, b)


# Fused networks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("in_tuple", [False, True])
@torch.no_grad()
def test_fused_networks_calibrate_what_is_present(masked, in_tuple):
    backbones, inputs = given(("resnet", "vit", "record"))
    wrap(backbones["resnet"], example_input=inputs["resnet"])
    net = fuse(backbones, TASKS, example_inputs=inputs).eval()
    inputs = {name: many(x, 20) for name, x in inputs.items()}
    present = torch.rand(20, 3, generator=torch.Generator().manual_seed(0)) < 0.7 if masked else None
    expected = net(inputs, present)
    calibrate(net, (inputs, present)) if in_tuple else calibrate(net, inputs, present)
    for task, logits in net(inputs, present).items():
        assert_same_bits(logits, expected[task])
    for refiner in (*net.refiners, *(a for _, a in placed(net))):
        assert refiner.is_start()
        assert (refiner.global_spread != 1).all()


def test_a_modality_that_the_batch_lacks_is_named():
    backbones, inputs = given(("resnet", "record"))
    net = fuse(backbones, TASKS, example_inputs=inputs)
    with pytest.raises(ValueError, match=r"at least two samples of each modality, got \[16, 0\]"):
        calibrate(net, {"resnet": many(inputs["resnet"])})
    assert (net.refiners[0].global_spread == 1).all()


# Refusals ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m, x: (m, x[:15]), "at least 16 samples to calibrate with, got 15"),
        (lambda m, x: (drifa_attn.unwrap(m), x), "holds no attention"),
        (lambda m, x: (drifa_attn.wrap(drifa_attn.unwrap(m), attention="eca"), x), "can be calibrated, only Foreign"),
        (lambda m, x: (drifa_attn.wrap(drifa_attn.unwrap(m), init="paper"), x), "has left its start at 'act1', "),
        (lambda m, x: (m, x.fill_(torch.nan)), "features that are not finite at 'act1'"),
        (lambda m, x: (nn.DataParallel(m), x), "got a parallel network .DataParallel.: calibrate it first"),
        (lambda m, x: (m.to("meta"), x), "on the meta device"),
        (lambda m, x: (Net(lambda net, x: x, m=m), x), "did not reach the attention at"),
    ],
)
def test_what_cannot_be_calibrated_says_so_and_stays(spoil, message):
    model, x = spoil(network(), batch())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        calibrate(model, x)
    for key, value in model.state_dict().items():
        assert value.is_meta or torch.equal(value, before[key])
    assert not any(m._forward_pre_hooks for m in model.modules())


@torch.no_grad()
def test_a_network_that_has_left_its_start_is_refused_by_the_names_of_its_sites():
    model = network()
    next(attention for site, attention in placed(model) if site.name == "layer2").alpha.add_(1e-3)
    with pytest.raises(ValueError, match="has left its start at 'layer2': calibrate before training"):
        calibrate(model, batch())


@torch.no_grad()
def test_an_error_on_the_way_leaves_the_network_as_it_was():
    """The error comes from the last block, when four sites are calibrated already."""
    model, x = network(), batch()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    handle = model.fc.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError("full")))
    with pytest.raises(MemoryError, match="full"):
        calibrate(model, x)
    handle.remove()
    for key, value in model.state_dict().items():
        assert_same_bits(value, before[key])


# What it is for ----------------------------------------------------------------------------------------------------------


def deviation_after_training(calibrated):
    """A frozen small network learns to tell samples apart by attention and head; how much the gains then vary over images."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4).eval()
    wrap(model)
    images = torch.randn(64, 3, 32, 32) * (0.2 + 2 * torch.rand(64, 3, 1, 1)) + torch.randn(64, 3, 1, 1)
    classes = (images.mean((1, 2, 3)) > 0).long() + 2 * (images.std((1, 2, 3)) > 1.2).long()
    if calibrated:
        calibrate(model, images)
    drifa_attn.freeze_backbone(model)
    optimizer = torch.optim.AdamW(drifa_attn.parameter_groups(model))
    for step in range(60):
        rows = torch.arange(step * 16, step * 16 + 16) % 64
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[rows]), classes[rows]).backward()
        optimizer.step()
    return {name: gain.std(0).mean().item() for name, gain in gains(model, images).items()}


def test_the_gates_of_a_calibrated_network_vary_over_images():
    """The first version of this library, with a learned strength, stayed below 0.005."""
    found = deviation_after_training(calibrated=True)
    assert max(found.values()) >= 0.05, found
    assert sum(value >= 0.03 for value in found.values()) >= 3, found
    plain = deviation_after_training(calibrated=False)
    assert max(plain.values()) > 0.005, plain  # nothing depends on calibration
    assert sum(plain.values()) < sum(found.values()), (plain, found)


# Several processes -------------------------------------------------------------------------------------------------------


def calibrate_in_process(rank, folder):
    older.register()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = network()
    calibrate(model, torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(rank)))
    parallel = DistributedDataParallel(model)
    try:
        calibrate(parallel, batch())
        refused = ""
    except ValueError as error:
        refused = str(error)
    torch.save((model.state_dict(), refused), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch is built without gloo")
def test_processes_calibrate_before_ddp_and_then_agree(tmp_path):
    torch.multiprocessing.spawn(calibrate_in_process, (str(tmp_path),), nprocs=2)
    (state, refused), (other, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for key, value in state.items():
        assert_same_bits(value, other[key])
    assert "got a parallel network (DistributedDataParallel): calibrate it first" in refused
    alone = network()
    calibrate(alone, torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    for key, value in alone.state_dict().items():
        assert_near(state[key], value, 1e-3)
