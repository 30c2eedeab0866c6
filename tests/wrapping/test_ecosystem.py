"""What else is done to a network: by timm, by torch, by whoever has it. And networks of any make."""

import copy
import gc
import io
import pickle
import subprocess
import sys
import warnings
from collections import Counter

import hypothesis.strategies as st
import pytest
import timm
import torch
import torch.distributed as dist
from hypothesis import given
from timm.layers import DropPath
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.export import Dim
from torch.nn.parallel import DistributedDataParallel

from drifa_attn import attention_parameters, disabled, gates, unwrap, wrap
from drifa_attn.wrapping.inject import Carried, Refinement
from tests._compare import assert_same_bits, assert_same_math
from tests._wrapping import (
    assert_same,
    awaken_,
    check_round_trip,
    counted,
    features,
    refinements,
    refused,
    strengthen_,
    wrapped,
)
from tests.cases import backward, loss
from tests.networks import Net, RunsItsChildren, built, conv, planned
from tests.older import later, needs_later_torch
from tests.strategies import SEEDS

SOME = pytest.mark.parametrize("name", ["resnet", "vit", "densenet", "pit"])


def without_randomness_(model):
    """Training mode in which two runs are the same, and one sample's output is its own."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.Dropout | DropPath):
            module.eval()
    return model


# timm --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", later(["resnet", "vit", "efficientnet", "swin", "densenet", "regnet", "mvitv2", "tnt"], "densenet", "tnt")
)
@torch.no_grad()
def test_forward_intermediates_see_the_attention(name):
    model, x = wrapped(name)
    final, taps = model.forward_intermediates(x)
    assert_same_bits(final, model.forward_features(x))
    plain_final, plain_taps = built(name)[0].forward_intermediates(x)
    with disabled(model):
        assert_same(model.forward_intermediates(x)[1], plain_taps)
    assert [tap.shape for tap in taps] == [tap.shape for tap in plain_taps]
    assert not torch.equal(final, plain_final)
    assert sum(torch.equal(tap, plain) for tap, plain in zip(taps, plain_taps, strict=True)) <= 1


@pytest.mark.parametrize(
    ("name", "options"), [("test_resnet", {}), ("test_vit", {"img_size": 80}), ("test_convnext", {}), ("test_efficientnet", {})]
)
@torch.no_grad()
def test_features_only_networks_are_wrapped(name, options):
    torch.manual_seed(0)
    model, x = timm.create_model(name, features_only=True, **options).eval(), torch.randn(2, 3, 80, 80)
    expected = model(x)
    wrap(model, example_input=x)
    assert_same(model(x), expected)
    counts = counted(strengthen_(model))
    changed = model(x)
    assert set(counts.values()) == {1}
    assert not any(torch.equal(a, b) for a, b in zip(changed, expected, strict=True))
    assert_same(unwrap(model)(x), expected)


@SOME
def test_reset_classifier_leaves_the_attention(name):
    model, x = wrapped(name)
    before = [(hook.site.name, id(hook.attention)) for hook in refinements(model)]
    expected = features(model, x)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert_same(features(model, x), expected)
    assert [(hook.site.name, id(hook.attention)) for hook in refinements(model)] == before


@pytest.mark.parametrize("at", ["stage", "block"])
@pytest.mark.parametrize("name", ["resnet", "vit", "efficientnet", "swin", "densenet", "regnet", "mvitv2"])
def test_grad_checkpointing_changes_no_output_and_no_gradient(name, at):
    model, x = wrapped(name, at)
    awaken_(without_randomness_(model))
    x.requires_grad_()  # or timm 1.0.9 runs no checkpoint backward
    y = model(x)
    expected = backward(loss(y), list(model.parameters()))
    model.set_grad_checkpointing(True)
    again = model(x)
    assert_same_math(again, y)
    # The checkpoints of timm 1.0.9 add what cancels in another order.
    scale = 0 if hasattr(timm.layers, "use_reentrant_ckpt") else 1
    for parameter, grad in zip(expected, backward(loss(again), list(model.parameters())), strict=True):
        assert_same_math(grad + scale, parameter + scale)


@SOME
@torch.no_grad()
def test_exponential_average_follows_the_attention(name):
    model, x = wrapped(name)
    ema = ModelEmaV3(model, decay=0.0)
    strengthen_(model)
    ema.update(model)
    assert_same_bits(ema.module(x), model(x))
    ours = {id(p) for p in attention_parameters(model)}
    assert not ours & {id(p) for p in attention_parameters(ema.module)}


@SOME
def test_optimizers_of_timm_take_every_parameter_once(name):
    model, _ = wrapped(name)
    everything = sorted(id(p) for p in model.parameters())
    for groups in (
        create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.7).param_groups,
        create_optimizer_v2(model, "sgd", lr=1e-3, weight_decay=0.1).param_groups,
    ):
        assert sorted(id(p) for group in groups for p in group["params"]) == everything


# Copies ------------------------------------------------------------------------------------------------------------------


@SOME
@torch.no_grad()
def test_a_deepcopy_is_independent(name):
    model, x = wrapped(name)
    expected, twin = model(x), copy.deepcopy(model)
    assert_same_bits(twin(x), expected)
    strengthen_(twin)
    assert not torch.equal(twin(x), expected)
    with disabled(twin):
        assert_same_bits(model(x), expected)
    unwrap(twin)
    assert_same_bits(twin(x), built(name)[0](x))
    assert_same_bits(model(x), expected)
    assert len(list(refinements(model))) == len(planned(name, "stage").sites)


@SOME
@torch.no_grad()
def test_pickles_and_saved_models_come_back_working(name):
    model, x = wrapped(name)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert_same_bits(twin(x), model(x))
        assert gates(twin, x).keys() == gates(model, x).keys()
        assert_same_bits(unwrap(twin)(x), built(name)[0](x))


FRESH = """
import pickle, sys, torch
torch.set_num_threads(1)
model, x, y = pickle.load(open(sys.argv[1], "rb"))
with torch.no_grad():
    assert (model(x) - y).abs().max() < 1e-5 * y.abs().max()
    from drifa_attn import unwrap
    assert not torch.equal(unwrap(model)(x), y)
