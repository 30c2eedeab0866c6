"""The networks of the tests that timm got after the oldest version that is allowed.

Where timm has no such network it is built from that version's own parts, equal to the later one, and stands under its name. One
whose parts are missing too skips the tests that build it, so that they are counted.
"""

import pytest
import timm
from timm.models import convnext, register_model, resnet, tnt
from timm.models._registry import generate_default_cfgs
from torch import nn

SMALL = {"input_size": (3, 160, 160), "crop_pct": 0.95, "mean": (0.5,) * 3, "std": (0.5,) * 3, "num_classes": 1000}

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


LATER = (test_resnet, test_convnext, tnt_s_legacy_patch16_224, test_mambaout)


def register():
    """Give older versions of timm the networks that they lack; of a new one nothing is touched."""
    for build in LATER:
        if not timm.is_model(build.__name__):
            register_model(build)
