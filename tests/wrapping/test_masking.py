"""`mask_from`: the mask that a network knows, found once per forward and handed to its attention."""

import copy
import importlib
import pickle
import threading
from functools import partial

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from torch.utils.checkpoint import checkpoint

import drifa_attn
from drifa_attn import MFA
from drifa_attn.wrapping.inject import STEPS, masks, placed
from tests._compare import assert_same_bits, assert_same_math
from tests.cases import perturb_
from tests.networks import Net
from tests.older import needs_later_torch

WIDTH = 16


class Encoder(nn.Module):
    """Two transformer layers over padded sequences; the answer is the mean of what is no padding."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x, padding=None):
        if padding is None:
            return self.encoder(x).mean(1)
        real = ~padding[..., None]
        return (self.encoder(x, src_key_padding_mask=padding) * real).sum(1) / real.sum(1)


def real_positions(args, kwargs):
    """A mask of the second argument of the encoder."""
    padding = args[1] if len(args) > 1 else kwargs.get("padding")
    return None if padding is None else ~padding


class Counting:
    """A callable with a state of its own."""

    def __init__(self):
        self.calls = 0

    def __call__(self, args, kwargs):
        self.calls += 1
        return real_positions(args, kwargs)


def sequences(batch=3, n=7, longest=None):
    """Sequences of different lengths, and where they are padding; `longest` adds padding."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, n, WIDTH, generator=generator, dtype=torch.float64)
    padding = torch.arange(n) >= n - torch.arange(batch)[:, None]
    x = torch.where(padding[..., None], 0, x)
    if longest:
        x = torch.cat([x, torch.randn(batch, longest - n, WIDTH, generator=generator, dtype=torch.float64)], 1)
        padding = torch.cat([padding, torch.ones(batch, longest - n, dtype=torch.bool)], 1)
    return x, padding


def wrapped(mask_from=real_positions, moved=True, net=None, **options):
    torch.manual_seed(0)
    net = (Encoder() if net is None else net).double().eval()
    drifa_attn.wrap(net, example_input=options.pop("example_input", sequences()), mask_from=mask_from, **options)
    for _, attention in placed(net) if moved else ():
        perturb_(attention)
    return net


@torch.no_grad()
def test_padding_changes_no_answer():
    short, long = sequences(), sequences(longest=20)
    masked, blind = wrapped(), wrapped(None)
    assert_same_math(masked(*long), masked(*short))
    assert (blind(*long) - blind(*short)).abs().max() > 1e-3
    assert_same_math(masked(short[0], padding=short[1]), masked(*short))
    without = Encoder().double().eval()
    without.load_state_dict(masked.state_dict(), strict=False)
    assert (masked(*short) - without(*short)).abs().max() > 1e-3
    for b in range(3):  # each sequence alone, without any padding
        assert_same_math(
            masked(short[0][b : b + 1, : 7 - b], torch.zeros(1, 7 - b, dtype=torch.bool)), masked(*short)[b : b + 1]
        )


def test_padding_changes_no_gradient():
    net, results = wrapped(), []
    for x, padding in (sequences(), sequences(longest=12)):
        x.requires_grad_()
        results.append(torch.autograd.grad(net.train()(x, padding).sin().sum(), [x, *net.parameters()]))
    short, long = results
    assert_same_math(long[0][:, :7], short[0], rel=1e-9)
    for one, other in zip(long[1:], short[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-11)


@torch.no_grad()
def test_the_start_changes_no_bit():
    net, (x, padding) = wrapped(moved=False), sequences()
    with drifa_attn.disabled(net):
        expected = net(x, padding)
    assert_same_bits(net(x, padding), expected)


@torch.no_grad()
def test_the_mask_is_found_once_per_forward():
    count = Counting()
    net, (x, padding) = wrapped(count), sequences()
    before = count.calls
    net(x, padding)
    assert count.calls == before + 1


@torch.no_grad()
def test_no_mask_is_every_position():
    net, x = wrapped(), sequences()[0]
    assert_same_bits(net(x), net(x))
    blind = wrapped(None)
    assert_same_bits(net(x), blind(x))
    assert_same_math(net(x, torch.zeros(3, 7, dtype=torch.bool)), net(x))


class Tokens(nn.Module):
    """A class token before the tokens, with a stage that halves their number."""

    num_prefix_tokens = 1

    def __init__(self, halves=False):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.first = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True)
        self.second = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True)
        self.halves = halves

    def forward(self, x, padding):
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        padding = nn.functional.pad(padding, (1, 0))
        x = self.first(x, src_key_padding_mask=padding)
        if self.halves:
            x, padding = torch.cat([x[:, :1], x[:, 1::2]], 1), torch.cat([padding[:, :1], padding[:, 1::2]], 1)
        x = self.second(x, src_key_padding_mask=padding)
        return x[:, 0] + torch.where(padding[..., None], 0, x)[:, 1:].sum(1)


