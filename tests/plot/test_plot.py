"""The pictures: what each shows, that it leaves everything as it was, and that mistakes are named."""

import subprocess
import sys
from contextlib import nullcontext
from io import BytesIO

import pytest
import timm
import torch
from PIL import Image
from torch import nn

import drifa_attn
from drifa_attn import Uncertainty, plot

matplotlib = pytest.importorskip("matplotlib")


def words(figure):
    """Every text of a figure that is not empty."""
    figure.savefig(BytesIO())
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def gates_of(b=12, c=6, k=3):
    """Gates at which channel j opens for class j and nothing else happens, and flat ones."""
    labels = torch.arange(b) % k
    opened = torch.full((b, c), 0.5)
    opened[torch.arange(b), labels] = 0.9
    return {"flat": torch.full((b, c), 0.5), "open": opened}, labels


def result_of(probs, uncertainty=None):
    """An `Uncertainty` of these probabilities, with these numbers as its total."""
    total = torch.zeros_like(probs[:, 0]) if uncertainty is None else uncertainty
    return Uncertainty(probs=probs, total=total, aleatoric=total.flip(0), epistemic=total, variance=probs)


@pytest.fixture(scope="module")
def wrapped():
    """A wrapped network whose attention has been moved, and images."""
    torch.manual_seed(0)
    model = drifa_attn.wrap(timm.create_model("test_resnet", num_classes=5))
    for parameter in drifa_attn.attention_parameters(model):
        parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    return model, torch.randn(3, 3, 64, 64)


def gates_picture():
    gates, labels = gates_of()
    return plot.gates(gates, labels)


def modalities_picture():
    one = {"refiners.0.a": torch.rand(4, 3), "refiners.0.b": torch.rand(4, 3)}
    return plot.modalities({"all": one, "no b": {"refiners.0.a": torch.rand(4, 3)}})


PICTURES = {
    "gates": gates_picture,
    "spread": lambda: plot.spread(gates_of()[0]),
    "plan": lambda: plot.plan(drifa_attn.plan(timm.create_model("test_resnet"))),
    "modalities": modalities_picture,
    "reliability": lambda: plot.reliability(result_of(torch.rand(9, 4).softmax(1)), torch.arange(9) % 4),
    "risk_coverage": lambda: plot.risk_coverage(result_of(torch.rand(9, 4).softmax(1), torch.rand(9)), torch.arange(9) % 4),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_a_figure_without_pyplot_and_changes_no_rule(name):
    before = dict(matplotlib.rcParams)
    figure = PICTURES[name]()
    assert isinstance(figure, matplotlib.figure.Figure)
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    with Image.open(BytesIO(figure._repr_png_())) as image:
        assert len(image.convert("L").getcolors()) > 20


@pytest.mark.parametrize("name", [*PICTURES, "cam"])
def test_without_matplotlib_it_says_what_to_install(name, monkeypatch, wrapped):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=rf'plot.{name} needs matplotlib: pip install "drifa-attn\[plots\]"'):
        plot.cam(*wrapped) if name == "cam" else PICTURES[name]()


def test_every_picture_is_public():
    assert sorted([*PICTURES, "cam"]) == plot.__all__


def test_the_room_is_loaded_when_it_is_asked_for_and_matplotlib_later():
    code = "import sys, drifa_attn; loaded = lambda: [n in sys.modules for n in ('drifa_attn.plot', 'matplotlib')]\n"
    code += "print(loaded()); drifa_attn.plot.spread; print(loaded(), hasattr(drifa_attn, 'plott'))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "[False, False]\n[True, False] False\n"


# Gates -------------------------------------------------------------------------------------------------------------------


def test_gates_show_what_opens_for_each_class():
    gates, labels = gates_of()
    figure = plot.gates(gates, labels, names=["cat", "dog", "owl"], channels=3, per_class=2)
    left, right = (axes.images[0].get_array() for axes in figure.axes[:2])
    assert left.shape == (6, 3)
    expected = torch.full((3, 3), -0.4 / 3) + 0.4 * torch.eye(3)
    assert torch.allclose(torch.tensor(right.tolist()), expected, atol=1e-6)
    assert torch.allclose(torch.tensor(left.tolist()), expected.repeat_interleave(2, 0), atol=1e-6)
    said = words(figure)
    assert {"cat", "dog", "owl", "channel (3 of 6)", "gate, less the channel's mean"} <= set(said)
    mean = gates["open"].std(0).mean()
    assert f"Gates at open: they deviate by {mean:.3f} over 12 samples" in said


