"""Folders and repositories: what is written, and how it is read, from the disk and from a hub on the loopback."""

import json
import re
import shutil

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from torch import nn

import drifa_attn
from drifa_attn import attention_parameters, from_pretrained, fuse, load_attention, plan, save_pretrained, wrap
from drifa_attn.files.source import Address, address
from tests._compare import assert_same_bits
from tests._hub import hub, told
from tests._wrapping import strengthen_, wrapped


def fresh():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=3).eval()


def trained():
    """A wrapped network whose attention does something."""
    return strengthen_(wrap(fresh()))


def lines(card):
    """The lines of a card that load the attention."""
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


@pytest.fixture
def offline(monkeypatch):
    """`pretrained=True` builds the same network without a download."""
    create = timm.create_model

    def build(name, pretrained=False, **options):
        torch.manual_seed(0)
        return create(name, **options).eval()

    monkeypatch.setattr(timm, "create_model", build)


# Folders ------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_lines_of_the_card_load_the_folder(tmp_path, monkeypatch, offline):
    model, x, folder = trained(), torch.randn(2, 3, 64, 64), tmp_path / "mine"
    save_pretrained(model, folder, classifier=True)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "attention.safetensors", "plan.json"]
    monkeypatch.chdir(tmp_path)
    code, space = lines((folder / "README.md").read_text()), {}
    assert 'timm.create_model("test_resnet.r160_in1k", pretrained=True, num_classes=3)' in code
    assert len(code.split("\n\n")[0].splitlines() + code.split("\n\n")[1].splitlines()) == 3
    exec(code, space)
    assert_same_bits(space["model"](x), model(x))
    assert_same_bits(from_pretrained(folder, backbone=fresh())(x), model(x))


def test_the_plan_is_there_for_programs_and_for_people(tmp_path):
    save_pretrained(trained(), tmp_path, metrics={"accuracy": 0.91})
    written, expected = json.loads((tmp_path / "plan.json").read_text()), plan(fresh())
    costs = [(site["module"], site["params"], site["flops"]) for site in written["sites"]]
    assert costs == [(site.module, site.params, site.flops) for site in expected.sites]
    with safe_open(tmp_path / "attention.safetensors", framework="pt") as file:
        inside = json.loads(file.metadata()["drifa_attn"])
    cut = [{key: value for key, value in site.items() if key not in ("params", "flops")} for site in written["sites"]]
    assert written | {"sites": cut} == inside
    card = (tmp_path / "README.md").read_text()
    for site in expected.sites:
        assert f"| `{site.name}` | {'×'.join(map(str, site.shape))} | `b c ...` | {site.channels} | " in card
    total = next(line for line in str(expected).splitlines() if "sites add" in line)
    assert total.strip().partition(" and ")[0] in card


def test_the_front_matter_is_what_the_hub_reads(tmp_path):
    metrics = {"accuracy": 0.91, "own | images": {"accuracy": "88.1 ± 0.4", "AUC": 0.95}}
    save_pretrained(trained(), tmp_path, license="apache-2.0", metrics=metrics, card={"datasets": ["user/images"]})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {
        "base_model": "timm/test_resnet.r160_in1k",
        "datasets": ["user/images"],
        "library_name": "drifa_attn",
        "license": "apache-2.0",
        "metrics": ["accuracy", "AUC"],
        "tags": ["attention", "drifa"],
    }
    rows = ["| – | accuracy | 0.91 |", "| own \\| images | accuracy | 88.1 ± 0.4 |", "| own \\| images | AUC | 0.95 |"]
    assert "\n".join(rows) in card.text
    assert card.text.lstrip().startswith(f"# {tmp_path.name}\n")


def test_the_card_says_which_weights_it_does_not_hold(tmp_path):
    model = trained()
    save_pretrained(model, tmp_path)
    told = "weights of the network that are not in the file could be trained"
    card = (tmp_path / "README.md").read_text()
    backbone = sum(p.numel() for p in fresh().parameters())
    assert f"{backbone / 1000:.2f} k {told}" in card
    assert "## Metrics" not in card
    assert "`fc`" not in card
    drifa_attn.freeze_backbone(model)
    save_pretrained(model, tmp_path, classifier=True)
    card = (tmp_path / "README.md").read_text()
    assert told not in card
    assert "holds the attention, beside it `fc`, and not the other weights" in card