@torch.no_grad()
def test_masks_leave_prefix_tokens_out():
    layouts = {"first": "b ... c", "second": "b ... c"}
    net = wrapped(net=Tokens(), at=["first", "second"], layouts=layouts)
    assert {site.num_prefix_tokens for site, _ in placed(net)} == {1}
    assert masks(net)[1] == ["first", "second"]
    assert_same_math(net(*sequences(longest=12)), net(*sequences()))


@torch.no_grad()
def test_the_plan_names_sites_that_the_mask_does_not_fit():
    options = {"at": ["first", "second"], "layouts": {"first": "b ... c", "second": "b ... c"}, "example_input": sequences()}
    net = Tokens(halves=True).double()
    plan = drifa_attn.plan(net, mask_from=real_positions, **options)
    assert [site.is_masked for site in plan.sites] == [True, False]
    note = "the mask (3, 7) of mask_from does not fit, and is not used, at second (4 positions behind 1 prefix tokens)"
    assert note in plan.notes
    assert f"note: {note}" in str(plan)
    assert not any("mask" in note for note in drifa_attn.plan(net, **options).notes)
    wrapped(net=net, **options)
    assert masks(net)[1] == ["first"]
    net(*sequences())


@torch.no_grad()
def test_a_mask_may_have_the_sizes_of_a_map():
    net = Net(
        lambda net, x, real: net.head(net.body(net.stem(x)).mean((2, 3))), stem=nn.Conv2d(3, 8, 1), body=nn.Conv2d(8, 8, 1)
    )
    net.head = nn.Linear(8, 2)
    x, real = torch.randn(2, 3, 6, 5, dtype=torch.float64), torch.rand(2, 6, 5) > 0.3
    wrapped(lambda args, kwargs: args[1], net=net, at=["stem"], example_input=(x, real))
    changed = torch.where(real[:, None], x, x + 1)
    (_, attention) = next(placed(net))
    seen = []
    attention.register_forward_hook(lambda m, args, kwargs, y: seen.append(m.gates(*args, **kwargs)), with_kwargs=True)
    net(x, real), net(changed, real), net(changed, ~real)
    assert_same_math(seen[0], seen[1])
    assert not torch.allclose(seen[1], seen[2])


# What is refused ---------------------------------------------------------------------------------------------------------


def give(value):
    return lambda args, kwargs: value


def fail(args, kwargs):
    raise KeyError("mask")


@pytest.mark.parametrize(
    ("mask_from", "options", "error", "message"),
    [
        (True, {}, TypeError, r"mask_from expected a callable \(args, kwargs\) -> .* got True"),
        (give(None), {}, ValueError, "mask_from gave None for the example input: pass an example_input= that has a mask"),
        (give(torch.ones(3, 7)), {}, TypeError, r"mask_from expected to give a boolean .* it gave torch\.float32 \(3, 7\)"),
        (give(torch.ones(7).bool()), {}, TypeError, r"it gave torch\.bool \(7,\)"),
        (give([True]), {}, TypeError, "it gave list"),
        (give(torch.ones(3, 8).bool()), {}, ValueError, r"a mask \(3, 8\) .* fits no site: encoder\.layers\.0 \(7 positions\)"),
        (give(torch.ones(4, 7).bool()), {}, ValueError, r"a mask \(4, 7\) for the example input, which fits no site"),
        (fail, {}, ValueError, r"mask_from failed on the example input \(KeyError: 'mask'\): pass an example_input= that"),
        (
            real_positions,
            {"attention": "eca"},
            ValueError,
            "mask_from is of attention='mfa': the attention 'eca' takes no mask",
        ),
    ],
)
def test_what_cannot_be_used_is_refused(mask_from, options, error, message):
    net = Encoder().double()
    for function in (drifa_attn.plan, drifa_attn.wrap):
        with pytest.raises(error, match=message):
            function(net, example_input=sequences(), mask_from=mask_from, **options)
    assert not any(key in vars(module) for module in net.modules() for key in ("forward", STEPS))


@torch.no_grad()
def test_a_mask_that_does_not_fit_later_is_refused_by_the_name_of_its_site():
    shift = []
    net = wrapped(lambda args, kwargs: torch.cat([real_positions(args, kwargs), *shift], 1))
    x, padding = sequences()
    expected = net(x, padding)
    shift.append(torch.ones(3, 1, dtype=torch.bool))
    message = r"the attention at 'encoder\.layers\.0' expected a mask for features \(3, 7, 16\), mask_from gave \(3, 8\)"
    with pytest.raises(ValueError, match=message):
        net(x, padding)
    shift[0] = shift[0].float()
    with pytest.raises(TypeError, match="mask_from expected to give a boolean tensor"):
        net(x, padding)
    shift.clear()
    assert_same_bits(net(x, padding), expected)


