"""Linear maps that another tool changed: they are called, and the fused operators decline them by name."""

import copy
import warnings
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

import drifa_attn
from drifa_attn import CLIA, HIFA, MFA, MGIFA, MIFA, MLIFA, functional, ops
from drifa_attn.attention.mfa import pair
from tests._compare import assert_same_bits, assert_same_math
from tests.cases import listed, loss, perturb_
from tests.networks import built
from tests.older import needs_later_torch

TOKENS = {"layout": "b ... c", "num_prefix_tokens": 1}
LAYERS = {
    "hifa": (partial(HIFA, 8), ((2, 8, 3, 2),)),
    "clia": (partial(CLIA, 8), ((2, 8, 3, 2),)),
    "mfa": (partial(MFA, 8), ((2, 8, 3, 2),)),
    "mfa-reduced-tokens": (partial(MFA, 16, reduction=2, init="identity", **TOKENS), ((2, 5, 16),)),
    "mgifa": (partial(MGIFA, 8), ((2, 8, 3), (2, 8))),
    "mlifa": (partial(MLIFA, 8), ((2, 8, 3), (2, 8))),
    "mifa": (partial(MIFA, 8), ((2, 8, 3), (2, 8))),
    "mifa-unequal": (partial(MIFA, (8, 9), init="identity"), ((2, 8, 3), (2, 9))),
}
EVERY = pytest.mark.parametrize("name", LAYERS)


