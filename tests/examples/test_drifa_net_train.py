"""Training is one command that can be killed, repeated and shared by processes, and says what was wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

import drifa_attn
from drifa_attn import TaskLoss
from examples.drifa_net import train
from examples.drifa_net.data import IGNORE, load
from examples.drifa_net.metrics import absent, abstention, reliability, risk_coverage, scores
from examples.drifa_net.networks import attentions, build, restored, scaled
from examples.drifa_net.records import read_record
from tests._compare import assert_same_bits, assert_same_math
from tests.examples.collections import write_archive
from tests.examples.own_data import write_table


@pytest.fixture(autouse=True)
def other_processes_settings():
    """Accelerate keeps one setting for the life of a process; here each test is one."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


ROOT = Path(__file__).parent.parent.parent
TINY = ("--size", "8", "--batch-size", "128")  # halves of 8x4 pixels, nine steps an epoch
FUSE = ("--model", "fuse", "--backbones", "test_resnet")


def archives(folder):
    """The options for two small collections of 40 and 30 training images: five steps of eight."""
    for name, count, seed in (("skin", 80, 1), ("cells", 60, 2)):
        write_archive(folder / f"{name}.npz", count=count, split=True, size=(8, 8), seed=seed)
    return "--data", str(folder / "skin.npz"), str(folder / "cells.npz"), "--pair", "chance", "--batch-size", "8"


