"""Which fusion: one protocol for all, samples that are paired, rows that are appended, a report that counts right."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import drifa_attn
from examples.does_it_help.networks import lite0
from examples.drifa_net.data import IGNORE
from examples.rows import Rows
from examples.which_fusion import protocol
from examples.which_fusion.__main__ import main
from examples.which_fusion.arms import VARIANTS, arms, built
from examples.which_fusion.branches import Branch, first_half
from examples.which_fusion.data import PARTS, Collection, View, check, divided, read
from examples.which_fusion.protocol import CHOOSING, ROW, Protocol, best, gathered, once, predicted, runs, steps
from examples.which_fusion.report import report
from tests._compare import assert_same_bits
from tests._process import run

ROOT = Path(__file__).parents[2]
SMALL = Protocol(seeds=2, choosing=1, samples=40, steps=2, batch=8, rates=(1e-3, 1e-2))


def collection():
    """Sixty samples of three classes: a map and a vector."""
    chance = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    views = {
        "map": View(torch.randn(60, 2, 1, 8, 4, generator=chance) + labels.view(-1, 1, 1, 1, 1), Branch("map", (1, 8, 4))),
        "vector": View(torch.randn(60, 1, 5, generator=chance) * 9 + 4, Branch("vector", (5,)), scaled=True),
    }
    return Collection("toy", "Toys.", {"class": ("a", "b", "c")}, views, divided(labels, list(views), "class"))


def skin(path, name="skin", **changes):
    """Forty-two images of three classes with their records, as an npz."""
    draw = np.random.default_rng(0)
    arrays = {
        "images": draw.integers(0, 255, (42, 64, 64, 3), dtype=np.uint8),
        "labels": np.arange(42) % 3,
        "classes": np.array(["a", "b", "c"]),
        "split": np.arange(42) // 14,
        "age": np.where(np.arange(42) == 5, np.nan, np.arange(42)).astype("f"),
        "sex": np.arange(42) % 2,
        "localization": np.arange(42) % 4,
        "dx_type": np.arange(42) % 3,
    } | changes
    np.savez(path / f"{name}.npz", **{key: array for key, array in arrays.items() if array is not None})
    return path / f"{name}.npz"


def omics(path, **changes):
    """Views of samples that are tested on others, which have no "b"."""
    draw = np.random.default_rng(0)
    arrays = {
        "train_labels": np.arange(40) % 2,
        "train_a": draw.normal(size=(40, 4)),
        "train_b": draw.normal(size=(40, 3)),
        "train_c": draw.normal(size=(40, 2)),
        "test_labels": np.arange(10) % 2,
        "test_a": draw.normal(size=(10, 4)),
        "test_c": draw.normal(size=(10, 2)),
    } | changes
    np.savez(path / "omics.npz", **{key: array for key, array in arrays.items() if array is not None})
    return path / "omics.npz"


# Data --------------------------------------------------------------------------------------------------------------------


def test_validation_is_apart_from_test_whatever_the_seed():
    digits = read([])
    parts = [digits.divide(seed) for seed in (0, 1, CHOOSING)]
    chosen = {int(row) for part in parts for row in part["validation"].rows["left"]}
    for part in parts:
        rows = [set(part[name].rows["left"].tolist()) for name in PARTS]
        assert sum(map(len, rows)) == len(set.union(*rows)) == 1797
        assert not chosen & rows[2]
        assert part["train"].rows["right"] is part["train"].rows["left"]
    assert parts[0]["test"].rows["left"].tolist() != parts[1]["test"].rows["left"].tolist()
    whole = torch.cat([digits.views[half].values[:, 0, 0] for half in ("left", "right")], -1)
    assert whole.shape == (1797, 8, 8)


def test_a_record_has_no_label_in_it(tmp_path):
    found = read([skin(tmp_path)])
    values = found.views["record"].values[:, 0]
    assert values.shape == (42, 2 + 2 + 4)  # age and whether it is unknown, sex, localization; no dx_type
    assert values[:14, 0].mean().abs() < 0.2  # standardised by the training samples
    assert values[:, 1].nonzero().flatten().tolist() == [5]
    assert values[5, 0] == 0
    assert {name: len(part) for name, part in found.divide(3).items()} == dict.fromkeys(PARTS, 14)


@torch.no_grad()
def test_the_frozen_branch_is_the_rest_of_the_network():
    images = torch.randint(0, 255, (3, 64, 64, 3), dtype=torch.uint8)
    halves = first_half(images)
    branch = Branch("frozen", tuple(halves.shape[2:])).build().train()
    x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.testing.assert_close(branch(halves[:, 0]), lite0(0)(x))
    torch.testing.assert_close(branch(halves[:, 1]), lite0(0)(x.flip(-1)))
    assert not any(module.training for module in branch.modules())
    assert not any(parameter.requires_grad for parameter in branch.parameters())


def test_views_that_no_test_sample_has_are_tried_with_others_alone(tmp_path):
    found = read([omics(tmp_path)])
    parts = found.divide(0)
    assert list(parts["train"].rows) == ["a", "b", "c"]
    assert list(parts["validation"].rows) == list(parts["test"].rows) == ["a", "c"]
    assert parts["test"].rows["a"].tolist() == list(range(40, 50))
    assert not set(parts["train"].rows["a"].tolist()) & set(parts["validation"].rows["a"].tolist())
    assert [name for name in arms(found) if name.endswith(" alone")] == ["a alone", "c alone"]
    row = once(found, SMALL, "mmtm", 0, 1e-2, on="test")
    assert list(row["without"]) == ["a", "c"]
    assert "no b" in found.what


def test_pairs_by_chance_count_every_image_once(tmp_path):
    few = skin(tmp_path, "few", split=np.where(np.arange(42) < 30, 0, 1 + np.arange(42) // 3 % 2))
    found = read([skin(tmp_path), few])
    one, two = found.divide(0), found.divide(1)
    assert list(found.tasks) == ["skin", "few"]
    assert len(one["train"]) == 14
    assert (one["train"].labels["few"] != IGNORE).all()
    assert one["train"].rows["few"].tolist() != two["train"].rows["few"].tolist()
    assert one["test"].rows["few"].tolist() == two["test"].rows["few"].tolist()
    for name, count in (("skin", 14), ("few", 6)):
        counted = one["test"].labels[name] != IGNORE
        assert counted.sum() == count == len(set(one["test"].rows[name][counted].tolist()))


BAD = {
    "no split": (lambda path: [skin(path, split=None)], "no array 'split'"),
    "no record": (lambda path: [skin(path, age=None)], "has no 'age' for each image"),
    "one name": (lambda path: [skin(path), skin(path)], "two archives of one name"),
    "a class is missing": (
        lambda path: [skin(path, labels=np.where(np.arange(42) < 28, np.arange(42) % 3, 0))],
        "test samples of skin have none of class 'b'",
    ),
    "too few": (lambda path: [omics(path)], "has 32 samples to train on, and a batch needs 33"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_bad_data_is_refused_by_name(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check(read(make(tmp_path)), 33 if message.endswith("33") else 8)


# Protocol ----------------------------------------------------------------------------------------------------------------


def test_every_fusion_is_an_arm_and_all_of_a_seed_start_alike():
    toy, starts = collection(), {}
    names = arms(toy)
    assert {*drifa_attn.fusion.FUSIONS, "map alone", "vector alone", "mifa, calibrated", *VARIANTS} == set(names)
    for _name, arm in names.items():
        net = built(toy, arm, 3, 0.3)
        for key, tensor in net.branches.state_dict().items():
            assert_same_bits(starts.setdefault(key, tensor), tensor)
        head = net.heads["class"].weight
        assert_same_bits(starts.setdefault(tuple(head.shape), head), head)
        assert net.modality_dropout == 0.3
    assert not torch.equal(starts["map.stage1.0.weight"], built(toy, names["concat"], 4, 0).branches["map"].stage1[0].weight)


def test_within_a_seed_all_arms_see_the_same_samples_and_lack_the_same_modalities(monkeypatch):
    seen = []

    def watched(*args):
        net = built(*args)
        net.register_forward_pre_hook(lambda _, given: seen[-1].append(dict(given[0])))
        net.readout.register_forward_pre_hook(lambda _, given: seen[-1].append(given[2]))
        return net

    monkeypatch.setattr(protocol, "built", watched)
    names = ("concat", "sum", "mmtm", "cross_attention", "gloria")
    for name in names:
        seen.append([])
        once(collection(), SMALL, name, 3, 1e-3, on="test")
    assert not seen[0][1].all()
    assert seen[0][1].any(1).all()
    for others in seen[1:]:
        for (inputs, present), (first, presence) in zip([others[:2], others[2:4]], [seen[0][:2], seen[0][2:4]], strict=True):
            assert_same_bits(present, presence)
            for view, x in inputs.items():
                assert_same_bits(x, first[view])


def test_vectors_are_standardised_by_the_samples_that_are_trained_on():
    toy = collection()
    parts = toy.divide(0)
    net = built(toy, arms(toy)["concat"], 0, 0)
    train = gathered(toy, parts["train"], parts["train"], net)["vector"]
    assert train.mean(0).abs().max() < 1e-5
    assert (train.std(0) - 1).abs().max() < 1e-4
    assert gathered(toy, parts["test"], parts["train"], net)["vector"].mean(0).abs().max() > 1e-3


def test_what_a_fusion_adds_to_the_loss_is_trained(monkeypatch):
    added = []
    forward = drifa_attn.TaskLoss.forward
    monkeypatch.setattr(drifa_attn.TaskLoss, "forward", lambda *args: (added.append(set(args[3])), forward(*args))[1])
    once(collection(), SMALL, "gloria", 0, 1e-3, on="test")
    once(collection(), SMALL, "concat", 0, 1e-3, on="test")
    assert added == [{"gloria local", "gloria global"}] * 2 + [set()] * 2


def test_rows_are_appended_and_a_stopped_comparison_goes_on(tmp_path, monkeypatch):
    names, path, toy = ["concat", "mmtm"], tmp_path / "toy.jsonl", collection()
    unfinished = runs(toy, SMALL, names, Rows(path, SMALL, ROW))
    for _ in range(4):
        next(unfinished)
    assert len(path.read_text().splitlines()) == 3
    list(runs(toy, SMALL, names, Rows(path, SMALL, ROW)))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["seed"], row["part"]) for row in rows] == [(CHOOSING, "validation")] * 4 + [
        (seed, "test") for seed in (0, 0, 1, 1)
    ]
    for row in rows[4:]:
        assert row["rate"] == best([other for other in rows if other["arm"] == row["arm"]], SMALL)
        assert set(row["without"]) == {"map", "vector"}
    assert rows[5]["deviations"]
    assert not rows[4]["deviations"]
    monkeypatch.setattr(protocol, "once", None)  # nothing is run again
    list(runs(toy, SMALL, names, Rows(path, SMALL, ROW)))
    with pytest.raises(ValueError, match="holds rows of another protocol"):
        Rows(path, Protocol(2, 1, 40, 3, 8, (1e-3, 1e-2)), ROW)
    with path.open("a") as file:
        file.write('{"arm": "con')
    with pytest.raises(ValueError, match=r"line 9, is no row of a run: delete the line"):
        Rows(path, SMALL, ROW)


def test_of_equally_good_rates_the_likelier_is_chosen():
    def tried(rate, score, nll):
        return {"part": "validation", "rate": rate, "balanced_accuracy": score, "nll": nll}

    assert best([tried(1e-3, 0.5, 1.0), tried(1e-2, 0.4, 0.1), {"part": "test", "rate": 1e-2}], SMALL) == 1e-3
    assert best([tried(1e-3, 0.5, 1.0), tried(1e-2, 0.5, 0.9)], SMALL) == 1e-2


def test_the_cost_of_a_step_is_that_of_each_arm():
    found = steps(collection(), SMALL, ["concat", "mttu"], rounds=1)
    assert found["mttu"]["ms"] > found["concat"]["ms"] > 0
    assert found["mttu"]["kept_mb"] > found["concat"]["kept_mb"] > 0


# Report and command ------------------------------------------------------------------------------------------------------


def test_the_report_counts_what_the_rows_say(tmp_path):
    def row(arm, seed, score, **changes):
        task = dict.fromkeys(("balanced_accuracy", "macro_f1", "auroc", "ece"), score)
        left = {} if arm == "a alone" else {"a": {"t": score / 2}, "b": {"t": score / 4}}
        rest = {"tasks": {"t": task}, "balanced_accuracy": score, "nll": 1, "without": left, "trained": 5000, "flops": 2e6}
        more = {"rate": 0.01, "part": "test", "deviations": {"s.a": 0.25} if arm == "mmtm" else {}, "torch": "2"}
        settings = SMALL.__dict__ | {"rates": [0.01, 0.1]}
        return {"data": "toy", "arm": arm, "seed": seed, **rest, **more, "protocol": settings} | changes

    scores = {"concat": (0.5, 0.6), "mmtm": (0.56, 0.64), "mifa": (0.4, 0.5), "a alone": (0.3, 0.3)}
    rows = [row(arm, seed, score) for arm, some in scores.items() for seed, score in enumerate(some)]
    rows.append(row("mmtm", CHOOSING, 0.99, part="validation"))  # chose a rate; the report does not count it
    rows.append(row("sum", 0, 0.99))  # has not all its seeds
    (tmp_path / "toy.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    costs = {"concat": {"ms": 2.0, "kept_mb": 4.0}, "mmtm": {"ms": 5.0, "kept_mb": 6.0}}
    about = {"what": "Toys.", "tasks": {"t": ["x", "y"]}, "parts": {"train": 9}, "threads": 1, "arms": costs}
    (tmp_path / "toy-steps.json").write_text(json.dumps(about))
    report(tmp_path, Console(quiet=True))
    lines = (tmp_path / "toy.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert [line.split(" | ")[0] for line in table[2:6]] == ["| mmtm", "| **concat**", "| mifa", "| a alone"]
    assert "| mmtm | 60.0 ± 5.7 | 60.0 ± 5.7 | 60.0 ± 5.7 | 60.0 ± 5.7 | +5.0 (+4.0 to +6.0), gains | 30.0 ± 2.8 |" in table[2]
    assert "| -10.0 (-10.0 to -10.0), loses | 22.5 ± 3.5 | 11.2 ± 1.8 |" in table[4]
    assert table[5].endswith("loses | – | – |")
    assert "| mmtm | 0.01 | 5,000 | 2.00 M | 2.50 | 1.50 | 0.250 |" in table
    assert (tmp_path / "toy.png").stat().st_size > 10_000
    (tmp_path / "toy-steps.json").write_text("{}")
    with pytest.raises(ValueError, match=r"toy-steps.json is damaged: delete it"):
        report(tmp_path, Console(quiet=True))


def test_a_quick_run_goes_through_the_command_line_and_goes_on(tmp_path):
    chosen = ["left alone", "concat", "mifa, calibrated"]
    command = [sys.executable, "-W", "error", "-m", "examples.which_fusion"]
    options = ["--quick", "--steps", "2", "--output", str(tmp_path), "--arms"]
    run(*command, *options, *chosen, cwd=ROOT)
    rows = (tmp_path / "digits.jsonl").read_text().splitlines()
    assert len(rows) == 3 * 3
    assert {path.name for path in tmp_path.iterdir()} == {f"digits{end}" for end in (".jsonl", "-steps.json", ".md", ".png")}
    main([*options, *chosen, "gloria"])
    again = (tmp_path / "digits.jsonl").read_text().splitlines()
    assert again[:9] == rows
    assert len(again) == 12
    assert list(json.loads((tmp_path / "digits-steps.json").read_text())["arms"]) == [*chosen, "gloria"]


def test_a_network_that_diverged_knows_nothing():
    toy = collection()
    net = built(toy, arms(toy)["concat"], 0, 0)
    torch.nn.init.constant_(net.heads["class"].weight, torch.nan)
    inputs = {"map": toy.views["map"].values[:, 0], "vector": toy.views["vector"].values[:, 0]}
    assert (predicted(net.eval(), inputs)["class"] == 1 / 3).all()


REFUSED = {
    "an unknown arm": (["--arms", "concat", "best"], "digits has no arm 'best', only left alone, right alone, mifa"),
    "nothing to report": (["--report"], "holds no rows of a test to report"),
    "a run's option with a report": (["--report", "--seeds", "3"], "--seeds is not for --report."),
    "views of digits": (["--views", "left"], "--views is for one archive of views."),
    "no such file": (["--data", "missing.npz"], "'missing.npz' cannot be read"),
    "a folder": (["--data", "."], "is a folder: the comparison reads npz archives."),
    "too few samples": (["--samples", "12"], "needs 16 --samples"),
    "fewer samples than a batch": (["--samples", "20", "--batch", "30"], "--samples 20 are fewer than the 30 of a --batch."),
    "no probability": (["--modality-dropout", "1"], "expected a number in [0, 1), got '1'"),
    "no rate": (["--rates", "0"], "expected a number > 0, got '0'"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_a_mistake_is_one_line(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--output", str(tmp_path / "out")])
    told = capsys.readouterr().err
    assert message in " ".join(told.split())
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_committed_tables_are_those_of_the_rows(tmp_path):
    results = ROOT / "examples" / "which_fusion" / "results"
    names = sorted(path.stem for path in results.glob("*.jsonl"))
    for path in (*results.glob("*.jsonl"), *results.glob("*-steps.json")):
        (tmp_path / path.name).write_text(path.read_text())
    report(tmp_path, Console(quiet=True))
    assert names
    for name in names:
        assert (results / f"{name}.md").read_text() == (tmp_path / f"{name}.md").read_text()
