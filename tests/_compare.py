"""The tolerances of the tests; each is shown to be able to fail before it is used."""

import numpy as np
import torch

# Largest error over largest value, by the dtype the tested tensor has. bfloat16 maps are computed in bfloat16.
SAME_MATH = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 2e-2}

# Golden values are float32 sums themselves. The floor is for gradients that are small differences of larger terms.
GOLDEN, GOLDEN_FLOOR = 1e-5, 5e-7
# A bias before a training batch norm, which subtracts the mean again: its gradient is a sum of terms a thousand times larger
# that nearly cancel. The golden values err by 2.8e-5 and 1.6e-5 (our float64 run shows it), and our float32 run adds its own
# error, which depends on the processor.
GOLDEN_EXCEPTIONS = {("rra_8to8_9x9_s1_bntrain_b3", "g.conv1.bias"): 1e-4, ("rra_8to8_9x9_s1_bntrain_b3", "g.conv2.bias"): 1e-4}


def exact(t):
    """Any array or tensor as a float64 tensor on the CPU."""
    return torch.from_numpy(np.asarray(t)).double() if not isinstance(t, torch.Tensor) else t.detach().cpu().double()


def max_abs(t):
    return t.abs().max().item() if t.numel() else 0.0


def assert_close_rel(actual, expected, rel, floor=0.0, name="value"):
    """Assert `max |actual − expected| <= rel · max |expected| + floor`, a bound that zeros and 5 % too much would break."""
    assert tuple(actual.shape) == tuple(expected.shape), f"{name}: {tuple(actual.shape)} is not {tuple(expected.shape)}"
    actual, expected = exact(actual), exact(expected)
    assert expected.isfinite().all(), f"{name}: the expected value is not finite"
    bound = rel * max_abs(expected) + floor
    for wrong in (torch.zeros_like(expected), 1.05 * expected):
        assert max_abs(expected) == 0 or max_abs(wrong - expected) > bound, f"{name}: bound {bound:.1e} lets anything pass"
    error = max_abs(actual - expected)
    assert error <= bound, f"{name}: error {error:.2e} > {bound:.2e} (max {max_abs(expected):.2e})"


def assert_same_math(actual, expected, rel=None, name="value"):
    """Assert that two spellings of one equation differ by rounding alone, in the dtype of `actual`."""
    assert_close_rel(actual, expected, SAME_MATH[actual.dtype] if rel is None else rel, name=name)


def assert_golden(actual, expected, file, name):
    """Assert that `actual` is what the released layer gave."""
    assert_close_rel(actual, expected, GOLDEN_EXCEPTIONS.get((file, name), GOLDEN), GOLDEN_FLOOR, f"{file} {name}")


def assert_same_bits(actual, expected):
    """Assert equality bit for bit, signs of zeros too, NaN equal to NaN.

    Only for equal instructions on equal operands: two products may differ.
    """
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.nan_to_num(nan=7.25), expected.nan_to_num(nan=7.25))
    assert torch.equal(actual.isnan(), expected.isnan())
    if actual.is_floating_point():
        assert torch.equal(actual.signbit() & ~actual.isnan(), expected.signbit() & ~expected.isnan())


def assert_no_worse(actual, reference, expected, factor):
    """Assert that the error against float64 is at most `factor` times that of the reference equations in the same dtype."""
    actual, reference, expected = exact(actual), exact(reference), exact(expected)
    bound = factor * max_abs(reference - expected) + 1e-6 * max_abs(expected)
    for wrong in (torch.zeros_like(expected), 1.05 * expected):
        assert max_abs(wrong - expected) > bound, f"bound {bound:.1e} lets anything pass"
    error = max_abs(actual - expected)
    assert error <= bound, f"error {error:.2e} > {bound:.2e} ({factor} times that of the reference equations)"