OUTSIDE = "known only while the forward of the whole network runs: call the network itself, not a part of it, and switch"


@torch.no_grad()
def test_a_part_of_the_network_has_no_mask():
    net, (x, padding) = wrapped(), sequences()
    for _ in range(2):
        with pytest.raises(ValueError, match=f"the attention at 'encoder.layers.0' expected .* {OUTSIDE}"):
            net.encoder(x)
        net(x, padding)
    with pytest.raises(TypeError):
        net(x, 3)  # the forward itself fails
    with pytest.raises(ValueError, match=OUTSIDE):
        net.encoder(x)
    with drifa_attn.disabled(net):
        net.encoder(x)


def test_gradient_checkpointing_is_refused_in_words():
    """The layers run a second time after the forward, when its mask is no longer known."""

    def forward(net, x, padding):
        return checkpoint(net.layer, x, use_reentrant=False).mean(1)

    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True)
    net = wrapped(net=Net(forward, layer=layer), at=["layer"], layouts={"layer": "b ... c"})
    y = net(*sequences())
    with pytest.raises(ValueError, match="switch gradient checkpointing off"):
        y.sum().backward()


def test_a_fused_network_takes_no_such_branch():
    net = wrapped(moved=False)
    with pytest.raises(
        ValueError, match="fuse got a backbone 'text' that was wrapped with mask_from=.* Wrap it without mask_from"
    ):
        drifa_attn.fuse({"text": net}, {"task": 2})


# Calls within calls, threads, copies -------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_call_within_a_call_has_its_own_mask():
    """The network calls itself for half of its batch between two layers; then the outer mask holds again."""

    def forward(net, x, padding, inner=True):
        x = net.first(x, src_key_padding_mask=padding)
        if inner and len(x) > 1:
            net(x[:1] * 2, ~padding[:1], False)
        return (net.second(x, src_key_padding_mask=padding) * ~padding[..., None]).sum(1)

    layers = {name: nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True) for name in ("first", "second")}
    net = Net(partial(forward), **layers)
    net = wrapped(
        net=net, at=["first", "second"], layouts=dict.fromkeys(layers, "b ... c"), example_input=(*sequences(), False)
    )
    x, padding = sequences()
    padding = padding.roll(1, 0)  # some of the first sequence is padding, so that its opposite has positions
    assert_same_bits(net(x, padding, True), net(x, padding, False))


