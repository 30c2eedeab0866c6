"""The loss of several tasks."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

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


# Kinds -------------------------------------------------------------------------------------------------------------------


def draws(seed):
    return torch.Generator().manual_seed(seed)


def by_hand(kind, z, y, c):
    """The loss of a task in Python's numbers, one label after another."""
    total, number = 0.0, 0.0
    for row, labels in zip(z.tolist(), y.tolist(), strict=True):
        if kind == "classes":
            if labels == -100 or (isinstance(labels, list) and math.isnan(labels[0])):
                continue
            p = labels if isinstance(labels, list) else [float(k == labels) for k in range(len(row))]
            log_sum = math.log(sum(math.exp(one) for one in row))
            total += sum(c[k] * p[k] * (log_sum - row[k]) for k in range(len(row)))
            number += sum(c[k] * p[k] for k in range(len(row)))
            continue
        for k, (one, label) in enumerate(zip(row, labels, strict=True)):
            if math.isnan(label):
                continue
            q = 1 / (1 + math.exp(-one))
            yes_no = -c[k] * label * math.log(q) - (1 - label) * math.log(1 - q)
            total += (one - label) ** 2 if kind == "regression" else yes_no
            number += 1
    return total / number if number else 0.0


FORMS = ["hard", "soft", "multilabel", "regression"]


def drawn(form, b, k, seed, unknown):
    """Logits and labels of a form, about a third of them unknown."""
    generator = draws(seed)
    z = 3 * torch.randn(b, k, generator=generator, dtype=torch.float64)
    rows = torch.rand(b, generator=generator) < unknown
    if form == "hard":
        return z, torch.randint(k, (b,), generator=generator).masked_fill(rows, -100)
    if form == "soft":
        return z, torch.randn(b, k, generator=generator, dtype=torch.float64).softmax(1).masked_fill(rows[:, None], math.nan)
    y = torch.rand(b, k, generator=generator, dtype=torch.float64) * (1 if form == "multilabel" else 50)
    return z, y.masked_fill(torch.rand(b, k, generator=generator) < unknown, math.nan)


def kind_of(form):
    return form if form in ("multilabel", "regression") else "classes"


@given(
    form=st.sampled_from(FORMS),
    b=st.integers(1, 5),
    k=st.integers(2, 4),
    seed=st.integers(0, 2**31),
    unknown=st.sampled_from([0, 0.4, 1]),
    weighted=st.booleans(),
)
def test_every_kind_is_its_equation(form, b, k, seed, unknown, weighted):
    z, y = drawn(form, b, k, seed, unknown)
    c = [0.0, 0.5, 3.0, 1.25][:k] if weighted and form != "regression" else [1.0] * k
    loss = TaskLoss(["t"], kinds=kind_of(form), class_weights=None if c == [1.0] * k else {"t": c})
    assert loss({"t": z}, {"t": y}).item() == pytest.approx(by_hand(kind_of(form), z, y, c), rel=1e-9, abs=1e-12)


def test_hard_labels_with_weights_are_those_of_torch_and_of_one_hot_ones():
    z, y, c = torch.randn(8, 4), torch.randint(4, (8,)), torch.tensor([1.0, 2.0, 0.5, 3.0])
    expected = F.cross_entropy(z, y, c)
    loss = TaskLoss(["t"], class_weights={"t": c})
    assert_same_math(loss({"t": z}, {"t": y}), expected)
    assert_same_math(loss({"t": z}, {"t": F.one_hot(y, 4).float()}), expected)
    assert_same_math(TaskLoss(["t"])({"t": z}, {"t": y.int()}), F.cross_entropy(z, y))
    labels = torch.rand(8, 4)
    assert_same_math(
        TaskLoss(["t"], kinds="multilabel", class_weights={"t": c})({"t": z}, {"t": labels}),
        F.binary_cross_entropy_with_logits(z, labels, pos_weight=c),
    )


