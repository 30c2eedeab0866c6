"""DRIFA-Net (Fig. 1A): the released network's numbers, then what the example adds to it."""

import copy
import functools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from drifa_attn import MFA, MIFA, RRA, TaskLoss
from examples.drifa_net.model import DrifaNet, flat_name
from tests._compare import GOLDEN, GOLDEN_FLOOR, assert_close_rel, assert_same_bits, assert_same_math
from tests.cases import listed, loss, perturb_
from tests.golden import fullnet_weights

GOLDEN_FOLDER = Path(__file__).parent.parent / "golden"
# At 128x128 one ReLU or maximum sits within float32's rounding of its kink: the golden's gradients are those of its other side
# (our float64 run differs from them by as much, 4.6e-3 of a gradient's norm). At 65x65 none does. Under training batch norms
# the gradients before them are small differences of large terms: float64 differs from the golden's by 8e-5.
GRADIENTS = {"128x128_b2_infer": 6e-3, "65x65_b2_infer": GOLDEN, "65x65_b2_bntrain": 1e-4}
WHOLE = [
    ("65x65_b2_infer", "symmetric"),
    ("65x65_b2_infer", "same"),
    ("65x65_b2_bntrain", "symmetric"),
    ("128x128_b2_infer", "same"),
]


@pytest.fixture(scope="module")
def released():
    """The paper's network with the golden weights, by padding: each is built once."""
    weights = fullnet_weights.weights()
    built = functools.cache(lambda padding: DrifaNet((5, 7), dropout=0.0, padding=padding))
    return lambda padding: built(padding).load_flat(weights)


@pytest.fixture
def net():
    """A narrow one, off its start."""
    return small()


def small(*args, seed=0, **options):
    torch.manual_seed(seed)
    return perturb_(DrifaNet(*args, **{"width": 2, **options})).eval()


def images(batch=2, branches=2, size=33, channels=3):
    return [torch.randn(batch, channels, size, size) for _ in range(branches)]


def run_golden(net, name):
    """Forward and backward as the golden file had them: what it names, as we have it."""
    golden, size = dict(np.load(GOLDEN_FOLDER / f"fullnet_{name}.npz")), int(name.partition("x")[0])
    net.train(name.endswith("bntrain")).zero_grad()
    xs = [torch.from_numpy(x).requires_grad_() for x in fullnet_weights.images(size, size)]
    ours = {}
    handles = []
    for s, mifa in enumerate(net.mifas, 1):
        handles.append(
            mifa.register_forward_hook(lambda _, args, ys, s=s: ours.update({(s, i): y for i, y in enumerate(ys, 1)}))
        )
    pooled = net.features(xs)
    for handle in handles:
        handle.remove()
    ours = {
        f"mifa{s}.out{i}.{key}": value
        for (s, i), y in ours.items()
        for key, value in (("mean_hw", y.mean((2, 3))), ("std_hw", y.std((2, 3), correction=0)))
    }
    logits = [head(pooled) for head in net.heads]
    each = [F.cross_entropy(y, torch.from_numpy(golden[f"labels{i}"])) for i, y in enumerate(logits, 1)]
    total = 0.5 * each[0] + 0.5 * each[1]
    total.backward()
    ours.update({"logits1": logits[0], "logits2": logits[1], "pooled_features": pooled})
    ours["loss"] = torch.stack([total, *each])
    return golden, ours, xs


@pytest.mark.parametrize(("name", "padding"), WHOLE)
def test_network_is_the_released_one(released, name, padding):
    net = released(padding)
    golden, ours, xs = run_golden(net, name)
    for key, value in ours.items():
        assert_close_rel(value, golden[key], GOLDEN, GOLDEN_FLOOR, f"{name} {key}")
    assert set(golden) - set(ours) <= {key for key in golden if re.match(r"prob|labels|grad_summary|g\.|after\.", key)}

    rel = GRADIENTS[name]
    for i, x in enumerate(xs, 1):
        norm, total, _ = golden[f"g.x{i}.summary"]
        assert_close_rel(x.grad.norm(), norm, rel, name=f"{name} norm of g.x{i}")
        assert abs(x.grad.double().sum() - total) <= rel * norm * x.grad.numel() ** 0.5
        if f"g.x{i}" in golden:
            assert_close_rel(x.grad[..., ::6, ::6], golden[f"g.x{i}"], rel, name=f"{name} g.x{i}")
    check_gradients(net, golden["grad_summary"], rel)
    buffers = {flat_name(key): value for key, value in net.named_buffers()}
    after = {key: value for key, value in golden.items() if key.endswith("running_mean")}
    for key, value in after.items():
        assert_close_rel(buffers[key.removeprefix("after.")], value, GOLDEN, name=f"{name} {key}")
    assert len(after) == (3 if name.endswith("bntrain") else 0)


