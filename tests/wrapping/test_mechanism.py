"""Attention sits on a `forward` of the instance: what the compiler, copies, other tools and the user's own hooks make of it."""

import copy
import importlib
import inspect
import pickle

import pytest
import timm
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

import drifa_attn
from drifa_attn import MFA
from drifa_attn.wrapping.inject import STEPS, Carried, placed
from tests._compare import assert_same_bits, assert_same_math
from tests.cases import perturb_

SITE = "layer2"


def network():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=4).eval()


def moved(model):
    """The network wrapped, its gates away from their start."""
    drifa_attn.wrap(model)
    for module in model.modules():
        if isinstance(module, MFA):
            perturb_(module)
    return model


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64)


def carrier(model):
    """The module that carries the attention of one site."""
    return next(module for name, module in model.named_modules() if STEPS in vars(module) and name.startswith(SITE))


class Scaled(nn.Module):
    """What a user, or peft, puts in the place of an attention."""

    def __init__(self, original):
        super().__init__()
        self.original = original
        self.factor = nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        return x * self.factor


# The compiler --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled(request):
    torch._dynamo.reset()
    yield lambda model: torch.compile(model, backend=request.param, fullgraph=True)
    torch._dynamo.reset()


BACKENDS = pytest.mark.parametrize("compiled", ["eager", pytest.param("inductor", marks=pytest.mark.slow)], indirect=True)


@BACKENDS
@torch.no_grad()
def test_a_wrapped_copy_compiled_after_a_plain_one_attends(compiled, x):
    plain = network()
    wrapped = moved(copy.deepcopy(plain))
    before = compiled(plain)(x)
    after = compiled(wrapped)(x)
    assert_same_math(after, wrapped(x))
    assert (after - before).abs().max() > 0.01


@BACKENDS
@torch.no_grad()
def test_wrapping_switching_and_unwrapping_after_compiling_and_running_count(compiled, x):
    model = network()
    fast, plain = compiled(model), model(x)
    assert_same_math(fast(x), plain)
    attends = moved(model)(x)
    assert (attends - plain).abs().max() > 0.01
    assert_same_math(fast(x), attends)
    with drifa_attn.disabled(model):
        assert_same_math(fast(x), plain)
    assert_same_math(fast(x), attends)
    drifa_attn.unwrap(model)
    assert_same_math(fast(x), plain)


@torch.no_grad()
def test_gates_of_a_compiled_network_are_those_of_the_network(x):
    model = moved(network())
    fast = torch.compile(model, backend="eager")
    fast(x)
    found, expected = drifa_attn.gates(fast, x), drifa_attn.gates(model, x)
    assert [name.removeprefix("_orig_mod.") for name in found] == list(expected)
    for one, other in zip(found.values(), expected.values(), strict=True):
        assert_same_bits(one, other)


