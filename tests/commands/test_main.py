"""The command line: what each command says, and that every mistake is one line on stderr with exit status 2."""

import importlib.util
import json
import sys
from importlib.metadata import PackageNotFoundError

import pytest
import timm
import torch
from PIL import Image

import drifa_attn
from drifa_attn.commands import bench, doctor, families, networks, show
from drifa_attn.commands.main import COMMANDS, main, parsers
from tests._commands import refused, tree


def said(capsys, *arguments):
    """What a command prints; it ends well and says nothing on stderr."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0
    printed, errors = capsys.readouterr()
    assert errors == ""
    return printed


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A network's weights, the attention of it for five classes, a fusion, an image, and things that are none of these."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet")
    torch.save(model.state_dict(), folder / "backbone.pth")
    model.reset_classifier(5)
    drifa_attn.wrap(model)
    for parameter in drifa_attn.attention_parameters(model):
        parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    drifa_attn.save_attention(model, folder / "attention.safetensors", classifier=True)
    pair = {"a": timm.create_model("test_resnet"), "b": timm.create_model("test_resnet")}
    drifa_attn.save_attention(drifa_attn.fuse(pair, {"task": 3}), folder / "fused.safetensors")
    Image.effect_noise((200, 180), 80).convert("RGB").save(folder / "image.png")
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "text.png").write_text("text")
    (folder / "folder").mkdir()
    return folder


def test_without_a_command_it_lists_them(capsys):
    printed = said(capsys)
    assert all(f"    {name} " in printed for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_ends_with_an_example_that_parses(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("attention.safetensors", "resnet50.pth", "image.jpg"):
        (tmp_path / file).touch()
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    *_, last = capsys.readouterr().out.strip().splitlines()
    assert last == f"example: {COMMANDS[name].EXAMPLE}"
    program, *arguments = last.removeprefix("example: ").replace("'", "").split()
    assert program == "drifa-attn"
    assert parsers()[0].parse_args(arguments).command == name


def test_plan_is_what_plan_prints(capsys):
    expected = drifa_attn.plan(timm.create_model("test_resnet"), "block", attention="eca")
    assert said(capsys, "plan", "test_resnet", "--at", "block", "--attention", "eca") == f"{expected}\n"
    expected = drifa_attn.plan(timm.create_model("test_resnet"), ["layer1", "layer3"], reduction=None)
    assert said(capsys, "plan", "test_resnet", "--at", "layer1", "layer3", "--reduction", "none") == f"{expected}\n"
    expected = drifa_attn.plan(timm.create_model("test_resnet"), variant="paper")
    assert said(capsys, "plan", "test_resnet", "--variant", "paper") == f"{expected}\n"


@pytest.mark.parametrize(("name", "shape"), [("test_resnet", [32, 32, 32]), ("test_vit", [17, 64])])
def test_plan_as_json_is_for_images_of_the_size(name, shape, capsys):
    plan = json.loads(said(capsys, "plan", name, "--size", "64", "--json"))
    assert plan["name"] == name
    assert plan["attention"] == {"name": "mfa", "options": {"reduction": 16, "init": "identity"}}
    assert plan["sites"][0]["shape"] == shape
    assert plan["flops"] > plan["params"] > sum(site["params"] for site in plan["sites"]) > 0


def test_families_are_listed_and_planned(capsys):
    printed = said(capsys, "families")
    assert all(f"  {family} " in printed for family in ("resnet", "vision_transformer"))
    printed = said(capsys, "families", "test_resnet")
    name, family, *_, stage, block = printed.splitlines()[2].split()
    model = timm.create_model("test_resnet")
    assert (name, family) == ("test_resnet", "resnet")
    assert [int(stage), int(block)] == [len(drifa_attn.plan(model, at).sites) for at in ("stage", "block")]


def test_families_say_why_not(capsys, monkeypatch):
    monkeypatch.setattr(families, "plan", lambda *_: (_ for _ in ()).throw(ValueError("it branches.\nmore")))
    assert said(capsys, "families", "test_resnet").splitlines()[2].split() == [
        *("test_resnet", "resnet", "it", "branches.", "–", "–", "–")
    ]


def test_inspect_says_what_is_inside_and_for_which_network(files, capsys):
    printed = said(capsys, "inspect", files / "attention.safetensors")
    assert "attention.safetensors: attention of ResNet\n" in printed
    assert "attention mfa(reduction=16, init='identity')" in printed
    assert "modules besides attention: fc; without the statistics of batch norms" in printed
    assert 'drifa_attn.load_attention(network, "attention.safetensors"), where network is the same ResNet' in printed
    assert all(f"  {name} " in printed for name in ("act1", "layer1", "layer2", "layer3", "layer4"))
    printed = said(capsys, "inspect", files / "fused.safetensors")
    assert "a fusion of a, b for task (3 classes), fusion='mifa'" in printed
    assert "stage 0, a: act1" in printed
    assert 'load_attention({"a": ..., "b": ...}, "fused.safetensors")' in printed
    data = json.loads(said(capsys, "inspect", files / "attention.safetensors", "--json"))
    assert data["plan"]["network"] == "ResNet"
    assert data["tensors"]["fc.weight"] == {"shape": [5, 96], "dtype": "float32"}


def test_inspect_takes_a_folder_and_an_address_of_the_hub(files, capsys, monkeypatch):
    assert "attention of ResNet" in said(capsys, "inspect", files)
    monkeypatch.setattr("drifa_attn.commands.inspect.located", lambda text: files / "attention.safetensors")
    assert 'drifa_attn.load_attention(network, "hf://user/name")' in said(capsys, "inspect", "hf://user/name")


def test_doctor_says_which_implementation_runs_and_why(capsys):
    data = json.loads(said(capsys, "doctor", "--json"))
    assert data["machine"]["torch"] == torch.__version__.partition("+")[0]
    found = {(row["attention"], row["features"], row["pass"]): row for row in data["paths"] if row["on"].startswith("cpu")}
    for (name, features, mode), row in found.items():
        if name == "MFA(64)":
            x = torch.empty(*map(int, features.split("×")))
            with torch.set_grad_enabled(mode == "training"):
                choice = drifa_attn.ops.explain(drifa_attn.MFA(64), x)
            assert (row["statistics"], row["why"]) == choice
    assert {row["gate"] for row in found.values()} == {"reference", "chunked"}
    assert "which implementation runs" in said(capsys, "doctor")


def test_doctor_says_what_is_not_installed(capsys, monkeypatch):
    def version(package):
        raise PackageNotFoundError

    monkeypatch.setattr(doctor, "version", version)
    assert json.loads(said(capsys, "doctor", "--json"))["machine"]["rich"] == "not installed"


SMALL = ("bench", "--batch", "1", "--channels", "16", "--side", "4", "--seconds", "0.001")


def test_bench_measures_every_way_against_se(capsys, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda layer, **_: (compiled.append(layer), layer)[1])
    rows = [line.split() for line in said(capsys, *SMALL).splitlines()[2:]]
    assert [" ".join(row[:-4]) for row in rows] == ["SE", "MFA, equations", "MFA, fused", "MFA, compiled"]
    assert rows[0][-2:] == ["1.00", "1.00"]
    assert all(float(cell) > 0 for row in rows for cell in row[-4:])
    assert len(compiled) == 1


def test_bench_runs_each_way_as_it_says(monkeypatch):
    modes = []
    monkeypatch.setattr(bench.ops, "use", lambda mode: modes.append(mode) or show_nothing())
    options = parsers()[0].parse_args([*SMALL, "--way", "equations", "fused"])
    x = torch.randn(1, 16, 4, 4)
    for layer in bench.layers(options).values():
        layer(x)
    assert modes == ["reference", "fused"]


class show_nothing:  # noqa: N801 - a context manager
    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


def test_a_compiler_that_is_missing_is_a_note(capsys, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no compiler\nmore")

    monkeypatch.setattr(torch, "compile", lambda layer, **_: fail)
    printed = said(capsys, *SMALL, "--way", "equations", "compiled")
    assert "MFA, compiled: not measured, RuntimeError: no compiler\n" in printed
    assert "MFA, equations" in printed


def test_maps_draws_a_picture_and_says_the_gates(files, tmp_path, capsys):
    out = tmp_path / "maps.png"
    weights = ("--weights", files / "attention.safetensors", "--backbone", files / "backbone.pth")
    printed = said(capsys, "maps", "test_resnet", *weights, files / "image.png", "--class", "3", "--out", out)
    assert "class 3: " in printed
    assert all(f"  {name} " in printed for name in ("act1", "layer1", "layer2", "layer3", "layer4"))
    with Image.open(out) as picture:
        assert picture.width > 1000
        assert len(picture.convert("L").getcolors()) > 50


def test_maps_needs_matplotlib_and_says_how(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    weights = ("--weights", files / "attention.safetensors", "--backbone", files / "backbone.pth")
    line = refused(capsys, main, ["maps", "test_resnet", *weights, files / "image.png", "--out", tmp_path / "maps.png"])
    assert 'maps needs matplotlib: pip install "drifa-attn[plots]"' in line


MISTAKES = {
    "zzz": "invalid choice: 'zzz'",
    "plan": "the following arguments are required: network",
    "plan resnt50": "has no network 'resnt50'; similar names: resnet50",
    "plan test_resnet.zzz --size x": "argument --size: expected an integer >= 1, got 'x'",
    "plan test_resnet --at zzz": "at='zzz' matched 0 of",
    "plan test_resnet --at layer1 zzz": "at= names no module of ResNet: ['zzz']",
    "plan test_resnet --at ( ": "at='(' is no regex",
    "plan test_resnet --attention zzz": "zzz",
    "plan test_resnet --attention eca --reduction 8": "--reduction is of mfa alone, and --attention is eca",
    "plan test_resnet --reduction 0": "argument --reduction: expected an integer >= 1, got '0'",
    "plan test_resnet --variant zzz": "invalid choice: 'zzz'",
    "plan test_resnet --size 0": "argument --size: expected an integer >= 1, got '0'",
    "plan test_resnet --size -1": "argument --size: expected",
    "plan vgg11 --size 8": "could not be traced with inputs [(2, 3, 8, 8)] on the meta device",
    "families zzz*": "no architecture or family of timm",
    "families a b": "unrecognized arguments: b",
    "inspect": "the following arguments are required: file",
    "inspect nowhere": "No such file or directory: nowhere",
    "inspect folder": "folder has no attention.safetensors, which save_pretrained writes",
    "inspect hf://user": 'a file of the hub is written "hf://user/name"',
    "inspect empty.safetensors": "empty.safetensors is no safetensors file, or was cut short",
    "inspect image.png": "image.png is no safetensors file",
    "doctor zzz": "unrecognized arguments: zzz",
    "bench --seconds nan": "argument --seconds: expected a number > 0, got 'nan'",
    "bench --seconds -1": "argument --seconds: expected a number > 0, got '-1'",
    "bench --way zzz": "invalid choice: 'zzz'",
    "bench --channels 0": "argument --channels: expected an integer >= 1, got '0'",
    "bench --device tpu": "argument --device: this machine has cpu",
    "bench --dtype int8": "invalid choice: 'int8'",
    "maps test_resnet image.png": "the following arguments are required: --weights, --out",
    "maps zzz9 image.png --weights attention.safetensors --out o.png": "has no network 'zzz9'",
    "maps test_resnet nowhere --weights attention.safetensors --out o.png": "No such file or directory",
    "maps test_resnet text.png --weights attention.safetensors --out o.png": "cannot identify image file",
    "maps test_resnet image.png --weights nowhere --out o.png": "argument --weights: 'nowhere' cannot",
    "maps test_resnet image.png --weights empty.safetensors --out o.png": "empty.safetensors is no safetensors file",
    "maps test_resnet image.png --weights fused.safetensors --backbone backbone.pth --out o.png": "got ResNet",
    "maps test_resnet image.png --weights attention.safetensors --backbone image.png --out o.png": "image.png does not hold",
    "maps test_resnet image.png --weights attention.safetensors --backbone nowhere --out o.png": "--backbone: 'nowhere' ",
    "maps test_vit image.png --weights attention.safetensors --backbone backbone.pth --out o.png": "does not hold the weights",
    "maps test_resnet image.png --weights attention.safetensors --out o.zzz": "--out o.zzz expected a file that ends in one of",
    "maps test_resnet image.png --weights attention.safetensors --out folder": "--out folder expected a file that ends",
    "maps test_resnet image.png --weights attention.safetensors --out no/o.png": "expected a file in a folder that is there",
    "maps test_resnet image.png --weights attention.safetensors --backbone backbone.pth --out o.png --class 5": "from 0 to 4",
    "maps test_resnet image.png --weights attention.safetensors --backbone backbone.pth --out o.png --site zz": "got site='zz'",
}


@pytest.mark.parametrize(("line", "message"), MISTAKES.items(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_no_file(line, message, files, capsys, monkeypatch):
    monkeypatch.chdir(files)
    before = tree(files)
    assert message in refused(capsys, main, line.split())
    assert tree(files) == before


def test_a_plan_that_was_changed_is_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "x").touch()
    plan = {"classifier": [], "batch_norm": False, "network": "ResNet", "attention": {"name": "mfa", "options": {}}}
    for sites in ([{}], [3], 3):
        monkeypatch.setattr("drifa_attn.commands.inspect.read", lambda path, sites=sites: (plan | {"sites": sites}, {}))
        line = refused(capsys, main, ["inspect", tmp_path / "x"])
        assert "x has a plan that was changed after save_attention wrote it" in line


def test_a_reader_that_goes_away_and_an_interruption_end_quietly(monkeypatch, capfd):
    def gone(options):
        raise BrokenPipeError

    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.dup2", lambda *_: None)
    monkeypatch.setattr(COMMANDS["doctor"], "run", gone)
    assert main(["doctor"]) == 0
    monkeypatch.setattr(COMMANDS["doctor"], "run", interrupted)
    assert main(["doctor"]) == 130
    assert capfd.readouterr() == ("", "")


TABLE = show.Table("title", ("name", "number"), [("[b]a[/b]", "1"), ("long", "1000")], ["note"])
PLAIN = "title\n  name      number\n  [b]a[/b]       1\n  long        1000\nnote\n"


def test_tables_are_plain_in_pipes_and_without_rich(capsys, monkeypatch):
    show.show(TABLE)
    assert capsys.readouterr().out == PLAIN
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    show.show(TABLE)
    assert capsys.readouterr().out == PLAIN


def test_tables_are_of_rich_on_a_terminal(capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show.show(TABLE)
    printed = capsys.readouterr().out
    assert "│" in printed
    assert all(text in printed for text in ("title", "[b]a[/b]", "1000", "note"))


def test_a_network_that_timm_cannot_build_is_one_line(monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: (_ for _ in ()).throw(AssertionError("no such size")))
    with pytest.raises(ValueError, match="timm cannot build test_vit for 3 pixels: no such size"):
        networks.create("test_vit", 3)