def check_gradients(net, rows, rel):
    """Norm, sum and dot product with a fixed direction of every parameter's gradient, as errors in units of its norm."""
    gradients = {flat_name(key): p.grad.double() for key, p in net.named_parameters()}
    spec = fullnet_weights.spec()
    assert len(rows) == len(gradients) == 1060
    for index, norm, total, dot in rows.astype(np.float64):
        key, shape, _ = spec[int(index)]
        gradient = gradients.pop(key)
        bound = rel * norm + GOLDEN_FLOOR  # a bias before a training batch norm has the gradient 0
        direction = torch.from_numpy(fullnet_weights.direction(int(index), shape))
        assert abs(gradient.norm() - norm) <= bound, key
        assert abs(gradient.sum() - total) <= bound * gradient.numel() ** 0.5, key
        # A direction has norm sqrt(n): errors of no direction of their own add up to `bound` times a normal deviate.
        assert abs((gradient * direction).sum() - dot) <= 2 * bound, key


def test_symmetric_padding_is_another_network_at_even_sizes(released):
    golden = np.load(GOLDEN_FOLDER / "fullnet_128x128_b2_infer.npz")
    net = released("symmetric").eval()
    with torch.no_grad():
        logits = net([torch.from_numpy(x) for x in fullnet_weights.images(128, 128)])
    assert max(np.abs(y.numpy() - golden[f"logits{i}"]).max() for i, y in enumerate(logits, 1)) > 0.3


def test_network_has_the_papers_parameters():
    with torch.device("meta"):
        net = DrifaNet()
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 53_865_668
    assert {flat_name(name): tuple(value.shape) for name, value in net.state_dict().items() if value.ndim} == {
        name: shape for name, shape, _ in fullnet_weights.spec()
    }