class Adapted(nn.Module):
    """A Linear with low-rank adapters, as other libraries put in its place: `W x + bias + B A x`."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def linears(layer):
    """Every linear map of a layer with its owner and its name there."""
    return [
        (owner, name, child)
        for owner in list(layer.modules())
        for name, child in list(owner.named_children())
        if isinstance(child, nn.Linear)
    ]


def adapt(owner, name, linear):
    setattr(owner, name, Adapted(linear))


def offload(owner, name, linear):
    """Weights that are only there while the module is called."""
    kept = {key: value.detach() for key, value in linear.named_parameters()}

    def forward(x):
        return nn.functional.linear(x, kept["weight"], kept["bias"])

    linear.to("meta")
    linear.forward = forward


def without_bias(owner, name, linear):
    nn.init.zeros_(linear.bias)
    setattr(owner, name, nn.Linear(linear.in_features, linear.out_features, bias=False, dtype=linear.weight.dtype))
    getattr(owner, name).weight = linear.weight


def half_pruned(owner, name, linear):
    prune.l1_unstructured(linear, "weight", 0.5)


def old_weight_norm(owner, name, linear):
    weight_norm(linear, "weight")
    with torch.no_grad():
        linear.weight_g.mul_(1.5)


def new_weight_norm(owner, name, linear):
    parametrizations.weight_norm(linear)
    with torch.no_grad():
        linear.parametrizations.weight.original0.mul_(1.5)


def doubled(owner, name, linear):
    nn.utils.parametrize.register_parametrization(linear, "weight", Doubled())


def hook(owner, name, linear):
    linear.register_forward_hook(lambda module, args, y: 2 * y)


def effective(module):
    """The weight and bias that a call of this module multiplies with."""
    if isinstance(module, Adapted):
        weight, bias = effective(module.base)
        return weight + module.up.weight @ module.down.weight, bias
    inputs = module.in_features
    zero = module(torch.zeros(1, inputs, dtype=torch.float64))
    return (module(torch.eye(inputs, dtype=torch.float64)) - zero).T.detach(), zero[0].detach()


CHANGES = {
    "adapted": adapt,
    "pruned": half_pruned,
    "weight norm": old_weight_norm,
    "parametrised": new_weight_norm,
    "doubled": doubled,
    "offloaded": offload,
    "no bias": without_bias,
    "hooked": hook,
}


def made(name, change=None):
    """A layer in float64, perturbed, its arguments, and optionally what a tool makes of its linear maps."""
    torch.manual_seed(0)
    layer, shapes = LAYERS[name]
    layer = perturb_(layer(dtype=torch.float64))
    xs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    if change is not None:
        with pytest.warns(FutureWarning) if change is old_weight_norm else nullcontext():
            for owner, child, linear in linears(layer):
                change(owner, child, linear)
    return layer, xs[0] if len(xs) == 1 else xs


@EVERY
@pytest.mark.parametrize("kind", CHANGES)
def test_a_changed_map_gives_what_its_effective_weights_give(name, kind):
    changed, args = made(name, CHANGES[kind])
    plain, _ = made(name)
    for owner, child, linear in linears(plain):
        path = next(f"{n}.{child}".lstrip(".") for n, m in plain.named_modules() if m is owner)
        weight, bias = effective(changed.get_submodule(path))
        with torch.no_grad():
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
    for y, expected in zip(listed(changed(args)), listed(plain(args)), strict=True):
        assert_same_math(y, expected)
    assert not torch.equal(listed(plain(args))[0], listed(made(name)[0](args))[0]) or kind in ("offloaded", "no bias")
    for one, other in zip(*(torch.autograd.grad(loss(m(args)), listed(args)) for m in (changed, plain)), strict=True):
        assert_same_math(one, other)


@EVERY
@pytest.mark.parametrize("kind", ["adapted", "pruned", "weight norm", "parametrised", "doubled", "no bias"])
def test_everything_trainable_of_a_changed_map_is_trained(name, kind):
    layer, args = made(name, CHANGES[kind])
    for _ in range(2):  # an effective weight that is computed once cannot be gone through twice
        layer.zero_grad()
        loss(layer(args)).backward()
    assert not [name for name, p in layer.named_parameters() if p.grad is None or not p.grad.any()]


@EVERY
def test_hooks_of_a_map_run(name):
    layer, args = made(name)
    expected = [y.detach() for y in listed(layer(args))]
    seen = {kind: [] for kind in ("before", "after", "backward before", "backward")}
    for owner, child, linear in linears(layer):
        linear.register_forward_pre_hook(lambda m, args, key=(owner, child): seen["before"].append(key))
        linear.register_forward_hook(lambda m, args, y, key=(owner, child): seen["after"].append(key))
    ys = layer(args)
    for y, e in zip(listed(ys), expected, strict=True):
        assert_same_math(y, e)
    every = {(owner, child) for owner, child, _ in linears(layer)}
    assert len(seen["before"]) == len(every)
    assert {*seen["before"]} == {*seen["after"]} == every
    layer, args = made(name)
    for owner, child, linear in linears(layer):
        linear.register_full_backward_pre_hook(lambda m, grads, key=(owner, child): seen["backward before"].append(key))
    loss(layer(args)).backward()
    assert {*seen["backward before"]} == {(owner, child) for owner, child, _ in linears(layer)}
    layer, args = made(name)
    for owner, child, linear in linears(layer):
        linear.register_full_backward_hook(lambda m, old, new, key=(owner, child): seen["backward"].append(key))
    loss(layer(args)).backward()
    assert {*seen["backward"]} == {(owner, child) for owner, child, _ in linears(layer)}


@EVERY
def test_a_plain_map_is_never_called(name, monkeypatch):
    layer, args = made(name)
    expected = listed(layer(args))

    def refused(self, *args):
        raise AssertionError("a plain nn.Linear was called")

    replica = torch.func.functional_call(layer, dict(layer.state_dict()), (args,))
    monkeypatch.setattr(nn.Linear, "forward", refused)
    for y, e, of_replica in zip(listed(layer(args)), expected, listed(replica), strict=True):
        assert_same_bits(y, e)
        assert_same_bits(of_replica, e)


@EVERY
def test_a_dynamically_quantised_map_is_called(name):
    layer, args = made(name)
    layer, args = layer.float().eval(), [x.float() for x in args] if isinstance(args, list) else args.float()
    quantised = quantised_copy(layer)
    assert not linears(quantised)
    with torch.no_grad():
        for y, expected in zip(listed(quantised(args)), listed(layer(args)), strict=True):
            assert_same_math(y, expected, rel=0.02)
            assert not torch.equal(y, expected)


def quantised_copy(module):
    """A copy with dynamically quantised linear maps; torch says that another package will take that over."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(module, {nn.Linear})


