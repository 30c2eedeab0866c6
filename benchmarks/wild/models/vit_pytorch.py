"""Networks of vit-pytorch."""

import importlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.wild.case import Case, images

DEEP = {"num_classes": 5, "dim": 32, "depth": 2, "heads": 2, "mlp_dim": 64}
PLAIN = DEEP | {"image_size": 32, "patch_size": 8}
SEQUENCE = DEEP | {"seq_len": 64, "patch_size": 8}
VIDEO = DEEP | {"image_size": 32, "image_patch_size": 8, "frames": 4, "frame_patch_size": 2}
STAGES = ("s1", "s2", "s3", "s4")
CROSS = {"sm_dim": 24, "lg_dim": 32, "sm_patch_size": 8, "lg_patch_size": 16, "depth": 2, "lg_enc_depth": 1}
FOUR: dict[str, Any] = {"dim": (16, 16, 32, 32), "depth": (1, 1, 1, 1), "num_classes": 5}
MOBILE = {"dims": [16, 24, 32], "channels": [8, 16, 16, 16, 24, 24, 32, 32, 40, 40, 64], "depths": (1, 1, 1), "num_classes": 5}


def net(name: str, file: str, kind: str, *size: int, **options: Any) -> Case:
    """The network of a class in a file of vit-pytorch, with what it reads."""
    build = partial(getattr(importlib.import_module(f"vit_pytorch.{file}"), kind), **options)
    return Case(library="vit-pytorch", name=name, build=build, inputs=images(*size))


def columns() -> Iterator[Case]:
    """Networks with tokens of one width."""
    yield net("ViT", "vit", "ViT", 32, 32, **PLAIN, dropout=0.1)
    yield net("ViT, mean", "vit", "ViT", 32, 32, **PLAIN, pool="mean")
    yield net("ViT, sequences", "vit_1d", "ViT", 64, **SEQUENCE)
    yield net("ViT, video", "vit_3d", "ViT", 4, 32, 32, **VIDEO)
    yield net("ViT, learnable memory", "learnable_memory_vit", "ViT", 32, 32, **PLAIN)
    yield net("ViT, parallel", "parallel_vit", "ViT", 32, 32, **PLAIN)
    yield net("ViT, patch merger", "vit_with_patch_merger", "ViT", 32, 32, **PLAIN)
    yield net("ViT, small data", "vit_for_small_dataset", "ViT", 32, 32, **PLAIN)
    yield net("ViT, adaptive sampling", "ats_vit", "ViT", 32, 32, **PLAIN, max_tokens_per_depth=(8, 4))
    yield net("SimpleViT", "simple_vit", "SimpleViT", 32, 32, **PLAIN)
    yield net("SimpleViT, video", "simple_vit_3d", "SimpleViT", 4, 32, 32, **VIDEO)
    yield net("SimpleViT, registers", "simple_vit_with_register_tokens", "SimpleViT", 32, 32, **PLAIN)
    yield net("SimpleViT, patch dropout", "simple_vit_with_patch_dropout", "SimpleViT", 32, 32, **PLAIN)
    yield net("SimpleViT, value residual", "simple_vit_with_value_residual", "SimpleViT", 32, 32, **PLAIN)
    yield net("SimpleUViT", "simple_uvit", "SimpleUViT", 32, 32, **PLAIN | {"depth": 4})
    yield net("nViT", "normalized_vit", "nViT", 32, 32, **PLAIN)
    yield net("JumboViT", "jumbo_vit", "JumboViT", 32, 32, **PLAIN)
    yield net("DeepViT", "deepvit", "DeepViT", 32, 32, **PLAIN)
    yield net("CaiT", "cait", "CaiT", 32, 32, **PLAIN, cls_depth=1)
    yield net("XCiT", "xcit", "XCiT", 32, 32, **PLAIN, cls_depth=1)
    yield net("RvT", "rvt", "RvT", 32, 32, **PLAIN)
    yield net("T2TViT", "t2t", "T2TViT", 32, 32, **DEEP, image_size=32)
    yield net("CCT", "cct", "CCT", 32, 32, img_size=32, embedding_dim=32, num_layers=2, num_heads=2, num_classes=5)
    yield net("CrossViT", "cross_vit", "CrossViT", 32, 32, image_size=32, num_classes=5, **CROSS)
    yield net(
        "LookViT",
        "look_vit",
        "LookViT",
        32,
        32,
        dim=32,
        image_size=32,
        num_classes=5,
        depth=2,
        patch_size=16,
        highres_patch_size=8,
    )


def pyramids() -> Iterator[Case]:
    """Networks whose maps become smaller from stage to stage."""
    yield net("PiT", "pit", "PiT", 32, 32, **PLAIN | {"depth": (1, 1)})
    yield net("LeViT", "levit", "LeViT", 64, 64, image_size=64, num_classes=5, dim=(32, 48, 64), depth=1, heads=2, mlp_mult=2)
    yield net("CvT", "cvt", "CvT", 64, 64, num_classes=5, s2_emb_dim=64, s3_emb_dim=96, s2_heads=1, s3_heads=2, s3_depth=2)
    twins = {f"{stage}_emb_dim": 16 for stage in STAGES} | {f"{stage}_depth": 1 for stage in STAGES}
    yield net("TwinsSVT", "twins_svt", "TwinsSVT", 224, 224, num_classes=5, **twins)
    yield net("RegionViT", "regionvit", "RegionViT", 224, 224, **FOUR)
    yield net("CrossFormer", "crossformer", "CrossFormer", 224, 224, **FOUR | {"dim": (32, 32, 64, 64)})
    yield net("MaxViT", "max_vit", "MaxViT", 224, 224, num_classes=5, dim=16, depth=(1, 1, 1, 1), dim_conv_stem=16, dim_head=8)
    yield net(
        "ScalableViT",
        "scalable_vit",
        "ScalableViT",
        64,
        64,
        num_classes=5,
        dim=16,
        depth=(1, 1, 1),
        heads=(1, 1, 2),
        reduction_factor=(4, 2, 1),
    )
    yield net("SepViT", "sep_vit", "SepViT", 224, 224, num_classes=5, dim=16, depth=(1, 1, 1, 1), heads=(1, 1, 2, 2))
    nest = {"image_size": 32, "patch_size": 4, "dim": 16, "heads": 1, "num_hierarchies": 2, "block_repeats": (1, 1)}
    yield net("NesT", "nest", "NesT", 32, 32, num_classes=5, **nest)
    yield net("MobileViT", "mobile_vit", "MobileViT", 64, 64, image_size=(64, 64), **MOBILE)


def cases() -> Iterator[Case]:
    """All of them."""
    yield from columns()
    yield from pyramids()
    uneven = partial(lambda *sizes: [torch.randn(3, *size) for size in sizes], (32, 32), (16, 32))
    kind = importlib.import_module("vit_pytorch.na_vit").NaViT
    yield Case(library="vit-pytorch", name="NaViT", build=partial(kind, **PLAIN), inputs=lambda: (uneven(),))