def test_network_is_built_as_the_table_says():
    with torch.device("meta"):
        net = DrifaNet()
    for branch in net.branches:
        rows = [(s.rra.conv1.out_channels, s.rra.stride, s.rra.proj is not None) for s in branch["stages"]]
        assert rows[:4] == [(64, 1, False), (64, 1, False), (128, 2, True), (128, 1, False)]
        assert rows[4:] == [(256, 2, True), (256, 1, False), (512, 2, True), (512, 1, False)]
        order = ["rra", "dropout", "mfa"]
        assert [[name for name, _ in s.named_children()] for s in branch["stages"]] == [order] * 6 + [["rra", "mfa"], ["rra"]]
        assert {m.p for m in branch.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}
    assert (net.dropout.p, len(net.mifas), sum(isinstance(m, RRA) for m in net.modules())) == (0.25, 8, 16)
    assert {(m.eps, m.momentum) for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {(1e-3, 0.01)}


def test_start_is_the_papers():
    net = DrifaNet(width=2)
    for name, p in net.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "scale" in name or "alpha" in name or ".bn" in name:
            assert (p == 1).all(), name
        else:
            fans = p[0].numel() + p.shape[0] * p[0, 0].numel()
            assert 0 < p.abs().max() <= (6 / fans) ** 0.5, name


def test_each_dropout_drops():
    net, xs = small(dropout=0.5), images(4)
    assert_same_bits(net(xs)[0], net(xs)[0])
    dropouts = [module for module in net.modules() if isinstance(module, torch.nn.Dropout)]
    assert len(dropouts) == 2 * 6 + 1
    for dropout in (net.dropout, dropouts[0], dropouts[11]):
        dropout.train()
        assert not torch.equal(net(xs)[0], net(xs)[0])
        dropout.eval()


@pytest.mark.parametrize(("branches", "heads"), [(1, (3,)), (2, (2,)), (3, (4, 2, 9)), (4, (1, 1))])
def test_any_branches_and_heads(branches, heads):
    net = small(heads, branches=branches, in_channels=[1, 3, 2, 4][:branches], reduction=2, init="identity").double()
    sizes = [33, 40, 17, 65]
    xs = [torch.randn(2, c, sizes[i], sizes[i] + i, dtype=torch.float64) for i, c in enumerate(net.in_channels)]
    logits = net(xs)
    assert [tuple(y.shape) for y in logits] == [(2, k) for k in heads]
    assert isinstance(logits, list)
    assert {(m.reduction, m.init) for m in net.modules() if isinstance(m, MFA)} == {(2, "identity")}
    assert {(m.modalities, m.init) for m in net.modules() if isinstance(m, MIFA)} == {(branches, "identity")}
    assert_same_math(net([x[1:] for x in xs])[0], logits[0][1:])  # samples are independent


@pytest.mark.parametrize("padding", ["symmetric", "same"])
def test_every_parameter_learns(padding):
    net = small(padding=padding, width=4, dropout=0.0).train()
    loss(net(images(4, size=65))).backward()
    still = [name for name, p in net.named_parameters() if not p.grad.isfinite().all() or not p.grad.any()]
    # What a batch norm takes away again can have no gradient but rounding's.
    assert not [name for name in still if not name.endswith("conv.bias")]


def test_task_loss_is_the_papers(net):
    labels = [torch.tensor([0, 4]), torch.tensor([6, 1])]
    logits = net(images())
    expected = 0.5 * F.cross_entropy(logits[0], labels[0]) + 0.5 * F.cross_entropy(logits[1], labels[1])
    names = ["cell", "lesion"]
    total = TaskLoss(names)(dict(zip(names, logits, strict=True)), dict(zip(names, labels, strict=True)))
    assert_same_math(total, expected)


def test_absent_branch_says_nothing():
    net = small(dropout=0.0)
    xs, present = images(3), torch.tensor([[True, True], [True, False], [False, True]])
    absent = [x.clone() for x in xs]
    absent[1][1], absent[0][2] = float("nan"), 1e30
    for training in (False, True):
        net.train(training)
        assert_same_bits(torch.cat(copy.deepcopy(net)(absent, present), 1), torch.cat(copy.deepcopy(net)(xs, present), 1))
    net.eval()
    everyone = torch.ones(3, 2, dtype=torch.bool)
    assert_same_math(net(xs, everyone)[0], net(xs)[0])
    assert_same_math(net(xs, present)[0][:1], net(xs)[0][:1])
    pooled = net.features(xs, present)
    half = pooled.shape[1] // 2
    assert not pooled[1, half:].any()
    assert not pooled[2, :half].any()
    alone = net.features([xs[0], torch.zeros_like(xs[1])], torch.tensor([[True, False]] * 3))
    assert_same_math(pooled[1:2], alone[1:2], rel=1e-4)


def test_absent_branch_of_every_sample_trains():
    net = small(dropout=0.0).train()
    present = torch.tensor([[True, False]] * 4)
    loss(net(images(4), present)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert_same_bits(net.eval().features(images(1), torch.tensor([[False, False]])), torch.zeros(1, 32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": ()}, r"expected heads to list the classes of each task, e\.g\. \(5, 7\), got \(\)"),
        ({"heads": 5}, "got 5"),
        ({"heads": (5, 0)}, "heads to be an integer >= 1, got 0"),
        ({"branches": 0}, "branches to be an integer >= 1, got 0"),
        ({"in_channels": (3, 0)}, "in_channels to be an integer >= 1, got 0"),
        ({"in_channels": (3, 3, 3)}, r"once per branch \(2\), got 3"),
        ({"dropout": 1.5}, r"dropout in \[0, 1\], got 1\.5"),
        ({"padding": "valid"}, 'padding "symmetric" or "same", got \'valid\''),
        ({"width": 0}, "width to be an integer >= 1, got 0"),
        ({"reduction": 0}, "reduction to be an integer >= 1, got 0"),
        ({"init": "zero"}, "got 'zero'"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        DrifaNet(**{"width": 2, **options})


@pytest.mark.parametrize(
    ("xs", "present", "kind", "message"),
    [
        (torch.zeros(2, 3, 9, 9), None, TypeError, "DrifaNet expected a list of 2 tensors"),
        ([torch.zeros(2, 3, 9, 9)], None, ValueError, "DrifaNet expected 2 modalities, got 1"),
        ([torch.zeros(2, 3, 9, 9), None], None, TypeError, "got NoneType"),
        (
            [torch.zeros(2, 3, 9, 9), torch.zeros(3, 3, 9, 9)],
            None,
            ValueError,
            r"one batch size for all modalities, got \[2, 3\]",
        ),
        ([torch.zeros(2, 3, 9, 9), torch.zeros(2, 1, 9, 9)], None, ValueError, r"c=3, got \(2, 1, 9, 9\)"),
        ([torch.zeros(2, 3, 9, 9), torch.zeros(2, 3, 9)], None, ValueError, r'images "b c h w" with c=3, got \(2, 3, 9\)'),
        ([torch.zeros(2, 3, 9, 9, dtype=torch.uint8)] * 2, None, TypeError, r"got torch\.uint8"),
        ([torch.zeros(2, 3, 9, 9)] * 2, torch.ones(2, 2), TypeError, r"got torch\.float32"),
        ([torch.zeros(2, 3, 9, 9)] * 2, torch.ones(2, 3, dtype=torch.bool), ValueError, r"\(2, 2\), got \(2, 3\)"),
    ],
)
def test_images_are_checked(net, xs, present, kind, message):
    with pytest.raises(kind, match=message):
        net(xs, present)


def flat(net):
    return {flat_name(name): value.numpy() for name, value in net.state_dict().items() if value.is_floating_point()}


def test_load_flat_is_the_state_dict_by_other_names(net):
    other = DrifaNet(width=2).eval()
    assert other.load_flat(flat(net)) is other
    xs = images()
    assert all(torch.equal(a, b) for a, b in zip(net(xs), other(xs), strict=True))


def test_flat_names_start_at_one():
    assert flat_name("branches.0.stages.6.rra.conv1.weight") == "branch1.stage7.rra.conv1.weight"
    assert flat_name("mifas.2.mlifa.convs.1.bias") == "mifa3.mlifa.conv2.bias"
    assert flat_name("mifas.0.alphas.0") == "mifa1.alpha1"
    assert flat_name("heads.1.weight") == "head2.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update(extra=np.zeros(1)), "knows no 'extra'"),
        (lambda w: w.pop("head2.bias"), r"misses 'head2\.bias' of shape \(7,\)"),
        (lambda w: w.update({"head1.weight": np.zeros((5, 3))}), r"'head1\.weight' of shape \(5, 32\), got \(5, 3\)"),
    ],
)
def test_load_flat_refuses_and_leaves_the_network(net, change, message):
    weights = {name: 2 * value for name, value in flat(net).items()}
    before = copy.deepcopy(net.state_dict())
    change(weights)
    with pytest.raises(ValueError, match=message):
        net.load_flat(weights)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_state_dict_round_trip(net):
    other = DrifaNet(width=2).eval()
    other.load_state_dict(net.state_dict())
    xs = images()
    assert all(torch.equal(a, b) for a, b in zip(net(xs), other(xs), strict=True))


@pytest.mark.slow  # 44 attentions and their gradients to trace
def test_network_compiles_whole():
    net, xs, present = small(branches=2), images(), torch.tensor([[True, True], [False, True]])
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for args in ((xs,), (xs, present)):
        for a, b in zip(compiled(*args), net(*args), strict=True):
            assert_same_math(a, b)


def test_network_exports():
    net, args = small(), (images(), torch.tensor([[True, True], [False, True]]))
    program = torch.export.export(net, args).module()
    for a, b in zip(listed(program(*args)), net(*args), strict=True):
        assert_same_math(a, b)
