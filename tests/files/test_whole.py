"""Checkpoints of a whole wrapped network, as others write them, are enough to rebuild it."""

import argparse
import functools

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from drifa_attn import load_attention, save_attention, wrap
from drifa_attn.wrapping.inject import Refinement, steps_of
from tests._compare import assert_same_bits
from tests._wrapping import refinements, refused, strengthen_, wrapped
from tests.networks import Net, built, conv


def fresh(name="resnet"):
    """A network of the same architecture, of which every weight and statistic is another."""
    model, _ = built(name)
    for tensor in model.state_dict().values():
        tensor.add_(1)
    return model


def places(model):
    """Where the attention of a network is: what carries it, which tensor it refines, and how it reads that."""
    return [
        (step.child, step.path, step.place, step.folded, name)
        for name, module in model.named_modules()
        for step in steps_of(module, Refinement)
    ]


@torch.no_grad()
def check(model, x, path, name="resnet", **options):
    """The checkpoint makes a fresh network the same, to the last bit and key."""
    again = fresh(name)
    assert load_attention(again, path, example_input=x, **options) is again
    assert list(again.state_dict()) == list(model.state_dict())
    assert places(again) == places(model)
    assert_same_bits(again(x), model(x))
    assert [repr(hook.attention) for hook in refinements(again)] == [repr(hook.attention) for hook in refinements(model)]
    return again


# What networks there are ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("resnet", "block"),
        ("vit", "stage"),
        ("swin", "block"),
        ("mvitv2", "stage"),
        ("crossvit", "stage"),
        ("torchvision video", "block"),
    ],
)
def test_the_places_are_read_off_the_keys(name, at, tmp_path):
    """Maps, tokens with a class token, channels-last maps, tuples, two tensors of one module, volumes."""
    model, x = wrapped(name, at)
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    check(model, x, tmp_path / "whole.pt", name)


@pytest.mark.parametrize("at", ["stage", "block"])
def test_sites_have_the_names_that_wrap_gave_them(at, tmp_path):
    """The last block of a stage gives the same tensor as the stage: what else holds attention tells which of them it was."""
    model = wrap(timm.create_model("test_resnet", layers=(2, 2, 2, 2)), at)
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    again = load_attention(timm.create_model("test_resnet", layers=(2, 2, 2, 2)), tmp_path / "whole.pt")
    assert [hook.site.name for hook in refinements(again)] == [hook.site.name for hook in refinements(model)]


@pytest.mark.parametrize(
    "arguments",
    [
        {"variant": "paper"},
        {"reduction": None},
        {"at": r"layer[34]", "reduction": 4},
        {"at": "conv", "reduction": 1, "init": "paper"},
        {"at": ["layer2", "bn1"]},
    ],
    ids=str,
)
def test_width_and_start_are_read_off_the_shapes(arguments, tmp_path):
    model, x = built("resnet")
    strengthen_(wrap(model, example_input=x, **arguments))
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    check(model, x, tmp_path / "whole.pt")


def test_what_keys_cannot_tell_is_refused_or_said(tmp_path):
    """A stage of a RegNet runs its children: the attention behind it lives in its first block, as that block's own would."""
    (model, x), path, again = wrapped("regnet", "stage"), tmp_path / "whole.pt", fresh("regnet")
    torch.save(model.state_dict(), path)
    with refused(again, x, ValueError, r"in s1.b1.drifa_attn, which may be that of 's1' or 's1.b1' in RegNet: pass at="):
        load_attention(again, path, example_input=x)
    with refused(again, x, ValueError, r"at='block' puts attention into \['s1.b1', .*\] of RegNet, the checkpoint has it"):
        load_attention(again, path, example_input=x, at="block")
    check(model, x, path, "regnet", at="stage")


def gate(channels, factor=1):
    """An attention of the user's own."""
    return nn.Sequential(nn.Conv2d(channels, factor * channels, 1), nn.Conv2d(factor * channels, channels, 1), nn.Sigmoid())