@pytest.mark.parametrize("name", ["mfa-reduced-tokens", "mifa-unequal"])
def test_the_choice_names_the_map(name):
    layer, args = made(name)
    x = args if isinstance(args, torch.Tensor) else list(args)
    assert layer.must_call() is None
    with ops.use("fused"):
        assert ops.explain(layer, x).path == "chunked"
        for owner, child in ((layer.hifa, "conv3"),) if name[:3] == "mfa" else ((layer.mlifa.convs, "1"),):
            adapt(owner, child, getattr(owner, child))
        path = "hifa.conv3" if name[:3] == "mfa" else "mlifa.convs.1"
        reason = f"{path} is a tests.attention.test_called.Adapted, which must be called"
        assert ops.explain(layer, x) == ("reference", reason)
        layer(args)  # a fused operator could not take it
        assert str(ops.explain(layer, x)) == f"reference: {reason}"
        linear = layer.squeeze if name[:3] == "mfa" else layer.squeezes[0]
        linear.register_forward_hook(lambda *_: None)
        expected = "squeeze" if name[:3] == "mfa" else path
        assert layer.must_call().startswith(f"{expected} is a ")
    first = "squeeze is a Linear with hooks or a forward of its own, which must be called"
    assert name[:3] != "mfa" or layer.must_call() == first


def test_the_choice_names_what_has_no_bias():
    layer = MFA(8)
    layer.hifa.dense = nn.Linear(16, 8, bias=False)
    assert layer.must_call() == "hifa.dense is a Linear with no bias, or weights of another kind, which must be called"


@pytest.mark.parametrize("name", ["mfa-reduced-tokens", "mifa-unequal"])
@pytest.mark.parametrize("kind", ["adapted", "pruned", "parametrised", "hooked"])
def test_changed_maps_compile_whole(name, kind):
    torch._dynamo.reset()
    layer, args = made(name, CHANGES[kind])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    leaves = [*listed(args), *(p for p in layer.parameters())]
    results = [(ys := m(args), torch.autograd.grad(loss(ys), leaves)) for m in (compiled, layer)]
    for one, other in zip(*([*listed(ys), *grads] for ys, grads in results), strict=True):
        assert_same_math(one, other, rel=1e-9)


LATER = pytest.param("hooked", marks=needs_later_torch("does not look at hooks again after it compiled"))


