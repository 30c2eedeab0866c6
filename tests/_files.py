"""Helpers of several tests about files."""

import json

import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.networks import built


def metadata(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def other(name="resnet", seed=7, **options):
    """A network of the same architecture with other weights."""
    torch.manual_seed(seed)
    model = timm.create_model("test_resnet", **{"num_classes": 10} | options) if options else built(name)[0]
    for parameter in model.parameters():
        parameter.data.add_(0.01)
    return model.eval()


def edited(path, tensors=None, **plan):
    """The same file with other tensors or another plan."""
    written = json.dumps(json.loads(metadata(path)["drifa_attn"]) | plan)
    save_file(load_file(path) if tensors is None else tensors, path, {"drifa_attn": written})
    return path


def without(path, word):
    tensors = load_file(path)
    gone = next(key for key in tensors if word in key)
    return edited(path, {key: tensor for key, tensor in tensors.items() if key != gone})