def launched(code, *arguments, module=()):
    """A process of its own, at the repository's root, that runs this code with these arguments."""
    command = [sys.executable, *module, code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def lasting(record):
    """A record without what differs from run to run."""
    return {name: value for name, value in record.items() if name != "seconds"}


KILLED = """
import os, signal, sys
from examples.drifa_net import train
from tests import older
older.register()
def one_epoch(self, before=train.Run.one_epoch):
    for step in before(self):
        yield step
        if (self.epoch, step) == (1, 3):
            os.kill(os.getpid(), signal.SIGKILL)
train.Run.one_epoch = one_epoch
train.main(sys.argv[1:])
"""


def table(folder):
    """The options for a table with absent images and records: five steps of ten, classes drawn as often."""
    path, kind = write_table(folder / "own", 75), ("--size", "8", "--batch-size", "10", "--balance", "sampling")
    return "--data", str(path), *kind, "--cache", str(folder / "cache"), *FUSE


@pytest.mark.parametrize(
    ("given", "model"), [(archives, ("--width", "4")), (table, ("--log", "csv"))], ids=["archives", "table"]
)
def test_killed_within_an_epoch_and_run_again_it_ends_with_the_same_bits(given, model, tmp_path):
    options = (*given(tmp_path), *model, "--losses", "uncertainty", "--epochs", "2", "--save-every", "2")
    died = launched(KILLED, *options, "--output", tmp_path / "killed", module=("-c",))
    (folder,) = (tmp_path / "killed").iterdir()
    logs = ["log.csv"] if "--log" in model else []
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.pt", *logs, "sources.json"]
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["place"][:2] == (1, 2)
    (resumed,) = train.main([*options, "--output", str(tmp_path / "killed")])
    (whole,) = train.main([*options, "--output", str(tmp_path / "whole")])
    assert lasting(resumed) == lasting(whole)
    assert sorted(path.name for path in folder.iterdir()) == [*logs, "model.safetensors", "run.json", "sources.json"]
    weights, others = (load_file(tmp_path / one / folder.name / "model.safetensors") for one in ("killed", "whole"))
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        assert_same_math(tensor.float(), others[name].float())


def test_a_step_depends_on_where_it_is_and_on_nothing_else(tmp_path):
    options = [*TINY, *FUSE, "--epochs", "1"]
    (first,) = train.main([*options, "--output", str(tmp_path / "a")])
    torch.rand(7)
    (again,) = train.main([*options, "--output", str(tmp_path / "b")])
    (other,) = train.main([*options, "--output", str(tmp_path / "c"), "--seeds", "1"])
    assert lasting(first) == lasting(again)
    assert first["history"] != other["history"]
    assert first["data"] == other["data"]  # seeds are trained on the same splits


def test_half_written_files_are_never_seen(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write(half):
        half.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        train.replace(path, write)
    assert path.read_text() == "old"


TWO = """
import sys
import torch
from examples.drifa_net import train
torch.nn.functional.dropout = lambda x, *_, **__: x
for model in (["--model", "concat", "--backbones", "test_vit", "--size", "32"], ["--width", "4", "--size", "8"]):
    train.main([*sys.argv[1:], *model])
"""


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch is built without gloo")
def test_two_processes_train_as_one_and_count_every_image_once(tmp_path, monkeypatch):
    """A network without batch norm, its dropout off, learns the same from shared batches; one with them tests what it saves."""
    script = tmp_path / "two.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{TWO}")
    options = ["--epochs", "1", "--batch-size", "256", "--output", str(tmp_path / "two")]
    module = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = launched(str(script), *options, module=module)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 0:") == 2  # one process speaks
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, *_, **__: x)
    (one,) = train.main([*options[:4], "--model", "concat", "--backbones", "test_vit", "--output", str(tmp_path / "one")])
    two = json.loads((tmp_path / "two" / "concat-seed0" / "run.json").read_text())
    assert (one["device"]["processes"], two["device"]["processes"]) == (1, 2)
    assert two["history"][0]["loss"] == pytest.approx(one["history"][0]["loss"], rel=1e-4)
    for task, values in one["test"].items():
        assert two["test"][task] == pytest.approx(values, abs=5e-3)
    data = load(size=8)
    folder = tmp_path / "two" / "drifa_net-seed0"
    record = read_record(folder / "run.json")
    net = restored(folder, record, data)
    found = train.metrics(train.predict(net, data.test, data, Accelerator(cpu=True), 64))
    for task, values in record["test"].items():
        assert values["samples"] == len(data.test) == 360
        assert values == pytest.approx(found[task], abs=1e-6)


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")  # flags() sets that flag too
@pytest.mark.parametrize(
    "options",
    [
        ("--width", "4", "--reduction", "2"),
        FUSE,
        (*FUSE[2:], "--model", "concat"),
        (*FUSE, "--fusion", "gloria"),
        (*FUSE, "--mixed-precision", "bf16"),
    ],
    ids=["drifa_net", "fuse", "concat", "gloria", "bf16"],
)
def test_every_model_learns_and_leaves_a_record_and_its_weights(options, tmp_path):
    # On processors with AMX, oneDNN gives NaN now and then in bfloat16 convolutions of a few pixels, here in backbones of timm.
    with torch.backends.mkldnn.flags(enabled="bf16" not in options):
        epochs = "1" if "bf16" in options else "2"
        (record,) = train.main([*TINY, *options, "--epochs", epochs, "--lr", "0.005", "--output", str(tmp_path)])
    model, refined = record["configuration"]["model"], not {"concat", "gloria"} & {*options}
    folder = tmp_path / f"{model}-seed0"
    assert json.loads((folder / "run.json").read_text()) == record
    assert record.keys() == RECORD
    assert record["history"][-1]["loss"] < record["history"][0]["loss"] or epochs == "1"
    assert record["configuration"]["precision"] == ("bf16" if "bf16" in options else "no")
    data = load(size=8)
    data = scaled(data, record["configuration"])
    net = restored(folder, record, data)
    assert bool(attentions(net)) == refined
    assert sum(parameter.numel() for parameter in net.parameters()) == record["parameters"]
    found = train.metrics(train.predict(net, data.test, data, Accelerator(cpu=True), 64))
    if "bf16" not in options:
        assert record["test"] == {task: pytest.approx(values, abs=1e-6) for task, values in found.items()}
    with drifa_attn.disabled(net) if refined else nullcontext():
        off = net(*train.named(batch(data), data, torch.device("cpu"))[:2])
    on = net(*train.named(batch(data), data, torch.device("cpu"))[:2])
    assert all(torch.equal(off[task], on[task]) != refined for task in data.tasks)


RECORD = {
    "configuration",
    "versions",
    "device",
    "data",
    "parameters",
    "history",
    "best_epoch",
    "stopped_early",
    "test",
    "absent",
    "seconds",
}