@pytest.mark.parametrize("kind", ["adapted", LATER, "forward"])
def test_a_compiled_layer_sees_a_later_change(kind):
    torch._dynamo.reset()
    layer, x = made("mfa")
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    before = compiled(x).detach()
    linear = layer.hifa.conv2
    if kind == "adapted":
        layer.hifa.conv2 = Adapted(linear)
    elif kind == "hooked":
        hook(layer.hifa, "conv2", linear)
    else:
        linear.forward = lambda x: 2 * nn.functional.linear(x, linear.weight, linear.bias)
    assert_same_math(compiled(x), layer(x))
    assert not torch.equal(layer(x), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_called_map_computes_in_its_own_dtype(dtype):
    """Maps of float16 and pooled vectors are float32 around it."""
    torch.manual_seed(0)
    layer, x = perturb_(MFA(8, reduction=1)).to(dtype), torch.randn(2, 8, 5).to(dtype)
    expected, seen = layer(x), []
    for _, _, linear in linears(layer):
        linear.register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
    y = layer(x)
    assert {*seen} == {dtype}
    assert y.dtype == dtype
    assert_same_math(y, expected, rel=2e-2)
    assert layer.gates(x).dtype == torch.float32


def test_functions_take_functions_for_maps():
    layer, x = made("mfa-reduced-tokens")
    x = x.detach()[:, 1:].mT
    scales = layer.global_scale, layer.local_scale
    hifa, clia = layer.hifa.weights(), layer.clia.weights()

    def as_function(linear):
        return lambda v: nn.functional.linear(v, *linear)

    plain = {"squeeze": pair(layer.squeeze), "expand": pair(layer.expand)}
    called = {key: as_function(linear) for key, linear in plain.items()}
    expected = functional.mfa(x, hifa, clia, *scales, **plain)
    functions = [as_function(linear) for linear in hifa], [as_function(linear) for linear in clia]
    assert_same_math(functional.mfa(x, *functions, *scales, **called), expected)
    with ops.use("fused"):
        assert_same_math(ops.mfa(x, *functions, *scales, **called), expected)
        assert not ops.is_fused(x, 8, functions[0])
        assert ops.is_fused(x, 8, hifa)


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("name", ["mfa-reduced-tokens", "mifa-unequal"])
def test_calibration_refuses_changed_maps_by_name(name, kind):
    torch.manual_seed(0)
    layer = LAYERS[name][0](dtype=torch.float64, **({} if name[:4] == "mifa" else {"init": "identity"}))
    shapes = [(16, *shape[1:]) for shape in LAYERS[name][1]]
    xs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    args = xs if len(xs) > 1 else xs[0]
    owner, child = (layer.hifa, "conv2") if name[:4] != "mifa" else (layer.mlifa.convs, "1")
    with pytest.warns(FutureWarning) if kind == "weight norm" else nullcontext():
        CHANGES[kind](owner, child, getattr(owner, child))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    path = "hifa.conv2" if name[:4] != "mifa" else "mlifa.convs.1"
    with pytest.raises(ValueError, match=rf"calibrate expected plain nn\.Linear maps, but {path} is a .* must be called"):
        layer.calibrate(args)
    assert all(value.is_meta or torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    z = torch.randn(16, layer.local_scale.shape[0], 3, dtype=torch.float64)
    with torch.no_grad(), pytest.raises(ValueError, match=r"calibrate expected a plain nn\.Linear, got a changed"):
        layer.hifa.calibrate(z) if name[:4] != "mifa" else layer.mlifa.calibrate([z, z], torch.ones(16, 2).bool())


# In a network ------------------------------------------------------------------------------------------------------------


def test_a_wrapped_network_can_be_changed_by_other_tools():
    """Wrap first, then quantise, prune or normalise: the network runs, and trains what there is to train."""
    model, x = built("resnet")
    drifa_attn.wrap(model, example_input=x)
    for attention in (m for m in model.modules() if isinstance(m, MFA)):
        perturb_(attention)
    expected = model(x)
    assert_same_math(quantised_copy(model)(x), expected, rel=0.02)
    with pytest.raises(ValueError, match=r"calibrate expected plain nn\.Linear maps at 'act1', but squeeze is a torch\.ao"):
        drifa_attn.calibrate(quantised_copy(model), torch.cat([x] * 8))
    for change in (old_weight_norm, half_pruned, adapt):
        changed = copy.deepcopy(model)
        with pytest.warns(FutureWarning) if change is old_weight_norm else nullcontext():
            for owner, name, linear in linears(changed):
                change(owner, name, linear)
        for _ in range(2):
            y = changed(x)
            y.square().sum().backward()
        assert not torch.equal(y, expected)
        assert not [name for name, p in changed.named_parameters() if p.grad is None]


@pytest.mark.parametrize("name", ["mfa-reduced-tokens", "mifa", "mifa-unequal"])
def test_weights_can_stay_off_the_device_between_calls(name):
    offloading = pytest.importorskip("accelerate")
    layer, args = made(name)
    with torch.no_grad():
        expected = layer(args)
        offloading.cpu_offload(layer, execution_device="cpu")
        assert {p.device.type for p in layer.parameters()} == {"meta"}
        for y, e in zip(listed(layer(args)), listed(expected), strict=True):
            assert_same_math(y, e)


def test_adapters_on_all_linear_maps_are_trained_and_merge():
    peft = pytest.importorskip("peft")
    model, x = built("resnet")
    drifa_attn.wrap(model, example_input=x)
    for attention in (m for m in model.modules() if isinstance(m, MFA)):
        perturb_(attention)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    y = model(x)
    y.square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert_same_math(model.merge_and_unload()(x), y, rel=1e-4)


def test_adapters_beside_the_attention():
    """The recipe of the README: the backbone gets adapters, the attention trains whole and is saved with them."""
    peft = pytest.importorskip("peft")
    model, x = built("vit")
    drifa_attn.wrap(model, example_input=x)
    names = [name for name, module in model.named_modules() if isinstance(module, MFA)]
    config = peft.LoraConfig(r=2, target_modules="all-linear", exclude_modules=r".*drifa_attn.*", modules_to_save=names)
    model = peft.get_peft_model(model, config)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {".lora_" in name or "drifa_attn" in name for name in trained} == {True}
    assert not [name for name in trained if ".lora_" in name and "drifa_attn" in name]
    with torch.no_grad():
        assert_same_math(model.eval()(x), built("vit")[0](x))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert not [name for name in trained if model.get_parameter(name).grad is None]
