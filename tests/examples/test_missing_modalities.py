"""The example on missing modalities."""

import json

import numpy as np
import pytest
import torch

from examples import missing_modalities as example
from tests._compare import assert_same_bits

pytest.importorskip("rich")


def archive(path, **changes):
    """Thirty samples of three classes with two views in training and one of them at test, as an npz."""
    draw, labels = np.random.default_rng(0), np.arange(30) % 3
    arrays = {
        "train_labels": labels,
        "train_a": draw.normal(size=(30, 4)) + labels[:, None],
        "train_b": draw.normal(size=(30, 3)),
        "train_names": np.array(["x"] * 30),
        "test_labels": labels[:12],
        "test_a": draw.normal(size=(12, 4)),
    } | changes
    np.savez(path, **{key: array for key, array in arrays.items() if array is not None})
    return path


def test_a_fast_run_writes_what_its_table_says(tmp_path):
    example.main(["--fast", "--data", str(archive(tmp_path / "omics.npz")), "--output", str(tmp_path / "out")])
    stem = tmp_path / "out" / "missing_modalities_omics"
    result = json.loads(stem.with_suffix(".json").read_text())
    assert (result["data"], result["samples"], result["views"], result["seeds"]) == ("omics", 30, {"a": 4, "b": 3}, 1)
    assert {protocol: list(scores[example.OWN]) for protocol, scores in result["scores"].items()} == {
        "folds": ["a", "b", "a + b"],
        "test": ["a"],
    }
    assert all(len(scores) == len(example.NETWORKS) + 2 for scores in result["scores"].values())
    assert stem.with_suffix(".md").read_text() == example.table(result)
    score = result["scores"]["test"][example.FILLED]["a"][0]
    assert f"{score:.3f}" in example.table(result).splitlines()[-1]
    assert stem.with_suffix(".png").stat().st_size > 10_000
    assert str(tmp_path) not in stem.with_suffix(".json").read_text()


def test_every_network_trains_as_its_column_says(monkeypatch):
    trained = []

    def train(net, *_, **__):
        trained.append((net.modality_dropout, all(refiner.enabled for refiner in net.refiners)))

    monkeypatch.setattr(example, "train", train)
    samples = example.read(None)[0][np.arange(60)]
    example.measured(example.fused(samples, 0), samples, samples, steps=1, seed=0)
    assert trained == list(example.NETWORKS.values()) == [(0.0, True), (0.5, True), (0.5, False)]


def test_the_embedded_views_are_the_whole_image():
    samples, _ = example.read(None)
    assert {name: view.shape for name, view in samples.views.items()} == {
        "upper": (1797, 24),
        "middle": (1797, 16),
        "lower": (1797, 24),
    }


def test_a_deviation_is_that_over_the_seeds_of_the_means_over_the_folds():
    results = [("folds", seed, {"m": {"a": score}}) for seed, score in ((0, 0.5), (0, 0.7), (1, 0.9), (1, 0.9))]
    found = example.gathered(results)["folds"]["m"]["a"]
    assert found == pytest.approx([0.6, 0.9])
    assert example.mean_sd(found) == "0.750 ± 0.212"


def test_training_is_repeatable_and_standardisation_is_that_of_training():
    samples = example.Samples({"a": np.random.randn(20, 4).astype("f"), "b": np.ones((20, 3), "f")}, np.arange(20) % 2)
    one, two = example.standardised(samples[np.arange(10)], samples[np.arange(10, 20)])
    assert one.views["a"].mean(0) == pytest.approx(0, abs=1e-6)
    assert two.views["a"].mean(0) != pytest.approx(0, abs=1e-3)
    assert np.isfinite(two.views["b"]).all()
    nets = [example.fused(one, 0) for _ in range(2)]
    for net in nets:
        net.modality_dropout = 0.5
        example.train(net, one, steps=3, seed=1)
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        assert_same_bits(a, b)
    assert not torch.equal(nets[0].heads["class"].weight, example.fused(one, 0).heads["class"].weight)


BAD = {
    "missing": ([], lambda path: path.unlink(), "cannot be read: No such file"),
    "no archive": ([], lambda path: path.write_text("x"), "is no npz archive of plain arrays"),
    "no labels": ([], lambda path: archive(path, train_labels=None, test_labels=None), "holds no labels"),
    "unknown view": (["--views", "a", "c"], archive, "has no view 'c' of 30 samples: it has a, b"),
    "one view": ([], lambda path: archive(path, train_b=None), r"has 1 views (a): fusion needs at least two"),
    "not finite": ([], lambda path: archive(path, train_b=np.full((30, 3), np.nan)), "view 'b'"),
    "rare class": ([], lambda path: archive(path, train_labels=np.arange(30) // 27), "class 1 of"),
}


@pytest.mark.parametrize(("arguments", "spoil", "message"), BAD.values(), ids=BAD)
def test_bad_data_is_refused_by_name(arguments, spoil, message, tmp_path, capsys):
    path = archive(tmp_path / "omics.npz")
    spoil(path)
    with pytest.raises(SystemExit, match="2"):
        example.main(["--fast", "--data", str(path), "--output", str(tmp_path / "out"), *arguments])
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