@pytest.mark.parametrize("attention", ["eca", gate, functools.partial(gate, factor=2)], ids=["name", "callable", "options"])
def test_another_attention_is_what_the_user_says(attention, tmp_path):
    model, x = built("resnet")
    wrap(model, example_input=x, attention=attention)
    for hook in refinements(model):
        nn.init.normal_(hook.attention.strength)
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    check(model, x, tmp_path / "whole.pt", attention=attention)
    again = fresh()
    with refused(
        again, x, ValueError, "another attention than the paper's in 'act1.drifa_attn', whose name no shape tells: pass"
    ):
        load_attention(again, tmp_path / "whole.pt", example_input=x)
    with refused(again, x, ValueError, "attention 'act1.drifa_attn' has .* it is of other options, or another tool"):
        load_attention(again, tmp_path / "whole.pt", example_input=x, attention="se")


@torch.no_grad()
def test_a_mask_is_passed_again(tmp_path):
    def network():
        torch.manual_seed(0)
        return Net(lambda net, x, mask: net.head(net.f(x).mean(1)), f=nn.Linear(8, 8), head=nn.Linear(8, 3)).eval()

    inputs = torch.randn(2, 5, 8), torch.arange(5) < torch.tensor([[3], [5]])
    arguments = {"example_input": inputs, "mask_from": lambda args, kwargs: args[1]}
    model = strengthen_(wrap(network(), ["f"], **arguments))
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    assert_same_bits(load_attention(network(), tmp_path / "whole.pt", **arguments)(*inputs), model(*inputs))
    unmasked = load_attention(network(), tmp_path / "whole.pt", example_input=inputs)
    assert not torch.equal(unmasked(*inputs), model(*inputs))


@torch.no_grad()
def test_tensors_with_two_names_may_be_written_once(tmp_path):
    def network():
        torch.manual_seed(0)
        net = Net(lambda net, x: net.f(x), f=conv(), head=conv())
        net.alias = net.f
        return net

    x, path = torch.randn(2, 8, 4, 4), tmp_path / "model.safetensors"
    model = strengthen_(wrap(network(), ["f"], example_input=x))
    for left in ("alias.", "f."):
        save_file({key: tensor for key, tensor in model.state_dict().items() if not key.startswith(left)}, path)
        again = network()
        again.f.weight.add_(1)
        assert_same_bits(load_attention(again, path, example_input=x)(x), model(x))


def test_a_module_that_is_called_as_attention_is_stays(tmp_path):
    def network():
        torch.manual_seed(0)
        return Net(lambda net, x: net.f(x), f=Net(lambda net, x: net.drifa_attn(x), drifa_attn=conv()))

    x, path = torch.randn(2, 8, 4, 4), tmp_path / "whole.pt"
    model = strengthen_(wrap(network(), ["f.drifa_attn"], example_input=x))
    torch.save(model.state_dict(), path)
    again = load_attention(network(), path, example_input=x, at=["f.drifa_attn"])
    assert list(again.state_dict()) == list(model.state_dict())
    assert_same_bits(again(x), model(x))


# How others write them --------------------------------------------------------------------------------------------------


def under(prefix, state):
    return {prefix + key: tensor for key, tensor in state.items()}