@torch.no_grad()
def test_threads_do_not_see_each_others_masks():
    """Both threads are within the first layer at the same time, with masks of other sizes."""
    net, inputs = wrapped(), [sequences(), sequences(longest=11)]
    inputs[1] = inputs[1][0], inputs[1][1].roll(1, 0)
    expected, barrier, found = [net(*one) for one in inputs], threading.Barrier(2, timeout=60), {}

    def meet(module, args):
        barrier.wait()

    handle = net.encoder.layers[0].linear1.register_forward_pre_hook(meet)

    def run(i):
        with torch.no_grad():
            found[i] = net(*inputs[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    for i in (0, 1):
        assert_same_math(found[i], expected[i])


@torch.no_grad()
@pytest.mark.parametrize("make", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"])
def test_copies_hand_masks_of_their_own(make):
    net = wrapped(Counting())
    expected = net(*sequences())
    other = make(net)
    assert masks(other)[0] is not masks(net)[0]
    calls = masks(net)[0].calls
    assert_same_bits(other(*sequences()), expected)
    assert masks(net)[0].calls == calls
    drifa_attn.unwrap(net)
    assert_same_math(other(*sequences(longest=12)), expected)


@torch.no_grad()
def test_replicas_of_data_parallel_hand_masks(monkeypatch):
    replicate = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(
        replicate,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [[t.clone() for t in tensors] for _ in devices],
    )
    net = wrapped()
    replica = replicate.replicate(net, [0, 1])[1]
    assert_same_math(replica(*sequences(longest=9)), net(*sequences()))
    for module in replica.modules():
        if isinstance(module, MFA):
            module.alpha.fill_(50.0)
    assert not torch.allclose(replica(*sequences()), net(*sequences()))


# The verbs ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_network_comes_out_as_it_was():
    torch.manual_seed(0)
    net = Encoder().double().eval()
    expected, before = net(*sequences()), {name: [*vars(module)] for name, module in net.named_modules()}
    wrapped(net=net)
    assert not torch.equal(net(*sequences()), expected)
    assert drifa_attn.unwrap(net) is net
    assert_same_bits(net(*sequences()), expected)
    assert {name: [*vars(module)] for name, module in net.named_modules()} == before
    wrapped(None, net=net)  # nothing of the mask stays
    assert masks(net) == (None, [])


class Doubling(ModelHook):
    def post_forward(self, module, output):
        return 2 * output


@torch.no_grad()
def test_what_another_tool_put_around_the_forward_stays():
    net, count = wrapped(Counting()), None
    expected, count = net(*sequences()), masks(net)[0]
    add_hook_to_module(net, Doubling())
    assert_same_bits(net(*sequences()), 2 * expected)
    drifa_attn.unwrap(net)
    calls = count.calls
    net(*sequences())
    assert count.calls == calls
    assert "_hf_hook" in vars(net)


@torch.no_grad()
def test_gates_gains_and_the_switch_use_the_mask():
    net = wrapped()
    for function in (drifa_attn.gates, drifa_attn.gains):
        short, long = function(net, *sequences()), function(net, *sequences(longest=12))
        assert list(short) == ["encoder.layers.0", "encoder.layers.1"]
        for name, one in short.items():
            assert_same_math(long[name], one)
    with drifa_attn.disabled(net):
        off = net(*sequences())
    drifa_attn.unwrap(net)
    assert_same_bits(off, net(*sequences()))


@torch.no_grad()
def test_calibration_counts_real_positions():
    inputs = sequences(batch=16, n=20), sequences(batch=16, n=20, longest=25)
    nets = [wrapped(moved=False) for _ in inputs]
    for net, batch in zip(nets, inputs, strict=True):
        drifa_attn.calibrate(net, batch)
    blind = drifa_attn.calibrate(wrapped(None, moved=False), inputs[1]).state_dict()
    for name, value in nets[0].state_dict().items():
        torch.testing.assert_close(nets[1].state_dict()[name], value, rtol=1e-8, atol=1e-11)
    assert not torch.allclose(
        blind["encoder.layers.0.drifa_attn.global_center"], nets[0].encoder.layers[0].drifa_attn.global_center
    )


@torch.no_grad()
def test_files_say_that_there_was_a_mask(tmp_path):
    net, path = wrapped(), tmp_path / "attention.safetensors"
    drifa_attn.save_attention(net, path)
    torch.manual_seed(0)
    fresh = Encoder().double().eval()
    with pytest.raises(ValueError, match=r"mask_from=real_positions, a callable, which a file cannot hold, .*pass it again"):
        drifa_attn.load_attention(fresh, path, example_input=sequences())
    assert next(placed(fresh), None) is None
    drifa_attn.load_attention(fresh, path, example_input=sequences(), mask_from=real_positions)
    assert masks(fresh)[1] == masks(net)[1] == ["encoder.layers.0", "encoder.layers.1"]
    assert_same_math(fresh(*sequences(longest=12)), net(*sequences()))
    drifa_attn.save_attention(wrapped(None), path)
    with pytest.raises(ValueError, match="the file holds attention that uses no mask: leave mask_from= out"):
        drifa_attn.load_attention(Encoder().double(), path, example_input=sequences(), mask_from=real_positions)


@torch.no_grad()
def test_files_keep_which_sites_use_the_mask(tmp_path):
    options = {"at": ["first", "second"], "layouts": {"first": "b ... c", "second": "b ... c"}, "example_input": sequences()}
    net, path = wrapped(net=Tokens(halves=True), **options), tmp_path / "attention.safetensors"
    drifa_attn.save_attention(net, path)
    fresh = Tokens(halves=True).double().eval()
    fresh.load_state_dict(net.state_dict(), strict=False)
    drifa_attn.load_attention(fresh, path, example_input=sequences(), mask_from=real_positions)
    assert masks(fresh)[1] == ["first"]
    assert_same_bits(fresh(*sequences()), net(*sequences()))


FAST = pytest.param(False, marks=needs_later_torch("compiles no fast path of a transformer's layer"))


@pytest.mark.parametrize("grad", [FAST, True])
def test_the_network_compiles_whole(grad):
    torch._dynamo.reset()
    net = wrapped()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        for x, padding in (sequences(), sequences(longest=12), (sequences()[0], sequences()[1].roll(1, 0))):
            assert_same_math(compiled(x, padding), net(x, padding))
        assert_same_math(compiled(sequences()[0]), net(sequences()[0]))
    with pytest.raises(ValueError, match=OUTSIDE):
        net.encoder(sequences()[0])


@torch.no_grad()
def test_layers_that_are_compiled_alone_get_the_mask():
    torch._dynamo.reset()
    net = wrapped()
    expected = net(*sequences())
    for layer in net.encoder.layers:
        layer.compile(backend="eager")
    assert_same_math(net(*sequences()), expected)
    assert_same_math(net(*sequences(longest=12)), expected)
