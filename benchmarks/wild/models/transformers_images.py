"""Networks of transformers that read images: backbones, classifiers, segmentation, depth."""

from collections.abc import Iterator

import transformers
from torch import nn

from benchmarks.wild.case import Case, images
from benchmarks.wild.models.transformers import net

VIT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
VIT |= {"image_size": 32, "patch_size": 8}
SWIN = {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [1, 1, 1], "num_heads": [1, 2, 2], "window_size": 4}
STAGES = {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1]}
RESNET = STAGES | {"embedding_size": 16, "layer_type": "basic"}
BIT = {"hidden_sizes": [32, 32, 64, 64], "depths": [1, 1, 1, 1], "embedding_size": 32}
SEGFORMER = STAGES | {"num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 16, "num_labels": 3}
PVT = STAGES | {"num_attention_heads": [1, 1, 2, 2], "image_size": 64}


MASKED = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
MASKED |= {"decoder_intermediate_size": 48}
DPT = VIT | {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 16, 16]}
DPT |= {"fusion_hidden_size": 16, "backbone_config": None, "is_hybrid": False}


def seeing_depth() -> nn.Module:
    """A network that estimates depth; untrained, the ReLU at its end would give zeros alone."""
    model = transformers.DPTForDepthEstimation(transformers.DPTConfig(**DPT))
    nn.init.ones_(model.head.head[-2].bias)
    return model


def vits() -> Iterator[Case]:
    """Networks with tokens of one width."""
    small = images(32, 32)
    yield net("ViTModel", "ViT", small, **VIT)
    yield net("ViTForImageClassification", "ViT", small, **VIT, num_labels=3)
    yield net("DeiTModel", "DeiT", small, **VIT)
    yield net("BeitModel", "Beit", small, **VIT, use_relative_position_bias=True)
    yield net("Data2VecVisionModel", "Data2VecVision", small, **VIT)
    yield net("Dinov2Model", "Dinov2", small, **VIT)
    yield net("Dinov2WithRegistersModel", "Dinov2WithRegisters", small, **VIT)
    yield net("Dinov2Backbone", "Dinov2", small, **VIT, out_features=["stage2", "stage3"])
    yield net("DINOv3ViTModel", "DINOv3ViT", small, **VIT, num_register_tokens=2)
    yield net("ViTMAEModel", "ViTMAE", small, **VIT, mask_ratio=0.5)
    yield net("ViTMAEForPreTraining", "ViTMAE", small, **VIT, **MASKED)
    yield net("ViTMSNModel", "ViTMSN", small, **VIT)
    yield net("CLIPVisionModel", "CLIPVision", small, **VIT, projection_dim=16)
    yield net("SiglipVisionModel", "SiglipVision", small, **VIT)
    yield Case(library="transformers", name="DPTForDepthEstimation", build=seeing_depth, inputs=small)
    yield net("IJepaModel", "IJepa", small, **VIT)


def pyramids() -> Iterator[Case]:
    """Networks whose maps become smaller from stage to stage."""
    small = images(64, 64)
    yield net("SwinModel", "Swin", small, **SWIN)
    yield net("SwinForImageClassification", "Swin", small, **SWIN, num_labels=3)
    yield net("SwinBackbone", "Swin", small, **SWIN, out_features=["stage1", "stage3"])
    yield net("Swinv2Model", "Swinv2", small, **SWIN)
    yield net("ConvNextModel", "ConvNext", small, **STAGES)
    yield net("ConvNextBackbone", "ConvNext", small, **STAGES, out_features=["stage2", "stage4"])
    yield net("ConvNextV2ForImageClassification", "ConvNextV2", small, **STAGES, num_labels=3)
    yield net("ResNetModel", "ResNet", small, **RESNET)
    yield net("ResNetForImageClassification", "ResNet", small, **RESNET, num_labels=3)
    yield net("RegNetModel", "RegNet", small, **STAGES, embedding_size=16, groups_width=8)
    yield net("BitModel", "Bit", small, num_groups=8, **BIT)
    yield net("MobileNetV1Model", "MobileNetV1", small, depth_multiplier=0.25)
    yield net("MobileNetV2Model", "MobileNetV2", small, depth_multiplier=0.35)
    yield net("MobileNetV2ForSemanticSegmentation", "MobileNetV2", small, depth_multiplier=0.35, num_labels=3)
    yield net(
        "MobileViTModel",
        "MobileViT",
        small,
        hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32],
        image_size=64,
        num_attention_heads=2,
    )
    yield net("EfficientNetModel", "EfficientNet", small, width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320)
    yield net("SegformerModel", "Segformer", small, **SEGFORMER)
    yield net("SegformerForSemanticSegmentation", "Segformer", small, **SEGFORMER)
    yield net("PvtV2Model", "PvtV2", small, **PVT)
    yield net("PoolFormerModel", "PoolFormer", small, **STAGES)
    yield net(
        "FocalNetModel",
        "FocalNet",
        small,
        image_size=64,
        embed_dim=16,
        depths=[1, 1],
        hidden_sizes=[16, 32],
        focal_levels=[1, 1],
        focal_windows=[3, 3],
    )
    yield net(
        "LevitModel",
        "Levit",
        small,
        image_size=64,
        hidden_sizes=[32, 48, 64],
        num_attention_heads=[2, 2, 2],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
    )
    yield net("CvtModel", "Cvt", small, embed_dim=[16, 24, 32], num_heads=[1, 1, 2], depth=[1, 2, 3])
    yield net(
        "HieraModel",
        "Hiera",
        small,
        image_size=[64, 64],
        embed_dim=16,
        depths=[1, 1, 1],
        num_heads=[1, 1, 2],
        num_query_pool=2,
        masked_unit_size=[4, 4],
    )
    yield net("SwiftFormerModel", "SwiftFormer", small, depths=[1, 1, 1, 1], embed_dims=[16, 24, 32, 40], image_size=64)
    yield net("GLPNForDepthEstimation", "GLPN", small, **SEGFORMER)


def cases() -> Iterator[Case]:
    """All that read images."""
    yield from vits()
    yield from pyramids()