def gate(channels):
    """An attention of the user's own."""
    return nn.Conv2d(channels, channels, 1)


@pytest.mark.parametrize(("attention", "name"), [(gate, "gate"), (lambda channels: gate(channels), "...")])
def test_what_only_the_user_has_stands_in_the_lines_of_the_card(attention, name, tmp_path):
    save_pretrained(wrap(fresh(), attention=attention), tmp_path, backbone='mine.build("x")')
    card = (tmp_path / "README.md").read_text()
    loading = f'model = drifa_attn.load_attention(backbone, "{tmp_path.name}", attention={name})'
    assert lines(card) == f'import drifa_attn\n\nbackbone = mine.build("x")\n{loading}\n'
    assert "base_model" not in card


@torch.no_grad()
def test_a_fused_network_has_a_card_too(tmp_path, monkeypatch, offline):
    branches = {"left": timm.create_model("test_resnet"), "right": wrap(timm.create_model("test_resnet"))}
    net = strengthen_(fuse(branches, tasks={"digit": 4}).eval())
    x = {"left": torch.randn(2, 3, 64, 64), "right": torch.randn(2, 3, 64, 64)}
    save_pretrained(net, tmp_path / "both")
    card = (tmp_path / "both" / "README.md").read_text()
    assert f"```text\n{net.plan}\n```" in card
    assert "Within right:" in card
    assert "Within left:" not in card
    monkeypatch.chdir(tmp_path)
    space = {}
    exec(lines(card), space)
    assert_same_bits(space["model"](x)["digit"], net(x)["digit"])
    costs = json.loads((tmp_path / "both" / "plan.json").read_text())["costs"]
    assert [one["params"] for one in costs["stages"]] == [stage.params for stage in net.plan.stages]


def test_nothing_is_written_unless_all_of_it_can_be(tmp_path):
    plain, model, _ = fresh(), *wrapped("torchvision resnet")
    net = fuse({"a": fresh(), "b": fresh()}, tasks={"digit": 4})
    folder = tmp_path / "none"
    for network, options, error, message in [
        (plain, {}, ValueError, "ResNet holds no attention"),
        (model, {}, ValueError, "ResNet does not say how it is built: pass backbone= as a name of timm, or as the expression"),
        (model, {"backbone": "x", "metrics": [0.9]}, TypeError, "metrics expected .*, got list"),
        (model, {"backbone": "x", "metrics": {"a": torch.ones(1)}}, TypeError, r"metrics expected numbers, .*tensor\(\[1"),
        (
            model,
            {"backbone": "x", "card": "mit"},
            TypeError,
            "save_pretrained expected card as a dict of front matter, got str",
        ),
        (model, {"backbone": {"a": "x"}}, TypeError, "backbone expected a string for one network, got dict"),
        (model, {"backbone": "x", "classifier": "head"}, ValueError, "has no module 'head'"),
        (net, {"backbone": {"a": "x"}}, TypeError, r"backbone expected {modality: string} for \['a', 'b'\], got {'a': 'x'}"),
        ("resnet50", {}, TypeError, "save_pretrained expected an nn.Module, got str"),
    ]:
        with pytest.raises(error, match=message):
            save_pretrained(network, folder, **options)
    assert not folder.exists()


def test_addresses_are_read():
    assert address("hf://user/name") == Address("user/name", None, "attention.safetensors")
    assert address("hf://user/name@v1.0") == Address("user/name", "v1.0", "attention.safetensors")
    assert address("hf://user/name/a/b.bin") == Address("user/name", None, "a/b.bin")
    assert address("hf://user/name@refs%2Fpr%2F1/b.bin") == Address("user/name", "refs/pr/1", "b.bin")
    for text in ("hf://", "hf://name", "hf://user/", "hf://user/name@", "hf:///user/name"):
        with pytest.raises(ValueError, match="a file of the hub is written .hf://user/name.*, got"):
            load_attention(fresh(), text)
    with pytest.raises(ValueError, match="from_pretrained got revision='v1' for .*, which is here on the disk"):
        from_pretrained(".", backbone=fresh(), revision="v1")
    with pytest.raises(ValueError, match="hf://us er/name is no name of a repository"):
        from_pretrained("us er/name", backbone=fresh())


