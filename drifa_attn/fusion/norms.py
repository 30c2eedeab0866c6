"""Batch norms inside a fusion: they see the samples that have what is fused, and no others."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .presence import present_rows

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def normed(norm: _BatchNorm, x: Tensor) -> Tensor:
    """A batch norm; in training with fewer than two values per channel it uses its running statistics, as in eval mode."""
    if norm.training and not torch.compiler.is_compiling() and x.numel() < 2 * x.shape[1]:
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    return norm(x)


def on_rows(run: Callable[..., Tensor], xs: list[Tensor], has: Tensor | None, *, training: bool) -> Tensor:
    """What a function gives for tensors `b ...`; in training it runs on the samples that `has` selects, the others are zero.

    In eval mode, where nothing depends on the batch, and in graphs, whose shapes may not depend on values, it runs on all.
    """
    rows = present_rows(has) if training else None
    if rows is None:
        return run(*xs)
    y = run(*[x[rows] for x in xs])
    return y.new_zeros(xs[0].shape[0], *y.shape[1:]).index_copy(0, rows, y)
