"""Every fusion against its equation in NumPy, with absent modalities left out; gradients; the order of modalities."""

import re
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drifa_attn.fusion import FUSIONS
from drifa_attn.fusion.maps import resample
from drifa_attn.layout import LAYOUTS, Place
from tests import _fusions as reference
from tests._compare import assert_same_bits, assert_same_math
from tests.cases import loss, perturb_, weights
from tests.strategies import SEEDS, Features

REFINERS = sorted(reference.REFINERS)
READOUTS = sorted(reference.READOUTS)
QUADRATIC = ("cross_attention", "mutual_attention", "caf", "mttu", "gloria")


def test_every_fusion_has_its_equation():
    """MIFA's is in `reference.py`."""
    assert {"mifa", *REFINERS, *READOUTS} == set(FUSIONS)
    for name, (refiner, _) in FUSIONS.items():
        assert name == "mifa" or (refiner is not None) == (name in REFINERS)


# What is drawn -----------------------------------------------------------------------------------------------------------


def features(channels, sizes, layout, prefix, batch, generator):
    """Random features with sizes of any rank; tokens may have a prefix."""
    prefix = prefix if layout == "b ... c" and len(sizes) == 1 else 0
    axes = (sizes[0] + prefix,) if prefix else sizes
    shape = (batch, channels, *axes) if layout == "b c ..." else (batch, *axes, channels)
    return Features(torch.randn(shape, generator=generator, dtype=torch.float64), channels, layout, prefix)


def place_of(one):
    return Place(
        channels=one.channels, layout=one.layout, num_prefix_tokens=one.num_prefix_tokens, shape=tuple(one.x.shape[1:])
    )


def grid_of(one):
    return tuple(one.positions().shape[2:]) or (1,)


class Batch(NamedTuple):
    """Two stages of one to four modalities, and which sample has which."""

    stages: list[list[Features]]
    present: torch.Tensor

    @property
    def vectors(self):
        return [one.positions().flatten(2).mean(-1) if one.x.ndim > 2 else one.x for one in self.stages[-1]]

    def spoilt(self, value=torch.nan):
        """The same batch with this value where a modality is absent."""
        rows = [self.present[:, i] for i in range(self.present.shape[1])]
        fill = lambda x, has: torch.where(has.view(-1, *[1] * (x.ndim - 1)), x, value)  # noqa: E731
        stages = [[one._replace(x=fill(one.x, has)) for one, has in zip(stage, rows, strict=True)] for stage in self.stages]
        return Batch(stages, self.present)

    def sample(self, b):
        """The modalities that sample b has: vectors, and of each stage maps and all grids."""
        mine = [i for i in range(self.present.shape[1]) if self.present[b, i]]
        vs = {i: self.vectors[i][b].numpy() for i in mine}
        stages = []
        for stage in self.stages:
            maps = {i: stage[i].positions()[b].reshape(stage[i].channels, -1).numpy() for i in mine}
            stages.append((maps, [grid_of(one) for one in stage]))
        return vs, stages


