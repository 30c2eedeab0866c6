"""`save_attention` and `load_attention`: a file with the attention alone, which fits any fresh copy of the network."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from torch import Tensor, nn

from drifa_attn.fusion import Fused
from drifa_attn.wrapping.active import attentions
from drifa_attn.wrapping.masking import MaskFrom
from drifa_attn.wrapping.norms import moved, tracking
from drifa_attn.wrapping.plan import Attention, check_backbone
from drifa_attn.wrapping.selection import At
from drifa_attn.wrapping.training import classifier_names
from drifa_attn.wrapping.wrap import Network

from .format import FORMAT, read, write
from .rebuild import rebuild
from .recipe import checked_masked, fuse_again, fused_recipe, wrap_again, wrapped_recipe
from .source import located
from .state import chosen_state, load_state, whole_state
from .whole import is_whole, network_state


def save_attention(
    model: nn.Module, path: str | Path, *, classifier: bool | str | Sequence[str] = False, batch_norm: bool | None = None
) -> None:
    """Write the attention of a network, and nothing else unless asked, as safetensors with its plan.

    Of a fused network a file holds the refiners, the readout, the heads, and the attention inside the branches.

    Args:
        model: a network that holds attention (not its DDP or compiled wrapper).
        path: of the file.
        classifier: True adds the classifier that a timm network states; or name the modules to add, such as a branch of a fused
            network that was trained from its start, "branches.record".
        batch_norm: None adds the running statistics that moved since the network was wrapped, fused or loaded: training moves
            them even where weights are frozen. True adds those of every batch norm, False none.

    A network that is sharded (`fully_shard`) is gathered: every process calls this, and the first one writes.

    Raises: ValueError: the network holds no attention, or has no such classifier.
    """
    attentions(model)
    if hasattr(model, "_orig_mod") or isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(f"save_attention got a {type(model).__name__}: give it the network inside, .module or ._orig_mod.")
    if not isinstance(model, Fused) and any(isinstance(module, Fused) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has a fused network inside: save the attention of that.")
    names = classifier_names(model, classifier)
    norms = moved(model) if batch_norm is None else list(tracking(model)) if batch_norm else []
    plan: dict[str, Any] = {"network": type(model).__name__, "classifier": names, "batch_norm": norms}
    plan |= {"fused": fused_recipe(model)} if isinstance(model, Fused) else wrapped_recipe(model)
    write(path, plan, chosen_state(model, names, norms))


@overload
def load_attention(
    backbone: Network,
    path: str | Path,
    *,
    attention: Attention | None = None,
    example_input: Any = None,
    mask_from: MaskFrom | None = None,
    at: At | None = None,
    weights: str | None = None,
) -> Network: ...


@overload
def load_attention(
    backbone: Mapping[str, nn.Module],
    path: str | Path,
    *,
    attention: Attention | None = None,
    example_input: Mapping[str, Tensor] | None = None,
) -> Fused: ...


def load_attention(
    backbone: Any,
    path: str | Path,
    *,
    attention: Attention | None = None,
    example_input: Any = None,
    mask_from: MaskFrom | None = None,
    at: At | None = None,
    weights: str | None = None,
) -> Any:
    """Rebuild the attention of a file on a fresh network of the same architecture, in place, and load its weights.

        model = drifa_attn.load_attention(timm.create_model("resnet50", pretrained=True), path)
        model = drifa_attn.load_attention(timm.create_model("resnet50", pretrained=True), "hf://user/name")
        net = drifa_attn.load_attention({"dermoscopy": resnet, "smear": swin}, path)

    Whatever else the file holds (classifier, batch-norm statistics, named modules) is loaded too. Where attention is part of
    the network's own code, its weights are loaded. Files are data: nothing in one is executed.

    A checkpoint of a whole wrapped network is enough too: a state dict of `torch.save` or safetensors, a checkpoint of timm or
    Lightning, the folder of a Trainer. Where its attention goes, how wide it is and how it started are read off the names and
    shapes of its weights, and all weights of the network are loaded, the backbone's too.

    Args:
        backbone: the network, not wrapped; for a file of a fused network {modality: network}, in any order, with or without
            their classifiers.
        path: of a file by `save_attention`, of a checkpoint, of a folder with one of them, or of a repository of the Hugging
            Face hub: "hf://user/name", "hf://user/name@revision", "hf://user/name@revision/file". What was downloaded is
            cached, and read from the cache where the hub cannot be reached.
        attention: the callable that made the attention, where `wrap` was given one; a file keeps only its name. A checkpoint
            does not even keep that of another attention than "mfa": its name, or the callable.
        example_input: as `plan` takes it, where the network needs one; {modality: tensor} for a file of a fused network.
        mask_from: the callable that finds the mask, where `wrap` was given one; a file keeps only that there was one, and a
            checkpoint does not.
        at: for a checkpoint, as `wrap` took it, where its keys fit several places.
        weights: for a checkpoint that holds the network several times, which one: "state_dict_ema", or what stands before the
            names of its keys. The message lists them.

    Returns: the network, or a new `Fused` of the networks.
    Raises: TypeError, ValueError: the content of the file does not fit or does not say enough, the network is wrapped, or it
        differs from the saved one; the message names the first difference, and the network is untouched. OSError: there is no
        such file or repository, or the hub cannot be reached.
    """
    backbones = list(backbone.values()) if isinstance(backbone, Mapping) else [backbone]
    for one in backbones:
        check_backbone(one)
    file = located(path)
    if is_whole(file):
        return loaded_whole(
            backbone, file, weights, at=at, attention=attention, example_input=example_input, mask_from=mask_from
        )
    if at is not None or weights is not None or isinstance(attention, str):
        raise ValueError(f"{path} says itself where its attention is and of which kind: leave at=, weights= and a name out.")
    return loaded(backbone, file, attention, example_input, mask_from)


def loaded(backbone: Any, path: Path, attention: Any, example_input: Any, mask_from: MaskFrom | None) -> Any:
    """The network, or the networks fused, with the attention of a file by `save_attention`."""
    plan, tensors = read(path)
    if ("fused" in plan) != isinstance(backbone, Mapping):
        expected = f"{{modality: network}} of {list(plan['fused']['branches'])}" if "fused" in plan else "one network"
        raise TypeError(f"{path} holds attention for {expected}, got {type(backbone).__name__}.")
    held = {"modules": plan["classifier"], "norms": plan["batch_norm"]}
    if "fused" in plan:
        checked_masked({}, mask_from)
        network: Any = fuse_again(backbone, plan["fused"], example_input or {}, factory=attention, tensors=tensors, **held)
    else:
        network = backbone
        wrap_again(network, plan, example_input, attention, mask_from)
    load_state(network, tensors, chosen_state(network, **held))
    return network


def loaded_whole(backbone: Any, path: Path, weights: str | None, **how: Any) -> nn.Module:
    """The network with its attention and all its weights, out of a checkpoint of the whole; `how` it was wrapped."""
    if isinstance(backbone, Mapping):
        raise TypeError(
            f"{path} is a checkpoint of one network, got {{modality: network}}: fuse by the call that was used, and "
            "net.load_state_dict(...), or write it by save_attention."
        )
    tensors = network_state(path, backbone.state_dict().keys(), weights)
    lacking = [name for name in whole_state(backbone, tensors) if name not in tensors]
    if lacking:
        is_renamed = hasattr(backbone, "save_pretrained")  # of transformers, whose version 5 writes other names than it uses
        renamed = " Where its library writes names of its own, write torch.save(model.state_dict(), ...)." * is_renamed
        raise ValueError(
            f"{path} was not written by save_attention: it has no {FORMAT!r} metadata, and as a checkpoint of the whole "
            f"network it lacks {lacking[0]!r}, which {type(backbone).__name__} has.{renamed}"
        )
    rebuild(backbone, tensors, **how)
    load_state(backbone, tensors, whole_state(backbone, tensors))
    return backbone
