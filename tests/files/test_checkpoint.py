import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from drifa_attn import MFA, attention_parameters, load_attention, save_attention, unwrap, wrap
from tests._compare import assert_same_bits
from tests._files import edited, metadata, other, without
from tests._wrapping import EVERY, check_round_trip, counted, refinements, refused, registered, strengthen_, wrapped
from tests.networks import Net, RunsItsChildren, built, conv, planned


@pytest.fixture
def path(tmp_path):
    """The attention, classifier and statistics of a small ResNet."""
    model, _ = wrapped("resnet")
    save_attention(model, tmp_path / "attention.safetensors", classifier=True, batch_norm=True)
    return tmp_path / "attention.safetensors"


# Save and load ----------------------------------------------------------------------------------------------------------


@EVERY
@torch.no_grad()
def test_attention_comes_back_on_a_fresh_network_to_the_last_bit(name, tmp_path):
    model, x = wrapped(name, "block")
    save_attention(model, tmp_path / "attention.safetensors")
    fresh, _ = built(name)
    assert load_attention(fresh, tmp_path / "attention.safetensors", example_input=x) is fresh
    assert list(fresh.state_dict()) == list(model.state_dict())
    assert_same_bits(fresh(x), model(x))
    assert [hook.site for hook in refinements(fresh)] == [hook.site for hook in refinements(model)]
    assert not any(hook.attention.training for hook in refinements(fresh))


@pytest.mark.parametrize(
    "arguments", [{"variant": "paper"}, {"reduction": None}, {"at": r"layer[34]", "reduction": 4}], ids=str
)
@torch.no_grad()
def test_every_kind_of_attention_comes_back(arguments, tmp_path):
    model, x = built("resnet")
    wrap(model, example_input=x, **arguments)
    for hook in refinements(model):
        hook.attention.alpha.add_(0.5)
    save_attention(model, str(tmp_path / "attention.safetensors"))
    fresh, _ = built("resnet")
    load_attention(fresh, str(tmp_path / "attention.safetensors"))
    assert_same_bits(fresh(x), model(x))
    assert [repr(hook.attention) for hook in refinements(fresh)] == [repr(hook.attention) for hook in refinements(model)]


def test_a_file_holds_the_attention_alone(tmp_path):
    model, _ = wrapped("coat", "stage")
    save_attention(model, tmp_path / "attention.safetensors")
    tensors = load_file(tmp_path / "attention.safetensors")
    assert tensors.keys() == model.state_dict().keys() - built("coat")[0].state_dict().keys()
    for key, tensor in tensors.items():
        assert_same_bits(tensor, model.state_dict()[key])
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    assert (tmp_path / "attention.safetensors").stat().st_size < size + 100_000


def test_the_plan_is_in_the_metadata(path):
    plan = json.loads(metadata(path)["drifa_attn"])
    assert (plan["network"], plan["attention"]) == ("ResNet", {"name": "mfa", "options": {"reduction": 16, "init": "identity"}})
    assert [site["module"] for site in plan["sites"]] == [site.module for site in planned("resnet", "stage").sites]
    assert [site["channels"] for site in plan["sites"]] == [site.channels for site in planned("resnet", "stage").sites]


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize(
    ("classifier", "prefixes"), [(False, []), (True, ["fc"]), ("fc", ["fc"]), (["fc", "bn1"], ["fc", "bn1"])]
)
@torch.no_grad()
def test_classifier_and_statistics_come_on_request(classifier, prefixes, batch_norm, tmp_path):
    model, x = wrapped("resnet")
    model.fc.weight.add_(1.0)
    model.bn1.running_mean.add_(1.0)
    save_attention(model, tmp_path / "attention.safetensors", classifier=classifier, batch_norm=batch_norm)
    state, attention = model.state_dict(), {key for key in model.state_dict() if "drifa_attn" in key}
    expected = attention | {key for key in state if key.split(".")[0] in prefixes}
    expected |= {key for key in state if batch_norm and ("running_" in key or key.endswith("num_batches_tracked"))}
    assert load_file(tmp_path / "attention.safetensors").keys() == expected
    fresh, _ = built("resnet")
    load_attention(fresh, tmp_path / "attention.safetensors")
    for key, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, state[key]) or key not in expected
    if prefixes and batch_norm:
        assert_same_bits(fresh(x), model(x))


def test_attention_takes_the_dtype_of_the_network_it_is_loaded_on(path):
    model, x = wrapped("resnet")
    fresh = load_attention(other().double(), path, example_input=x.double())
    for hook, source in zip(refinements(fresh), refinements(model), strict=True):
        for key, parameter in hook.attention.named_parameters():
            assert_same_bits(parameter, source.attention.get_parameter(key).double())


@torch.no_grad()
def test_a_file_of_a_whole_fits_that_whole(tmp_path):
    """Attention that was put into a backbone is that of whatever the backbone became a part of."""
    (backbone, x), path = wrapped("resnet"), tmp_path / "attention.safetensors"
    save_attention(nn.Sequential(backbone, nn.Linear(10, 3)), path)
    fresh = nn.Sequential(built("resnet")[0], nn.Linear(10, 3))
    load_attention(fresh, path, example_input=x)
    assert_same_bits(fresh[0](x), backbone(x))