# A hub --------------------------------------------------------------------------------------------------------------------


def total(model):
    """What the client computes, too."""
    return sum(p.detach().double().abs().sum().item() for p in attention_parameters(model))


LOAD = "total(drifa_attn.load_attention(fresh(), {!r}))"
MISSING = {
    "hf://user/other": ["FileNotFoundError", "hf://user/other is no repository of the hub, or a private one: check the name"],
    "hf://user/name@v9": [
        "FileNotFoundError",
        "hf://user/name@v9: the repository user/name has no revision 'v9': name a branch",
    ],
    "hf://user/name/x.bin": ["FileNotFoundError", "hf://user/name has no file 'x.bin': check its name"],
    "hf://user/whole": [
        "FileNotFoundError",
        "hf://user/whole has no file 'attention.safetensors': it was not written by push_to",
    ],
}


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """Two processes of a user: one with a hub, one without a connection; what they and the hub say."""
    folder, home = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("home")
    first, second = trained(), trained()
    second.layer1[0].conv1.weight.data.add_(1)
    for parameter in attention_parameters(second):
        parameter.data.add_(1)
    save_pretrained(first, folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    torch.save(second.state_dict(), folder / "pytorch_model.bin")
    with hub() as server:
        server.repos["user/name"] = {"main": files, "v1": {}}
        save_pretrained(second, folder)
        server.repos["user/name"]["v1"] = {path.name: path.read_bytes() for path in folder.iterdir()}
        server.repos["user/whole"] = {"main": {"pytorch_model.bin": (folder / "pytorch_model.bin").read_bytes()}}
        online = told(
            server.url,
            home,
            LOAD.format("hf://user/name"),
            LOAD.format("hf://user/name@v1"),
            LOAD.format("hf://user/whole/pytorch_model.bin"),
            'total(drifa_attn.from_pretrained("user/name", backbone=fresh(), revision="v1"))',
            *map(LOAD.format, MISSING),
            'drifa_attn.push_to_hub(net := drifa_attn.wrap(fresh()), "me/new", token="hf_write", license="mit")',
            'drifa_attn.push_to_hub(net, "me/new", token="hf_read")',
        )
        url, asked, repos = server.url, list(server.asked), dict(server.repos)
    steps = map(LOAD.format, ["hf://user/name", "hf://user/name@v1", "hf://user/other"])
    offline = told(url, home, *steps, HF_HUB_OFFLINE="1")
    yield {"totals": [total(first), total(second)], "online": online, "offline": offline, "asked": asked, "repos": repos}
    shutil.rmtree(home)


def test_a_repository_is_loaded_in_any_revision_and_by_any_file(session):
    first, second = session["totals"]
    assert first != second
    assert session["online"][:4] == pytest.approx([first, second, second, second], rel=1e-12)


def test_what_is_missing_is_named(session):
    for said, (kind, message) in zip(session["online"][4:8], MISSING.values(), strict=True):
        assert said[0] == kind
        assert said[1].startswith(message)
        assert "\n" not in said[1]


def test_a_repository_is_made_and_written(session):
    commit, refused = session["online"][8:]
    assert re.fullmatch(r"http://127.0.0.1:\d+/me/new/commit/0{40}", commit)
    files = session["repos"]["me/new"]["main"]
    assert sorted(files) == ["README.md", "attention.safetensors", "plan.json"]
    card = files["README.md"].decode()
    assert "license: mit\n" in card
    assert "# new\n" in card
    assert 'drifa_attn.load_attention(backbone, "hf://me/new")' in card
    assert refused[0] == "ConnectionError"
    assert refused[1].startswith("push_to_hub could not write to 'me/new' (HfHubHTTPError: ")
    assert refused[1].endswith("log in with a token that may write (hf auth login), or pass token=.")
    assert "\n" not in refused[1]


def test_the_cache_serves_without_a_connection(session):
    first, second = session["totals"]
    assert session["offline"][:2] == pytest.approx([first, second], rel=1e-12)
    kind, message = session["offline"][2]
    assert kind == "ConnectionError"
    assert message.startswith("hf://user/other could not be reached, and its 'attention.safetensors' is not in the cache")
    downloads = [line for line in session["asked"] if line.startswith("GET /user/name/resolve/main/")]
    assert len(downloads) == 1