def batch(data, count=6):
    """The first few test images as a loader gives them."""
    return next(iter(data.loader(data.test, count)))


def test_a_finished_run_is_not_trained_again(tmp_path, monkeypatch):
    options = [*TINY, *FUSE, "--epochs", "1", "--output", str(tmp_path)]
    before = train.main(options)
    monkeypatch.setattr(train.Run, "train", None)
    assert train.main([*options, "--workers", "1"]) == before


def test_early_stopping_keeps_the_best_weights(tmp_path, monkeypatch):
    losses = iter([1.0, 0.5, 0.7, 0.6, 0.1])
    kept = []

    def fake(predictions):
        return {task: {"nll": next(losses) if task == "digit" else 0.0, "accuracy": 0.0, "samples": 1} for task in predictions}

    close = train.Run.close_epoch

    def watched(self, progress):
        kept.append({name: tensor.clone() for name, tensor in self.learner.net.state_dict().items()})
        close(self, progress)

    monkeypatch.setattr(train, "metrics", fake)
    monkeypatch.setattr(train.Run, "close_epoch", watched)
    monkeypatch.setattr(train, "shown", lambda records: "")
    (record,) = train.main([*TINY, *FUSE, "--epochs", "5", "--patience", "2", "--output", str(tmp_path)])
    assert (record["best_epoch"], record["stopped_early"], len(record["history"])) == (1, True, 4)
    for name, tensor in load_file(tmp_path / "fuse-seed0" / "model.safetensors").items():
        assert_same_bits(tensor, kept[1][name])


def test_the_rate_rises_and_falls_to_zero(tmp_path):
    data = load(size=8)
    options = train.parser("").parse_args([*TINY, *FUSE, "--epochs", "10", "--lr", "0.5"])
    accelerator = Accelerator(cpu=True)
    run = train.Run(train.configured(options, 0, data, accelerator), data, accelerator, tmp_path, train.Console(quiet=True))
    rates = []
    for step in range(10 * run.steps):
        run.epoch, run.step = divmod(step, run.steps)
        rates.append(run.rate())
    top = int(np.argmax(rates))
    assert max(rates) == rates[4] == rates[5] == 0.5  # five steps up, then the cosine's 85 down
    assert rates[5 + 42] == pytest.approx(0.25, abs=0.01)
    assert top == pytest.approx(train.WARMUP * len(rates), abs=1)
    assert all(a < b for a, b in zip(rates[:top], rates[1:top], strict=False))
    assert all(a > b for a, b in zip(rates[top + 1 :], rates[top + 2 :], strict=False))
    assert rates[-1] < 0.001


def test_other_options_do_not_go_on_with_a_run(tmp_path, capsys, monkeypatch):
    options = [*TINY, *FUSE, "--epochs", "2", "--output", str(tmp_path)]
    monkeypatch.setattr(train, "metrics", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main([*options, "--save-every", "5"])
    assert (tmp_path / "fuse-seed0" / "checkpoint.pt").exists()
    monkeypatch.setattr(train, "load", None)  # it is told before images are read
    with pytest.raises(SystemExit, match="2"):
        train.main([*options, "--lr", "0.5"])
    assert re.search(r"is of a run with lr=0.002, this one has lr=0.5: give the same", capsys.readouterr().err)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="2"):
        train.main([*options[:-1], str(tmp_path / "file")])
    assert "is no folder that can be written to" in capsys.readouterr().err


def interrupted(predictions):
    raise KeyboardInterrupt


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="training loss of epoch 0 is nan: lower --lr"):
        train.main([*TINY, *FUSE, "--epochs", "1", "--lr", "1e30", "--output", str(tmp_path)])


def test_collections_give_a_branch_and_a_task_each(tmp_path):
    options = [*archives(tmp_path), "--width", "4", "--epochs", "1", "--output", str(tmp_path)]
    (record,) = train.main(options)
    assert record["configuration"]["data"] == ["skin.npz", "cells.npz"]
    assert {task: values["samples"] for task, values in record["test"].items()} == {"skin": 20, "cells": 15}
    assert str(tmp_path) not in json.dumps(record)


