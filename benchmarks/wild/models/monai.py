"""Networks of MONAI, for volumes, images and sequences of one channel."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from monai.networks import nets

from benchmarks.wild.case import Case, images

VOLUME = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}
IMAGE = VOLUME | {"spatial_dims": 2}
SEQUENCE = VOLUME | {"spatial_dims": 1}
LEVELS: dict[str, Any] = {"channels": (8, 16, 32), "strides": (2, 2)}
CODES = LEVELS | {"strides": (2, 2, 2)}
PYRAMID = {"features": (8, 8, 16, 16, 32, 8)}
KERNELS = {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [8, 16, 32]}
RESIDUAL = {"init_filters": 8, "blocks_down": (1, 1, 1)}
SWIN = {"feature_size": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
MEDNEXT = {"init_filters": 8, "blocks_down": (1, 1, 1, 1), "blocks_up": (1, 1, 1, 1), "blocks_bottleneck": 1}
TOKENS = {"hidden_size": 24, "mlp_dim": 48, "num_heads": 2}
CODER = {"channels": (8, 16), "num_res_blocks": (1, 1), "norm_num_groups": 4, "attention_levels": (False, True)}
QUANTISED = {"channels": (8, 16), "num_res_layers": 1, "num_res_channels": (8, 16), "num_embeddings": 16, "embedding_dim": 8}
QUANTISED |= {"downsample_parameters": ((2, 4, 1, 1),) * 2, "upsample_parameters": ((2, 4, 1, 1, 0),) * 2}


def net(kind: str, note: str, *size: int, bands: int = 1, **options: Any) -> Case:
    """A network of MONAI that reads one batch of this size."""
    name = f"{kind}, {note}" if note else kind
    build = partial(getattr(nets, kind), **options)
    return Case(library="MONAI", name=name, build=build, inputs=images(*size, channels=bands))


def segmenting() -> Iterator[Case]:
    """Networks that give a map."""
    yield net("UNet", "volumes", 16, 16, 16, **VOLUME, **LEVELS, num_res_units=1)
    yield net("UNet", "images", 32, 32, **IMAGE, **LEVELS, num_res_units=2)
    yield net("UNet", "sequences", 64, **SEQUENCE, **LEVELS)
    yield net("AttentionUnet", "", 16, 16, 16, **VOLUME, **LEVELS)
    yield net("BasicUNet", "", 32, 32, 32, **VOLUME, **PYRAMID)
    yield net("BasicUNetPlusPlus", "", 32, 32, **IMAGE, **PYRAMID)
    yield net("BasicUNetPlusPlus", "deep supervision", 32, 32, **IMAGE, **PYRAMID, deep_supervision=True)
    yield net("DynUNet", "", 16, 16, 16, **VOLUME, **KERNELS)
    deep = {"kernel_size": [3] * 4, "strides": [1, 2, 2, 2], "upsample_kernel_size": [2] * 3, "filters": [8, 8, 16, 16]}
    yield net("DynUNet", "deep supervision", 16, 16, 16, **VOLUME, **deep, deep_supervision=True, deep_supr_num=2)
    yield net("SegResNet", "", 16, 16, 16, **VOLUME, **RESIDUAL, blocks_up=(1, 1))
    vae = {"input_image_size": (16, 16, 16), "vae_nz": 8}
    yield net("SegResNetVAE", "", 16, 16, 16, **VOLUME, **RESIDUAL, blocks_up=(1, 1), **vae)
    yield net("SegResNetDS", "", 16, 16, 16, **VOLUME, **RESIDUAL, dsdepth=2)
    yield net("UNETR", "", 32, 32, 32, **VOLUME, **TOKENS, img_size=32, feature_size=8)
    yield net("SwinUNETR", "volumes", 64, 64, 64, **VOLUME, **SWIN)
    yield net("SwinUNETR", "images, v2", 64, 64, **IMAGE, **SWIN, use_v2=True)
    yield net("VNet", "", 16, 16, 16, **VOLUME)
    yield net("HighResNet", "", 12, 12, 12, **VOLUME)
    yield net("AHNet", "", 128, 128, **IMAGE, layers=(1, 1, 1, 1))
    yield net("FlexibleUNet", "", 64, 64, in_channels=1, out_channels=2, backbone="efficientnet-b0")
    yield net("MedNeXt", "", 32, 32, 32, **VOLUME, **MEDNEXT)
    yield net("Quicknat", "", 32, 32, num_classes=2, num_filters=8)
    yield net("RegUNet", "", 32, 32, **IMAGE, num_channel_initial=8, depth=2)


def classifying() -> Iterator[Case]:
    """Networks that give a vector."""
    yield net("DenseNet121", "volumes", 32, 32, 32, **VOLUME)
    yield net("DenseNet121", "images", 64, 64, **IMAGE)
    yield net("resnet10", "volumes", 32, 32, 32, spatial_dims=3, n_input_channels=1, num_classes=2)
    yield net("EfficientNetBN", "", 64, 64, model_name="efficientnet-b0", pretrained=False, spatial_dims=2, in_channels=1)
    yield net("SEResNet50", "images", 64, 64, spatial_dims=2, in_channels=1, num_classes=2)
    yield net(
        "ViT", "", 16, 16, 16, in_channels=1, img_size=(16, 16, 16), patch_size=8, classification=True, **TOKENS, num_layers=3
    )
    yield net("Classifier", "", 32, 32, in_shape=(1, 32, 32), classes=3, **LEVELS)
    yield net("Regressor", "", 16, 16, 16, in_shape=(1, 16, 16, 16), out_shape=(3,), **LEVELS)
    yield net("TorchVisionFCModel", "resnet18", 224, 224, bands=3, model_name="resnet18", num_classes=3)
    bags = {"num_classes": 3, "pretrained": False, "backbone": "resnet18"}
    yield net("MILModel", "a bag of patches", 3, 64, 64, bands=4, mil_mode="att_trans", **bags)


def coding() -> Iterator[Case]:
    """Networks that give back what they read, and others."""
    yield net("AutoEncoder", "", 16, 16, 16, **VOLUME, **CODES, inter_channels=[16])
    yield net("VarAutoEncoder", "", 32, 32, spatial_dims=2, in_shape=(1, 32, 32), out_channels=1, latent_size=8, **CODES)
    yield net("AutoencoderKL", "", 32, 32, **IMAGE, **CODER, latent_channels=4)
    yield net("VQVAE", "", 32, 32, **IMAGE, **QUANTISED)
    yield net(
        "ViTAutoEnc", "", 32, 32, in_channels=1, img_size=(32, 32), patch_size=(4, 4), spatial_dims=2, **TOKENS, num_layers=3
    )
    masked = {
        "decoder_hidden_size": 24,
        "decoder_mlp_dim": 48,
        "decoder_num_layers": 2,
        "decoder_num_heads": 2,
        "num_layers": 3,
    }
    yield net(
        "MaskedAutoEncoderViT", "", 32, 32, in_channels=1, img_size=(32, 32), patch_size=8, spatial_dims=2, **TOKENS, **masked
    )
    yield Case(
        library="MONAI",
        name="DiffusionModelUNet",
        build=partial(nets.DiffusionModelUNet, **IMAGE | CODER, num_head_channels=8),
        inputs=lambda: (torch.randn(2, 1, 16, 16), torch.tensor([3, 7])),
    )


def cases() -> Iterator[Case]:
    """All of them."""
    yield from segmenting()
    yield from classifying()
    yield from coding()
