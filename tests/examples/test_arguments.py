"""Every argument of every example's command, with bad values of every kind: one line, status 2, no step, no file."""

import json

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file

from examples import missing_modalities, quickstart
from examples.does_it_help import __main__ as evidence
from examples.drifa_net import evaluate, figures, report, train
from examples.drifa_net.checkpoints import CHECKPOINT
from tests._commands import make_unwritable, refused, tree
from tests.examples.collections import write_archive
from tests.older import needs_later_torch

RUN = "fuse-seed0"
TRAIN = {
    "an argument that is none": ("extra", "unrecognized arguments: extra"),
    "data: nothing": ("--data", "argument --data: expected at least one argument"),
    "data: not there": ("--data nowhere", "argument --data: 'nowhere' cannot be read: No such file"),
    "data: a folder of nothing": (
        "--data empty",
        "empty holds no collection (ham10000, sipakmed, brain_mri, iq_othnccd) and no images",
    ),
    "data: no archive": ("--data text", "text is no npz archive of plain arrays"),
    "data: no byte": ("--data zero.npz", "zero.npz is no npz archive of plain arrays, or is damaged"),
    "data: cut short": ("--data cut.npz", "cut.npz is no npz archive of plain arrays, or is damaged"),
    "data: another byte": ("--data byte.npz", "byte.npz is no npz archive of plain arrays, or is damaged"),
    "data: one class": ("--data one.npz", "one.npz needs at least two classes of different names, got a"),
    "data: one class of two": ("--data half.npz", "half: class 'b' of half.npz has but 0 of at least 3 images"),
    "data: a name twice": ("--data twice.npz", "twice.npz needs at least two classes of different names, got a, a"),
    "model": ("--model zzz", "argument --model: invalid choice: 'zzz'"),
    "backbones: unknown": ("--model fuse --backbones zzz9000", "timm has no network 'zzz9000'"),
    "backbones: an unknown tag": ("--model fuse --backbones resnet18.zzz", "--backbones resnet18.zzz cannot be had"),
    "backbones: three": ("--model fuse --backbones a b c", "--backbones expected one network, or one for each"),
    "backbones: of the other model": ("--backbones test_resnet", "--backbones does nothing to --model drifa_net"),
    "pretrained: of the other model": ("--pretrained", "--pretrained does nothing to --model drifa_net"),
    "width: of the other model": ("--model fuse --width 8", "--width does nothing to --model fuse"),
    "fusion: of another model": ("--model concat --fusion mttu", "--fusion does nothing to --model concat"),
    "reduction: of the other model": ("--model concat --reduction 8", "--reduction does nothing to --model concat"),
    "width: 0": ("--width 0", "argument --width: expected an integer >= 1, got '0'"),
    "width: a word": ("--width wide", "argument --width: expected an integer >= 1, got 'wide'"),
    "reduction": ("--reduction -1", "argument --reduction: expected an integer >= 1, got '-1'"),
    "losses": ("--losses zzz", "argument --losses: invalid choice: 'zzz'"),
    "epochs": ("--epochs 1.5", "argument --epochs: expected an integer >= 1, got '1.5'"),
    "batch-size: 0": ("--batch-size 0", "argument --batch-size: expected an integer >= 1, got '0'"),
    "batch-size: 1": ("--batch-size 1", "--batch-size must give each process at least 2 pairs"),
    "batch-size: too large": ("--batch-size 5000", "--batch-size 5000 is more than the 1257 training pairs"),
    "lr: 0": ("--lr 0", "argument --lr: expected a number > 0, got '0'"),
    "lr: negative": ("--lr -1", "argument --lr: expected a number > 0, got '-1'"),
    "lr: nan": ("--lr nan", "argument --lr: expected a number > 0, got 'nan'"),
    "lr: inf": ("--lr inf", "argument --lr: expected a number > 0, got 'inf'"),
    "lr: a word": ("--lr fast", "argument --lr: expected a number > 0, got 'fast'"),
    "patience": ("--patience 0", "argument --patience: expected an integer >= 1, got '0'"),
    "size: 0": ("--size 0", "argument --size: expected an integer >= 1, got '0'"),
    "size: odd": ("--size 7", "load expected an even size for the halves of the digits, got 7"),
    "size: too small": pytest.param(
        "--model concat --backbones test_vit --size 4",
        "could not be traced with inputs",
        marks=needs_later_torch("takes images on the meta device that are smaller than the kernel of a convolution"),
    ),
    "seeds: nothing": ("--seeds", "argument --seeds: expected at least one argument"),
    "seeds: twice": ("--seeds 1 1", "--seeds expected different integers >= 0, got [1, 1]"),
    "seeds: negative": ("--seeds -1", "argument --seeds: expected an integer >= 0, got '-1'"),
    "output: nothing": (["--output", ""], "argument --output: '' is no folder that can be written to: it has no name"),
    "output: a file": ("--output text", "argument --output: 'text' is no folder that can be written to: Not a directory"),
    "output: in a file": ("--output text/in", "'text/in' is no folder that can be written to: Not a directory"),
    "output: locked": ("--output locked/in", "'locked/in' is no folder that can be written to: Permission denied"),
    "output: a file for the run": ("--output taken", f"'taken/{RUN}' is no folder"),
    "output: a folder for a file": ("--output full", f"Is a directory: 'full/{RUN}/model.safetensors'"),
    "save-every": ("--save-every 0", "argument --save-every: expected an integer >= 1, got '0'"),
    "mixed-precision": ("--mixed-precision zzz", "argument --mixed-precision: invalid choice: 'zzz'"),
    "workers": ("--workers -1", "argument --workers: expected an integer >= 0, got '-1'"),
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder, in which the command runs, with all kinds of things that are not what they should be."""
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "locked", "taken", f"full/{RUN}/model.safetensors"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("text", f"taken/{RUN}", f"taken/{RUN}".replace("fuse", "drifa_net")):
        (tmp_path / name).write_text("text")
    make_unwritable(monkeypatch, "locked")
    good = write_archive(tmp_path / "good.npz", count=80, split=True, size=(8, 8))
    whole = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "zero.npz").write_bytes(b"")
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "byte.npz").write_bytes(whole[:500] + bytes([whole[500] ^ 255]) + whole[501:])
    ones = np.zeros_like(good["labels"])
    for name, change in (
        ("one", {"classes": ["a"], "labels": ones}),
        ("half", {"labels": ones}),
        ("twice", {"classes": ["a", "a"]}),
        ("unsplit", {"split": None}),
        ("split", {"split": good["split"] // 2}),
    ):
        np.savez(tmp_path / f"{name}.npz", **{key: array for key, array in (good | change).items() if array is not None})
    yield tmp_path
    AcceleratorState._reset_state(reset_partial_state=True)


def untouched(files, capsys, main, arguments):
    """The line that a command answers with; no file has changed."""
    before = tree(files)
    given = arguments.split() if isinstance(arguments, str) else arguments
    said = refused(capsys, main, given, silent=main is not train.main)
    assert tree(files) == before
    return said


def began(*_, **__):
    pytest.fail("it began")


@pytest.mark.parametrize(("arguments", "message"), TRAIN.values(), ids=TRAIN)
def test_a_bad_argument_of_train_is_one_line(arguments, message, files, capsys, monkeypatch):
    monkeypatch.setattr(train.Run, "train", began)
    model = ["--model", "fuse"] if "full" in arguments or "taken" in arguments else []
    given = [*(arguments.split() if isinstance(arguments, str) else arguments), *model]
    small = [] if "--size" in given or "--data" in given else ["--size", "8"]
    tiny = [] if {"--width", "--model"} & {*given} else ["--width", "4"]
    assert message in untouched(files, capsys, train.main, [*given, *small, *tiny])


def record(model="fuse", seed=0, **changes):
    """What a run leaves."""
    values = dict.fromkeys(("samples", "accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece", "nll"), 0.5)
    configuration = {"model": model, "data": ["digits"], "seed": seed, "lr": 0.002, "epochs": 1, "batch_size": 64}
    configuration |= {"width": 16, "reduction": None, "backbones": ["test_resnet"]}
    history = [{"validation": {"digit": values, "parity": values}}]
    found = {"configuration": configuration, "data": {}, "parameters": 1, "history": history}
    return found | {"test": {"digit": values, "parity": values}} | changes


DAMAGED = {
    "no byte": "",
    "cut short": json.dumps(record())[:100],
    "no JSON": "text",
    "no text": "\udcff",
    "a list": "[1]",
    "nothing in it": "{}",
    "too deep": "[" * 100_000,
    "no configuration": json.dumps(record(configuration=[])),
    "words for numbers": json.dumps(record(test={"digit": {"samples": "many"}})),
    "no history": json.dumps(record(history=[])),
}


@pytest.fixture
def run(files):
    """The folder of a run that left a record and weights of nothing."""
    folder = files / "runs" / RUN
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(record()))
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_record_is_one_line_of_every_command(text, files, run, capsys, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", files / "results")
    (run / "run.json").write_text(text, errors="surrogateescape")
    small = ["--size", "8", "--output", "runs"]
    for main, arguments in (
        (train.main, ["--model", "fuse", "--backbones", "test_resnet", *small]),
        (evaluate.main, [run, *small[2:]]),
        (figures.main, [run, *small[2:]]),
        (report.main, [run]),
        (report.main, ["--trials", run]),
    ):
        assert f"{RUN}/run.json is damaged" in untouched(files, capsys, main, arguments)


@pytest.mark.parametrize("content", [b"", b"text", b"x" * 999, None], ids=["no byte", "text", "other bytes", "another network"])
def test_damaged_weights_are_one_line(content, files, run, capsys, monkeypatch):
    monkeypatch.setattr("examples.drifa_net.networks.build", lambda *_: torch.nn.Linear(2, 2))
    if content is not None:
        (run / "model.safetensors").write_bytes(content)
    configuration = record()["configuration"] | {"size": 8}
    text = json.dumps(record(data=train.load(size=8).report, configuration=configuration))
    other = run.with_name("fuse-seed1")
    other.mkdir()
    (run / "run.json").write_text(text)
    (other / "run.json").write_text(text.replace('"seed": 0, "lr"', '"seed": 1, "lr"'))
    (other / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    for main, runs in ((evaluate.main, [run, other]), (figures.main, [run])):
        said = untouched(files, capsys, main, [*runs, "--output", "runs"])
        assert "model.safetensors is damaged, or of another network" in said


@pytest.mark.parametrize("content", [b"", b"text", "a list", "other keys", None], ids=str)
def test_a_damaged_checkpoint_is_one_line(content, files, capsys, monkeypatch):
    monkeypatch.setattr(train.Run, "train", began)
    path = files / "runs" / RUN / "checkpoint.pt"
    path.parent.mkdir(parents=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save({"a list": [1], "other keys": {"learner": {}}}.get(content, state()), path)
    arguments = ["--model", "fuse", "--backbones", "test_resnet", "--size", "8", "--output", "runs"]
    said = untouched(files, capsys, train.main, arguments)
    assert f"{RUN}/checkpoint.pt {'does not fit this network' if content is None else 'is damaged'}" in said
    assert "delete it to begin again" in said


def state():
    """A checkpoint of the right run and of a network that has no weights."""
    options = train.parser("").parse_args(["--model", "fuse", "--backbones", "test_resnet", "--size", "8"])
    data = train.load(size=8)
    configuration = train.configured(options, 0, data, train.Accelerator(cpu=True))
    return dict.fromkeys(CHECKPOINT) | {"configuration": configuration, "learner": {}}


OTHERS = {
    evaluate.main: {
        "": "the following arguments are required: members",
        "nowhere": "argument members: 'nowhere' cannot be read: No such file",
        "text": "text holds no run.json",
        "empty": "empty holds no run.json: name the folder of a finished run",
        "runs --data": "argument --data: expected at least one argument",
        "runs --samples 0": "argument --samples: expected an integer >= 1, got '0'",
        "runs --samples some": "argument --samples: expected an integer >= 1, got 'some'",
        "runs --batch-size -1": "argument --batch-size: expected an integer >= 1, got '-1'",
        "runs --output text": "argument --output: 'text' is no folder that can be written to: Not a directory",
        "runs --output locked": "argument --output: 'locked' is no folder that can be written to: Permission denied",
    },
    figures.main: {
        "": "the following arguments are required: runs",
        "nowhere": "argument runs: 'nowhere' cannot be read: No such file",
        "empty": "empty holds no run.json: name the folder of a finished run",
        "runs --data nowhere": "argument --data: 'nowhere' cannot be read: No such file",
        "runs --output text": "argument --output: 'text' is no folder that can be written to: Not a directory",
        "runs --embedded 0": "argument --embedded: expected an integer >= 1, got '0'",
    },
    report.main: {
        "nowhere": "argument runs: 'nowhere' cannot be read: No such file",
        "--trials": "argument --trials: expected at least one argument",
        "--trials empty": "empty holds no run.json: name the folder of a finished run",
        "empty": "empty holds no run.json: name the folder of a finished run",
    },
    missing_modalities.main: {
        "extra": "unrecognized arguments: extra",
        "--data nowhere": "argument --data: 'nowhere' cannot be read: No such file",
        "--data empty": "empty is no npz archive of plain arrays",
        "--data zero.npz": "zero.npz is no npz archive of plain arrays, or is damaged",
        "--data cut.npz": "cut.npz is no npz archive of plain arrays, or is damaged",
        "--data one.npz": "one.npz has one class alone",
        "--views zz": "the digits has no view 'zz' of 1797 samples: it has upper, middle, lower",
        "--views upper": "the digits has 1 views (upper): fusion needs at least two",
        "--views": "argument --views: expected at least one argument",
        "--output text": "argument --output: 'text' is no folder that can be written to: Not a directory",
        "--output full": "Is a directory: 'full/missing_modalities_scikit-learn_digits.json'",
        "--fast 1": "unrecognized arguments: 1",
    },
    evidence.main: {
        "extra": "unrecognized arguments: extra",
        "--data nowhere": "argument --data: 'nowhere' cannot be read: No such file",
        "--data empty": "No such file or directory: 'empty/train'",
        "--data zero.npz": "zero.npz is no npz archive of plain arrays, or is damaged",
        "--data one.npz": "one.npz needs at least two classes",
        "--data unsplit.npz": "unsplit.npz has no array 'split'",
        "--data half.npz --images 32": "the train images of half have none of class 'b'",
        "--data good.npz": "--images 1000: good has 40 to train on, and a batch needs 32",
        "--data good.npz --size 32": "--size is for folders of images",
        "--quick --images 31": "--images 31: digits has 718 to train on, and a batch needs 32",
        "--quick --images 800": "--images 800: digits has 718 to train on, and a batch needs 32",
        "--quick --size 0": "argument --size: expected an integer >= 1, got '0'",
        "--quick --network zzz": "--network: timm has no network 'zzz'",
        "--quick --sites blocks.99": "at= names no module of EfficientNet: ['blocks.99'], for example blocks.6",
        "--quick --arms zzz": "argument --arms: invalid choice: 'zzz'",
        "--quick --seeds 0": "argument --seeds: expected an integer >= 1, got '0'",
        "--quick --images -1": "argument --images: expected an integer >= 1, got '-1'",
        "--quick --epochs nan": "argument --epochs: expected an integer >= 1, got 'nan'",
        "--quick --output text": "argument --output: 'text' is no folder that can be written to: Not a directory",
        "--quick --output full": "Is a directory: 'full/digits.jsonl'",
        "--report --output empty": "empty holds no rows of a test to report",
        "--report --epochs 3": "--epochs is not for --report",
        "--report --arms MFA": "--arms is not for --report",
    },
    quickstart.main: {
        "extra": "unrecognized arguments: extra",
        "--output text": "argument --output: 'text' is no folder that can be written to: Not a directory",
        "--output locked/in": "argument --output: 'locked/in' is no folder that can be written to: Permission denied",
        "--output full": "Is a directory: 'full/quickstart.pt'",
    },
}


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [(main, arguments, message) for main, cases in OTHERS.items() for arguments, message in cases.items()],
    ids=[f"{main.__module__.rpartition('.')[2]} {arguments}" for main, cases in OTHERS.items() for arguments in cases],
)
def test_a_bad_argument_of_the_other_commands_is_one_line(main, arguments, message, files, capsys, monkeypatch):
    (files / "runs").mkdir()
    for name in ("digits.jsonl", "missing_modalities_scikit-learn_digits.json", "quickstart.pt"):
        (files / "full" / name).mkdir()
    monkeypatch.setattr(evidence, "run", began)
    monkeypatch.setattr(missing_modalities, "runs", began)
    monkeypatch.setattr(quickstart, "Demo", began)
    monkeypatch.setattr(report, "RESULTS", files / "results")
    if main is evidence.main and "--report" not in arguments and "--output" not in arguments:
        arguments += " --output new"
    if main is evidence.main and "--arms" not in arguments and "--report" not in arguments:
        arguments += " --arms MFA"  # not LoRA, whose package may be missing
    assert message in untouched(files, capsys, main, arguments)


def row(**changes):
    """A row of the evidence."""
    kind = {"network": "x", "sites": ["a"], "seeds": 5, "images": 200, "epochs": 2, "rates": [0.01], "batch": 32}
    numbers = {"balanced_accuracy": 0.5, "macro_f1": 0.5, "ece": 0.1, "rate": 0.01, "trained": 5, "kept_mb": 1.0}
    return {"arm": "MFA", "seed": 0, "part": "test", "deviations": [0.1], "torch": "2", **numbers, "protocol": kind} | changes


ROWS = {
    "cut short": (json.dumps(row())[:50], "line 2, is no row of a run: delete the line to do that run again"),
    "another list": ("[1, 2]", "line 2, is no row of a run"),
    "nothing in it": ("{}", "line 2, is no row of a run"),
    "no protocol": (json.dumps(row(protocol=None)), "line 2, is no row of a run"),
}


@pytest.mark.parametrize(("line", "message"), ROWS.values(), ids=ROWS)
def test_damaged_rows_of_the_evidence_are_one_line(line, message, files, capsys, monkeypatch):
    monkeypatch.setattr(evidence, "run", began)
    (files / "digits.jsonl").write_text(f"{json.dumps(row())}\n{line}\n")
    for arguments in ("--quick --arms MFA --output .", "--report --output ."):
        assert f"digits.jsonl, {message}" in untouched(files, capsys, evidence.main, arguments)


@pytest.mark.parametrize("text", ["", "[]", '{"MFA": "soon"}', '{"MFA": 1'])
def test_damaged_times_of_the_evidence_are_one_line(text, files, capsys):
    (files / "digits.jsonl").write_text(json.dumps(row()) + "\n")
    (files / "digits-steps.json").write_text(text)
    said = untouched(files, capsys, evidence.main, "--report --output .")
    assert "digits-steps.json is damaged: delete it, and the times are measured again" in said


def test_the_evidence_does_not_go_on_with_rows_of_another_protocol(files, capsys, monkeypatch):
    monkeypatch.setattr(evidence, "run", began)
    (files / "digits.jsonl").write_text(json.dumps(row()) + "\n")
    assert "holds rows of another protocol" in untouched(files, capsys, evidence.main, "--quick --arms MFA --output .")


def test_the_evidence_without_peft_is_one_line_before_any_run(files, capsys, monkeypatch):
    monkeypatch.setattr(evidence, "run", began)
    monkeypatch.setattr(evidence.importlib.util, "find_spec", lambda name: None)
    assert "the arm LoRA needs peft" in untouched(files, capsys, evidence.main, "--quick --output .")


def test_what_is_given_beside_quick_counts(files, monkeypatch):
    seen = []
    monkeypatch.setattr(evidence, "run", lambda collection, protocol, rows, arms, console: seen.append(protocol))
    monkeypatch.setattr(evidence, "report", lambda *_: None)
    monkeypatch.setattr(evidence.drifa_attn, "plan", lambda *_, **__: None)
    evidence.main("--quick --seeds 3 --images 100 --arms MFA --output new".split())
    (chosen,) = seen
    assert (chosen.seeds, chosen.images, chosen.epochs, chosen.rates) == (3, 100, 2, (1e-2,))


LABELS = np.arange(30) % 2
VIEWS = {"a": np.ones((30, 3)), "b": np.ones((30, 2))}
MISSING = {
    "one class": ({"labels": np.zeros(30, int)}, "x.npz has one class alone: it needs at least two"),
    "names": ({"labels": np.array(["a", "b"] * 15)}, "x.npz needs an integer for each sample as labels, got <U1 (30,)"),
    "fractions": ({"labels": LABELS + 0.5}, "x.npz needs an integer for each sample as labels, got float64 (30,)"),
    "one hot": ({"labels": np.eye(30, dtype=int)}, "x.npz needs an integer for each sample as labels, got int64 (30, 30)"),
    "none": ({"labels": np.zeros(0, int)}, "x.npz needs an integer for each sample as labels, got int64 (0,)"),
    "views of no feature": ({"a": np.ones((30, 0))}, "x.npz has 1 views (b): fusion needs at least two"),
    "another class at test": ({"test_labels": [0, 9], "test_a": np.ones((2, 3))}, "test samples of class 9"),
    "no view at test": ({"test_labels": [0, 1]}, "x.npz has test labels but none of the views at test"),
    "other features at test": ({"test_labels": [0], "test_a": np.ones((1, 4))}, "view 'a' of x.npz has other features"),
    "nan at test": ({"test_labels": [0], "test_a": np.full((1, 3), np.nan)}, "view 'a' of x.npz holds values that are not"),
}


@pytest.mark.parametrize(("change", "message"), MISSING.values(), ids=MISSING)
def test_wrong_arrays_of_views_are_one_line(change, message, files, capsys, monkeypatch):
    monkeypatch.setattr(missing_modalities, "runs", began)
    np.savez("x.npz", **{"labels": LABELS, **VIEWS, **change})
    assert message in untouched(files, capsys, missing_modalities.main, "--data x.npz")


def test_classes_may_have_any_numbers_and_views_may_be_chosen(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, labels=np.array([7, -4, 1000] * 10), test_labels=[1000], test_b=np.ones((1, 2)), **VIEWS)
    samples, test = missing_modalities.read(path, ["b", "a"])
    assert list(samples.views) == ["b", "a"]
    assert samples.labels.tolist() == [1, 0, 2] * 10
    assert (list(test.views), test.labels.tolist()) == (["b"], [2])
    samples, test = missing_modalities.read(None, ["lower", "upper"])
    assert (list(samples.views), test) == (["lower", "upper"], None)


def test_runs_of_several_kinds_are_not_reported_together(files, capsys, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", files / "results")
    kinds = {
        "one": record(),
        "again": record(),
        "longer": record(configuration=record(seed=1)["configuration"] | {"epochs": 9}),
        "unknown": record("unet"),
        "other": record("concat", test={"cell": record()["test"]["digit"]}),
    }
    for name, run in kinds.items():
        (files / name).mkdir()
        (files / name / "run.json").write_text(json.dumps(run))
    for names, message in (
        ("one again", "two of these runs would be fuse-seed0.json"),
        ("one longer", "fuse-seed1 differs from other runs of its model in more than the seed"),
        ("unknown", "unet-seed0 is of a model that the table does not know"),
        ("one other", "concat-seed0 has other tasks, cell"),
    ):
        assert message in untouched(files, capsys, report.main, names)
