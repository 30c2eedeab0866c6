"""What finished runs say of their uncertainty, and the pictures of what they look at."""

import json

import matplotlib.image
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

import drifa_attn
from examples.drifa_net import evaluate, figures, train
from examples.drifa_net.data import load
from examples.drifa_net.networks import attentions, backbone, restored
from examples.drifa_net.reading import reloaded

SIZE = ("--size", "8")


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """Two members of a fusion that have learnt the digits a little, and two other runs."""
    folder = tmp_path_factory.mktemp("runs")
    options = [*SIZE, "--batch-size", "64", "--backbones", "test_resnet", "--lr", "0.005", "--output", str(folder)]
    train.main([*options, "--model", "fuse", "--epochs", "3", "--seeds", "0", "1"])
    train.main([*options, "--model", "concat", "--epochs", "1"])
    AcceleratorState._reset_state(reset_partial_state=True)
    return [folder / name for name in ("fuse-seed0", "fuse-seed1", "concat-seed0")]


def test_ensemble_and_dropout_are_measured_and_drawn(members, tmp_path, capsys):
    result = evaluate.main([*map(str, members[:2]), "--samples", "3", "--output", str(tmp_path)])
    assert "2 members; the paper's ensemble has 5." in capsys.readouterr().out
    assert json.loads((tmp_path / "uncertainty.json").read_text()) == result
    assert (result["members"], result["seeds"], result["samples"]) == (2, [0, 1], 3)
    singles = [json.loads((folder / "run.json").read_text())["test"] for folder in members[:2]]
    for task, ways in result["tasks"].items():
        assert [len(several) for several in ways.values()] == [2, 2, 1, 1]
        for found, single in zip(ways[evaluate.SINGLE], singles, strict=True):
            assert {name: found[name] for name in single[task]} == pytest.approx(single[task], abs=1e-5)
        for found in sum(ways.values(), []):
            assert (found["samples"], found["kept"]) == (360, 324)
            assert found["accuracy"] == pytest.approx(found["accuracy_all"])
        # Jensen: the mean of predictions loses less than they do on average.
        for worth, alone in ((ways[evaluate.ENSEMBLE], ways[evaluate.SINGLE]), (ways[evaluate.BOTH], ways[evaluate.DROPOUT])):
            for name in ("nll", "brier"):
                slack = 0.02 if alone is ways[evaluate.DROPOUT] else 0  # other masks
                assert worth[0][name] <= np.mean([one[name] for one in alone]) + slack
    assert_a_picture(tmp_path / "uncertainty.png")


def test_ensemble_is_the_mean_of_the_members(members):
    records, data = zip(*(reloaded(folder, [], None) for folder in members[:2]), strict=True)
    data = data[0]
    nets = [restored(folder, record, data) for folder, record in zip(members, records, strict=False)]
    found = evaluate.predictions(nets, data, 100, 2)
    for task in data.tasks:
        mean = torch.stack([one[task][0] for one in found[evaluate.SINGLE]]).mean(0)
        assert torch.allclose(found[evaluate.ENSEMBLE][0][task][0], mean, atol=1e-6)
        assert not torch.allclose(found[evaluate.DROPOUT][0][task][0], found[evaluate.SINGLE][0][task][0], atol=1e-3)


def assert_a_picture(path):
    """A file that shows something."""
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) > 200
    assert pixels[..., :3].std() > 0.05


