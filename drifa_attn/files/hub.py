"""Attention in folders and in repositories of the Hugging Face hub: the file, its plan, and a model card."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload
from urllib.parse import quote

from torch import Tensor, nn

from drifa_attn.checks import check_mapping, check_module
from drifa_attn.fusion import Fused
from drifa_attn.wrapping.masking import MaskFrom
from drifa_attn.wrapping.plan import Attention
from drifa_attn.wrapping.wrap import Network

from .card import backbone_calls, base_model, card_text, checked_metrics, site_rows
from .checkpoint import load_attention, save_attention
from .format import read
from .source import ATTENTION, SCHEME

Metrics = Mapping[str, float | str | Mapping[str, float | str]]


def save_pretrained(
    model: nn.Module,
    directory: str | Path,
    *,
    backbone: str | Mapping[str, str] | None = None,
    license: str | None = None,
    metrics: Metrics | None = None,
    classifier: bool | str | Sequence[str] = False,
    batch_norm: bool | None = None,
    card: Mapping[str, Any] | None = None,
    repo_id: str | None = None,
) -> None:
    """Write a folder that holds the attention of a network, as a repository of the hub does.

        drifa_attn.save_pretrained(model, "folder", license="apache-2.0", metrics={"accuracy": 0.91}, classifier=True)
        model = drifa_attn.load_attention(timm.create_model("resnet50", pretrained=True), "folder")

    The folder holds `attention.safetensors` (of `save_attention`), `plan.json` (its plan, with what each site costs), and
    `README.md`, the model card: what it is for, the lines that load it, the sites with their costs, and the metrics.

    Args:
        model: a network that holds attention.
        directory: the folder; it is made, and files in it that are called so are written anew.
        backbone: for the card, how the network is built: a name of timm, "resnet50.a1_in1k", or an expression,
            'torchvision.models.resnet18(weights="DEFAULT")'. None is what a timm network says of itself. For a fused network
            {modality: …}.
        license: for the card, as the hub knows it: "apache-2.0", "mit", "cc-by-4.0".
        metrics: for the card, {name: number}, or {data set: {name: number}}.
        classifier: True adds the classifier to the file, or the names of modules do, as `save_attention` takes it.
        batch_norm: which statistics of batch norms are added; None those that moved.
        card: more of the card's front matter, as `huggingface_hub.ModelCardData` takes it: {"datasets": ["user/images"]}.
        repo_id: for the card, the repository that the folder is for, "user/name"; None names the folder instead.

    Raises: TypeError, ValueError: the network holds no attention, is sharded, does not say how it is built, or what is for the
        card is not as said. Nothing is written then.
    Differs: the paper publishes no weights.
    """
    check_module("save_pretrained", model)
    check_mapping("save_pretrained", "card", card, "of front matter")
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise ValueError("save_pretrained got a sharded network: save_attention gathers it; load its file on a whole one.")
    built, checked, folder = backbone_calls(model, backbone), checked_metrics(metrics or {}), Path(directory)
    with tempfile.TemporaryDirectory() as made:  # so that nothing is written unless all of it can be
        file = Path(made) / ATTENTION
        save_attention(model, file, classifier=classifier, batch_norm=batch_norm)
        plan, tensors = read(file)
        left = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and name not in tensors)
        text = card_text(
            model,
            plan,
            left,
            name=(repo_id or folder.resolve().name).rpartition("/")[2],
            address=f"{SCHEME}{repo_id}" if repo_id else folder.resolve().name,
            backbone=built,
            license=license,
            metrics=checked,
            more=base_model(model, backbone) | dict(card or {}),
        )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ATTENTION).write_bytes(file.read_bytes())
    (folder / "plan.json").write_text(json.dumps(costed(model, plan), indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(text, encoding="utf-8")


def costed(model: nn.Module, plan: Mapping[str, Any]) -> dict[str, Any]:
    """The plan of a file, with the parameters and the FLOPs of each of its sites."""
    if not isinstance(model, Fused):
        costs = [{"params": params, "flops": flops} for _, params, flops in site_rows(model)]
        return {**plan, "sites": [{**site, **cost} for site, cost in zip(plan["sites"], costs, strict=True)]}
    whole = model.plan
    stages = [{"params": stage.params, "flops": stage.flops} for stage in whole.stages]
    return {**plan, "costs": {"stages": stages, "readout": {"params": whole.readout_params, "flops": whole.readout_flops}}}


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    backbone: str | Mapping[str, str] | None = None,
    license: str | None = None,
    metrics: Metrics | None = None,
    classifier: bool | str | Sequence[str] = False,
    batch_norm: bool | None = None,
    card: Mapping[str, Any] | None = None,
    private: bool | None = None,
    token: str | None = None,
    message: str = "Attention by drifa_attn",
) -> str:
    """Write the folder of `save_pretrained` into a repository of the Hugging Face hub, which is made if it is not there.

        drifa_attn.push_to_hub(model, "user/name", license="apache-2.0", metrics={"accuracy": 0.91}, classifier=True)

    Args:
        model: a network that holds attention.
        repo_id: of the repository, "user/name".
        backbone: how the network is built, in full at `save_pretrained` as all that follows; a timm network says it itself.
        license: as the hub knows it.
        metrics: {name: number}, or {data set: {name: number}}.
        classifier: True adds the classifier, or the names of modules do.
        batch_norm: which statistics of batch norms are added; None those that moved.
        card: more of the card's front matter.
        private: whether a repository that is made here is private; None is what the account says.
        token: one that may write; None is the one that huggingface_hub is logged in with.
        message: of the commit.

    Returns: the address of the commit.
    Raises: TypeError, ValueError: as `save_pretrained`. ConnectionError: the hub cannot be reached, or refuses.
    Differs: the paper publishes no weights.
    """
    from huggingface_hub import HfApi  # a dependency of timm; importing the package does not need it

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(
            model,
            folder,
            backbone=backbone,
            license=license,
            metrics=metrics,
            classifier=classifier,
            batch_norm=batch_norm,
            card=card,
            repo_id=repo_id,
        )
        api = HfApi(token=token, library_name="drifa_attn")
        try:
            made = api.create_repo(repo_id, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message=message).commit_url)
        except Exception as error:  # what carries the request has errors of its own, which differ from version to version
            said = str(error).partition("\n")[0]
            raise ConnectionError(
                f"push_to_hub could not write to {repo_id!r} ({type(error).__name__}: {said}): check the name and the "
                "connection, and log in with a token that may write (hf auth login), or pass token=."
            ) from error


@overload
def from_pretrained(
    source: str | Path,
    *,
    backbone: Network,
    revision: str | None = None,
    attention: Attention | None = None,
    example_input: Any = None,
    mask_from: MaskFrom | None = None,
) -> Network: ...


@overload
def from_pretrained(
    source: str | Path,
    *,
    backbone: Mapping[str, nn.Module],
    revision: str | None = None,
    attention: Attention | None = None,
    example_input: Mapping[str, Tensor] | None = None,
) -> Fused: ...


def from_pretrained(
    source: str | Path,
    *,
    backbone: Any,
    revision: str | None = None,
    attention: Attention | None = None,
    example_input: Any = None,
    mask_from: MaskFrom | None = None,
) -> Any:
    """Rebuild the attention of a folder or a repository on a fresh network: `load_attention` by the words that the hub uses.

        model = drifa_attn.from_pretrained("user/name", backbone=timm.create_model("resnet50", pretrained=True))

    Args:
        source: a folder (or file) that is there, else a repository of the hub, "user/name".
        backbone: the network, or {modality: network}; it is built first, for a file holds no code that could build it.
        revision: of the repository, a branch, a tag or a commit; None is the main one.
        attention: the callable that made the attention, where `wrap` was given one.
        example_input: as `plan` takes it, where the network needs one.
        mask_from: the callable that finds the mask, where `wrap` was given one.

    Returns: the network, or a new `Fused` of the networks.
    Raises: as `load_attention`.
    Differs: the paper publishes no weights.
    """
    is_here = Path(source).exists()
    if is_here and revision is not None:
        raise ValueError(f"from_pretrained got revision={revision!r} for {source}, which is here on the disk: leave it out.")
    path = source if is_here else f"{SCHEME}{source}" + (f"@{quote(revision, safe='')}" if revision else "")
    return load_attention(backbone, path, attention=attention, example_input=example_input, mask_from=mask_from)
