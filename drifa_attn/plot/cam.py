"""What a network looks at with attention off and on, and the difference."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .evidence import Evidence, evidence
from .given import check_names, named
from .style import DIFFERENCE, HEAT, bare, need, sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def cam(
    model: nn.Module,
    x: Tensor,
    classes: Any = None,
    *,
    site: str | None = None,
    images: Any = None,
    names: Sequence[str] | None = None,
) -> "Figure":
    """Draw Grad-CAM of a wrapped network with attention off and on, and the difference.

    A row is an image. Its maps show where the features of a site speak for the class: 0 is the least place of a map and 1 its
    greatest, each scaled for itself. Red in the last column is where attention adds weight to a place, blue where it takes some
    away. Above a map stands the probability of the class. With attention off the same trained weights run without it: that is
    what attention does in this network, not what a network trained without it would do. Before training the maps are equal.

    The network is as it was afterwards: its modes, what wants a gradient, and the gradients.

    Args:
        model: a network that `wrap` has put attention into, and that gives logits `b k`.
        x: the images as the network takes them, `b c h w`.
        classes: the class of each image that the maps speak for, `b`; None is the likeliest with attention on.
        site: where Grad-CAM is taken, behind the attention; None is the last site with 16 positions at least.
        images: the images as they are shown, `b h w` or `b h w 3`, in [0, 1]; None shows the mean of the channels of x, from
            its least value to its greatest.
        names: of the classes, in words.

    Returns: the figure, with the image, two maps and their difference for each image.
    Raises: TypeError, ValueError: no such network, images or classes. ImportError: matplotlib or grad-cam is missing.
    Source: Grad-CAM, arXiv:1610.02391, by the library pytorch-grad-cam. Differs: the paper's Figure 4 has no difference.
    """
    need("plot.cam")
    found = evidence("plot.cam", model, x, site, classes)
    check_names("plot.cam", names, int(found.classes.max()))
    shown = pictures(x, images)
    with sheet("plot.cam", 9, 2.1 * len(x) + 0.9) as figure:
        panels = figure.subplots(len(x), 4, squeeze=False)
        for row, line in enumerate(panels):
            draw_row(line, found, row, shown[row], named(int(found.classes[row]), names))
        below = figure.colorbar(panels[0, 2].images[-1], ax=list(panels[:, 1:3].flat), location="bottom", aspect=40, pad=0.02)
        below.set_label("evidence for the class, of its greatest")
        beside = figure.colorbar(panels[0, 3].images[-1], ax=list(panels[:, 3]), location="bottom", aspect=20, pad=0.02)
        beside.set_label("on − off")
        moved = (found.on[1] - found.off[1]).abs().mean()
        figure.suptitle(f"Grad-CAM with attention off and on: they differ by {moved:.3f} on average")
    return figure


def pictures(x: Tensor, images: Any) -> Tensor:
    """The images as they are shown, `b h w` or `b h w 3`, in [0, 1]."""
    if images is None:
        grey = x.detach().float().cpu().mean(1)
        least, most = grey.amin((1, 2), keepdim=True), grey.amax((1, 2), keepdim=True)
        return (grey - least) / (most - least).clamp(min=1e-12)
    shown = torch.as_tensor(images).float().cpu()
    if shown.shape not in ((len(x), *x.shape[2:]), (len(x), *x.shape[2:], 3)) or shown.min() < 0 or shown.max() > 1:
        raise ValueError(
            f"plot.cam expected images of shape {(len(x), *x.shape[2:])}, or with 3 colours last, in [0, 1], got "
            f"{tuple(shown.shape)} from {shown.min():.3g} to {shown.max():.3g}."
        )
    return shown


def draw_row(line: Sequence[Any], found: Evidence, row: int, image: Tensor, name: str) -> None:
    """The image, both maps, and their difference."""
    line[0].imshow(image.numpy(), cmap="gray", vmin=0, vmax=1)
    line[0].set_title(f"class {name}")
    for axes, word, (probability, maps) in zip(line[1:], ("off", "on"), (found.off, found.on), strict=False):
        overlay(axes, image, maps[row])
        axes.set_title(f"{word}: {100 * probability[row]:.1f} %")
    overlay(line[3], image, found.on[1][row] - found.off[1][row], signed=True)
    line[3].set_title("on − off")
    for axes in line:
        bare(axes)


def overlay(axes: Any, image: Tensor, heat: Tensor, *, signed: bool = False) -> None:
    """A map `h w` over the grey image, from 0 to 1, or of a difference from −1 to 1; what is near 0 lets the image through."""
    grey = image if image.ndim == 2 else image.mean(2)
    axes.imshow(grey.numpy(), cmap="gray", vmin=-0.6, vmax=1)
    strength = (1.5 * heat.abs()).clamp(max=0.8).numpy()
    axes.imshow(heat.numpy(), cmap=DIFFERENCE if signed else HEAT, vmin=-1 if signed else 0, vmax=1, alpha=strength)
