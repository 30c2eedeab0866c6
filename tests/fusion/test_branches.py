"""What branches read and give: integers, several tensors, several maps; and branches whose stages are computed twice."""

import copy
from collections import OrderedDict

import pytest
import timm
import torch
from torch import nn

import drifa_attn
from drifa_attn import fuse
from tests._compare import assert_same_bits, assert_same_math
from tests.cases import loss
from tests.networks import Net

TASKS = {"t": 3}


class Text(nn.Module):
    """Tokens to a vector."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.one = nn.Sequential(nn.Conv1d(16, 16, 3, padding=1), nn.ReLU())
        self.two = nn.Sequential(nn.Conv1d(16, 16, 3, 2, padding=1), nn.ReLU())

    def forward(self, tokens):
        return self.two(self.one(self.embed(tokens).transpose(1, 2))).mean(2)


class Bags(nn.Module):
    """Columns of categories to a vector."""

    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(10, 16)
        self.one, self.two = nn.Sequential(nn.Linear(16, 16), nn.ReLU()), nn.Linear(16, 16)

    def forward(self, columns):
        return self.two(self.one(self.bag(columns)))


BRANCHES = {"text": (Text, torch.randint(1, 50, (4, 12))), "bags": (Bags, torch.randint(0, 10, (4, 5)))}


@pytest.mark.parametrize("example", ["values", "int32", "no values"])
@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_may_read_integers(name, example):
    """Its example's own values are tried, or zeros where it has none."""
    build, ids = BRANCHES[name]
    torch.manual_seed(0)
    branch = build().eval()
    given = {"values": ids, "int32": ids.int(), "no values": ids.to("meta")}[example]
    image = timm.create_model("test_resnet", num_classes=0).eval()
    net = fuse({"image": image, "other": branch}, TASKS, example_inputs={"other": given}, classifiers={"other": None}).eval()
    inputs = {"image": torch.randn(4, 3, 32, 32), "other": ids.to(given.dtype)}
    with torch.no_grad():
        assert_same_bits(net.features(inputs)["other"], branch(inputs["other"]))
        present = torch.tensor([[True, True], [True, False], [False, True], [True, True]])
        padded = inputs | {"other": torch.where(present[:, 1:], inputs["other"], -1)}  # no index of the table
        for task, logits in net(padded, present).items():
            assert_same_math(logits, net(inputs, present)[task])
    net.train()(padded, present)["t"].sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpointing_counts_a_batch_once(momentum):
    """The second run of a stage gives the gradients of the first, and leaves the statistics alone."""
    torch.manual_seed(0)
    backbones = {"a": timm.create_model("test_resnet", num_classes=0), "b": nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))}
    net = fuse(backbones, TASKS, example_inputs={"b": torch.zeros(2, 6)}).double().train()
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)):
        norm.momentum = momentum
    inputs = {"a": torch.randn(4, 3, 64, 64).double(), "b": torch.randn(4, 6).double()}
    results = []
    for enable in (False, True):
        one = copy.deepcopy(net)
        one.set_grad_checkpointing(enable)
        for _ in range(2):
            loss(list(one(inputs).values())).backward()
        results.append([*(p.grad for p in one.parameters()), *one.buffers()])
        norms = [m for m in one.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
        assert {m.momentum for m in norms} == {momentum}
        assert {int(m.num_batches_tracked) for m in norms} == {2}
    for plain, twice in zip(*results, strict=True):
        assert_same_math(plain.double(), twice.double())


# Inputs and outputs of every kind ----------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Tokens and their mask in, a mapping of tokens and a vector out."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 16)
        layers = [nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0) for _ in range(2)]
        self.layers = nn.ModuleList(layers)

    def forward(self, ids, mask=None):
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~mask.bool())
        return OrderedDict(tokens=x, first=x[:, 0])


def text(batch=4):
    ids = torch.randint(0, 50, (batch, 9), generator=torch.Generator().manual_seed(0))
    return {"ids": ids, "mask": (torch.arange(9) < 6).expand(batch, 9).long()}


@pytest.mark.parametrize("given", [text(), tuple(text().values())], ids=["dict", "tuple"])
def test_a_branch_may_take_several_tensors(given, tmp_path):
    torch.manual_seed(0)
    encoder, image = Encoder().eval(), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        alone = encoder(**text())["tokens"].mT.mean(-1)
    backbones = {"text": encoder, "image": timm.create_model("test_resnet")}
    fresh = copy.deepcopy(backbones)
    net = fuse(backbones, TASKS, example_inputs={"text": given}).eval()
    inputs = {"text": given, "image": image}
    with torch.no_grad():
        assert_same_bits(net.features(inputs)["text"], alone)  # the last map of its output
    present = torch.tensor([[True, True], [False, True], [True, False], [True, True]])
    net.train()(inputs, present)["t"].sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    drifa_attn.save_attention(net.eval(), tmp_path / "net.safetensors", classifier=["branches"])
    again = drifa_attn.load_attention(fresh, tmp_path / "net.safetensors", example_input={"text": given}).eval()
    assert_same_bits(again(inputs)["t"], net(inputs)["t"])


def test_none_is_absent():
    net = fuse({"text": Encoder(), "image": timm.create_model("test_resnet")}, TASKS, example_inputs={"text": text()}).eval()
    image = torch.randn(4, 3, 32, 32)
    assert_same_bits(net({"text": None, "image": image})["t"], net({"image": image})["t"])
    with pytest.raises(ValueError, match=r"one batch size .*'text\[ids\]': 3"):
        net({"text": text(3), "image": image})


def test_the_last_of_several_maps_is_read():
    net = fuse({"image": timm.create_model("test_resnet", features_only=True)}, TASKS)
    assert net.outputs["image"].channels == net.heads["t"].in_features == 96


def test_a_linear_layer_at_the_end_takes_a_word():
    def build():
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 10))

    example = {"table": torch.zeros(2, 6)}
    message = (
        r"'table' \(Sequential\) ends in the linear layer '2', whose 10 values .*: classifiers={'table': '2'} takes it off"
    )
    table = build()
    with pytest.raises(ValueError, match=message):
        fuse({"table": table}, TASKS, example_inputs=example)
    assert isinstance(table[2], nn.Linear)
    for classifier, width in (("2", 8), (None, 10)):
        net = fuse({"table": build()}, TASKS, example_inputs=example, classifiers={"table": classifier})
        assert net.heads["t"].in_features == width
    with pytest.raises(ValueError, match=r"classifiers\['table'\] to be the name of a module or None, got ''"):
        fuse({"table": table}, TASKS, example_inputs=example, classifiers={"table": ""})


def test_layouts_decide_where_channels_are():
    f = Net(lambda net, x: x.flatten(2).softmax(-1)[:, :, :5])
    example, options = {"a": torch.zeros(2, 7, 4, 4)}, {"at": [{"a": "f"}]}
    with pytest.raises(ValueError, match="undecided: name it in layouts="):
        fuse({"a": Net(lambda net, x: net.f(x) * 2, f=f)}, TASKS, example_inputs=example, **options)
    for layout, channels in (("b c ...", 7), ("b ... c", 5)):
        layouts = {"a": {"f": layout, "": layout}}
        net = fuse({"a": Net(lambda net, x: net.f(x) * 2, f=f)}, TASKS, example_inputs=example, layouts=layouts, **options)
        assert [net.stages[0]["a"].channels, net.outputs["a"].channels] == [channels, channels]
