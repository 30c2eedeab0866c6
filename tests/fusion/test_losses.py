"""The loss of several tasks."""

import math

import pytest
import torch
import torch.nn.functional as F

from drifa_attn import TaskLoss
from tests._compare import assert_same_math

LOGITS = {"a": torch.randn(4, 3), "b": torch.randn(4, 5)}
LABELS = {"a": torch.tensor([0, 2, -100, 1]), "b": torch.tensor([4, -100, -100, 0])}


def each():
    return [F.cross_entropy(LOGITS[t], LABELS[t], ignore_index=-100) for t in "ab"]


@pytest.mark.parametrize(("weights", "expected"), [(None, (0.5, 0.5)), ({"b": 2, "a": 0.25}, (0.25, 2))])
def test_fixed_weights_are_the_equation(weights, expected):
    loss = TaskLoss(["a", "b"], weights)
    assert_same_math(loss(LOGITS, LABELS), sum(w * one for w, one in zip(expected, each(), strict=True)))
    assert not loss.state_dict()
    assert not list(loss.parameters())


def test_learned_weights_are_the_equation_and_find_the_better_task():
    loss = TaskLoss(["a", "b"], "uncertainty")
    assert_same_math(loss(LOGITS, LABELS), sum(each()))
    loss.log_variances.data.copy_(torch.tensor([0.5, -1.0]))
    a, b = each()
    assert_same_math(loss(LOGITS, LABELS), a * torch.tensor(-0.5).exp() + 0.25 + b * torch.tensor(1.0).exp() - 0.5)
    sgd = torch.optim.SGD(loss.parameters(), lr=0.1)
    for _ in range(400):
        sgd.zero_grad()
        loss(LOGITS, LABELS).backward()
        sgd.step()
    assert_same_math(loss.log_variances, (2 * torch.stack(each())).log(), 1e-3)  # where its derivative is zero


def test_a_task_without_labels_adds_zero_and_no_gradient():
    logits = {t: x.clone().requires_grad_() for t, x in LOGITS.items()}
    total = TaskLoss(["a", "b"])(logits, LABELS | {"b": torch.full((4,), -100)})
    assert_same_math(total, each()[0] / 2)
    total.backward()
    assert not logits["b"].grad.any()
    assert logits["a"].grad.any()


def test_a_task_without_labels_moves_no_learned_weight():
    """Else its weight would grow with every batch that knows nothing of it."""
    loss = TaskLoss(["a", "b"], "uncertainty")
    loss.log_variances.data.copy_(torch.tensor([0.5, -1.0]))
    total = loss(LOGITS, LABELS | {"b": torch.full((4,), -100)})
    assert_same_math(total, each()[0] * torch.tensor(-0.5).exp() + 0.25)
    total.backward()
    assert loss.log_variances.grad[0] != 0
    assert loss.log_variances.grad[1] == 0  # and there is one: DDP finds no parameter unused


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_loss_is_float32_at_least_and_does_not_overflow(dtype):
    logits = torch.tensor([[0.0, 6e4]]).expand(4, -1).to(dtype)
    total = TaskLoss(["a"])({"a": logits}, {"a": torch.zeros(4).long()})
    assert total.dtype == torch.promote_types(dtype, torch.float32)
    assert_same_math(total, logits[0, 1].to(total.dtype))


@pytest.mark.parametrize(
    "weights",
    [{"a": 1}, *({"a": 1, "b": w} for w in (-1, math.nan, math.inf, "1", None)), {"a": 1, "b": 1, "c": 1}, "learned", 0.5],
)
def test_bad_weights_are_refused(weights):
    with pytest.raises(ValueError, match=r"expected weights >= 0 for \['a', 'b'\], \"uncertainty\" or None"):
        TaskLoss(["a", "b"], weights)


@pytest.mark.parametrize("tasks", ["ab", "", [], ["a", "b", "a"]])
def test_bad_tasks_are_refused(tasks):
    with pytest.raises(ValueError, match="expected the names of the tasks, each once, got"):
        TaskLoss(tasks)


def test_tasks_may_be_those_of_fuse():
    assert TaskLoss({"a": 3, "b": 5}).tasks == ["a", "b"]


def test_other_tasks_are_refused():
    with pytest.raises(ValueError, match=r"expected logits of the tasks \['a'\], got \['a', 'b'\]"):
        TaskLoss(["a"])(LOGITS, LABELS)
    with pytest.raises(ValueError, match=r"expected labels of the tasks \['a', 'b'\], got \['a'\]"):
        TaskLoss(["a", "b"])(LOGITS, {"a": LABELS["a"]})
    with pytest.raises(TypeError, match="expected logits as a dict by task, got list"):
        TaskLoss(["a", "b"])([*LOGITS.values()], LABELS)
    with pytest.raises(TypeError, match="expected labels as a dict by task, got Tensor"):
        TaskLoss(["a", "b"])(LOGITS, LABELS["a"])


def test_what_a_fusion_adds_is_added_as_it_is():
    extra = {"gloria local": torch.tensor(0.25, requires_grad=True), "gloria global": torch.tensor(0.5)}
    for weights in (None, "uncertainty"):
        loss = TaskLoss(["a", "b"], weights)
        total = loss(LOGITS, LABELS, auxiliary=extra)
        assert_same_math(total, loss(LOGITS, LABELS) + 0.75)
        assert_same_math(loss(LOGITS, LABELS, auxiliary={}), loss(LOGITS, LABELS))
    (grad,) = torch.autograd.grad(total, extra["gloria local"])
    assert grad == 1
    with pytest.raises(TypeError, match=r"expected auxiliary as a dict, net.losses\(\), got list"):
        loss(LOGITS, LABELS, auxiliary=[*extra.values()])


def test_learned_weights_are_half_the_loss_of_mttu():
    """MTTU-Net adds exp(−s) L + s: at s − log 2 this is twice our loss and a constant."""
    loss = TaskLoss(["a", "b"], "uncertainty")
    s = torch.tensor([0.5, -1.0])
    loss.log_variances.data.copy_(s)
    theirs = sum(torch.exp(-(s_t - math.log(2))) * one + s_t - math.log(2) for s_t, one in zip(s, each(), strict=True))
    assert_same_math(2 * loss(LOGITS, LABELS) - 2 * math.log(2), theirs)
