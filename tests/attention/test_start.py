"""The start of MFA and MIFA, and `calibrate` of one layer from its features."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from drifa_attn import MFA, MIFA, functional
from drifa_attn.attention.mfa import pair, statistics
from drifa_attn.attention.start import BEFORE_SIGMOID, SMALLEST_SPREAD
from drifa_attn.layout import positions
from tests import strategies
from tests._compare import assert_same_bits, assert_same_math
from tests.cases import perturb_

REDUCTIONS = st.sampled_from([None, 1, 2])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def varied(x, seed=0):
    """Features whose samples and channels differ in mean and size, as those of a network do."""
    generator = torch.Generator().manual_seed(seed)
    size = 0.2 + 3 * torch.rand(x.shape[0], x.shape[1], *[1] * (x.ndim - 2), generator=generator, dtype=torch.float64)
    return (x.double() * size + torch.randn(size.shape, generator=generator, dtype=torch.float64)).to(x.dtype)


def maps_of(mfa, x):
    """What every map of an MFA gives for features x, by the equations, before its sigmoid."""
    z = positions(x, mfa.layout, mfa.num_prefix_tokens)
    found = {}
    if mfa.squeeze is not None:
        z = found["squeeze"] = functional.lin(z, pair(mfa.squeeze))
    h, c = mfa.hifa, mfa.clia
    found["conv1"] = functional.lin(z, pair(h.conv1))
    h1 = found["conv1"].sigmoid()
    found["conv2"] = functional.lin(h1, pair(h.conv2))
    h2 = found["conv2"].sigmoid()
    found["conv3"] = functional.lin(h1 + h2, pair(h.conv3))
    h3 = found["conv3"].sigmoid()
    found["conv4"] = functional.lin(h3, pair(h.conv4))
    pooled = [h1.mean(-1) + h2.amax(-1), h3.mean(-1) + found["conv4"].sigmoid().amax(-1)]
    found["dense"] = functional.dense(torch.cat(pooled, 1), pair(h.dense))[..., None]
    found["clia.conv1"] = functional.lin(z, pair(c.conv1))
    found["clia.conv2"] = functional.dense(found["clia.conv1"].sigmoid().mean(-1), pair(c.conv2))[..., None]
    return found


def assert_fitted(maps, reduction_deviation=1.0):
    """Each map has mean zero and its deviation in every channel that differs at all."""
    for name, y in maps.items():
        deviation, mean = torch.std_mean(y, (0, 2), correction=0)
        expected = reduction_deviation if name.startswith("squeeze") else BEFORE_SIGMOID
        assert mean.abs().max() < 1e-5, name
        assert ((deviation - expected).abs() < 1e-5).all(), name


@given(strategies.features(batch=16), REDUCTIONS, strategies.SEEDS)
def test_calibrated_maps_have_mean_zero_and_their_deviation(features, reduction, seed):
    torch.manual_seed(seed)
    mfa = MFA(features.channels, reduction=reduction, init="identity", dtype=torch.float64, **features.options)
    x = varied(features.x, seed)
    assume(x.std(0).min() > 0.01)
    mfa.calibrate(x)
    assert_same_bits(mfa(x), x)
    assert_fitted(maps_of(mfa, x))
    z = positions(x, mfa.layout, mfa.num_prefix_tokens)
    z = z if mfa.squeeze is None else functional.lin(z, pair(mfa.squeeze))
    for info, center, spread in (
        (mfa.hifa(z), mfa.global_center, mfa.global_spread),
        (mfa.clia(z), mfa.local_center, mfa.local_spread),
    ):
        assert_same_math(info.mean(0), center)
        standard = functional.standardised(info, center, spread)
        assert (standard.std(0, correction=0) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", [None, 4])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_calibration_changes_no_bit_of_the_output(dtype, reduction, memory_format, device):
    x = strategies.stored(varied(torch.randn(20, 33, 6, 5)).to(device, dtype), memory_format)
    mfa = MFA(33, reduction=reduction, init="identity", device=device, dtype=dtype)
    with torch.autocast(device.type, torch.bfloat16):
        mfa.calibrate(x)
        assert_same_bits(mfa(x), x)
    assert_same_bits(mfa(x), x)
    assert {value.dtype for value in mfa.state_dict().values()} == {dtype}
    assert not any(p.grad_fn for p in mfa.parameters())
    assert all(value.isfinite().all() for value in mfa.state_dict().values())
    spread = (mfa.hifa(x) if reduction is None else mfa.hifa(functional.lin(x.flatten(2), pair(mfa.squeeze)))).std(0)
    assert (spread > 0.05).all()  # before: under 0.005


@given(strategies.features(batch=17), REDUCTIONS, strategies.SEEDS)
def test_calibrating_twice_changes_nothing(features, reduction, seed):
    torch.manual_seed(seed)
    mfa = MFA(features.channels, reduction=reduction, init="identity", dtype=torch.float64, **features.options)
    x = varied(features.x, seed)
    assume(x.std(0).min() > 0.01)
    mfa.calibrate(x)
    before = {name: value.clone() for name, value in mfa.state_dict().items()}
    mfa.calibrate(x)
    for name, value in mfa.state_dict().items():
        assert torch.allclose(value, before[name], rtol=1e-6, atol=1e-6), name


def test_a_calibrated_map_is_one_that_was_scaled_by_hand(device):
    """Of vectors and with one map alone the rule can be written down: W / deviation, (b − mean) / deviation."""
    x = varied(torch.randn(64, 6, dtype=torch.float64, device=device))
    mfa = MFA(6, reduction=1, init="identity", dtype=torch.float64, device=device)
    weight, bias = (tensor.detach().clone() for tensor in pair(mfa.squeeze))
    mfa.calibrate(x)
    y = x @ weight.T + bias
    deviation = y.std(0, correction=0)
    assert_same_math(mfa.squeeze.weight, weight / deviation[:, None])
    assert_same_math(mfa.squeeze.bias, (bias - y.mean(0)) / deviation)


def test_prefix_tokens_do_not_count(device):
    x = torch.randn(16, 9, 8, device=device)
    other = x.clone()
    other[:, :2] = 1e6
    layers = []
    for features in (x, other):
        torch.manual_seed(0)
        layers.append(MFA(8, init="identity", layout="b ... c", num_prefix_tokens=2).to(device))
        layers[-1].calibrate(features)
    for one, two in zip(*(layer.state_dict().values() for layer in layers), strict=True):
        assert_same_bits(one, two)


def test_a_channel_that_never_differs_is_not_enlarged_without_limit(device):
    x = torch.randn(16, 8, 4, device=device)
    x[:, 3] = 0.7
    mfa = MFA(8, reduction=8, init="identity").to(device)
    with torch.no_grad():
        mfa.squeeze.weight.zero_()
        mfa.squeeze.weight[:, 3] = 1
    mfa.calibrate(x)
    assert (mfa.global_spread >= SMALLEST_SPREAD).all()
    assert all(value.isfinite().all() for value in mfa.state_dict().values())


# Several modalities ------------------------------------------------------------------------------------------------------


@given(strategies.modalities(), st.sampled_from([{}, {"reduction": 2}, {"dim": 3}]), strategies.SEEDS)
def test_mifa_is_fitted_to_what_is_present(drawn, width, seed):
    torch.manual_seed(seed)
    xs = [varied(torch.randn(20, *one.x.shape[1:], dtype=torch.float64), seed) for one in drawn.each]
    m = len(xs)
    present = None if drawn.present is None else torch.rand(20, m) < 0.7
    assume(present is None or (present.sum(0) >= 2).all())
    mifa = MIFA([one.channels for one in drawn.each], init="identity", dtype=torch.float64, **width, **drawn.options)
    mifa.calibrate(xs, present)
    for y, x in zip(mifa(xs, present), xs, strict=True):
        assert_same_bits(y, x)
    has = torch.ones(20, m, dtype=torch.bool) if present is None else present
    zs = [positions(x, *place) for x, place in zip(xs, zip(mifa.layouts, mifa.num_prefix_tokens, strict=True), strict=True)]
    if mifa.squeezes is not None:
        zs = [functional.lin(z, pair(squeeze)) for z, squeeze in zip(zs, mifa.squeezes, strict=True)]
        assert_fitted({f"squeezes.{i}": z[has[:, i]] for i, z in enumerate(zs)})
    zs, some = functional.mask_absent(zs, has), has.any(1)
    assert_fitted({f"convs.{i}": functional.lin(z[has[:, i]], pair(mifa.mlifa.convs[i])) for i, z in enumerate(zs)})
    pools = functional.dense(functional.pool_modalities(zs, has)[:, some], pair(mifa.mgifa.dense))
    assert_fitted({"dense": pools.permute(1, 2, 0)})
    for info, center in ((mifa.mgifa(zs, has), mifa.global_center), (mifa.mlifa(zs, has), mifa.local_center)):
        assert_same_math(info[some].mean(0), center)


def test_what_is_absent_has_no_say(device):
    present = torch.rand(32, 2, device=device) < 0.6
    xs = [torch.randn(32, 8, 5, device=device), torch.randn(32, 4, 3, device=device)]
    other = [torch.where(has[:, None, None], x, torch.nan) for x, has in zip(xs, present.unbind(1), strict=True)]
    layers = []
    for features in (xs, other):
        torch.manual_seed(0)
        layers.append(MIFA((8, 4), init="identity").to(device))
        layers[-1].calibrate(features, present)
    for one, two in zip(*(layer.state_dict().values() for layer in layers), strict=True):
        assert_same_bits(one, two)


# Refusals ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [MFA(8, init="identity"), MFA(8, init="identity", reduction=2), MIFA(8, init="identity")])
def test_a_layer_that_cannot_be_calibrated_says_so_and_stays(layer):
    def features(n, c=8):
        x = torch.randn(n, c, 4)
        return [x, x] if isinstance(layer, MIFA) else x

    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(ValueError, match="at least 16 samples to calibrate with, got 15"):
        layer.calibrate(features(15))
    with pytest.raises(ValueError, match="c=8, got"):
        layer.calibrate(features(16, c=7))
    for name, value in layer.state_dict().items():
        assert_same_bits(value, before[name])
    assert layer.is_start()
    perturb_(layer)
    assert not layer.is_start()
    with pytest.raises(ValueError, match="expected a layer at its start"):
        layer.calibrate(features(16))


def test_paper_layers_have_no_statistics():
    for layer, args in ((MFA(8), torch.randn(16, 8)), (MIFA(8), [torch.randn(16, 8)] * 2)):
        assert statistics(layer) is None
        assert not layer.is_start()
        with pytest.raises(ValueError, match='calibrate expected init="identity", got "paper"'):
            layer.calibrate(args)


def test_a_modality_without_samples_is_named():
    present = torch.tensor([[True, False]]).expand(20, 2)
    with pytest.raises(ValueError, match=r"at least two samples of each modality, got \[20, 0\]"):
        MIFA(8, init="identity").calibrate([torch.randn(20, 8)] * 2, present)
