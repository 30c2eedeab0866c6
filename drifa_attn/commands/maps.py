"""A picture of what a network looks at: Grad-CAM of one image with attention off and on, and every gate.

Grad-CAM is of the class that the network finds likeliest with attention on, or of `--class`. Needs matplotlib:
pip install "drifa-attn[plots]".
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drifa_attn.files.checkpoint import load_attention
from drifa_attn.files.format import read
from drifa_attn.layout import positions
from drifa_attn.network.site import Site
from drifa_attn.trees import at_path
from drifa_attn.wrapping.active import disabled, gates
from drifa_attn.wrapping.inject import placed

from .arguments import readable
from .networks import create, load_weights
from .picture import Seen, draw
from .show import Table, show

EXAMPLE = "drifa-attn maps resnet50 --weights attention.safetensors --backbone resnet50.pth image.jpg --out maps.png"
ENOUGH = 16  # positions that a map should have at least


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("network", help="a name of timm")
    parser.add_argument("image", type=readable, help="a file that Pillow can read")
    parser.add_argument("--weights", type=readable, required=True, help="the attention, a file of save_attention")
    parser.add_argument("--backbone", type=readable, help="the weights of the network itself (default: timm's, downloaded)")
    parser.add_argument("--class", dest="target", type=int, help="the number of the class (default: the likeliest)")
    parser.add_argument("--site", help="where Grad-CAM is taken (default: the last with 16 positions)")
    parser.add_argument("--out", type=Path, required=True, help="the picture, .png, .pdf, .svg, ...")


def run(options: argparse.Namespace) -> None:
    """Load, look, draw."""
    check_out(options.out)
    picture = opened(options.image)
    model = loaded(options)
    x, image = prepared(model, picture)
    sites = [site for site, _ in placed(model)]
    site = chosen(sites, options.site)
    seen = look(model, x, image, site, options.target)
    draw(seen, options.out)
    rows = [(name, f"{a.mean():.3f}", f"{a.min():.3f}", f"{a.max():.3f}") for name, a in seen.gates.items()]
    off, on = seen.off[0], seen.on[0]
    note = f"class {seen.target}: {100 * off:.1f} % with attention off, {100 * on:.1f} % with it on. Written: {options.out}"
    show(Table(f"gates of {options.image}", ("site", "mean", "least", "greatest"), rows, [note]))


def check_out(out: Path) -> None:
    """Raise a `ValueError` unless matplotlib is there and can write such a file."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError('maps needs matplotlib: pip install "drifa-attn[plots]".') from error
    known = Figure().canvas.get_supported_filetypes()
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


def chosen(sites: list[Site], name: str | None) -> Site:
    """The site of a name, or the last one with enough positions."""
    if not sites:
        raise ValueError("the file names no site: its attention is part of the network's own code, which maps does not read.")
    if name is not None and name not in [site.name for site in sites]:
        raise ValueError(f"--site {name!r} has no attention; there is some at {', '.join(site.name for site in sites)}.")
    several = [site for site in sites if name in (None, site.name)]
    large = [site for site in several if site.positions >= ENOUGH]
    return large[-1] if large else max(several, key=lambda site: site.positions)


def look(model: nn.Module, x: Tensor, image: Tensor, site: Site, target: int | None) -> Seen:
    """Run the network with attention on and off."""
    with torch.no_grad():
        logits = model(x)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ValueError(f"{type(model).__name__} gives no logits of classes, which Grad-CAM needs.")
    target = int(logits.argmax()) if target is None else target
    if not 0 <= target < logits.shape[1]:
        raise ValueError(f"--class expected a number from 0 to {logits.shape[1] - 1}, got {target}.")
    with disabled(model):
        off = cam(model, x, site, target)
    return Seen(image, target, off, cam(model, x, site, target), gates(model, x))


def cam(model: nn.Module, x: Tensor, site: Site, target: int) -> tuple[float, Tensor]:
    """The probability of a class, and its Grad-CAM at a site, `h w` in [0, 1]: where features speak for the class."""
    kept: list[Tensor] = []
    module = model.get_submodule(site.module)
    handle = module.register_forward_hook(lambda _, __, output: kept.append(at_path(output, site.path)))
    try:
        with torch.enable_grad():
            logits = model(x.clone().requires_grad_())
    finally:
        handle.remove()
    (gradient,) = torch.autograd.grad(logits[0, target], kept[0])
    features, slopes = (positions(t, site.layout, site.num_prefix_tokens)[0] for t in (kept[0].detach(), gradient))
    found = (slopes.mean(1) @ features).relu()
    return logits.softmax(1)[0, target].item(), (found / found.max().clamp(min=1e-12)).view(grid(kept[0], site, x))


def grid(feature: Tensor, site: Site, x: Tensor) -> tuple[int, int]:
    """The rows and columns of the positions of a feature; those of tokens have the image's proportions."""
    if feature.ndim == 4:
        rows, columns = feature.shape[2:] if site.layout == "b c ..." else feature.shape[1:3]
        return rows, columns
    count = feature.shape[1 if site.layout == "b ... c" else 2] - site.num_prefix_tokens
    rows = max(round((count * x.shape[2] / x.shape[3]) ** 0.5), 1)
    if rows * (count // rows) != count:
        raise ValueError(f"{site.name} has {count} positions, which are no map: name another --site.")
    return rows, count // rows