@st.composite
def batches(draw, at_least=1):
    m, b = draw(st.integers(at_least, 3)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    sizes = st.lists(st.sampled_from([1, 2, 3, 4]), max_size=2).map(tuple)
    kinds = [(draw(st.sampled_from(LAYOUTS)), draw(st.integers(0, 2))) for _ in range(m)]
    stages = []
    for _ in range(2):
        wide = [draw(st.sampled_from([1, 3, 8])) for _ in range(m)]
        stages.append([features(c, draw(sizes), *kind, b, generator) for c, kind in zip(wide, kinds, strict=True)])
    rows = draw(st.lists(st.lists(st.booleans(), min_size=m, max_size=m), min_size=b, max_size=b))
    return Batch(stages, torch.tensor(rows))


def refiner(name, batch):
    torch.manual_seed(0)
    return perturb_(FUSIONS[name][0]([place_of(one) for one in batch.stages[-1]], dtype=torch.float64)).eval()


def readout(name, batch, **options):
    torch.manual_seed(0)
    stages = [[place_of(one) for one in stage] for stage in batch.stages]
    kind = FUSIONS[name][1]
    return perturb_(kind(stages[-1], stages, dtype=torch.float64, **options)).eval()


def read(layer, batch, present):
    kept = {k: [one.x for one in batch.stages[k]] for k in layer.keeps}
    return layer(batch.vectors, kept, present)


# Equations ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFINERS)
@settings(max_examples=8)
@given(batch=batches())
@torch.no_grad()
def test_a_refiner_is_its_equation_on_what_each_sample_has(name, batch):
    layer, last = refiner(name, batch), batch.stages[-1]
    ys = layer([one.x for one in batch.spoilt().stages[-1]], batch.present)
    if batch.present.all():
        for y, other in zip(layer([one.x for one in last]), ys, strict=True):
            assert_same_bits(y, other)
    widths = [one.channels for one in last]
    for b in range(len(batch.present)):
        _, stages = batch.sample(b)
        expected = reference.REFINERS[name](weights(layer), *stages[-1], widths)
        for i, (one, y) in enumerate(zip(last, ys, strict=True)):
            assert y.shape == one.x.shape
            if i not in expected:
                assert y[b].isnan().all()  # unchanged
                continue
            found = one.positions(y)[b].reshape(widths[i], -1)
            assert_same_math(found, torch.from_numpy(expected[i]))
            prefix = one.num_prefix_tokens
            assert_same_bits(y[b][:prefix] if prefix else y[b][:0], one.x[b][:prefix] if prefix else one.x[b][:0])


@pytest.mark.parametrize("name", READOUTS)
@settings(max_examples=8)
@given(batch=batches())
@torch.no_grad()
def test_a_readout_is_its_equation_on_what_each_sample_has(name, batch):
    layer = readout(name, batch)
    z = read(layer, batch.spoilt(), batch.present)
    assert z.shape == (len(batch.present), layer.width)
    if batch.present.all():
        assert_same_math(read(layer, batch, None), z)
    for b in range(len(z)):
        vs, stages = batch.sample(b)
        expected = reference.READOUTS[name](weights(layer), vs, stages, [one.channels for one in batch.stages[-1]])
        if vs:
            assert_same_math(z[b], torch.from_numpy(expected))
        else:
            assert not z[b].any()
            assert not expected.any()


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=3), SEEDS)
def test_resampling_is_area_pooling_by_overlap(axes, seed):
    grid, to = zip(*axes, strict=True)
    x = torch.randn(2, 3, *grid, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y = resample(x.flatten(2), grid, to)
    for b in range(2):
        assert_same_math(y[b], torch.from_numpy(reference.resample(x[b].numpy(), grid, to)))
    if all(a % b == 0 for a, b in axes):
        assert_same_math(y, torch.nn.functional.interpolate(x, to, mode="area").flatten(2))


# Gradients ---------------------------------------------------------------------------------------------------------------


def fixed(present=True, batch=3):
    """A map, tokens with a prefix, and a vector."""
    generator = torch.Generator().manual_seed(3)
    kinds = [((3, 2), "b c ...", 0), ((4,), "b ... c", 1), ((), "b c ...", 0)]
    stages = [
        [features(c, *kind, batch, generator) for c, kind in zip(wide, kinds, strict=True)] for wide in ((4, 3, 2), (5, 4, 3))
    ]
    rows = torch.tensor([[True, True, True], [True, False, True], [False, True, False]])[:batch]
    return Batch(stages, rows if present else torch.ones_like(rows))


def run(layer, batch, present, xs):
    """A refiner or a readout on these features of the last stage; vectors are their means."""
    if hasattr(layer, "keeps"):
        last = [one._replace(x=x) for one, x in zip(batch.stages[-1], xs, strict=True)]
        return [read(layer, Batch([batch.stages[0], last], batch.present), present)]
    return layer(xs, present)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", [*REFINERS, *(f"{name} readout" for name in READOUTS)])
def test_gradients_are_those_of_finite_differences(name, mode):
    batch = fixed()
    layer = (readout if name.endswith("readout") else refiner)(name.removesuffix(" readout"), batch).train(mode == "train")
    for norm in layer.modules():
        if isinstance(norm, torch.nn.modules.batchnorm._BatchNorm):
            norm.momentum = 0.0  # else every call would change the next
    xs = [one.x.clone().requires_grad_() for one in batch.stages[-1]]
    parameters = list(layer.parameters())

    def outputs(*leaves):
        return tuple(run(layer, batch, batch.present, leaves[: len(xs)]))

    assert torch.autograd.gradcheck(outputs, (*xs, *parameters), fast_mode=True)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", [*REFINERS, *(f"{name} readout" for name in READOUTS)])
def test_what_an_absent_sample_holds_reaches_no_gradient(name, mode):
    batch, found = fixed(), []
    for value in (torch.nan, 0.0):
        layer = (readout if name.endswith("readout") else refiner)(name.removesuffix(" readout"), batch).train(mode == "train")
        xs = [one.x.clone().requires_grad_() for one in batch.spoilt(value).stages[-1]]
        ys = run(layer, batch.spoilt(value), batch.present, xs)
        if not name.endswith("readout"):  # there the absent pass unchanged
            ys = [y[batch.present[:, i]] for i, y in enumerate(ys)]
        (loss(ys) + sum(getattr(layer, "losses", dict)().values())).backward()
        assert all(p.grad is not None for p in layer.parameters()), "DDP waits for it"
        found.append([*(x.grad for x in xs if x.grad is not None), *(p.grad for p in layer.parameters())])
        for i, x in enumerate(xs):
            assert x.grad is None or not x.grad[~batch.present[:, i]].any()
    for one, other in zip(*found, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("name", ["aff", "iaff", "caf"])
@torch.no_grad()
def test_in_training_absent_samples_touch_no_norm(name):
    """Two more samples that lack what is fused change no vector of the others, and no running statistic."""
    batch = fixed()
    more = torch.tensor([[False, False, False], [False, False, name != "caf"]])
    longer = Batch(
        [[one._replace(x=torch.cat([one.x, torch.full_like(one.x[:2], 7)])) for one in stage] for stage in batch.stages],
        torch.cat([batch.present, more]),
    )
    layers = [readout(name, batch).train() for _ in range(2)]
    z, again = (read(layer, one, one.present) for layer, one in zip(layers, (batch, longer), strict=True))
    assert_same_math(again[:3], z)
    for one, other in zip(*(layer.buffers() for layer in layers), strict=True):
        assert_same_math(one.double(), other.double())
    assert any(not torch.equal(a, b) for a, b in zip(layers[0].buffers(), readout(name, batch).buffers(), strict=True))


# The order of modalities -------------------------------------------------------------------------------------------------


def permuted(state, order, widths):
    """A state dict for the modalities in another order: numbers in names move, and so do the columns that read all of them."""
    moved, new = {}, {str(old): str(place) for place, old in enumerate(order)}
    starts = np.cumsum([0, *widths])
    columns = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in order])
    for name, value in state.items():
        head, *rest = name.split(".")
        if head in ("stages", "layers", "first", "second"):
            rest = re.sub(r"\b(scores|projs)\.(\d)", lambda m: f"{m[1]}.{new[m[2]]}", ".".join(rest)).split(".")
        else:
            rest = [new.get(part, part) for part in rest]
        is_wide = value.ndim == 2 and value.shape[1] == sum(widths) and head in ("squeeze", "gates")
        moved[".".join([head, *rest])] = value[:, torch.from_numpy(columns)] if is_wide else value
    return moved


