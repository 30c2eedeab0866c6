"""What the oldest allowed versions of timm and torch do not have, for the tests.

Where timm has no such network it is built from that version's own parts, equal to the later one, and stands under its name. One
whose parts are missing too skips the tests that build it, so that they are counted.
"""

import sys

import pytest
import timm
import torch
from timm.models import convnext, crossvit, densenet, register_model, resnet, tnt
from timm.models._registry import generate_default_cfgs
from torch import nn

SMALL = {"input_size": (3, 160, 160), "crop_pct": 0.95, "mean": (0.5,) * 3, "std": (0.5,) * 3}
SMALL |= {"num_classes": 1000, "hf_hub_id": "timm/"}

default_cfgs = generate_default_cfgs(
    {
        "test_resnet.r160_in1k": {**SMALL, "pool_size": (5, 5), "first_conv": "conv1.0", "classifier": "fc"},
        "test_convnext.r160_in1k": {**SMALL, "pool_size": (5, 5), "first_conv": "stem.0", "classifier": "head.fc"},
    }
)


def test_resnet(pretrained, **options):
    """Basic blocks, but bottlenecks in the third stage: one kind for all stages is what older versions build."""
    one, two, three, four = options.pop("channels", (32, 48, 48, 96))
    widths = {"layers": (1, 1, 1, 1), "channels": (one, two, 4 * three, four), "block": resnet.BasicBlock}
    stem = {"stem_width": 16, "stem_type": "deep", "avg_down": True}
    model = timm.models.build_model_with_cfg(resnet.ResNet, "test_resnet", pretrained, **{**widths, **stem, **options})
    for i, basic in enumerate(model.layer3):
        first = (two, three, 2, basic.downsample) if i == 0 else (4 * three, three)
        model.layer3[i] = block = resnet.Bottleneck(*first, drop_path=basic.drop_path)
        for conv in (block.conv1, block.conv2, block.conv3):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        block.zero_init_last()
    return model


def test_convnext(pretrained, **options):
    sizes = {"depths": (1, 2, 4, 2), "dims": (24, 32, 48, 64), "norm_eps": 1e-5, "act_layer": "gelu_tanh"}
    return convnext._create_convnext("test_convnext", pretrained, **{**sizes, **options})


def tnt_s_legacy_patch16_224(pretrained, **options):
    return tnt.tnt_s_patch16_224(pretrained, **options)


def test_mambaout(pretrained, **options):
    pytest.skip(f"timm {timm.__version__} has no MambaOut")


LATER = {test_resnet: resnet, test_convnext: convnext, tnt_s_legacy_patch16_224: tnt, test_mambaout: sys.modules[__name__]}


def register():
    """Give older versions of timm the networks that they lack, where the later ones have them; a new one is not touched.

    Each process needs this for itself.
    """
    for build, module in LATER.items():
        name = build.__name__
        if not timm.is_model(name):
            build.__module__ = module.__name__
            setattr(module, name, build)
            if name in default_cfgs:
                module.default_cfgs[name] = default_cfgs[name]
            register_model(build)


CHANGED = {"crossvit": crossvit.CrossVit, "densenet": densenet.DenseNet, "tnt": tnt.TNT}


def later(names, *changed):
    """Names of networks as parameters; of these, the ones that older versions of timm build otherwise are skipped there."""
    return [pytest.param(name, marks=built_otherwise(name) if name in changed else ()) for name in names]


def built_otherwise(name):
    reason = f"timm {timm.__version__} has another {name}, which has no forward_intermediates"
    return pytest.mark.skipif(not hasattr(CHANGED[name], "forward_intermediates"), reason=reason)


def needs_later_torch(lack):
    """Skip a test in the oldest version of torch, which lacks something or does it otherwise, in words."""
    is_oldest = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7)
    return pytest.mark.skipif(is_oldest, reason=f"torch {torch.__version__} {lack}")