def test_a_module_under_two_names_is_saved_and_comes_back(tmp_path):
    def build():
        torch.manual_seed(0)
        net = Net(lambda net, x: net.f(x), f=conv())
        net.alias = net.f
        return net

    model, x = build(), torch.randn(2, 8, 4, 4)
    wrap(model, ["f"], example_input=x)
    for hook in refinements(model):
        hook.attention.alpha.data.add_(0.5)
    save_attention(model, tmp_path / "attention.safetensors")
    assert_same_bits(load_attention(build(), tmp_path / "attention.safetensors", example_input=x)(x), model(x))


# Refusals ----------------------------------------------------------------------------------------------------------------


def resized(path, word, shape):
    tensors = load_file(path)
    return edited(path, {key: torch.zeros(shape) if word in key else tensor for key, tensor in tensors.items()})


def foreign(path):
    save_file(load_file(path), path, {"format": "pt"})
    return path


def moved(file, **change):
    first, second, *rest = json.loads(metadata(file)["drifa_attn"])["sites"]
    return edited(file, sites=[first, second | change, *rest])


BAD_FILES = {
    "no metadata": (foreign, ValueError, "was not written by save_attention: it has no 'drifa_attn' metadata"),
    "missing": (lambda path: path.with_name("none"), FileNotFoundError, "none"),
    "a tensor is missing": (
        lambda p: without(p, "alpha"),
        ValueError,
        "the file lacks .*alpha', which ResNet has",
    ),
    "a tensor too many": (
        lambda p: edited(p, load_file(p) | {"x": torch.ones(1)}),
        ValueError,
        "holds 'x', which ResNet does not",
    ),
    "another shape": (
        lambda p: resized(p, "alpha", (3,)),
        ValueError,
        r"alpha' is \(3,\) in the file and \(\d+,\) in ResNet",
    ),
    "another classifier": (
        lambda p: resized(p, "fc.bias", (3,)),
        ValueError,
        r"'fc.bias' is \(3,\) in the file and \(10,\) in",
    ),
    "a later format": (lambda p: edited(p, version=5), ValueError, "version 5, this drifa_attn reads version 4"),
    "another module": (lambda p: moved(p, module="layer9"), ValueError, "at 'layer9', a module that ResNet does not have"),
    "another leaf": (lambda p: moved(p, path=[0]), ValueError, r"attention at 'layer1.*\[0\]', where ResNet can take none"),
    "other channels": (
        lambda p: moved(p, channels=5),
        ValueError,
        "at 'layer1.*' has channels=5, ResNet has channels=32 there",
    ),
    "another layout": (
        lambda p: moved(p, layout="b ... c"),
        ValueError,
        "at 'layer1.*' has channels=32, ResNet has channels=16",
    ),
    "cut short": (lambda p: rewritten(p, p.read_bytes()[:-100]), ValueError, "attention.* is no safetensors file, or was cut"),
    "empty": (lambda p: rewritten(p, b""), ValueError, "attention.* is no safetensors file, or was cut short"),
    "a page": (lambda p: rewritten(p, b"<html>not found</html>" * 9), ValueError, "attention.* is no safetensors file"),
    "a pickle": (lambda p: rewritten(p, pickle.dumps({"a": 1})), ValueError, "attention.* is no safetensors file"),
    "no JSON": (lambda p: with_plan(p, "{"), ValueError, "attention.* has a plan that cannot be read .JSONDecodeError"),
    "no dict": (lambda p: with_plan(p, "[1]"), ValueError, "attention.* has a plan that cannot be read .TypeError"),
    "no version": (lambda p: with_plan(p, "{}"), ValueError, "attention.* has a plan that cannot be read .KeyError"),
    "deep": (lambda p: with_plan(p, "[" * 100_000), ValueError, "attention.* has a plan that cannot be read"),
    "no sites": (lambda p: with_plan(p, '{"version": 4}'), ValueError, "attention.* has a plan without sites or branches"),
}


def rewritten(path, content):
    path.write_bytes(content)
    return path


def with_plan(path, text):
    save_file(load_file(path), path, {"drifa_attn": text})
    return path


