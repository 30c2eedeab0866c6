"""The pictures of what runs look at: Figures 4 and 5, of one run and of several methods on the same images."""

import json
import math

import matplotlib.image
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from matplotlib.figure import Figure

import drifa_attn
from examples.drifa_net import embedding, evidence, figures, methods, panels, strips, train
from examples.drifa_net.data import load
from examples.drifa_net.networks import attentions, backbone
from tests._commands import refused, tree

SMALL = ("--size", "16", "--batch-size", "256", "--lr", "0.005", "--epochs", "1")
RESNET = ("--backbones", "test_resnet")
RUNS = {
    "mifa": ("fuse", *RESNET),
    "mttu": ("fuse", *RESNET, "--fusion", "mttu"),
    "concat": ("concat", *RESNET),
    "drifa_net": ("drifa_net", "--width", "2"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of each run of the digits, by name."""
    root, found = tmp_path_factory.mktemp("runs"), {}
    for name, (model, *options) in RUNS.items():
        train.main([*SMALL, "--model", model, *options, "--output", str(root / name)])
        AcceleratorState._reset_state(reset_partial_state=True)
        found[name] = root / name / f"{model}-seed0"
    return found


def changed(folder, run, change):
    """A run that differs from another by what `change` does to its record; its folder."""
    folder.mkdir()
    record = json.loads((run / "run.json").read_text())
    change(record)
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def assert_a_picture(path):
    """A file that shows something."""
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) > 200
    assert pixels[..., :3].std() > 0.05


def test_figures_of_one_run_are_drawn(runs, tmp_path):
    paths = figures.main([str(runs["mifa"]), "--output", str(tmp_path)])
    assert [path.name for path in paths] == ["gradcam.png", "features.png", "gates.png"]
    for path in paths:
        assert_a_picture(path)


def test_a_run_without_gates_has_no_picture_of_them(runs, tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(figures, "draw_gradcam", lambda found, *_: asked.append(found))
    monkeypatch.setattr(figures, "draw_features", lambda found, *_: asked.append(found))
    paths = figures.main([str(runs["concat"]), "--output", str(tmp_path)])
    assert [path.name for path in paths] == ["gradcam.png", "features.png"]
    assert [[method.title for method in found] for found in asked] == [["concat"]] * 2
    assert "No gates.png: this network has none." in capsys.readouterr().out


def test_figures_of_several_methods_have_a_column_each(runs, tmp_path, capsys, monkeypatch):
    drawn = {}
    real = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **o: (drawn.update({path.name: self}), real(self, path, **o)))
    given = [str(runs[name]) for name in ("mifa", "mttu", "drifa_net", "concat")]
    paths = figures.main([*given, "--output", str(tmp_path), "--embedded", "2"])
    assert [path.name for path in paths] == ["gradcam.png", "features.png"]
    titles = [axes.get_title() for axes in drawn["gradcam.png"].axes if axes.get_title()]
    assert titles == ["image", "DRIFA", "MTTU", "DRIFA-Net", "concat"] * 2
    assert len(drawn["gradcam.png"].axes) == 2 * 10 * 5  # two halves, ten digits, the image and four methods
    assert [axes.get_title().splitlines()[0] for axes in drawn["features.png"].axes] == ["DRIFA", "MTTU"] * 2
    said = capsys.readouterr().out
    assert "features.png is without DRIFA-Net, concat: give --embedded 4." in said
    assert "left, act1, 8x4 positions; stage 0, 4x2 positions: correlation" in " ".join(said.split())
    above = drawn["gradcam.png"].texts[1].get_text()
    assert above.startswith(
        "right: evidence for digit in act1, 8x4 positions; stage 0, 4x2 positions (dark: none, light: most)"
    )
    for path in paths:
        assert_a_picture(path)


def seeded(record):
    record["configuration"]["seed"] = 1


def resized(record):
    record["configuration"]["size"] = 8


def split_anew(record):
    record["data"]["branches"]["left"]["images"]["test"]["3"] += 1


def again(record):
    record["configuration"]["fusion"] = "mifa"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (seeded, "other has seed 1, "),
        (resized, "other has size 8, "),
        (split_anew, "other saw another split or size of the data than "),
        (again, "2 of the runs are of DRIFA: give one run for each method."),
    ],
)
def test_runs_that_do_not_go_together_are_refused_before_any_work(change, message, runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(methods, "reloaded", lambda *_: pytest.fail("data was read"))
    other = changed(tmp_path / "other", runs["mttu"], change)
    before = tree(tmp_path)
    assert message in refused(capsys, figures.main, [runs["mifa"], other, "--output", tmp_path])
    assert tree(tmp_path) == before


def test_methods_have_the_weights_and_the_scales_of_their_own_runs(runs):
    found = methods.methods_of([runs["mifa"], runs["drifa_net"]], [], None)
    assert [method.title for method in found] == ["DRIFA", "DRIFA-Net"]
    assert found[0].data.scales
    assert not found[1].data.scales
    taken = [method.taken([3, 5])[0]["left"] for method in found]
    looks = [panels.pixels_of(x, method.data, "left") for x, method in zip(taken, found, strict=True)]
    assert np.allclose(*looks, atol=1e-5)
    for method, name in zip(found, ("mifa", "drifa_net"), strict=True):
        answers, _ = evidence.told_by(method)
        record = json.loads((runs[name] / "run.json").read_text())
        right = answers["digit"] == method.data.test.targets[:, 0].numpy()
        assert right.mean() == pytest.approx(record["test"]["digit"]["accuracy"])


def test_gates_off_are_without_attention(runs):
    off, on = methods.methods_of([runs["mifa"]], [], None)
    assert (off.title, on.title) == ("gates off", "gates on")
    for part in attentions(on.net).values():
        torch.nn.init.normal_(part.alphas[0] if hasattr(part, "alphas") else part.alpha, 3.0)
    found = [embedding.features(method)["digit"][0] for method in (off, on)]
    assert not torch.allclose(*found, atol=1e-3)
    assert on.net.refiners[0].enabled


def test_gates_of_every_site_are_read(runs):
    method = methods.methods_of([runs["mifa"]], [], None)[-1]
    found = strips.gates(method)
    assert len(found) == 2 * len(attentions(method.net)) == 2 * len(method.net.refiners)
    for a, gain in found.values():
        assert a.shape == gain.shape
        assert len(a) == 360
        assert ((a > 0) & (a < 1)).all()
    assert any((gain - 1).abs().max() > 1e-3 for _, gain in found.values())


@pytest.mark.parametrize("name", ["mifa", "mttu", "drifa_net"])
def test_features_are_what_the_heads_read(name, runs):
    method = methods.methods_of([runs[name]], [], None)[-1]
    found = embedding.features(method)
    assert list(found) == ["digit", "parity"]
    for task, (x, y) in found.items():
        with torch.no_grad():
            logits = embedding.head_of(method.net, method.data, task)(x)
        answers, _ = evidence.told_by(method)
        assert logits.argmax(1).tolist() == answers[task].tolist()
        assert y.tolist() == method.data.test.targets[:, list(found).index(task)].tolist()


# The maps ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["test_resnet", "test_vit", "swin_tiny_patch4_window7_224"])
def test_grad_cam_reads_every_layout(model):
    """Evidence that lies in one corner of the image is found there, whatever the order of axes."""
    torch.manual_seed(0)
    size = 64
    branch = backbone(model, (3, size, size), pretrained=False)
    examples = {"left": torch.zeros(2, 3, size, size)}
    net = drifa_attn.fuse({"left": branch}, {"task": 2}, fusion="concat", example_inputs=examples).eval()
    _, layer, transform = evidence.stage_of(net, "left", torch.zeros(1, 3, size, size))
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


@pytest.mark.parametrize("fusion", ["mifa", "gloria", "mutual_attention", "caf", "mttu"])
def test_every_method_is_looked_at_in_one_stage_with_positions_enough(fusion):
    """At 32 px the last stage has a single position; that of the maps has 8x8, and is the same for all methods."""
    shape = (1, 3, 32, 32)
    branches = {name: backbone("test_resnet", shape[1:], pretrained=False) for name in ("left", "right")}
    examples = {name: torch.zeros(2, *shape[1:]) for name in branches}
    net = drifa_attn.fuse(branches, {"task": 2}, fusion=fusion, example_inputs=examples).eval()
    name, layer, _ = evidence.stage_of(net, "left", torch.zeros(shape))
    sizes = []
    layer.register_forward_hook(lambda _, __, output: sizes.append(output.shape[-2:]))
    net(dict.fromkeys(branches, torch.zeros(shape)))
    assert (name, sizes[0]) == ("layer1", (8, 8))


def test_of_every_class_the_image_that_most_methods_tell_right():
    data = load(size=8)
    labels = np.arange(len(data.test)) % 10
    labels[labels == 7] = 6
    data.test.targets[:, 0] = torch.from_numpy(labels)
    first, second = labels.copy(), np.full(len(labels), 9)
    first[:10] = 5  # which tells the first ten wrong but one
    first[labels == 3] = 8  # and a 3 never
    there = np.ones((len(labels), 2), bool)
    there[5, 0] = False
    found = evidence.chosen(data, "left", [{"digit": first}, {"digit": second}], there)
    assert found.classes == [0, 1, 2, 3, 4, 5, 6, 8, 9]  # the 3 that is never told right has its place
    assert found.places == [10, 11, 12, 3, 14, 15, 16, 18, 19]  # 5 has no left half
    assert found.none == [7]
    assert found.right.tolist() == [[True] * 3 + [False] + [True] * 5, [False] * 8 + [True]]
    assert found.told[0].tolist() == [0, 1, 2, 8, 4, 5, 6, 8, 9]
    with pytest.raises(ValueError, match="no test sample with a label of digit has right"):
        evidence.chosen(data, "right", [{"digit": first}], np.zeros_like(there))


def test_classes_without_room_are_named(monkeypatch):
    data = load(size=8)
    monkeypatch.setattr(evidence, "CLASSES", 8)
    labels = data.test.targets[:, 0].numpy().copy()
    data.test.targets[labels == 9, 0] = 0
    one = evidence.chosen(data, "left", [{"digit": labels}], np.ones((len(labels), 2), bool))
    found = evidence.Evidence(one, np.random.default_rng(0).random((1, 8, 4, 2)), ["layer1, 8x4 positions"])
    said = panels.heading("left", found, data)
    assert said[0] == "left: evidence for digit in layer1, 8x4 positions (dark: none, light: most)"
    assert said[1].endswith("0 of 8 are flat")
    assert said[2:] == ["no room for 8", "no test image of 9"]


def test_maps_that_are_alike_or_flat_are_counted():
    draw = np.random.default_rng(0)
    first, flat = draw.random((2, 6, 6)), np.zeros((6, 6))
    one = evidence.Chosen([0, 1], [0, 1], np.zeros((3, 2), int), [], [])
    found = evidence.Evidence(one, np.stack([first, 1 - first, np.stack([first[0], flat])]), ["a"] * 3)
    assert found.alike(0, 1) == pytest.approx(-1)
    assert found.alike(0, 2) == pytest.approx(1)  # of the pair that is not flat
    assert found.unmoved(0) == pytest.approx(np.corrcoef(first[0].ravel(), first[1].ravel())[0, 1])
    assert math.isnan(found.unmoved(2))
    assert [found.flat(a) for a in range(3)] == [0, 0, 1]


def test_titles_and_rows_of_all_branches_are_aligned(runs, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: drawn.append(self))
    found = methods.methods_of([runs["mifa"], runs["mttu"]], [], None)
    panels.draw_gradcam(found, evidence.evidence(found), tmp_path / "x.png")
    places = np.array([[axes.get_position().bounds for axes in drawn[0].axes[k : k + 3]] for k in range(0, 60, 3)])
    assert len(drawn[0].axes) == 60
    assert (np.ptp(places[:, :, 0], 0) < 1e-9).all()  # columns
    assert (np.ptp(places[:, :, 1], 1) < 1e-9).all()  # rows
    assert (np.ptp(places[:, :, 2:], (0, 1)) < 1e-9).all()  # sizes
    assert (np.diff(places[:, 0, 1]) < -places[0, 0, 3]).all()  # nothing over another


def test_what_is_told_wrong_has_a_red_frame_and_what_is_flat_is_named():
    one = evidence.Chosen([0], [1], np.array([[1], [0]]), [], [])
    found = evidence.Evidence(one, np.stack([np.eye(4)[None], np.zeros((1, 4, 4))]), ["a", "a"])
    axes = Figure().subplots(1, 3)
    panels.draw_row(axes, np.zeros((4, 4, 3)), found, 0, ["cat", "dog"])
    assert [[text.get_text() for text in place.texts] for place in axes] == [[], [], ["flat", "told cat"]]
    assert axes[0].get_ylabel() == "dog"
    assert axes[2].spines["left"].get_linewidth() > 2 > axes[1].spines["left"].get_linewidth()


def test_nearest_neighbours_vote_by_hand():
    x = np.array([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2], [0.15]])
    y = np.array([0, 0, 0, 1, 1, 1, 1])
    assert embedding.vote(x, y, 2) == pytest.approx(100 * (1 + 3 / 4) / 2)


def test_too_few_neighbours_are_refused():
    data = load(size=8)
    data.test.targets[5:] = embedding.IGNORE
    with pytest.raises(ValueError, match="digit has too few test images for its 5 nearest"):
        embedding.check_neighbours(data)