LOSS = {"loss.weight": torch.ones(3)}
WRITERS = {
    "torch": lambda state: state,
    "DDP": lambda state: under("module.", state),
    "compiled": lambda state: under("_orig_mod.", state),
    "DDP and compiled": lambda state: under("module._orig_mod.", state),
    "a part is compiled": lambda state: {key.replace("layer1.0.", "layer1._orig_mod.0."): t for key, t in state.items()},
    "timm": lambda state: {"epoch": 3, "arch": "x", "state_dict": state, "args": argparse.Namespace(lr=0.1)},
    "Lightning": lambda state: {
        "epoch": 3,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": under("model.", state) | LOSS,
        "optimizer_states": [{"state": {0: {"step": torch.ones(1)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}],
        "hyper_parameters": {"lr": 0.1},
    },
    "a teacher without attention": lambda state: (
        under("student.", state) | under("teacher.", {key: tensor for key, tensor in state.items() if "drifa_attn" not in key})
    ),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_writer_is_read(writer, tmp_path):
    model, x = wrapped("resnet")
    torch.save(WRITERS[writer](model.state_dict()), tmp_path / "whole.pt")
    check(model, x, tmp_path / "whole.pt")


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_the_folder_of_a_trainer_is_read(file, tmp_path):
    (model, x), folder = wrapped("resnet"), tmp_path / "checkpoint-20"
    folder.mkdir()
    state = under("model.", model.state_dict())
    save_file(state, folder / file, {"format": "pt"}) if file == "model.safetensors" else torch.save(state, folder / file)
    torch.save({"state": {}, "param_groups": []}, folder / "optimizer.pt")
    check(model, x, folder)
    (folder / file).rename(folder / "weights.bin")
    with pytest.raises(FileNotFoundError, match=r"checkpoint-20 has no attention.safetensors.* it holds optimizer.pt, weights"):
        load_attention(fresh(), folder)


def test_attention_comes_before_a_checkpoint_in_a_folder(tmp_path):
    model, x = wrapped("resnet")
    save_attention(model, tmp_path / "attention.safetensors")
    save_file({"other": torch.ones(1)}, tmp_path / "model.safetensors")
    again = load_attention(built("resnet")[0], tmp_path, example_input=x)
    assert_same_bits(again(x), model(x))


@torch.no_grad()
def test_one_of_several_is_picked(tmp_path):
    """timm's saver writes the average beside the weights, and neither is the one that is surely meant."""
    (model, x), path, again = wrapped("resnet"), tmp_path / "last.pth.tar", fresh()
    ema = {key: tensor + 1 if tensor.is_floating_point() else tensor for key, tensor in model.state_dict().items()}
    torch.save({"state_dict": model.state_dict(), "state_dict_ema": ema}, path)
    with refused(again, x, ValueError, r"holds the network as \['state_dict', 'state_dict_ema'\]: pick one"):
        load_attention(again, path, example_input=x)
    with refused(again, x, ValueError, r"has no weights 'ema' of such a network, it has \['state_dict', 'state_dict_ema'\]"):
        load_attention(again, path, example_input=x, weights="ema")
    check(model, x, path, weights="state_dict")
    load_attention(again, path, example_input=x, weights="state_dict_ema")
    assert all(torch.equal(tensor, ema[key]) for key, tensor in again.state_dict().items())
    torch.save({"state_dict": under("a.", ema) | under("b.", model.state_dict())}, path)
    check(model, x, path, weights="state_dict.b")


# Refusals -----------------------------------------------------------------------------------------------------------------


class Payload:
    """What a file must not run."""

    def __reduce__(self):
        return open, (Payload.path, "w")


def changed(state, word, change):
    return {key: change(tensor) if word in key else tensor for key, tensor in state.items()}


def without(state, word):
    return {key: tensor for key, tensor in state.items() if word not in key}


REFUSED = {
    "no attention": (lambda s: without(s, "drifa_attn"), "the checkpoint holds no attention that wrap put there"),
    "a weight is missing": (
        lambda s: without(s, "fc.bias"),
        "as a checkpoint of the whole network it lacks 'fc.bias', which ResNet has",
    ),
    "a weight too many": (lambda s: s | LOSS, "the file holds 'loss.weight', which ResNet does not have"),
    "another head": (
        lambda s: changed(s, "fc.", lambda t: t[:7]),
        r"'fc.weight' is \(7, 96\) in the file and \(10, 96\) in ResNet",
    ),
    "other layers": (
        lambda s: {key.replace("act1.drifa_attn", "act9.drifa_attn"): t for key, t in s.items()},
        "the checkpoint has attention in 'act9', a module that ResNet does not have",
    ),
    "other channels": (
        lambda s: changed(s, "act1.drifa_attn.alpha", lambda t: t[:5]),
        r"attention for \[5\] channels in act1.drifa_attn, where ResNet has act1 with 32 channels",
    ),
    "no feature": (
        lambda s: {key.replace("act1.drifa_attn", "fc.drifa_attn"): t for key, t in s.items()},
        r"for \[32\] channels in fc.drifa_attn, where ResNet has fc with 10 channels",
    ),
    "two starts": (
        lambda s: {key: t for key, t in s.items() if "act1" not in key or "_center" not in key and "_spread" not in key},
        "the checkpoint holds attention of several starts or reductions",
    ),
    "two reductions": (lambda s: changed(s, "act1.drifa_attn.local_scale", lambda t: t[:3]), "of several reductions, .*32, 3"),
    "two attentions": (
        lambda s: without(s, "act1.drifa_attn.alpha"),
        "the paper's attention, and another one in 'act1.drifa_attn'",
    ),
    "adapters": (
        lambda s: s | {"act1.drifa_attn.squeeze.lora_A": torch.ones(1)},
        r"'act1.drifa_attn' has 'squeeze.lora_A' of \(1,\), 'mfa' there has none: .* or another tool has changed it",
    ),
    "another child": (
        lambda s: {key.replace("act1.drifa_attn", "act1.drifa_attn_2"): t for key, t in s.items()},
        "the file lacks 'act1.drifa_attn.",
    ),
    "no state": (lambda s: [1], "holds a list, not a state dict"),
    "no tensors": (lambda s: {"epoch": 1}, "holds no attention that wrap put there"),
    "code": (lambda s: s | {"x": Payload()}, r"holds more than tensors and plain values \(a \S*open\), and is not read"),
}


@pytest.mark.parametrize(("spoil", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(spoil, message, tmp_path):
    (model, x), path, again, Payload.path = wrapped("resnet"), tmp_path / "whole.pt", fresh(), str(tmp_path / "it ran")
    torch.save(spoil(model.state_dict()), path)
    with refused(again, x, ValueError, message):
        load_attention(again, path, example_input=x)
    assert not (tmp_path / "it ran").exists()


def test_a_library_that_renames_what_it_writes_is_named(tmp_path):
    """As transformers does: the names in the folder of its Trainer are those of its older networks."""
    (model, x), again = wrapped("resnet"), fresh()
    again.save_pretrained = None
    torch.save({key.replace("layer1.", "encoder.layer.0."): t for key, t in model.state_dict().items()}, tmp_path / "whole.pt")
    with refused(
        again, x, ValueError, r"lacks 'layer1.0.*, which ResNet has. Where its library writes names of its own, write"
    ):
        load_attention(again, tmp_path / "whole.pt", example_input=x)


def test_a_file_that_was_cut_short_is_refused(tmp_path):
    (model, x), path, again = wrapped("resnet"), tmp_path / "whole.pt", fresh()
    torch.save(model.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-5000])
    with refused(again, x, ValueError, "whole.pt is no torch file, or was cut short"):
        load_attention(again, path, example_input=x)


def test_arguments_that_a_file_does_not_need_are_refused(tmp_path):
    (model, x), again = wrapped("resnet"), fresh()
    save_attention(model, tmp_path / "attention.safetensors")
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    for options in ({"at": "stage"}, {"weights": "state_dict"}, {"attention": "mfa"}):
        with refused(again, x, ValueError, "says itself where its attention is and of which kind: leave at="):
            load_attention(again, tmp_path / "attention.safetensors", example_input=x, **options)
    with refused(again, x, ValueError, "the paper's attention, which its shapes describe: leave attention= out"):
        load_attention(again, tmp_path / "whole.pt", example_input=x, attention="eca")
    with pytest.raises(TypeError, match="whole.pt is a checkpoint of one network, got {modality: network}: fuse by the call"):
        load_attention({"a": again}, tmp_path / "whole.pt")
