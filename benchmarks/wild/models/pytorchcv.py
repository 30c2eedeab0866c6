"""Networks of pytorchcv, by its own names."""

from collections.abc import Iterator
from functools import partial

from pytorchcv.model_provider import get_model

from benchmarks.wild.case import Case, images

CLASSIFIERS = ("resnet10", "seresnet10", "dla46c", "hrnet_w18_small_v1", "mobilenetv3_small_w7d20")
CIFAR = ("resnet20_cifar10", "pyramidnet110_a48_cifar10", "densenet40_k12_cifar10", "wrn16_10_cifar10", "ror3_56_cifar10")
SEGMENTERS = {"bisenet_resnet18_celebamaskhq": {}, "fastscnn_cityscapes": {}, "lednet_cityscapes": {}}


def cases() -> Iterator[Case]:
    """All of them."""
    case = partial(Case, library="pytorchcv")
    for name in CLASSIFIERS:
        yield case(name=name, build=partial(get_model, name), inputs=images(224, 224))
    for name in CIFAR:
        yield case(name=name, build=partial(get_model, name), inputs=images(32, 32))
    for name, options in SEGMENTERS.items():
        yield case(name=name, build=partial(get_model, name, in_size=(128, 128), **options), inputs=images(128, 128))
