"""Reliability, risk and coverage: numbers that scikit-learn, SciPy and a count by hand agree with."""

import pytest
import torch

from drifa_attn import Uncertainty, plot

pytest.importorskip("matplotlib")

from tests._plot import result_of, words  # noqa: E402 - they need matplotlib


def line(axes, start):
    """The x and y of the line whose label starts so."""
    (found,) = [one for one in axes.lines if str(one.get_label()).startswith(start)]
    return found.get_xdata(), found.get_ydata()


def test_reliability_is_that_of_scikit_learn():
    calibration = pytest.importorskip("sklearn.calibration")
    probs, labels = (2 * torch.randn(300, 4)).softmax(1), torch.randint(4, (300,))
    figure = plot.reliability(result_of(probs), labels, bins=7)
    confidence, answer = probs.max(1)
    right, claimed = calibration.calibration_curve((answer == labels).numpy(), confidence.numpy(), n_bins=7)
    (bars,) = figure.axes[0].containers
    assert bars[0].get_xdata() == pytest.approx(claimed, abs=1e-6)
    assert bars[0].get_ydata() == pytest.approx(right, abs=1e-6)
    counts = figure.axes[1].lines[0].get_ydata()
    assert counts.sum() == 300
    error = (counts * abs(right - claimed)).sum() / 300
    assert f"ECE {error:.3f}" in words(figure)


def test_intervals_are_those_of_wilson():
    stats = pytest.importorskip("scipy.stats")
    from drifa_attn.plot.reliability import interval

    low, high = interval(torch.tensor([0.0, 0.3, 1.0]), torch.tensor([5, 10, 40]))
    for k, (right, n) in enumerate([(0, 5), (3, 10), (40, 40)]):
        expected = stats.binomtest(right, n).proportion_ci(method="wilson")
        assert (low[k].item(), high[k].item()) == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_risk_rises_with_coverage_as_counted_by_hand():
    probs = torch.eye(2)[[0, 0, 0, 0]]
    labels, uncertainty = torch.tensor([0, 1, 0, 1]), torch.tensor([0.1, 0.9, 0.2, 0.8])
    axes = plot.risk_coverage(result_of(probs, uncertainty), labels).axes[0]
    x, y = line(axes, "total: AURC")
    assert list(x) == [0.25, 0.5, 0.75, 1]
    assert list(y) == pytest.approx([0, 0, 1 / 3, 1 / 2])
    assert list(line(axes, "best order")[1]) == pytest.approx([0, 0, 1 / 3, 1 / 2])
    assert axes.lines[1].get_ydata() == [0.5, 0.5]
    assert f"total: AURC {(1 / 3 + 1 / 2) / 4:.3f}" in [text.get_text() for text in axes.get_legend().get_texts()]
    x, y = line(plot.risk_coverage(result_of(probs, uncertainty), labels, by="aleatoric").axes[0], "aleatoric")
    assert list(y) == pytest.approx([1, 1, 2 / 3, 1 / 2])


def test_samples_of_equal_uncertainty_are_taken_together():
    for labels in ([0, 1, 1], [1, 1, 0], [1, 0, 1]):
        result = result_of(torch.eye(2)[[0, 0, 0]], torch.tensor([0.5, 0.5, 0.5]))
        x, y = line(plot.risk_coverage(result, labels).axes[0], "total")
        assert (list(x), list(y)) == ([1], pytest.approx([2 / 3]))


def test_several_results_are_several_curves():
    probs, labels = torch.rand(20, 3).softmax(1), torch.arange(20) % 3
    results = {"one": result_of(probs, torch.rand(20)), "many": result_of(probs.flip(1), torch.rand(20))}
    assert {"one: AURC", "many: AURC"} <= {text[:-6] for text in words(plot.risk_coverage(results, labels))}
    both = plot.risk_coverage(results, labels, by=["total", "epistemic"])
    assert sum("AURC" in text for text in words(both)) == 4
    assert sum("ECE" in text for text in words(plot.reliability(results, labels))) == 2


def test_unknown_labels_pixels_and_several_labels_at_once_count_right():
    probs = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    figure = plot.reliability(result_of(probs), [0, -100, 0])
    assert figure.axes[1].lines[0].get_ydata().sum() == 2
    maps = torch.rand(2, 3, 4, 4).softmax(1)
    result = Uncertainty(probs=maps, total=maps[:, 0], aleatoric=maps[:, 0], epistemic=maps[:, 0], variance=maps)
    assert plot.reliability(result, torch.randint(3, (2, 4, 4))).axes[1].lines[0].get_ydata().sum() == 32
    several = Uncertainty(probs=probs, total=probs, aleatoric=probs, epistemic=probs, variance=probs)
    figure = plot.reliability(several, torch.tensor([[1, 0], [1, torch.nan], [1, 1.0]]), bins=1)
    (bars,) = figure.axes[0].containers
    assert bars[0].get_xdata() == pytest.approx([(0.9 + 0.9 + 0.6 + 0.8 + 0.8) / 5])
    assert bars[0].get_ydata() == pytest.approx([4 / 5])


@pytest.mark.parametrize(
    ("results", "labels", "message"),
    [
        (
            torch.rand(3, 2),
            [0, 1, 1],
            "expected an Uncertainty of mc_dropout or ensemble, or a dict of them by name, got Tensor",
        ),
        ({"a": None}, [0, 1, 1], "expected an Uncertainty of mc_dropout or ensemble for 'a'"),
        ({}, [0, 1, 1], "expected 1 to 7 results, got 0"),
        (result_of(torch.rand(3, 2)), [0, 1], r"labels of shape \(3,\), as the result's total, got \(2,\)"),
        (result_of(torch.rand(3, 2)), [0, 1, 2], "labels from 0 to 1, got 2"),
        (result_of(torch.rand(3, 2)), [-100] * 3, "no sample with a known label"),
    ],
)
def test_results_and_labels_that_do_not_fit_are_refused(results, labels, message):
    for draw in (plot.reliability, plot.risk_coverage):
        with pytest.raises((TypeError, ValueError), match=message):
            draw(results, labels)


def test_measures_and_bins_out_of_their_range_are_refused():
    result = result_of(torch.rand(3, 2))
    with pytest.raises(ValueError, match="expected by as one of .*, got 'zzz'"):
        plot.risk_coverage(result, [0, 1, 1], by="zzz")
    with pytest.raises(ValueError, match="bins to be an integer >= 1, got 0"):
        plot.reliability(result, [0, 1, 1], bins=0)
    with pytest.raises(ValueError, match="at most 7 curves, got 8"):
        plot.risk_coverage(dict.fromkeys("abcd", result), [0, 1, 1], by=["total", "epistemic"])
