"""Networks of torchvision: classification, segmentation, detection, video, optical flow."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import convnext, detection, optical_flow, segmentation, swin_transformer, video

from benchmarks.wild.case import Case, images

CLASSIFIERS = dict.fromkeys(("densenet121", "efficientnet_b0", "googlenet", "mnasnet0_5", "mobilenet_v2", "resnet18"), 64)
CLASSIFIERS |= dict.fromkeys(("mobilenet_v3_small", "regnet_y_400mf", "shufflenet_v2_x0_5", "squeezenet1_1"), 64)
CLASSIFIERS |= {"inception_v3": 128}
SEGMENTERS = ("deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large")
VIDEO = ("mc3_18", "r2plus1d_18", "r3d_18")
SMALL = {"min_size": 96, "max_size": 128, "num_classes": 5}
FEW = {"rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 20, "box_detections_per_img": 5}
SWIN = {"patch_size": [4, 4], "embed_dim": 16, "depths": [1, 1, 2], "num_heads": [1, 2, 2], "window_size": [4, 4]}
FILM = SWIN | {"patch_size": [2, 4, 4], "window_size": [2, 4, 4]}
MAXVIT = {"stem_channels": 16, "partition_size": 2, "block_channels": [16, 32], "block_layers": [1, 1], "head_dim": 16}


def built(module: Any, name: str, **options: Any) -> Callable[[], nn.Module]:
    """How to make a network of torchvision without its weights."""
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    return partial(getattr(module, name), weights=None, **options)


def pyramid(kind: type[nn.Module], **options: Any) -> nn.Module:
    """A detector around the maps of a ResNet-18."""
    return kind(detection.backbone_utils.resnet_fpn_backbone(backbone_name="resnet18", weights=None), **SMALL, **options)


def pictures() -> tuple[list[Tensor]]:
    """What a detector takes in eval mode."""
    return ([torch.rand(3, 96, 96), torch.rand(3, 96, 96)],)


def labelled(*, masks: bool) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """What a detector takes in training mode."""
    target = {"boxes": torch.tensor([[8.0, 8.0, 60.0, 70.0]]), "labels": torch.tensor([1])}
    if masks:
        target["masks"] = torch.ones(1, 96, 96, dtype=torch.uint8)
    return *pictures(), [dict(target), dict(target)]


def small() -> Iterator[Case]:
    """Networks with sizes of our own."""
    case = partial(Case, library="torchvision")
    vit = partial(models.VisionTransformer, 32, 8, 3, 2, 32, 64, num_classes=5)
    yield case(name="VisionTransformer", build=vit, inputs=images(32, 32))
    yield case(name="SwinTransformer", build=partial(models.SwinTransformer, **SWIN, num_classes=5), inputs=images(64, 64))
    second = {"block": swin_transformer.SwinTransformerBlockV2, "downsample_layer": swin_transformer.PatchMergingV2}
    build = partial(models.SwinTransformer, **SWIN, num_classes=5, **second)
    yield case(name="SwinTransformer, v2", build=build, inputs=images(64, 64))
    blocks = [convnext.CNBlockConfig(16, 32, 1), convnext.CNBlockConfig(32, 48, 1), convnext.CNBlockConfig(48, None, 2)]
    yield case(name="ConvNeXt", build=partial(models.ConvNeXt, blocks, num_classes=5), inputs=images(64, 64))
    build = partial(models.MaxVit, input_size=(32, 32), stochastic_depth_prob=0.1, num_classes=5, **MAXVIT)
    yield case(name="MaxVit", build=build, inputs=images(32, 32))
    build = partial(video.SwinTransformer3d, **FILM, num_classes=5)
    yield case(name="SwinTransformer3d", build=build, inputs=images(4, 32, 32))


def detectors() -> Iterator[Case]:
    """Detectors, whole and their backbones."""
    makers: dict[str, Callable[[], nn.Module]] = {
        "fasterrcnn_mobilenet_v3_large_320_fpn": partial(
            detection.fasterrcnn_mobilenet_v3_large_320_fpn, weights=None, weights_backbone=None, **SMALL, **FEW
        ),
        "MaskRCNN, resnet18": partial(pyramid, detection.MaskRCNN, **FEW),
        "RetinaNet, resnet18": partial(pyramid, detection.RetinaNet, detections_per_img=5, score_thresh=0.0),
        "FCOS, resnet18": partial(pyramid, detection.FCOS, detections_per_img=5, score_thresh=0.0),
        "ssdlite320_mobilenet_v3_large": partial(
            detection.ssdlite320_mobilenet_v3_large, weights=None, weights_backbone=None, num_classes=5, detections_per_img=5
        ),
    }
    for name, build in makers.items():
        whole = Case(
            library="torchvision", name=name, build=build, inputs=pictures, training=partial(labelled, masks="Mask" in name)
        )
        yield whole
        yield replace(whole, part="backbone", part_inputs=images(96, 96))


def cases() -> Iterator[Case]:
    """All of them."""
    case = partial(Case, library="torchvision")
    for name, size in CLASSIFIERS.items():
        yield case(name=name, build=built(models, name), inputs=images(size, size))
    yield from small()
    for name in SEGMENTERS:
        whole = case(name=name, build=built(segmentation, name, weights_backbone=None, num_classes=5), inputs=images(64, 64))
        yield whole
        yield replace(whole, part="backbone")
    yield from detectors()
    for name in VIDEO:
        yield case(name=name, build=built(video, name), inputs=images(4, 32, 32))
    yield case(
        name="raft_small",
        build=built(optical_flow, "raft_small"),
        inputs=lambda: (torch.rand(2, 3, 128, 128), torch.rand(2, 3, 128, 128)),
    )
