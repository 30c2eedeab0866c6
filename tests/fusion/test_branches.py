"""Branches that read integers, and branches whose stages are computed twice."""

import copy

import pytest
import timm
import torch
from torch import nn

from drifa_attn import fuse
from tests._compare import assert_same_bits, assert_same_math
from tests.cases import loss

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
    net = fuse({"image": image, "other": branch}, TASKS, example_inputs={"other": given}).eval()
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
