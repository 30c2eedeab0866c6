"""Grad-CAM of a wrapped network with its attention off and on, by pytorch-grad-cam; the network stays as it was."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from drifa_attn.checks import check_module
from drifa_attn.layout import positions
from drifa_attn.network.modes import eagerly, eval_mode
from drifa_attn.network.site import Site
from drifa_attn.wrapping.active import disabled
from drifa_attn.wrapping.inject import placed

from .style import need

ENOUGH = 16  # positions that a map should have at least


class Evidence(NamedTuple):
    """The classes that were asked for, `b`, and for attention off and on their probability `b` and their map `b h w` in [0, 1].

    Each map is scaled for itself: its least value is 0, its greatest 1.
    """

    classes: Tensor
    off: tuple[Tensor, Tensor]
    on: tuple[Tensor, Tensor]


def evidence(owner: str, model: nn.Module, x: Tensor, site: str | None = None, classes: Any = None) -> Evidence:
    """Where features speak for a class, with attention off and on.

    Raises: TypeError, ValueError: x is no batch of images, the network has no such site or gives no logits of classes, or the
        classes do not fit. ImportError: grad-cam is missing.
    """
    if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point():
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{owner} expected a batch of images (b, c, h, w) as the network takes them, got {got}.")
    sites = sites_of(owner, model, site)
    need(owner, "pytorch_grad_cam")
    with untouched(model):
        logits, positions = looked_at(model, x, sites)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise ValueError(f"{owner} expected logits of classes (b, k), which {type(model).__name__} does not give.")
        wanted = logits.argmax(1) if classes is None else torch.as_tensor(classes).cpu()
        if wanted.shape != logits.shape[:1] or not ((wanted >= 0) & (wanted < logits.shape[1])).all():
            raise ValueError(
                f"{owner} expected a class from 0 to {logits.shape[1] - 1} for each of {len(logits)} images, "
                f"got {wanted.tolist()}."
            )
        chosen = largest(owner, positions)
        with disabled(model):
            off = gradcam(owner, model, x, sites[chosen], wanted)
        return Evidence(wanted.cpu(), off, gradcam(owner, model, x, sites[chosen], wanted))


def sites_of(owner: str, model: nn.Module, name: str | None) -> list[tuple[Site, nn.Module]]:
    """The site of a name, or all sites, each with its attention."""
    check_module(owner, model)
    found = list(placed(model))
    if not found:
        raise ValueError(f"{owner} found no site in {type(model).__name__}: drifa_attn.wrap(model) makes them.")
    several = [(site, attention) for site, attention in found if name in (None, site.name)]
    if not several:
        names = ", ".join(site.name for site, _ in found)
        raise ValueError(f"{owner} got site={name!r}, where no attention is; there is some at {names}.")
    return several


def looked_at(model: nn.Module, x: Tensor, sites: Sequence[tuple[Site, nn.Module]]) -> tuple[Any, dict[int, int]]:
    """What a network says of images, and how many positions the features of each site have for them, by its number."""
    found: dict[int, int] = {}
    with ExitStack() as stack:
        for k, (site, attention) in enumerate(sites):

            def note(_: nn.Module, args: tuple, k: int = k, site: Site = site) -> None:
                found[k] = positions(args[0], site.layout, site.num_prefix_tokens).shape[2]

            stack.callback(attention.register_forward_pre_hook(note).remove)
        with torch.no_grad():
            return model(x), found


def largest(owner: str, found: Mapping[int, int]) -> int:
    """The last site with enough positions, else the one with the most."""
    large = [k for k, number in found.items() if number >= ENOUGH]
    chosen = large[-1] if large else max(found, key=found.__getitem__, default=None)
    if chosen is None or found[chosen] < 2:
        raise ValueError(f"{owner} found no site with 2 positions or more for these images: one position is no map.")
    return chosen


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Within this context a network is in eval mode and uncompiled, and none of its weights wants a gradient.

    Afterwards, also after an error, it is as it was before. The library of Grad-CAM sets the network to eval mode and takes the
    gradients of its weights away.
    """
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        stack.enter_context(eagerly())
        try:
            model.requires_grad_(False)
            yield
        finally:
            for parameter, wants, gradient in before:
                parameter.requires_grad_(wants)
                parameter.grad = gradient


def gradcam(owner: str, model: nn.Module, x: Tensor, at: tuple[Site, nn.Module], classes: Tensor) -> tuple[Tensor, Tensor]:
    """The probability of each class, and its Grad-CAM, of the size of the images.

    It is taken behind the attention of a site, whose output is one tensor whatever the module around it returns.
    """
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    site, attention = at

    def as_map(feature: Tensor) -> Tensor:
        if len(feature) != len(x):
            raise ValueError(
                f"{owner} cannot map {site.name}: it has {len(feature)} rows for {len(x)} images. Name another site."
            )
        found = positions(feature, site.layout, site.num_prefix_tokens)
        return found.float().unflatten(2, grid(owner, feature, site, x)).clone()  # what comes next may work in place

    with torch.enable_grad(), GradCAM(model, [attention], as_map) as cam:
        maps = cam(x.clone().requires_grad_(), [ClassifierOutputTarget(one) for one in classes.tolist()])
        probs = cam.outputs.detach().softmax(1).cpu()
    return probs.gather(1, classes.cpu()[:, None])[:, 0], torch.from_numpy(maps)


def grid(owner: str, feature: Tensor, site: Site, x: Tensor) -> tuple[int, int]:
    """The rows and columns of the positions of a feature; those of tokens have the image's proportions."""
    if feature.ndim == 4:
        rows, columns = feature.shape[2:] if site.layout == "b c ..." else feature.shape[1:3]
        return rows, columns
    count = feature.shape[1 if site.layout == "b ... c" else 2] - site.num_prefix_tokens
    rows = max(round((count * x.shape[2] / x.shape[3]) ** 0.5), 1)
    if rows * (count // rows) != count:
        raise ValueError(f"{owner} cannot map {site.name}: it has {count} positions, which are no map. Name another site.")
    return rows, count // rows