def test_one_value_may_be_labelled_without_its_axis():
    z, y = torch.randn(8, 1), torch.rand(8)
    for kind in ("regression", "multilabel"):
        loss = TaskLoss(["t"], kinds=kind)
        assert_same_math(loss({"t": z}, {"t": y}), loss({"t": z}, {"t": y[:, None]}))
    assert_same_math(TaskLoss(["t"], kinds="regression")({"t": z}, {"t": y}), F.mse_loss(z[:, 0], y))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_has_no_label_counts_nothing_and_gives_no_gradient(form, bad):
    """Not even where its logits are no numbers."""
    z, y = drawn(form, 6, 3, 0, 0)
    expected = TaskLoss(["t"], kinds=kind_of(form))({"t": z[2:]}, {"t": y[2:]})
    y[:2] = -100 if form == "hard" else math.nan
    z[:2] = bad
    z.requires_grad_()
    found = TaskLoss(["t"], kinds=kind_of(form))({"t": z}, {"t": y})
    assert_same_math(found, expected)
    found.backward()
    assert not z.grad[:2].any()
    assert (z.grad[2:] != 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weights", [None, "uncertainty"])
def test_a_task_of_any_kind_without_labels_moves_nothing(form, weights):
    loss = TaskLoss(["t", "other"], weights, kinds={"t": kind_of(form)})
    (z, y), (other, labels) = drawn(form, 6, 3, 0, 1), drawn("hard", 6, 3, 1, 0)
    z.requires_grad_()
    total = loss({"t": z, "other": other}, {"t": y, "other": labels})
    assert_same_math(total, F.cross_entropy(other, labels) / (1 if weights else 2))
    total.backward()
    assert not z.grad.any()
    assert loss.log_variances is None or loss.log_variances.grad[0] == 0


def test_a_learned_weight_of_a_regression_is_that_of_a_gaussian():
    """The negative logarithm of its density, but for a constant: `(z − y)² / (2 σ²) + log σ`."""
    loss = TaskLoss(["t"], "uncertainty", kinds="regression")
    loss.log_variances.data.fill_(0.7)
    z, y = torch.randn(8, 1), torch.randn(8, 1)
    density = torch.distributions.Normal(z, torch.tensor(0.35).exp()).log_prob(y).mean() + math.log(2 * math.pi) / 2
    assert_same_math(loss({"t": z}, {"t": y}), -density)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_added_up_in_float32(form, dtype):
    z, y = drawn(form, 16, 100, 0, 0.3)
    z = z.to(dtype)
    y = y if form == "hard" else y.to(dtype)
    loss = TaskLoss(["t"], kinds=kind_of(form))
    found = loss({"t": z}, {"t": y})
    assert found.dtype is torch.float32
    assert_same_math(found, loss({"t": z.float()}, {"t": y if form == "hard" else y.float()}))


# Labels that are none ----------------------------------------------------------------------------------------------------

OUT_OF_RANGE = {
    "class": ("hard", lambda y: y.index_fill(0, torch.tensor(2), 3), "0 to 2, −100 where unknown"),
    "negative class": ("hard", lambda y: y.index_fill(0, torch.tensor(2), -1), "0 to 2, −100 where unknown"),
    "several at once": (
        "soft",
        lambda y: y.isnan().logical_not().to(y),
        r"probabilities that sum to one, .*kinds='multilabel'",
    ),
    "negative": ("soft", lambda y: y - torch.tensor([1.0, -1.0, 0.0]), "probabilities that sum to one"),
    "half known": ("soft", lambda y: y.index_fill(1, torch.tensor(0), math.nan), "probabilities that sum to one"),
    "label": ("multilabel", lambda y: y + 0.5, r"\(multilabel\) in \[0, 1\], NaN where unknown; some are not"),
    "value": ("regression", lambda y: y.index_fill(0, torch.tensor(2), math.inf), r"\(regression\) finite, NaN where unknown"),
}


@pytest.mark.parametrize("what", OUT_OF_RANGE)
def test_labels_out_of_range_name_the_task(what):
    form, spoil, message = OUT_OF_RANGE[what]
    z, y = drawn(form, 6, 3, 0, 0)
    with pytest.raises(ValueError, match=f"TaskLoss expected labels of task 't' .*{message}"):
        TaskLoss(["t"], kinds=kind_of(form))({"t": z}, {"t": spoil(y)})


@pytest.mark.parametrize("weights", [None, "uncertainty"])
@pytest.mark.parametrize("what", OUT_OF_RANGE)
def test_where_labels_are_not_read_the_loss_is_nan_and_moves_nothing(what, weights):
    """In compiled code, as on a GPU. Other batches have the loss that they have uncompiled."""
    torch._dynamo.reset()
    form, spoil, _ = OUT_OF_RANGE[what]
    z, y = drawn(form, 6, 3, 0, 0.3)
    loss = TaskLoss(["t"], weights, kinds=kind_of(form), class_weights=None if form == "regression" else {"t": [1.0, 2, 3]})
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    assert_same_math(compiled({"t": z}, {"t": y}), loss({"t": z}, {"t": y}))
    z.requires_grad_()
    total = compiled({"t": z}, {"t": spoil(y)})
    assert total.isnan()
    total.backward()
    assert not z.grad.any()
    assert loss.log_variances is None or not loss.log_variances.grad.any()


@pytest.mark.cuda
@pytest.mark.parametrize("what", OUT_OF_RANGE)
def test_on_a_gpu_nothing_waits_and_nothing_crashes(what, device):
    form, spoil, _ = OUT_OF_RANGE[what]
    z, y = drawn(form, 6, 3, 0, 0.3)
    loss = TaskLoss(["t"], kinds=kind_of(form)).cuda()
    expected, wrong = TaskLoss(["t"], kinds=kind_of(form))({"t": z}, {"t": y}), spoil(y).cuda()
    z, y = z.cuda(), y.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found, bad = loss({"t": z}, {"t": y}), loss({"t": z}, {"t": wrong})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_math(found.cpu(), expected)
    assert bad.isnan()


# Arguments ---------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kinds": "binary"}, ValueError, r"TaskLoss expected each of kinds to be one of \('classes', .* got 'binary'"),
        ({"kinds": {"a": 1}}, ValueError, "each of kinds to be one of .* got 1"),
        ({"kinds": ["classes"]}, TypeError, r"kinds as one of .* or a dict of them by name, got \['classes'\]"),
        ({"kinds": {"c": "classes"}}, ValueError, r"kinds for \['c'\], but there are \['a', 'b'\]"),
        ({"class_weights": [1.0, 2.0]}, TypeError, r"class_weights as a dict \{task: weights\}, got list"),
        ({"class_weights": {"c": [1.0]}}, ValueError, r"class_weights of 'c', but its tasks are \['a', 'b'\]"),
        ({"class_weights": {"a": [1.0, -1.0]}}, ValueError, "class_weights of task 'a' as k numbers >= 0"),
        ({"class_weights": {"a": [1.0, math.nan]}}, ValueError, "class_weights of task 'a' as k numbers >= 0"),
        ({"class_weights": {"a": [0.0, 0.0]}}, ValueError, "class_weights of task 'a' as k numbers >= 0"),
        ({"class_weights": {"a": 2.0}}, ValueError, "class_weights of task 'a' as k numbers >= 0"),
        ({"class_weights": {"a": [1.0]}, "kinds": "regression"}, ValueError, "task 'a', a regression, which has no classes"),
    ],
)
def test_bad_kinds_and_class_weights_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        TaskLoss(["a", "b"], **options)


