"""`disabled`: what it switches off, for how long, and what copies, replicas and compiled code make of it."""

import copy
import importlib
import io
import pickle

import pytest
import timm
import torch

from drifa_attn import MFA, disabled, fuse, gates, wrap
from drifa_attn.attention import Refines
from tests._compare import assert_same_bits, assert_same_math
from tests.cases import perturb_

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def moved_(model):
    """The network with attention that does something."""
    for module in layers(model):
        perturb_(module)
    return model.eval()


def network(attention="mfa"):
    torch.manual_seed(0)
    return moved_(wrap(timm.create_model("test_resnet", num_classes=4), attention=attention))


def fused():
    torch.manual_seed(0)
    return moved_(fuse({name: timm.create_model("test_resnet") for name in "ab"}, {"lesion": 3}))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


NETWORKS = {
    "mfa": (network, lambda model: model(X)),
    "another attention": (lambda: network("eca"), lambda model: model(X)),
    "fused": (fused, lambda model: model({"a": X, "b": X})["lesion"]),
}
COPIES = {
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "an average": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
}


def layers(model):
    return [module for module in model.modules() if isinstance(module, Refines)]


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("kind", NETWORKS)
@torch.no_grad()
def test_a_copy_that_is_made_within_attends(kind, way):
    build, run = NETWORKS[kind]
    model = build()
    attends = run(model)
    with disabled(model):
        bare = run(model)
        with disabled(model):
            other = COPIES[way](model)
        if way != "copy.copy":  # which has the same layers
            assert_same_bits(run(other), attends)
            with disabled(other):
                assert_same_bits(run(other), bare)
        assert_same_bits(run(model), bare)
    assert not torch.equal(attends, bare)
    for one in (model, other):
        assert_same_bits(run(one), attends)
        with disabled(one):
            assert_same_bits(run(one), bare)
        assert_same_bits(run(one), attends)


def test_a_copy_of_a_layer_takes_what_was_set_and_not_what_disabled_did():
    for outside in (True, False):
        layer = MFA(8)
        layer.enabled = outside
        with disabled(layer):
            twins = [copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))]
            assert not layer.enabled
        assert layer.enabled is outside
        assert [twin.enabled for twin in twins] == [outside] * 3
        assert list(vars(twins[0])) == list(vars(twins[2]))
        assert "_contexts" not in vars(twins[0])
        with disabled(twins[0]):
            assert not twins[0].enabled
        assert twins[0].enabled is outside


@torch.no_grad()
def test_contexts_may_be_nested_may_overlap_and_may_fail():
    model = network()
    attends = model(X)
    with disabled(model):
        bare = model(X)
        with pytest.raises(RuntimeError, match="stop"), disabled(model):
            raise RuntimeError("stop")
        assert_same_bits(model(X), bare)
    assert_same_bits(model(X), attends)
    one, two = disabled(model), disabled(model)  # as two threads would
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    assert_same_bits(model(X), bare)
    two.__exit__(None, None, None)
    assert_same_bits(model(X), attends)


@torch.no_grad()
def test_a_layer_that_is_off_stays_off_and_the_others_come_back():
    model = network()
    layers(model)[0].enabled = False
    expected = model(X)
    with disabled(model):
        other = copy.deepcopy(model)
    assert [layer.enabled for layer in layers(model)] == [False, True, True, True, True]
    assert_same_bits(model(X), expected)
    assert_same_bits(other(X), expected)


@torch.no_grad()
def test_gates_are_shown_within_and_leave_it_disabled():
    model = network()
    expected, attends = gates(model, X), model(X)
    with disabled(model):
        bare, found = model(X), gates(model, X)
        assert_same_bits(model(X), bare)
        other = copy.deepcopy(model)
        with pytest.raises(TypeError):
            gates(model)
        assert_same_bits(model(X), bare)
    for name, gate in gates(other, X).items():
        assert_same_bits(gate, expected[name])
        assert_same_bits(found[name], expected[name])
    assert_same_bits(model(X), attends)


@torch.no_grad()
def test_replicas_of_data_parallel_that_are_made_within_are_disabled(monkeypatch):
    """Two devices are played by one. Replicas live for one forward."""
    replicate = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(
        replicate,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [[t.clone() for t in tensors] for _ in devices],
    )
    model = network()
    attends = model(X)
    with disabled(model):
        bare = model(X)
        for replica in replicate.replicate(model, [0, 1]):
            assert_same_bits(replica(X), bare)
    for replica in replicate.replicate(model, [0, 1]):
        assert_same_bits(replica(X), attends)


@torch.no_grad()
def test_compiled_networks_and_copies_see_it():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    model = network()
    attends = model(X)
    fast = torch.compile(model, backend=backend, fullgraph=True)
    assert_same_math(fast(X), attends)
    for _ in range(3):
        with disabled(model):
            assert_same_math(fast(X), bare := model(X))
            with disabled(model):
                assert_same_math(fast(X), bare)
            other = copy.deepcopy(model)
        assert_same_math(fast(X), attends)
    assert len(graphs) <= 3  # attending before and after the switch was first set, and disabled
    slow = torch.compile(other, backend="eager", fullgraph=True)
    assert_same_math(slow(X), attends)
    with disabled(other):
        assert_same_math(slow(X), bare)
        assert_same_math(fast(X), attends)
    torch._dynamo.reset()