@pytest.mark.filterwarnings("ignore:.*torch.jit:")
@torch.no_grad()
def test_tracers_and_exporters_see_it(x):
    model = moved(network())
    for strict in (False, True):
        assert_same_math(torch.export.export(model, (x,), strict=strict).module()(x), model(x))
    assert_same_math(torch.jit.trace(model, (x,))(x), model(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit:")
def test_script_says_what_to_do():
    with pytest.raises(
        AttributeError, match=r"jit\.script cannot compile what drifa_attn put behind a .*: use torch\.jit\.trace"
    ):
        torch.jit.script(moved(network()))


# Copies --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
@torch.no_grad()
def test_copies_carry_weights_of_their_own(copied, x):
    model = moved(network())
    other = copied(model)
    assert_same_bits(other(x), model(x))
    for _, attention in placed(other):
        nn.init.constant_(attention.alpha, 5.0)
    assert not torch.equal(other(x), model(x))
    drifa_attn.unwrap(other)
    assert_same_bits(other(x), network()(x))
    assert len(list(placed(model))) == 5


@torch.no_grad()
def test_a_part_is_copied_without_the_rest(x):
    """What a container carries refers to nothing around it."""
    model = drifa_attn.wrap(timm.create_model("densenet121").eval())
    part = copy.deepcopy(model.features.denseblock1)
    names = {id(module) for module in part.modules()}
    assert all(id(inner) in names for _, attention in placed(part) for inner in attention.modules())
    assert len(pickle.dumps(part)) < len(pickle.dumps(model)) / 10


@torch.no_grad()
def test_replicas_of_data_parallel_use_their_own_weights(x, monkeypatch):
    """Two devices are played by one: replicas get copies of the weights, which are then changed."""
    replicate = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(
        replicate,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [[t.clone() for t in tensors] for _ in devices],
    )
    model = moved(network())
    expected = model(x)
    replica = replicate.replicate(model, [0, 1])[1]
    assert_same_bits(replica(x), expected)
    for module in replica.modules():
        if isinstance(module, MFA):
            module.alpha.fill_(50.0)
    assert not torch.equal(replica(x), expected)
    assert_same_bits(model(x), expected)


# What replaces the child ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_replaces_the_child_is_used_trained_shown_and_taken_out(x):
    model = moved(network())
    before, owner = model(x), carrier(model)
    owner.drifa_attn = Scaled(owner.drifa_attn)
    assert not torch.equal(model(x), before)
    with torch.enable_grad():
        model(x).sum().backward()
    assert owner.drifa_attn.factor.grad.abs() > 0
    assert owner.drifa_attn in [attention for _, attention in placed(model)]
    drifa_attn.unwrap(model)
    assert_same_bits(model(x), network()(x))
    assert list(model.state_dict()) == list(network().state_dict())


def test_modules_to_save_of_peft_train(x):
    peft = pytest.importorskip("peft")
    model = moved(network())
    config = peft.LoraConfig(target_modules=["fc"], modules_to_save=["drifa_attn"])
    tuned = peft.get_peft_model(model, config)
    tuned(x).square().sum().backward()
    trained = [p for n, p in tuned.named_parameters() if "modules_to_save" in n and p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    assert SITE in drifa_attn.gates(tuned.base_model.model, x)


# Other tools and the user's own hooks ------------------------------------------------------------------------------------


class Doubling(ModelHook):
    def post_forward(self, module, output):
        return 2 * output


@pytest.mark.parametrize("order", ["attention first", "hook first"])
@torch.no_grad()
def test_forward_wrappers_of_accelerate_work_in_both_orders(order, x):
    expected, model = moved(network()), network()
    block = model.get_submodule(SITE)[-1]
    if order == "hook first":
        add_hook_to_module(block, Doubling())
    moved(model)
    if order == "attention first":
        add_hook_to_module(block, Doubling())
    assert not torch.equal(model(x), expected(x))
    changed = model(x)
    with drifa_attn.disabled(model):
        assert not torch.equal(model(x), changed)
    if order == "attention first":
        remove_hook_from_module(block)
        assert_same_bits(model(x), expected(x))
        drifa_attn.unwrap(model)
    else:
        drifa_attn.unwrap(model)
        remove_hook_from_module(block)
    assert_same_bits(model(x), network()(x))
    assert not any(isinstance(vars(module).get("forward"), Carried) for module in model.modules())


@torch.no_grad()
def test_unwrap_under_a_wrapper_of_another_tool_leaves_the_wrapper(x):
    model = moved(network())
    block = model.get_submodule(SITE)[-1]
    add_hook_to_module(block, Doubling())
    drifa_attn.unwrap(model)
    alone = network()
    add_hook_to_module(alone.get_submodule(SITE)[-1], Doubling())
    assert_same_bits(model(x), alone(x))


@pytest.mark.parametrize("first", [True, False])
@torch.no_grad()
def test_hooks_of_the_user_see_refined_features(first, x):
    """Also those that were there before: the attention is part of the module's forward."""
    seen = {}
    model = network()
    block = model.get_submodule(SITE)[-1]

    def keep(module, args, output):
        seen["features"] = output

    if first:
        block.register_forward_hook(keep)
        moved(model)
    else:
        moved(model)
        block.register_forward_hook(keep)
    model(x)
    attends = seen["features"]
    with drifa_attn.disabled(model):
        model(x)
    assert not torch.equal(seen["features"], attends)


@torch.no_grad()
def test_the_class_the_signature_and_the_forward_of_before_stay(x):
    model = network()
    classes = [type(module) for module in model.modules()]
    block = model.get_submodule(SITE)[-1]
    signature = inspect.signature(block.forward)
    moved(model)
    assert [type(module) for module in model.modules() if not is_attention(model, module)] == classes
    assert inspect.signature(block.forward) == signature
    drifa_attn.unwrap(model)
    assert not any(
        key in vars(module) for module in model.modules() for key in ("forward", STEPS, "_replicate_for_data_parallel")
    )


def is_attention(model, module):
    return any(module is inner for _, attention in placed(model) for inner in attention.modules())


# Attention that got in by construction -----------------------------------------------------------------------------------


def constructed():
    torch.manual_seed(0)
    return timm.create_model("resnet18", block_args={"attn_layer": MFA}, num_classes=4, zero_init_last=False).eval()


@torch.no_grad()
def test_the_verbs_find_attention_that_is_part_of_a_network(x, tmp_path):
    model = constructed()
    layers = [name for name, module in model.named_modules() if isinstance(module, MFA)]
    assert list(drifa_attn.gates(model, x)) == layers
    numbers = sum(p.numel() for name in layers for p in model.get_submodule(name).parameters())
    assert sum(p.numel() for p in drifa_attn.attention_parameters(model)) == numbers
    before = model(x)
    with drifa_attn.disabled(model):
        assert not torch.equal(model(x), before)
    assert_same_bits(model(x), before)
    drifa_attn.freeze_backbone(model, classifier="fc")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".se.")[0] for name in trained if not name.startswith("fc.")} == {
        n.removesuffix(".se") for n in layers
    }
    drifa_attn.save_attention(model, tmp_path / "own.safetensors")
    other = constructed()
    for parameter in drifa_attn.attention_parameters(other):
        parameter.add_(0.1)
    assert not torch.equal(other(x), before)
    drifa_attn.load_attention(other, tmp_path / "own.safetensors")
    assert_same_bits(other(x), before)


def test_unwrap_takes_out_only_what_wrap_put_there():
    with pytest.raises(ValueError, match=r"holds no attention that wrap put there: .*disabled\(model\)"):
        drifa_attn.unwrap(constructed())


def test_a_network_with_own_attention_can_be_wrapped_too(x):
    model = constructed()
    own = list(drifa_attn.gates(model, x))
    drifa_attn.wrap(model)
    assert list(drifa_attn.gates(model, x))[: len(own)] != own
    assert set(own) < set(drifa_attn.gates(model, x))
    drifa_attn.unwrap(model)
    assert list(drifa_attn.gates(model, x)) == own