def test_scores_are_scikit_learns():
    draw = torch.Generator().manual_seed(0)
    probs, labels = (3 * torch.randn(200, 4, generator=draw)).softmax(1).double(), torch.randint(4, (200,), generator=draw)
    labels[::7] = IGNORE
    kept, found = labels != IGNORE, scores(probs, labels)
    p, y = probs[kept].numpy(), labels[kept].numpy()
    expected = {
        "samples": len(y),
        "accuracy": (p.argmax(1) == y).mean(),
        "balanced_accuracy": balanced_accuracy_score(y, p.argmax(1)),
        "macro_f1": f1_score(y, p.argmax(1), average="macro"),
        "auroc": roc_auc_score(y, p, multi_class="ovr"),
        "nll": -np.log(p[np.arange(len(y)), y]).mean(),
        "brier": ((p - np.eye(4)[y]) ** 2).sum(1).mean(),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    confidence, accuracy, share = reliability(probs[kept], labels[kept])
    gaps = torch.nan_to_num((confidence - accuracy).abs() * share).sum()
    assert found["ece"] == pytest.approx(gaps.item(), rel=1e-4)


@pytest.mark.parametrize(("shown", "said"), [([0, 2], [0, 2]), ([0, 2, 3], [0, 1, 2]), ([1, 3], [0, 1, 2, 3])])
def test_scores_leave_out_what_is_absent_as_scikit_learn_does(shown, said):
    """Classes that no label has: not 0 in a mean; macro-F1 counts them where they are predicted."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.tensor(shown)[torch.randint(len(shown), (60,), generator=draw)]
    logits = torch.randn(60, 4, generator=draw)
    logits[:, [k for k in range(4) if k not in said]] = -9  # what is never predicted
    probs = logits.softmax(1).double()
    found, y, guess = scores(probs, labels), labels.numpy(), probs.argmax(1).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that labels lack a prediction
        assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y, guess))
    assert found["macro_f1"] == pytest.approx(f1_score(y, guess, average="macro"))
    expected = [roc_auc_score(y == k, probs[:, k].numpy()) for k in shown]
    assert found["auroc"] == pytest.approx(np.mean(expected))
    assert absent(labels, "abcd") == [name for k, name in enumerate("abcd") if k not in shown]


def test_scores_of_one_class_or_nothing():
    probs = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    found = scores(probs, torch.tensor([0, 0]))
    assert (found["balanced_accuracy"], np.isnan(found["auroc"])) == (0.5, True)
    with pytest.raises(ValueError, match="at least one sample with a label, got none"):
        scores(probs, torch.tensor([IGNORE, IGNORE]))


def test_risk_coverage_by_hand():
    """Four samples, the third wrong; from the most to the least certain they are 1, 3, 0, 2 (counted from 0)."""
    probs = torch.tensor([[0.6, 0.4], [0.1, 0.9], [0.8, 0.2], [0.7, 0.3]]).double()
    labels, uncertainty = torch.tensor([0, 1, 1, 0]), torch.tensor([0.3, 0.1, 0.9, 0.2])
    assert_same_math(risk_coverage(probs, labels, uncertainty), torch.tensor([0, 0, 0, 0.25]).double())
    found = abstention(probs, labels, uncertainty, share=0.25)
    assert found == pytest.approx({"aurc": 0.0625, "accuracy_all": 0.75, "kept": 3, "accuracy_kept": 1.0})


def test_the_losses_of_a_fusion_are_learned_too():
    """GLoRIA's come on top of the tasks'."""

    class Nothing(TaskLoss):
        def forward(self, logits, labels, auxiliary=None):
            return super().forward(logits, labels)

    data = load(size=8)
    torch.manual_seed(0)
    net = build({"model": "fuse", "fusion": "gloria", "backbones": ["test_resnet"], "pretrained": False}, data).train()
    given = train.named(batch(data), data, torch.device("cpu"))
    found = []
    for kind in (TaskLoss, Nothing):
        torch.manual_seed(0)
        found.append(train.Learner(net, kind(list(data.tasks)))(*given))
    torch.testing.assert_close(found[0] - found[1], sum(net.losses().values()))
    assert found[0] > found[1]
