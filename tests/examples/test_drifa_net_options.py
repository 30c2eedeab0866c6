"""What flags of training do: rare classes, logs, the pixels that a backbone expects, flips."""

import json
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from accelerate.state import AcceleratorState

from drifa_attn import TaskLoss
from examples.drifa_net import logs, train
from examples.drifa_net.augmentation import augment, shift
from examples.drifa_net.data import load
from examples.drifa_net.networks import named, paired_up, scaled
from tests._commands import refused
from tests.examples.collections import build
from tests.examples.own_data import shown, write_folder, write_table

CPU = torch.device("cpu")
TINY = ("--model", "fuse", "--backbones", "test_resnet", "--size", "8", "--batch-size", "16")


@pytest.fixture(autouse=True)
def other_processes_settings():
    """Accelerate keeps one setting for the life of a process; here each test is one."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def rare(tmp_path):
    """A folder of three classes, of which one has a tenth of the images."""
    root = tmp_path / "rare"
    for i in range(100):
        label = min(i // 45, 2)
        (root / "abc"[label]).mkdir(parents=True, exist_ok=True)
        shown(label, i).save(root / "abc"[label] / f"{i}.png")
    return root


# Rare classes


def test_weights_of_classes_are_one_over_how_often_they_are(rare, tmp_path, monkeypatch):
    data = load([rare], size=8)
    (weights,) = data.class_weights().values()
    counts = np.bincount(data.train.labels[0])
    assert np.allclose(np.array(weights) * counts, counts.sum() / 3)
    given = []
    before = TaskLoss.__init__
    monkeypatch.setattr(
        TaskLoss, "__init__", lambda self, *a, **k: (given.append(k["class_weights"]), before(self, *a, **k))[1]
    )
    options = ["--data", str(rare), *TINY, "--epochs", "1", "--output", str(tmp_path / "out"), "--cache", str(tmp_path / "c")]
    train.main(options)
    train.main([*options[:-3], str(tmp_path / "other"), "--cache", str(tmp_path / "c"), "--balance", "weights"])
    assert given == [None, {"rare": weights}]


def test_sampling_draws_classes_as_often_in_training_alone(rare):
    plain, balanced = load([rare], size=8), load([rare], size=8, balanced=True)
    counts = Counter()
    for epoch in range(30):
        balanced.train.set_epoch(epoch)
        assert len(balanced.train.order) == len(plain.train)
        counts.update(balanced.train.targets[:, 0].tolist())
    shares = np.array([counts[k] for k in range(3)]) / counts.total()
    assert np.abs(shares - 1 / 3).max() < 0.05
    balanced.train.set_epoch(3)
    before = balanced.train.order.copy()
    balanced.train.set_epoch(3)
    assert np.array_equal(before, balanced.train.order)  # so that a run can be resumed
    for key in ("validation", "test"):
        assert np.array_equal(getattr(plain, key).order, getattr(balanced, key).order)


def test_sampling_by_chance_balances_every_task(rare, tmp_path):
    data = load([rare, write_folder(tmp_path / "even")], size=8, pair="chance", balanced=True)
    counts = [Counter(), Counter()]
    for epoch in range(30):
        data.train.set_epoch(epoch)
        for k in (0, 1):
            counts[k].update(data.train.targets[:, k].tolist())
    for found in counts:
        assert max(found.values()) < 1.3 * min(found.values())


# Logs


def test_logs_follow_the_history_and_go_on_where_a_run_does(tmp_path, monkeypatch):
    options = ["--size", "8", *TINY[:4], "--batch-size", "128", "--epochs", "3", "--output", str(tmp_path)]
    before, seen = train.log, []

    def dying(several, epoch):
        before(several, epoch)
        seen.append(epoch["epoch"])
        if seen == [0, 1]:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "log", dying)
    with pytest.raises(KeyboardInterrupt):
        train.main([*options, "--log", "csv", "tensorboard"])
    AcceleratorState._reset_state(reset_partial_state=True)
    (record,) = train.main([*options, "--log", "csv", "tensorboard"])
    table = pd.read_csv(tmp_path / "fuse-seed0" / "log.csv", converters={"loss": float})  # to the last bit
    assert table["epoch"].tolist() == [0, 1, 2]
    assert table["loss"].tolist() == [epoch["loss"] for epoch in record["history"]]
    found = [epoch["validation"]["digit"]["balanced_accuracy"] for epoch in record["history"]]
    assert table["digit/balanced_accuracy"].tolist() == pytest.approx(found)
    assert len(list((tmp_path / "fuse-seed0" / "tensorboard").iterdir())) == 2
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train.main(options) == [record]  # logs do not touch the result


def test_a_log_that_cannot_be_written_is_refused_before_the_first_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda name: None)
    said = refused(capsys, train.main, ["--log", "tensorboard", "--output", tmp_path])
    assert "needs the package tensorboard: pip install tensorboard, or give --log csv" in said


# Pixels


def test_images_have_the_mean_and_deviation_that_the_backbone_was_trained_with():
    data = load(size=8)
    configuration = {"model": "fuse", "backbones": ["resnet10t", "vit_tiny_patch16_224"]}
    known = [timm.get_pretrained_cfg(name).to_dict() for name in configuration["backbones"]]
    assert known[0]["mean"] != known[1]["mean"]
    batch = next(iter(data.loader(data.test, 4)))
    inputs, _, _ = named(batch, scaled(data, configuration), CPU)
    for (branch, x), cfg in zip(inputs.items(), known, strict=True):
        mean, deviation = (torch.tensor(cfg[name])[:, None, None] for name in ("mean", "std"))
        torch.testing.assert_close(x * deviation + mean, (batch[0][branch] + 1) / 2)
    inputs, _, _ = named(batch, scaled(data, {"model": "drifa_net"}), CPU)
    assert all(torch.equal(inputs[branch], batch[0][branch]) for branch in inputs)


@pytest.mark.parametrize(
    ("kind", "turned"), [("ham10000", True), ("sipakmed", True), ("brain_mri", False), ("iq_othnccd", False)]
)
def test_what_has_a_top_is_never_turned(kind, turned, tmp_path):
    root = build(kind, tmp_path)
    assert load([root], size=8).train.augmentation == [augment if turned else shift]
    assert load([root], size=8, flips="none").train.augmentation == [shift]
    assert load([root], size=8, flips="any").train.augmentation == [augment]
    assert load([root], size=8).test.augmentation == [None]


def test_images_of_ones_own_are_shifted_alone_unless_they_have_no_top(tmp_path):
    path = write_table(tmp_path)
    assert load([path], size=8).train.augmentation == [shift, None]
    assert load([path], size=8, flips="any").train.augmentation == [augment, None]


# Who is present


def test_a_branch_that_one_sample_of_a_batch_has_is_left_out_there():
    present = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 0, 0]]).bool()
    assert paired_up(present).tolist() == [[True, False, False], [True, False, False], [True, False, False]]
    present = torch.tensor([[1, 0], [0, 1], [0, 1]]).bool()
    assert paired_up(present).tolist() == present.tolist()  # it is all that the sample has
    assert paired_up(None) is None


def test_networks_are_told_who_is_present(tmp_path):
    data = load([write_table(tmp_path)], size=8)
    batch = next(iter(data.loader(data.train, 60)))
    _, present, _ = named(batch, data, CPU)
    assert torch.equal(present, batch[1])
    assert not present.all()
    whole = [part[present.all(1)] for part in batch[1:]]
    inputs = {name: x[present.all(1)] for name, x in batch[0].items()}
    assert named([inputs, *whole], data, CPU)[1] is None


@pytest.mark.parametrize("model", ["fuse", "concat", "drifa_net"])
def test_absent_modalities_are_trained_and_tested_with(model, tmp_path):
    path = write_table(tmp_path / "own")
    kind = ["--model", model, *([] if model == "drifa_net" else ["--backbones", "test_resnet"])]
    narrow = ["--width", "4", "--record"] if model == "drifa_net" else []
    frame = pd.read_csv(path, dtype=str).assign(second=lambda f: f["photo"].where(f.index % 4 > 0))
    frame.to_csv(path, index=False)
    options = ["--data", str(path), *kind, *narrow, "--size", "16", "--batch-size", "16", "--epochs", "2", "--lr", "0.005"]
    (record,) = train.main([*options, "--leaks", "drop", "--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")])
    branches = ["photo", "second"] + ([] if model == "drifa_net" else ["record"])
    assert record["configuration"]["branches"] == branches
    assert model == "drifa_net" or record["test"]["diagnosis"]["accuracy"] > 0.5
    assert str(tmp_path) not in json.dumps(record)


def test_a_record_in_a_drifa_net_is_refused(tmp_path, capsys):
    said = refused(
        capsys,
        train.main,
        ["--data", write_table(tmp_path), "--size", "8", "--batch-size", "8", "--cache", tmp_path / "c"],
        silent=False,
    )
    assert "--model drifa_net reads images alone, not record: give --model fuse, or an empty --record" in said