def test_gates_of_the_site_that_is_named_and_without_labels():
    gates, _ = gates_of()
    figure = plot.gates({**gates, "open": gates["open"]}, site="flat", what="gain")
    assert "Gains at flat: they deviate by 0.000 over 12 samples" in words(figure)
    assert len([axes for axes in figure.axes if axes.images]) == 1


def test_spread_is_the_deviation_over_the_batch():
    gates, _ = gates_of()
    figure = plot.spread({**gates, "twice": [gates["open"], gates["flat"]]})
    axes = figure.axes[0]
    expected = [0, gates["open"].std(0).mean().item(), gates["open"].std(0).mean().item(), 0]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(expected)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["flat", "open", "twice, call 1", "twice, call 2"]
    assert axes.get_xlabel().startswith("standard deviation of a gate over 12 samples")


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([1], {}, "plot.gates expected the dict that drifa_attn.gates or drifa_attn.gains returns, got list"),
        ({}, {}, "the dict is empty"),
        ({"a": 3}, {}, "expected a tensor as the gate of 'a', got int"),
        ({"a": torch.rand(3)}, {}, r"expected the gate of 'a' as \(b, c\), got \(3,\)"),
        ({"a": torch.full((2, 2), torch.nan)}, {}, "a gate of 'a' that is not finite"),
        ({"a": torch.rand(1, 2)}, {}, "at least 2 samples, got {'a': 1}"),
        ({"a": torch.rand(2, 2)}, {"site": "b"}, "got site='b', but there are gates of a"),
        ({"a": torch.rand(2, 2, 2)}, {}, "plot.modalities draws attention among positions"),
        ({"a": torch.rand(2, 2)}, {"labels": [0, 1, 1]}, r"labels of shape \(2,\), one class a sample, got \(3,\)"),
        ({"a": torch.rand(2, 2)}, {"labels": [0.5, 1]}, "labels as integers, one class a sample, got torch.float32"),
        ({"a": torch.rand(2, 2)}, {"labels": [-100, 1]}, "labels of at least 0, got -100"),
        ({"a": torch.rand(2, 2)}, {"labels": [0, 1], "names": ["x"]}, "got 1 names and a class 1"),
        ({"a": torch.rand(2, 2)}, {"channels": 0}, "channels to be an integer >= 1, got 0"),
        ({"a": torch.rand(2, 2)}, {"what": "weight"}, 'what to be "gate" or "gain", got \'weight\''),
    ],
)
def test_gates_that_cannot_be_drawn_are_refused(given, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        plot.gates(given, **options)


# Plans -------------------------------------------------------------------------------------------------------------------


def test_a_plan_is_drawn_with_its_numbers():
    plan = drifa_attn.plan(timm.create_model("test_resnet"))
    params, flops = plot.plan(plan).axes
    assert [bar.get_width() for bar in params.patches] == [site.params for site in plan.sites]
    assert [bar.get_width() for bar in flops.patches] == [site.flops for site in plan.sites]
    assert [label.get_text() for label in params.get_yticklabels()] == [site.name for site in plan.sites]
    assert params.get_xlabel() == "parameters added"
    assert flops.get_xlabel() == "FLOPs per sample added"


def test_a_plan_of_a_fusion_is_drawn_by_stages_and_readout():
    networks = {name: timm.create_model("test_resnet") for name in "ab"}
    plan = drifa_attn.fuse(networks, {"task": 3}, fusion="gated").plan
    figure = plot.plan(plan)
    assert [bar.get_width() for bar in figure.axes[0].patches] == [plan.readout_params]
    plan = drifa_attn.fuse(networks, {"task": 3}).plan
    assert [bar.get_width() for bar in plot.plan(plan).axes[0].patches] == [stage.params for stage in plan.stages]


def test_what_is_no_plan_or_costs_nothing_is_refused():
    with pytest.raises(TypeError, match=r"plot.plan expected what drifa_attn.plan returns, or net.plan, got ResNet"):
        plot.plan(timm.create_model("test_resnet"))
    nothing = drifa_attn.fuse({name: timm.create_model("test_resnet") for name in "ab"}, {"task": 3}, fusion="concat").plan
    with pytest.raises(ValueError, match="the fusion 'concat' adds no parameters and no FLOPs"):
        plot.plan(nothing)


# Modalities --------------------------------------------------------------------------------------------------------------


def cells(axes):
    return [text.get_text() for text in axes.texts]


def test_modalities_are_compared_with_the_first_case():
    first = {"refiners.0.a": torch.tensor([[0.2, 0.4]]), "refiners.0.b": torch.tensor([[0.5, 0.5]])}
    left, right = plot.modalities({"all": first, "no b": {"refiners.0.a": torch.tensor([[0.3, 0.2]])}}).axes
    assert cells(left) == ["0.300", "0.250", "0.500", "absent"]
    assert cells(right) == ["0.150", "absent"]
    assert left.get_title(loc="left") == "mean gate"
    assert [label.get_text() for label in left.get_yticklabels()] == ["refiners.0.a", "refiners.0.b"]


@pytest.mark.parametrize("axis", [-1, -2])
def test_attention_matrices_are_told_by_the_positions_that_are_looked_at(axis):
    even, one = torch.full((2, 3, 4, 4), 0.25), torch.zeros(2, 3, 4, 4)
    one.select(axis, 1).fill_(1)
    left, right = plot.modalities({"all": {"refiners.0.a": even}, "no b": {"refiners.0.a": one}}).axes
    assert cells(left) == ["4.000", "1.000"]
    assert cells(right) == ["0.750"]
    assert left.get_title(loc="left") == "positions looked at"


@pytest.mark.parametrize("fusion", ["mifa", "mmtm", "cross_attention", "gated", "mutual_attention"])
def test_gates_of_fused_networks_are_drawn(fusion):
    net = drifa_attn.fuse({name: timm.create_model("test_resnet") for name in "ab"}, {"task": 3}, fusion=fusion)
    inputs = {name: torch.randn(2, 3, 64, 64) for name in "ab"}
    cases = {"all": drifa_attn.gates(net, inputs)}
    cases |= {f"no {name}": drifa_attn.gates(net, {**inputs, name: None}) for name in inputs}
    figure = plot.modalities(cases)
    assert cells(figure.axes[0]).count("absent") >= 2
    assert {"all", "no a", "no b"} <= set(words(figure))


def test_cases_that_do_not_fit_are_refused():
    gates = {"refiners.0.a": torch.rand(4, 3)}
    for cases, message in (
        ([gates], "expected a dict of gates by case, got list"),
        ({"all": gates}, "at least 2 cases"),
        ({"all": gates, "no b": {"refiners.0.a": torch.rand(5, 3)}}, r"has 4 in 'all' and 5 in 'no b'"),
        ({"all": gates, "no b": torch.rand(4, 3)}, "expected the dict that drifa_attn.gates"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            plot.modalities(cases)


# Answers -----------------------------------------------------------------------------------------------------------------


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


# Grad-CAM ----------------------------------------------------------------------------------------------------------------


def by_hand(model, x, target, site):
    """Grad-CAM of a class, by its equation, at the output of a module."""
    kept = []
    handle = model.get_submodule(site).register_forward_hook(lambda *args: kept.append(args[2]))
    logits = model(x.clone().requires_grad_())
    handle.remove()
    (slope,) = torch.autograd.grad(logits[torch.arange(len(x)), target].sum(), kept[0])
    found = (slope.mean((2, 3), keepdim=True) * kept[0]).sum(1).relu().detach()
    return logits.softmax(1).detach(), found


def test_cam_is_that_of_its_equation_with_attention_off_and_on(wrapped):
    pytest.importorskip("pytorch_grad_cam")
    from drifa_attn.plot.evidence import evidence

    model, x = wrapped
    model.eval()
    classes = torch.tensor([1, 4, 0])
    found = evidence("plot.cam", model, x, "layer2", classes)
    assert found.classes.equal(classes)
    pooled = nn.functional.adaptive_avg_pool2d
    for told, context in ((found.on, nullcontext()), (found.off, drifa_attn.disabled(model))):
        with context:
            probs, maps = by_hand(model, x, classes, "layer2")
        assert torch.allclose(told[0], probs[torch.arange(3), classes], atol=1e-5)
        least = maps.amin((1, 2), keepdim=True)
        expected = (maps - least) / (maps.amax((1, 2), keepdim=True) - least).clamp(min=1e-7)
        assert (pooled(told[1], expected.shape[1:]) - expected).abs().mean() < 0.1  # theirs is of the size of the image
    assert (found.on[1] - found.off[1]).abs().mean() > 0.01


def test_cam_leaves_the_network_as_it_was(wrapped):
    pytest.importorskip("pytorch_grad_cam")
    model, x = wrapped
    model.train()
    model.bn1.eval()
    model(x).sum().backward()
    model.conv1[0].weight.requires_grad_(False)
    before = {
        name: (p.clone(), p.requires_grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()
    }
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    plot.cam(model, x)
    with pytest.raises(ValueError, match="from 0 to 4"):
        plot.cam(model, x, [9, 9, 9])
    assert modes == [module.training for module in model.modules()]
    assert all(tensor.equal(state[name]) for name, tensor in model.state_dict().items())
    for name, parameter in model.named_parameters():
        value, wants, gradient = before[name]
        assert (parameter.requires_grad, parameter.grad is None) == (wants, gradient is None)
        assert gradient is None or parameter.grad.equal(gradient)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model.conv1[0].weight.requires_grad_(True)
    model.zero_grad()


@pytest.mark.parametrize(("name", "size"), [("test_vit", 160), ("test_convnext", 64), ("test_resnet", 64)])
def test_cam_reads_maps_and_tokens(name, size):
    pytest.importorskip("pytorch_grad_cam")
    model, x = drifa_attn.wrap(timm.create_model(name, num_classes=5)), torch.randn(2, 3, size, size)
    figure = plot.cam(model, x, names=list("abcde"))
    assert "Grad-CAM with attention off and on: they differ by 0.000 on average" in words(figure)  # before training
    assert sum(bool(axes.images) for axes in figure.axes) == 2 * 4
    assert sum(text in {"class a", "class b", "class c", "class d", "class e"} for text in words(figure)) == 2


def test_cam_takes_the_last_site_with_enough_positions_for_these_images(wrapped, monkeypatch):
    pytest.importorskip("pytorch_grad_cam")
    from drifa_attn.plot import evidence

    model, _ = wrapped
    taken, real = [], evidence.gradcam
    monkeypatch.setattr(evidence, "gradcam", lambda *args: (taken.append(args[3][0].name), real(*args))[1])
    for size in (32, 64, 160):
        plot.cam(model, torch.randn(1, 3, size, size))
    assert taken == ["layer2", "layer2", "layer3", "layer3", "layer4", "layer4"]


def test_cam_with_an_activation_that_works_in_place():
    pytest.importorskip("pytorch_grad_cam")
    from drifa_attn.plot.evidence import evidence

    torch.manual_seed(0)
    found = []
    for inplace in (False, True):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(inplace), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
        drifa_attn.wrap(net, at=["0"], example_input=torch.zeros(2, 3, 8, 8))
        found.append(evidence("plot.cam", net, torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8).sin()))
    assert found[0].on[1].equal(found[1].on[1])
    assert found[0].on[1].max() > 0


def test_what_cam_cannot_read_is_refused(wrapped):
    pytest.importorskip("pytorch_grad_cam")
    model, x = wrapped
    plain = timm.create_model("test_resnet")
    for arguments, options, message in (
        (("resnet50", x), {}, "plot.cam expected an nn.Module, got str"),
        ((plain, x), {}, r"plot.cam found no site in ResNet: drifa_attn.wrap\(model\) makes them"),
        ((model, x[0]), {}, r"a batch of images \(b, c, h, w\)"),
        ((model, x.long()), {}, "got torch.int64"),
        ((model, x), {"site": "zz"}, "got site='zz', where no attention is; there is some at act1, layer1"),
        ((model, x), {"classes": [0, 1]}, "from 0 to 4 for each of 3 images, got \\[0, 1\\]"),
        ((model, x), {"images": torch.rand(3, 9, 9)}, r"expected images of shape \(3, 64, 64\)"),
        ((model, x), {"images": 255 * torch.ones(3, 64, 64)}, "from 255 to 255"),
        ((model, x), {"names": ["a"], "classes": [1, 1, 1]}, "got 1 names and a class 1"),
        ((model, x[:, :, :2, :2]), {"site": "layer4"}, "one position is no map"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            plot.cam(*arguments, **options)


def test_cam_needs_grad_cam_and_says_so(wrapped, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    with pytest.raises(ImportError, match=r'plot.cam needs grad-cam: pip install "drifa-attn\[plots\]"'):
        plot.cam(*wrapped)
