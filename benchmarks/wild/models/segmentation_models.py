"""Networks of segmentation-models-pytorch: every decoder on a small encoder, and one decoder on every kind of encoder."""

from collections.abc import Iterator
from functools import partial

import segmentation_models_pytorch as smp

from benchmarks.wild.case import Case, images

DECODERS = {
    "DPT": "tu-vit_tiny_patch16_224",
    "DeepLabV3": "resnet18",
    "DeepLabV3Plus": "resnet18",
    "FPN": "resnet18",
    "Linknet": "resnet18",
    "MAnet": "resnet18",
    "PAN": "resnet18",
    "PSPNet": "resnet18",
    "Segformer": "mit_b0",
    "UPerNet": "resnet18",
    "Unet": "resnet18",
    "UnetPlusPlus": "resnet18",
}
ENCODERS = (
    "densenet121",
    "efficientnet-b0",
    "mobilenet_v2",
    "mobileone_s0",
    "tu-test_convnext",
    "timm-regnetx_002",
    "vgg11_bn",
    "mit_b0",
)


def cases() -> Iterator[Case]:
    """All of them."""
    case = partial(Case, library="segmentation-models-pytorch")
    slim = {"decoder_intermediate_channels": (16, 16, 32, 32), "decoder_fusion_channels": 16}
    for name, encoder in DECODERS.items():
        size = {"DPT": 224, "PAN": 128}.get(name, 64)
        options = slim if name == "DPT" else {}
        make = partial(getattr(smp, name), encoder, encoder_weights=None, classes=3, **options)
        yield case(name=f"{name}, {encoder}", build=make, inputs=images(size, size))
    make = partial(smp.Unet, "resnet18", encoder_weights=None, classes=3)
    yield case(name="Unet, resnet18", build=make, inputs=images(64, 64), part="encoder")
    for encoder in ENCODERS:
        make = partial(smp.Unet, encoder, encoder_weights=None, classes=3)
        yield case(name=f"Unet, {encoder}", build=make, inputs=images(64, 64))
    make = partial(smp.Unet, "resnet18", encoder_weights=None, classes=3, aux_params={"classes": 4, "dropout": 0.2})
    yield case(name="Unet, resnet18, with a class", build=make, inputs=images(64, 64))