@pytest.mark.parametrize(
    ("chosen", "options", "message"),
    [
        ([0], (), "at least two members of different seeds, got seeds [0]"),
        ([0, 0], (), "at least two members of different seeds, got seeds [0, 0]"),
        ([0, 2], (), "at least two members of different seeds, got seeds [0, 0]"),
        ([1, 2], (), "the members differ in model: 'fuse' and 'concat'"),
        ([0, 1], ("--data", "."), "was trained on other data, ['digits'], not ['']: give those by --data"),
        ([0, None], (), "holds no run.json"),
    ],
)
def test_wrong_members_are_refused(chosen, options, message, members, tmp_path, capsys):
    folders = [str(tmp_path if k is None else members[k]) for k in chosen]
    with pytest.raises(SystemExit, match="2"):
        evaluate.main([*folders, *options, "--output", str(tmp_path / "out")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("k", [0, 2], ids=["fuse", "concat"])
def test_figures_are_drawn(k, members, tmp_path):
    paths = figures.main([str(members[k]), "--output", str(tmp_path)])
    assert [path.name for path in paths] == ["gradcam.png", "features.png", "gates.png"][: 3 if k == 0 else 2]
    for path in paths:
        assert_a_picture(path)


def test_gates_of_every_site_are_read(members):
    record, data = reloaded(members[0], [], None)
    net = restored(members[0], record, data)
    found = figures.gates(net, data)
    assert len(found) == 2 * len(attentions(net)) == 2 * len(net.refiners)
    for a, gain in found.values():
        assert a.shape == gain.shape
        assert len(a) == 360
        assert ((a > 0) & (a < 1)).all()
    assert any((gain - 1).abs().max() > 1e-3 for _, gain in found.values())


@pytest.mark.parametrize("model", ["test_resnet", "test_vit", "swin_tiny_patch4_window7_224"])
def test_grad_cam_reads_every_layout(model):
    """Evidence that lies in one corner of the image is found there, whatever the order of axes."""
    torch.manual_seed(0)
    size = 64
    branch = backbone(model, (3, size, size), pretrained=False)
    examples = {"left": torch.zeros(2, 3, size, size)}
    net = drifa_attn.fuse({"left": branch}, {"task": 2}, fusion="concat", example_inputs=examples).eval()
    layer, transform = figures.stage_of(net, "left", torch.zeros(1, 3, size, size))
    outputs = []
    layer.register_forward_hook(lambda _, __, output: outputs.append(output))
    image = torch.zeros(2, 3, size, size)
    image[1, :, : size // 4, : size // 4] = 3
    net({"left": image})
    maps = transform(outputs[0])
    change = (maps[1] - maps[0]).abs().mean(0)
    assert change.ndim == 2
    rows, columns = change.shape
    assert rows == columns >= 4
    assert divmod(int(change.argmax()), columns) < (rows // 2, columns // 2)


def test_nearest_neighbours_vote_by_hand():
    x = np.array([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2], [0.15]])
    y = np.array([0, 0, 0, 1, 1, 1, 1])
    assert figures.vote(x, y, 2) == pytest.approx(100 * (1 + 3 / 4) / 2)


class Says(torch.nn.Module):
    """A network that says of every image the class of its sample, but never a 3 and of every 4 a 5."""

    def forward(self, inputs, present=None):
        codes = ((inputs["left"].mean((1, 2, 3)) + 1) * 127.5).round().long()
        return {"digit": torch.nn.functional.one_hot(torch.where((codes == 3) | (codes == 4), 5, codes), 10).float()}


def test_classes_without_an_image_are_named(monkeypatch):
    """Those that are never told right, and those for which there is no room."""
    data = load(size=8)
    labels = torch.arange(10).repeat(3)
    inputs = {name: (labels / 127.5 - 1)[:, None, None, None].expand(-1, 3, 8, 4) for name in data.branches}
    monkeypatch.setattr(figures, "batches", lambda data: [(inputs, None, {"digit": labels})])
    found = figures.chosen(Says(), data, "left")
    assert found.classes.tolist() == [0, 1, 2, 5]
    assert (found.never, found.more) == ([3, 4], [6, 7, 8, 9])
    said = figures.heading("left", found, data, "digit").splitlines()
    assert said == ["left: evidence for digit (black: none)", "never told right: 3, 4", "told right too: 6, 7, 8, 9"]


def test_images_of_all_branches_stand_in_rows(members, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, path, **_: drawn.append(self))
    record, data = reloaded(members[0], [], None)
    figures.draw_gradcam(restored(members[0], record, data), data, tmp_path / "x.png")
    (figure,) = drawn
    figure.canvas.draw()
    places = [axes.get_position() for axes in figure.axes]
    assert len({round(place.y0, 3) for place in places}) == 3
    assert len({round(place.width, 3) for place in places}) == 1
    (left, right) = (text for axes in figure.axes for text in axes.texts)
    assert left.get_window_extent().y0 == pytest.approx(right.get_window_extent().y0)


def test_a_heat_map_has_positions_enough_in_small_images():
    shape = (1, 3, 32, 32)
    branch = backbone("resnet10t", shape[1:], pretrained=False)
    examples = {"left": torch.zeros(2, *shape[1:])}
    net = drifa_attn.fuse({"left": branch}, {"task": 2}, fusion="concat", example_inputs=examples).eval()
    layer, _ = figures.stage_of(net, "left", torch.zeros(shape))
    sizes = []
    layer.register_forward_hook(lambda _, __, output: sizes.append(output.shape[-2:]))
    net({"left": torch.zeros(shape)})
    assert sizes[0] >= (7, 7)
