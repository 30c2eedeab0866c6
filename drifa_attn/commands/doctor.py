"""What this machine has, and which implementation each attention takes here, and why."""

import argparse
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from drifa_attn import __version__
from drifa_attn.attention import MFA, MIFA
from drifa_attn.ops import explain
from drifa_attn.ops.choose import triton_missing, triton_reason

from .show import Table, show, show_json

EXAMPLE = "drifa-attn doctor"
PACKAGES = ("torch", "einops", "timm", "safetensors", "triton", "torchvision", "rich", "matplotlib", "grad-cam")
SHAPES = ((8, 64, 56, 56), (8, 256, 14, 14), (1, 256, 14, 14))


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def run(options: argparse.Namespace) -> None:
    """Ask, and show."""
    machine, paths = dict(facts()), [path for device in devices() for path in choices(device)]
    header = ("attention", "features", "on", "pass", "statistics", "gate", "why")
    if options.json:
        show_json({"machine": machine, "paths": [dict(zip(header, path, strict=True)) for path in paths]})
        return
    show(Table("this machine", ("what", "here"), list(machine.items()), left=2))
    show(Table("which implementation runs", header, paths, left=len(header)))


def facts() -> Iterator[tuple[str, str]]:
    """Versions, devices and switches."""
    yield "drifa_attn", __version__
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "not installed"
    yield "threads", str(torch.get_num_threads())
    yield "CUDA", torch.version.cuda or "torch is built without it"
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        yield f"cuda:{i}", f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}"
    if not torch.cuda.is_available():
        yield "GPU", "none that torch can use"
    yield "Triton kernels", triton_missing() or "can be used on CUDA devices of compute capability 8.0 and later"
    yield "DRIFA_BACKEND", os.environ.get("DRIFA_BACKEND", "auto (not set)")


def devices() -> list[tuple[torch.device, torch.dtype]]:
    """Where attention can run, and in which dtype one would."""
    gpu = [torch.float32, torch.bfloat16] if torch.cuda.is_available() else []
    return [(torch.device("cpu"), torch.float32), *((torch.device("cuda"), dtype) for dtype in gpu)]


def choices(where: tuple[torch.device, torch.dtype]) -> Iterator[tuple[str, ...]]:
    """Some attentions, and the implementation of each for some features; nothing is computed."""
    device, dtype = where
    for shape in SHAPES:
        x = torch.empty(shape, device=device, dtype=dtype)
        for name, layer, features in (
            (f"MFA({shape[1]})", MFA(shape[1]), x),
            (f"MFA({shape[1]}, reduction=16)", MFA(shape[1], reduction=16), x),
            (f"MIFA({shape[1]}, 2)", MIFA(shape[1], 2), [x, x]),
        ):
            for trains in (False, True):
                with torch.set_grad_enabled(trains):
                    choice = explain(layer, features)
                gate = "reference" if choice.path == "reference" else "chunked" if triton_reason(x) else "triton"
                where_it_runs = f"{device} {str(dtype)[6:]}"
                mode = "training" if trains else "inference"
                yield name, "×".join(map(str, shape)), where_it_runs, mode, choice.path, gate, choice.reason
