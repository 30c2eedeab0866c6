"""Networks of torchvision: classification, segmentation, detection, video, optical flow."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import detection, optical_flow, segmentation, video

from benchmarks.wild.case import Case, images

CLASSIFIERS = {
    "alexnet": 64,
    "convnext_tiny": 64,
    "densenet121": 64,
    "efficientnet_b0": 64,
    "efficientnet_v2_s": 64,
    "googlenet": 64,
    "inception_v3": 128,
    "maxvit_t": 224,
    "mnasnet0_5": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "regnet_y_400mf": 64,
    "resnet18": 64,
    "resnext50_32x4d": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_1": 64,
    "swin_t": 64,
    "swin_v2_t": 64,
    "vgg11_bn": 64,
}
DETECTORS = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": {"min_size": 96, "max_size": 128},
    "fcos_resnet50_fpn": {"min_size": 96, "max_size": 128},
    "maskrcnn_resnet50_fpn": {"min_size": 96, "max_size": 128},
    "retinanet_resnet50_fpn": {"min_size": 96, "max_size": 128},
    "ssdlite320_mobilenet_v3_large": {},
}
SEGMENTERS = ("deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large")
VIDEO = {"mc3_18": (4, 32, 32), "mvit_v2_s": (16, 224, 224), "r2plus1d_18": (4, 32, 32), "r3d_18": (4, 32, 32)}
VIDEO |= {"s3d": (16, 64, 64), "swin3d_t": (4, 32, 32)}
OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
    "mvit_v2_s": {},
}


def built(module: Any, name: str, **options: Any) -> Callable[[], nn.Module]:
    """How to make a network of torchvision without its weights."""
    return partial(getattr(module, name), weights=None, **OPTIONS.get(name, {}), **options)


def pictures() -> tuple[list[Tensor]]:
    """What a detector takes in eval mode."""
    return ([torch.rand(3, 96, 96), torch.rand(3, 96, 96)],)


def labelled(masks: bool) -> Callable[[], tuple[list[Tensor], list[dict[str, Tensor]]]]:
    """What a detector takes in training mode."""

    def make() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        target = {"boxes": torch.tensor([[8.0, 8.0, 60.0, 70.0]]), "labels": torch.tensor([1])}
        if masks:
            target["masks"] = torch.ones(1, 96, 96, dtype=torch.uint8)
        return *pictures(), [dict(target), dict(target)]

    return make


def cases() -> Iterator[Case]:
    """All of them."""
    case = partial(Case, library="torchvision")
    for name, size in CLASSIFIERS.items():
        yield case(name=name, build=built(torchvision.models, name), inputs=images(size, size))
    yield case(
        name="vit (2 layers)",
        build=lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5),
        inputs=images(32, 32),
    )
    for name in SEGMENTERS:
        make = built(segmentation, name, weights_backbone=None, num_classes=5)
        yield case(name=name, build=make, inputs=images(64, 64))
        yield case(name=name, build=make, inputs=images(64, 64), part="backbone")
    for name, options in DETECTORS.items():
        make = built(detection, name, weights_backbone=None, num_classes=5, **options)
        whole = {"build": make, "inputs": pictures, "training": labelled("mask" in name)}
        yield case(name=name, **whole)
        yield case(name=name, **whole, part="backbone", part_inputs=images(96, 96))
    for name, size in VIDEO.items():
        yield case(name=name, build=built(video, name), inputs=images(*size))
    yield case(
        name="raft_small",
        build=built(optical_flow, "raft_small"),
        inputs=lambda: (torch.rand(2, 3, 128, 128), torch.rand(2, 3, 128, 128)),
    )