@pytest.mark.parametrize(("spoil", "error", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_refused_and_change_nothing(spoil, error, message, path):
    model, (_, x) = other(), built("resnet")
    spoilt = spoil(path)
    with refused(model, x, error, message):
        load_attention(model, spoilt, example_input=x)


OTHERS = {
    "wider": (lambda: other(channels=(32, 64, 96, 192)), "at 'layer2'.* has channels=48, ResNet has channels=64 there"),
    "another family": (lambda: built("efficientnet")[0], "attention at 'act1', a module that EfficientNet does not have"),
    "no prefix": (lambda: built("vit")[0], "attention at 'act1', a module that VisionTransformer does not have"),
    "another head": (lambda: other(num_classes=7), r"'fc.bias' is \(10,\) in the file and \(7,\) in ResNet"),
    "other depth": (lambda: other(layers=(1, 1, 2, 1)), "layer3"),
    "wrapped": (lambda: wrapped("resnet")[0], r"ResNet is wrapped already: drifa_attn.unwrap\(model\) first"),
}


@pytest.mark.parametrize(("build", "message"), OTHERS.values(), ids=OTHERS)
def test_another_network_is_refused_with_the_first_difference(build, message, path):
    model, (_, x) = build(), built("resnet")
    x = torch.randn(2, 3, 80, 80) if type(model).__name__ == "VisionTransformer" else x
    with refused(model, x, ValueError, message):
        load_attention(model, path, example_input=x)


def test_a_failure_half_way_leaves_the_network_as_it_was(path):
    """Shapes are checked before, so something else must fail: here the network's own load hook, after some were copied."""
    model, (_, x) = other(), built("resnet")

    def fail(module, incompatible):
        raise RuntimeError("half-way")

    model.fc.register_load_state_dict_post_hook(fail)
    with refused(model, x, RuntimeError, "half-way"):
        load_attention(model, path, example_input=x)


def test_save_refuses_what_it_cannot_name(tmp_path):
    model, x = built("resnet")
    path = tmp_path / "attention.safetensors"
    before = registered(model)
    with pytest.raises(ValueError, match=r"ResNet holds no attention: drifa_attn\.wrap\(model\) puts it there"):
        save_attention(model, path)
    wrap(model, example_input=x)
    with pytest.raises(ValueError, match="save_attention got a OptimizedModule: give it the network inside"):
        save_attention(torch.compile(model), path)
    with pytest.raises(ValueError, match="ResNet has no module 'head' to take as its classifier"):
        save_attention(model, path, classifier="head")
    assert not path.exists()
    assert registered(unwrap(model)) == before


# Where the weights live --------------------------------------------------------------------------------------------------


STAGES = {
    "Sequential": nn.Sequential,
    "runs its children": RunsItsChildren,
    "nested": lambda *blocks: RunsItsChildren(RunsItsChildren(*blocks)),
    "Sequential of one": lambda *blocks: nn.Sequential(RunsItsChildren(*blocks)),
    "one of Sequential": lambda *blocks: RunsItsChildren(nn.Sequential(*blocks)),
}
ROOTS = {
    "module": lambda stage: Net(lambda net, x: net.tail(net.stage(x)), stage=stage, tail=conv()),
    "Sequential": lambda stage: nn.Sequential(stage, conv()),
    "runs its children": lambda stage: RunsItsChildren(stage, conv()),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("root", ROOTS)
@torch.no_grad()
def test_no_module_runs_attention_as_a_step_of_its_own(root, stage):
    """A child of what runs its children would be run twice, unseen at its start."""
    torch.manual_seed(0)
    model = ROOTS[root](STAGES[stage](conv(), nn.BatchNorm2d(8), nn.ReLU(inplace=True)))
    site, x = next(name for name, _ in model.named_children()), torch.randn(2, 8, 6, 6)
    check_round_trip(model, x, at=[site])
    counts = counted(strengthen_(wrap(model, [site], example_input=x)))
    model(x)
    assert list(counts.values()) == [1]
    assert not any(isinstance(m, MFA) for c in model.modules() if isinstance(c, nn.Sequential) for m in c.children())


def test_names_that_are_taken_stay():
    model = Net(lambda net, x: net.f(x), f=Net(lambda net, x: net.drifa_attn(x), drifa_attn=conv()))
    check_round_trip(model, torch.randn(2, 8, 4, 4), at=["f", "f.drifa_attn"])


def test_attention_takes_device_and_mode_of_its_network():
    model, x = built("resnet")
    model.to("meta").train().layer2.eval()
    wrap(model, example_input=x)
    assert {p.device.type for p in attention_parameters(model)} == {"meta"}
    assert {hook.site.module.split(".")[0] for hook in refinements(model) if not hook.attention.training} == {"layer2"}
    model.eval()
    assert not any(hook.attention.training for hook in refinements(model))
    model.double().train()
    assert {p.dtype for p in attention_parameters(model)} == {torch.float64}
    assert all(hook.attention.training for hook in refinements(model))


class Versioned(nn.Conv2d):
    """Loads only a state that says which version it is of, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if local_metadata.get("version") != 2:
            raise ValueError("version should be 2")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def test_modules_that_ask_for_their_version_get_it(tmp_path):
    def network():
        torch.manual_seed(0)
        return nn.Sequential(Versioned(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 144, 2))

    x = torch.randn(2, 3, 16, 16)
    net = wrap(network(), at=["1", "3"], example_input=x).eval()
    strengthen_(net)
    save_attention(net, tmp_path / "attention.safetensors")
    assert_same_bits(load_attention(network().eval(), tmp_path / "attention.safetensors", example_input=x)(x), net(x))