def test_kinds_in_the_place_of_numbers_are_told_where_they_belong():
    with pytest.raises(ValueError, match=r"names of the tasks, got \{'age': 'regression'\}: .*kinds="):
        TaskLoss({"age": "regression"})


def test_class_weights_of_another_length_name_the_task():
    with pytest.raises(ValueError, match="2 class weights for task 'a', which has 3 logits"):
        TaskLoss(["a"], class_weights={"a": [1.0, 2.0]})({"a": LOGITS["a"]}, {"a": LABELS["a"]})


def test_class_weights_follow_the_module_and_stay_out_of_files():
    given_weights = torch.tensor([1.0, 2.0, 3.0])
    loss = TaskLoss(["a"], class_weights={"a": given_weights})
    given_weights.zero_()  # a copy is kept
    assert_same_math(
        loss({"a": LOGITS["a"]}, {"a": LABELS["a"]}), F.cross_entropy(LOGITS["a"], LABELS["a"], torch.tensor([1.0, 2, 3]))
    )
    assert not loss.state_dict()
    meta = loss.to("meta")
    assert {buffer.device.type for buffer in meta.buffers()} == {"meta"}
    assert TaskLoss(["a", "b"], kinds={"b": "multilabel"}).kinds == {"a": "classes", "b": "multilabel"}


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
