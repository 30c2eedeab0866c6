"""A picture of what a network looks at: Grad-CAM of one image with attention off and on, and every gate.

Grad-CAM is of the class that the network finds likeliest with attention on, or of `--class`. Needs matplotlib
and grad-cam: pip install "drifa-attn[plots]".
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drifa_attn.files.checkpoint import load_attention
from drifa_attn.files.format import read
from drifa_attn.plot.evidence import evidence
from drifa_attn.plot.style import sheet
from drifa_attn.wrapping.active import gates

from .arguments import readable
from .networks import create, load_weights
from .picture import Seen, draw
from .show import Table, show

EXAMPLE = "drifa-attn maps resnet50 --weights attention.safetensors --backbone resnet50.pth image.jpg --out maps.png"


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("network", help="a name of timm")
    parser.add_argument("image", type=readable, help="a file that Pillow can read")
    parser.add_argument("--weights", type=readable, required=True, help="the attention, a file of save_attention")
    parser.add_argument("--backbone", type=readable, help="the weights of the network itself (default: timm's, downloaded)")
    parser.add_argument("--class", dest="target", type=int, help="the number of the class (default: the likeliest)")
    parser.add_argument("--site", help="where Grad-CAM is taken (default: the last with 16 positions or more)")
    parser.add_argument("--out", type=Path, required=True, help="the picture, .png, .pdf, .svg, ...")


def run(options: argparse.Namespace) -> None:
    """Load, look, draw."""
    check_out(options.out)
    picture = opened(options.image)
    model = loaded(options)
    x, image = prepared(model, picture)
    found = evidence("maps", model, x, options.site, None if options.target is None else [options.target])
    seen = Seen(image, found, gates(model, x))
    draw(seen, options.out)
    rows = [(name, f"{a.mean():.3f}", f"{a.min():.3f}", f"{a.max():.3f}") for name, a in seen.gates.items()]
    off, on = found.off[0].item(), found.on[0].item()
    said = f"class {found.classes.item()}: {100 * off:.1f} % with attention off, {100 * on:.1f} % with it on"
    show(Table(f"gates of {options.image}", ("site", "mean", "least", "greatest"), rows, [f"{said}. Written: {options.out}"]))


def check_out(out: Path) -> None:
    """Raise an `ImportError` unless matplotlib is there, and a `ValueError` unless it can write such a file."""
    with sheet("maps", 1, 1) as figure:
        known = figure.canvas.get_supported_filetypes()
    if out.suffix[1:] not in known:
        raise ValueError(f"--out {out} expected a file that ends in one of .{', .'.join(sorted(known))}.")
    if not out.parent.is_dir() or out.is_dir():
        raise ValueError(f"--out {out} expected a file in a folder that is there.")


def opened(path: Path) -> Any:
    """The image of a file, in colours."""
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


def loaded(options: argparse.Namespace) -> nn.Module:
    """The network with its weights and its attention, in eval mode, with as many classes as the file of attention says."""
    plan, tensors = read(options.weights)
    model = create(options.network, pretrained=options.backbone is None)
    if options.backbone is not None:
        load_weights(model, options.backbone)
    heads = [tensors[f"{name}.weight"].shape[0] for name in plan["classifier"] if f"{name}.weight" in tensors]
    if heads and heads[0] != model.num_classes:
        model.reset_classifier(heads[0])  # type: ignore[operator]
    return load_attention(model, options.weights).eval()


def prepared(model: nn.Module, image: Any) -> tuple[Tensor, Tensor]:
    """An image as the network takes it, `1 3 h w`, and the same as it is shown, `h w 3` in [0, 1]."""
    from timm.data import create_transform, resolve_model_data_config

    config = resolve_model_data_config(model)
    x = create_transform(**config, is_training=False)(image)
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return x[None], (x * std + mean).clamp(0, 1).permute(1, 2, 0)
