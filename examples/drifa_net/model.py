"""DRIFA-Net, Fig. 1A of arXiv:2412.01248, from the library's RRA, MFA and MIFA."""

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drifa_attn import MFA, MIFA, RRA
from examples.drifa_net.checks import check_count, check_heads, check_images, check_present, per_branch

Padding = Literal["symmetric", "same"]
Init = Literal["paper", "identity"]

# One row per stage: channels (in widths), stride, dropout after the block, an MFA after it.
STAGES = (
    (1, 1, True, True),
    (1, 1, True, True),
    (2, 2, True, True),
    (2, 1, True, True),
    (4, 2, True, True),
    (4, 1, True, True),
    (8, 2, False, True),
    (8, 1, False, False),
)


def glorot_(module: nn.Module) -> None:
    """The paper's first weights: Glorot-uniform, with zero biases."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Pad so that a convolution gives `ceil(size / stride)`, the odd row and column at the end (TensorFlow's "same")."""
    total = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:]]
    (top, bottom), (left, right) = ((t // 2, t - t // 2) for t in total)
    return F.pad(x, (left, right, top, bottom))


class Stem(nn.Module):
    """The start of a branch, Fig. 1A: `maxpool(relu(bn(mfa(conv(x)))))`, conv 7x7 and maxpool 3x3, both of stride 2.

    Shape: x `b in_channels h w` -> `b out_channels ceil(h/4) ceil(w/4)`.
    Differs: none.
    """

    def __init__(self, in_channels: int, out_channels: int, *, padding: Padding, reduction: int | None, init: Init) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(in_channels, out_channels, 7, 2, 3 if padding == "symmetric" else 0)
        self.mfa = MFA(out_channels, reduction=reduction, init=init)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3, momentum=0.01)
        glorot_(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        """The first features of images x."""
        if self.padding == "symmetric":
            return F.max_pool2d(F.relu(self.bn(self.mfa(self.conv(x)))), 3, 2, 1)
        x = F.relu(self.bn(self.mfa(self.conv(pad_same(x, 7, 2)))))
        return F.max_pool2d(pad_same(x, 3, 2), 3, 2)  # after a ReLU, a padded zero is never the only maximum


def stage(
    before: int, channels: int, row: Sequence[Any], *, padding: Padding, dropout: float, reduction: int | None, init: Init
) -> nn.Module:
    """One stage of a branch, by its row in `STAGES`: RRA, dropout, MFA."""
    _, stride, drops, attends = row
    parts = OrderedDict[str, nn.Module]()
    parts["rra"] = RRA(before, channels, stride, padding=padding, reduction=reduction, init=init)
    if drops:
        parts["dropout"] = nn.Dropout(dropout)
    if attends:
        parts["mfa"] = MFA(channels, reduction=reduction, init=init)
    return nn.Sequential(parts)


class DrifaNet(nn.Module):
    """The two-branch, two-task network of Fig. 1A, for any number of branches and tasks.

        x_i = stem_i(image_i)
        8 times:  x_1..x_m = MIFA(stage_i(x_i)),  stage = RRA → dropout → MFA
        logits_k = lin(heads[k], mean(dropout([x_1 ; … ; x_m])))

    Stages have 64, 64, 128, 128, 256, 256, 512 and 512 channels and halve the positions where those double. The last two have
    no dropout, the last no MFA of its own. With two branches of 3 channels, heads of 5 and 7: 53,865,668 parameters.

    Args:
        heads: classes of each task, each >= 1.
        branches: number m of images a sample has, >= 1.
        in_channels: channels of every image, >= 1: one number, or one per branch.
        dropout: after the first six stages and before the heads, in [0, 1].
        padding: "symmetric" (PyTorch's k // 2) or "same" (TensorFlow's, as released); they agree where all sizes are odd.
        width: channels of the first stage, >= 1; 64 is the paper's.
        reduction, init: of every MFA and MIFA.

    Shape: images, a list of m `b in_channels[i] h_i w_i`, present `b m` (bool) -> a list with logits `b k` for each head.
    Raises: ValueError, TypeError: an argument out of its range, an image of other channels or batch size, or a `present`
        that is no boolean `b m`.
    Differs: m other than 2, sizes that differ between branches, other heads, `width`, `reduction`, `init="identity"` and
        `present` are not in the paper; by default none is used. What an absent branch holds reaches no gate and no logit: its
        features are zeros and the others are scaled by m over their number. In training mode its zeros still count in its own
        batch norms. Batch norms store the unbiased running variance (the released ones the biased).
    """

    def __init__(
        self,
        heads: Sequence[int] = (5, 7),
        *,
        branches: int = 2,
        in_channels: int | Sequence[int] = 3,
        dropout: float = 0.25,
        padding: Padding = "symmetric",
        width: int = 64,
        reduction: int | None = None,
        init: Init = "paper",
    ) -> None:
        super().__init__()
        check_count("branches", branches)
        check_count("width", width)
        self.in_channels = per_branch("in_channels", in_channels, branches)
        check_heads(heads)
        if not 0 <= dropout <= 1:
            raise ValueError(f"DrifaNet expected dropout in [0, 1], got {dropout!r}.")
        if padding not in ("symmetric", "same"):
            raise ValueError(f'DrifaNet expected padding "symmetric" or "same", got {padding!r}.')
        self.padding = padding
        attention: dict[str, Any] = {"reduction": reduction, "init": init}
        channels = [width, *(width * row[0] for row in STAGES)]
        self.branches = nn.ModuleList()
        for c in self.in_channels:
            steps = zip(channels, channels[1:], STAGES, strict=False)
            stages = [stage(*pair, row, padding=padding, dropout=dropout, **attention) for *pair, row in steps]
            stem = Stem(c, width, padding=padding, **attention)
            self.branches.append(nn.ModuleDict({"stem": stem, "stages": nn.ModuleList(stages)}))
        self.mifas = nn.ModuleList(MIFA(c, branches, **attention) for c in channels[1:])
        self.dropout = nn.Dropout(dropout)
        self.heads = nn.ModuleList(nn.Linear(branches * channels[-1], classes) for classes in heads)
        self.heads.apply(glorot_)

    def forward(self, images: Sequence[Tensor], present: Tensor | None = None) -> list[Tensor]:
        """The logits of every task."""
        fused = self.features(images, present)
        return [head(fused) for head in self.heads]

    def features(self, images: Sequence[Tensor], present: Tensor | None = None) -> Tensor:
        """What the heads read: the fused, pooled features `b (m c)`."""
        xs = [branch["stem"](x) for branch, x in zip(self.branches, self.checked(images, present), strict=True)]
        for s, mifa in enumerate(self.mifas):
            xs = mifa([branch["stages"][s](x) for branch, x in zip(self.branches, xs, strict=True)], present)
        # Dropout is per element: dropping and averaging before concatenating is the same, and lets sizes differ.
        pooled = [self.dropout(x).mean((2, 3)) for x in xs]
        if present is not None:
            share = len(xs) / present.sum(1, keepdim=True).clamp(min=1)
            pooled = [torch.where(present[:, i, None], x, 0) * share.to(x.dtype) for i, x in enumerate(pooled)]
        return torch.cat(pooled, 1)

    def checked(self, images: Sequence[Tensor], present: Tensor | None) -> list[Tensor]:
        """The images, zeros where they are absent, or an error."""
        check_images(images, self.in_channels)
        check_present(present, images)
        if present is None:
            return list(images)
        return [torch.where(present[:, i, None, None, None], x, 0) for i, x in enumerate(images)]

    @torch.no_grad()
    def load_flat(self, weights: Mapping[str, np.ndarray]) -> "DrifaNet":
        """Load arrays by flat names and return the network; a wrong one is an error that leaves the network as it was.

        The names are those of `state_dict()` with every list numbered from one and written in the singular:
        `branch1.stage1.rra.conv1.weight` is `branches.0.stages.0.rra.conv1.weight`, `mifa1.alpha2` is `mifas.0.alphas.1`.
        Batch norms' counters of batches have none.

        Raises: ValueError: a name that is unknown or missing, or an array of another shape.
        """
        own = {flat_name(name): value for name, value in self.state_dict().items() if value.is_floating_point()}
        for name in (*weights, *own):
            if name not in own:
                raise ValueError(f"DrifaNet.load_flat knows no {name!r}: build the network with the branches and heads it has.")
            if name not in weights:
                raise ValueError(f"DrifaNet.load_flat misses {name!r} of shape {tuple(own[name].shape)}.")
            if np.shape(weights[name]) != own[name].shape:
                expected, got = tuple(own[name].shape), np.shape(weights[name])
                raise ValueError(f"DrifaNet.load_flat expected {name!r} of shape {expected}, got {got}.")
        arrays = {name: torch.as_tensor(weights[name], dtype=value.dtype) for name, value in own.items()}
        for name, value in own.items():
            value.copy_(arrays[name])
        return self


def flat_name(name: str) -> str:
    """A name of `state_dict()` as the flat one: `branches.0.stages.0` as `branch1.stage1`."""
    return re.sub(r"(branch|stage|mifa|head|conv|alpha)e?s\.(\d+)", lambda match: f"{match[1]}{int(match[2]) + 1}", name)