ORDER = [2, 0, 1]


@pytest.mark.parametrize("name", REFINERS)
@torch.no_grad()
def test_a_refiner_does_not_care_about_the_order(name):
    batch = fixed()
    layer, widths = refiner(name, batch), [one.channels for one in batch.stages[-1]]
    ys = layer([one.x for one in batch.stages[-1]], batch.present)
    turned = Batch([[stage[i] for i in ORDER] for stage in batch.stages], batch.present[:, ORDER])
    other = refiner(name, turned)
    other.load_state_dict(permuted(layer.state_dict(), ORDER, widths))
    for y, i in zip(other([one.x for one in turned.stages[-1]], turned.present), ORDER, strict=True):
        assert_same_math(y, ys[i])


def equal_shapes():
    """Three maps of one shape, so that no modality sets the grid of the others."""
    generator = torch.Generator().manual_seed(3)
    stages = [[features(c, (3, 2), "b c ...", 0, 3, generator) for _ in range(3)] for c in (4, 5)]
    return Batch(stages, fixed().present)


@pytest.mark.parametrize("name", [name for name in READOUTS if name not in ("aff", "iaff")])  # they fold in order
@torch.no_grad()
def test_a_readout_does_not_care_about_the_order(name):
    batch = equal_shapes() if name == "caf" else fixed()
    layer, widths = readout(name, batch), [one.channels for one in batch.stages[-1]]
    z = read(layer, batch, batch.present)
    turned = Batch([[stage[i] for i in ORDER] for stage in batch.stages], batch.present[:, ORDER])
    other = readout(name, turned)
    other.load_state_dict(permuted(layer.state_dict(), ORDER, widths))
    found = read(other, turned, turned.present)
    parts = {"concat": [widths], "caf": [widths, [5]], "mttu": [widths, widths, [8], [8]], "gloria": [[128] * 3] * 2}
    start = 0
    for part in parts.get(name, [[layer.width]]):
        here, there = (t[:, start : start + sum(part)] for t in (z, found))
        start += sum(part)
        if len(part) > 1:
            here = torch.cat([here.split(part, 1)[i] for i in ORDER], 1)
        assert_same_math(there, here)
    assert start == layer.width


# Losses ------------------------------------------------------------------------------------------------------------------


def test_the_losses_of_gloria_are_the_equation_and_those_of_training_alone():
    batch = fixed(batch=3)
    present = torch.tensor([[True, True, True], [True, True, False], [True, True, True]])
    batch = Batch(batch.stages, present)
    layer = readout("gloria", batch)
    read(layer, batch.spoilt(), present)
    assert layer.losses() == {}
    read(layer.train(), batch.spoilt(), present)
    samples = [(vs, stages[-1][0]) for vs, stages in (batch.sample(b) for b in range(3))]
    expected = reference.gloria_losses(weights(layer), samples)
    for (name, value), one in zip(layer.losses().items(), expected, strict=True):
        assert_same_math(value, torch.tensor(one), name=name)
    half = readout("gloria", batch, gloria_weight=0.05).train()
    read(half, batch, present)
    assert_same_math(half.losses()["gloria local"], layer.losses()["gloria local"] / 2)
    none = readout("gloria", batch, gloria_weight=0).train()
    read(none, batch, present)
    assert none.losses() == {}
    read(layer.eval(), batch, present)
    assert layer.losses() == {}
    read(layer.train(), batch, torch.eye(3).bool())
    assert not any(layer.losses().values())  # no sample has two modalities