"""


@torch.no_grad()
def test_attention_survives_a_pickle_in_a_fresh_process(tmp_path):
    model, x = nn.Sequential(conv(), nn.ReLU()), torch.randn(2, 8, 4, 4)
    strengthen_(wrap(model, ["0", "1"], example_input=x))
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((model, x, model(x))))
    result = subprocess.run([sys.executable, "-c", FRESH, tmp_path / "model.pickle"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@torch.no_grad()
def test_part_of_a_larger_network():
    (one, x), (two, _) = wrapped("resnet"), wrapped("resnet")
    strengthen_(two)
    model = Net(lambda net, x: net.head(net.one(x) + net.two(x)), one=one, two=two, head=nn.Linear(10, 3))
    assert (
        len(list(refinements(model)))
        == len(attention_parameters(model)) / len(list(refinements(one)[0].attention.parameters()))
        == 10
    )
    maps = gates(model, x)
    assert len(maps) == 10
    for part, inner in (("one", one), ("two", two)):
        for name, gate in gates(inner, x).items():
            assert_same_bits(maps[f"{part}.{name}"], gate)
    with disabled(model):
        assert_same_bits(one(x), two(x))
    expected = built("resnet")[0](x)
    assert_same_bits(unwrap(model)(x), model.head(expected + expected))


@torch.no_grad()
def test_a_hundred_wraps_leak_nothing():
    model, x = nn.Sequential(conv(), nn.Sequential(conv(), nn.ReLU())), torch.randn(2, 8, 4, 4)
    expected, keys = model(x), list(model.state_dict())
    model[1].register_forward_hook(lambda *_: None)

    def live():
        gc.collect()
        return Counter(k for k in map(type, gc.get_objects()) if issubclass(k, Carried | Refinement | nn.Module | torch.Tensor))

    unwrap(wrap(model, ["0", "1"], example_input=x))
    before = live()
    for _ in range(100):
        unwrap(wrap(model, ["0", "1"], example_input=x))
    assert live() == before
    assert list(model.state_dict()) == keys
    assert [len(m._forward_hooks) for m in model.modules()] == [int(m is model[1]) for m in model.modules()]
    assert_same_bits(model(x), expected)


# Formats -----------------------------------------------------------------------------------------------------------------


@SOME
@torch.no_grad()
def test_channels_last_and_autocast_change_no_bit(name):
    model, x = built(name)
    model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    expected = features(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        expected_low = features(model, x)
    wrap(model, example_input=x)
    assert_same(features(model, x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(features(model, x), expected_low)
        strengthen_(model)
        assert [f.dtype for f in features(model, x)] == [f.dtype for f in expected_low]
        assert not torch.equal(features(model, x)[0], expected_low[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@SOME
@torch.no_grad()
def test_other_dtypes_change_no_bit(name, dtype):
    model, x = built(name)
    model, x = model.to(dtype), x.to(dtype)
    expected = model(x)
    assert_same_bits(wrap(model, example_input=x)(x), expected)
    assert {p.dtype for p in attention_parameters(model)} == {dtype}
    assert strengthen_(model)(x).dtype == dtype


# Compile, export, trace --------------------------------------------------------------------------------------------------


def small(name):
    """The network with attention at one place only: what is tested here is the hook."""
    model, x = built(name)
    return strengthen_(wrap(model, {"resnet": ["layer2"], "vit": ["blocks.1"]}[name], example_input=x)), x


@torch.no_grad()
def test_compiles_whole_and_switches_off():
    model, x = small("resnet")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, original = model(x), built("resnet")[0](x)
    assert not torch.equal(expected, original)
    assert_same_math(compiled(x), expected)
    for switched in (model, compiled):
        with disabled(switched):
            assert_same_math(compiled(x), original)
        assert_same_math(compiled(x), expected)


@pytest.mark.parametrize("name", ["resnet", "vit"])
@torch.no_grad()
def test_exports_with_any_batch(name):
    model, x = small(name)
    program = torch.export.export(model, (x,), strict=False, dynamic_shapes=({0: Dim("batch", min=1, max=64)},)).module()
    for batch in (1, 5):
        x = torch.randn(batch, *x.shape[1:])
        assert_same_math(program(x), model(x))


@needs_later_torch("finds no batch norm for ONNX in today's onnxscript")
@torch.no_grad()
def test_exports_to_onnx():
    model, x = small("resnet")
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False, dynamic_shapes=({0: Dim.AUTO},))
    x = torch.randn(5, *x.shape[1:])
    assert_same_math(program(x)[0], model(x))


@SOME
@torch.no_grad()
def test_traces(name):
    model, x = wrapped(name)
    with warnings.catch_warnings(record=True) as caught:  # the networks have their own
        warnings.simplefilter("always")
        traced = torch.jit.trace(model, x)
    assert not [warning for warning in caught if "drifa_attn" in warning.filename]
    x = torch.randn(5, *x.shape[1:])
    assert_same_math(traced(x), model(x))


BUFFERS = ("_center", "_spread")

# Processes ---------------------------------------------------------------------------------------------------------------


def train(rank, folder):
    """Two steps in one of two processes, each with its own samples."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, _ = wrapped("vit")
    awaken_(model.train())
    parallel = DistributedDataParallel(model, find_unused_parameters=False)
    sgd = torch.optim.SGD(parallel.parameters(), lr=0.01)
    for step in range(2):
        sgd.zero_grad()
        loss(parallel(torch.randn(2, 3, 80, 80, generator=torch.Generator().manual_seed(10 * step + rank)))).backward()
        sgd.step()
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch is built without gloo")
def test_two_processes_train_every_attention_parameter_in_step(tmp_path):
    torch.multiprocessing.spawn(train, (str(tmp_path),), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for key in one:
        assert_same_math(one[key].float(), two[key].float())
    start = wrapped("vit")[0].state_dict()
    assert one.keys() == start.keys()
    assert all(not torch.equal(one[key], start[key]) for key in one if "drifa_attn" in key and not key.endswith(BUFFERS))


def test_ddp_is_refused_before_and_welcome_after(tmp_path):
    model, x = built("resnet")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with refused(model, x, ValueError, "got a DistributedDataParallel: wrap the network first, then make it parallel"):
            wrap(DistributedDataParallel(model), example_input=x)
        parallel = DistributedDataParallel(wrap(model, example_input=x))
        assert len(list(refinements(parallel))) == len(planned("resnet", "stage").sites)
        assert len(unwrap(parallel).state_dict()) == len(built("resnet")[0].state_dict())
    finally:
        dist.destroy_process_group()


# Any small network -------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, inner, is_residual):
        super().__init__()
        self.inner, self.is_residual = inner, is_residual

    def forward(self, x):
        return x + self.inner(x) if self.is_residual else self.inner(x)


class Last(nn.Module):
    """A layer for channels-first tensors, applied to channels-last ones."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.movedim(-1, 1)).movedim(1, -1)


@st.composite
def networks(draw):
    """Some layers of maps, channels-last maps, sequences, volumes, tokens or vectors; and an input."""
    kind = draw(st.sampled_from(["maps", "last", "sequence", "volume", "tokens", "vectors"]))
    width, depth, size = draw(st.sampled_from([1, 3, 8, 17])), draw(st.integers(1, 3)), draw(st.integers(2, 5))
    rank = {"sequence": 1, "maps": 2, "last": 2, "volume": 3}.get(kind, 0)
    torch.manual_seed(draw(SEEDS))

    def layer():
        if not rank:
            return nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.Dropout(draw(st.sampled_from([0.0, 0.5]))))
        convolution, norm = (getattr(nn, f"{word}{rank}d") for word in ("Conv", "BatchNorm"))
        layers = convolution(width, width, 3, padding=1), norm(width), nn.ReLU(inplace=draw(st.booleans()))
        return Last(nn.Sequential(*layers)) if kind == "last" else nn.Sequential(*layers)

    body = draw(st.sampled_from([nn.Sequential, RunsItsChildren]))(
        *[Residual(layer(), draw(st.booleans())) for _ in range(depth)]
    )
    sizes = tuple(range(size, size + rank)) if rank else (size,) * (kind == "tokens")
    shape = (width, *sizes) if kind not in ("last", "tokens") else (*sizes, width)
    x = torch.randn(draw(st.integers(2, 3)), *shape)
    return nn.Sequential(body, nn.Flatten(), nn.Linear(x[0].numel(), 3)), x


@given(networks(), st.sampled_from([1, 4, 16, None]), st.sampled_from([["0"], r"0\.\d", r"0\.\d\.inner"]), st.booleans())
def test_any_network_comes_back_as_it_was(network, reduction, at, is_training):
    model, x = network
    check_round_trip(model.train(is_training), x, at=at, reduction=reduction)
