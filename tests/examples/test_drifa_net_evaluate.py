"""What finished runs say of their uncertainty."""

import json

import matplotlib.image
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from examples.drifa_net import evaluate, train
from examples.drifa_net.networks import restored
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
