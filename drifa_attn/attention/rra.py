"""The robust residual attention block (RRA), Fig. 1C of arXiv:2412.01248."""

import math
from collections import OrderedDict
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drifa_attn.checks import Init, count, number
from drifa_attn.layout import check_features

from .mfa import MFA
from .start import glorot_

Padding = Literal["symmetric", "same"]


def pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Pads so that a convolution gives `ceil(size / stride)`, the odd row and column at the end, as "same" in TensorFlow."""
    total = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:]]
    (top, bottom), (left, right) = ((t // 2, t - t // 2) for t in total)
    return F.pad(x, (left, right, top, bottom))


class RRA(nn.Module):
    """Robust residual attention, Fig. 1C: a basic residual block with MFA after each convolution.

        z = relu(bn1(mfa1(conv1(x))))        z = bn2(mfa2(conv2(z)))        y = relu(z + shortcut(x))

    conv1 is 3x3 with the stride, conv2 is 3x3 with stride 1. The shortcut is the identity if the shapes allow it, else
    `proj.bn(proj.conv(x))` with a 1x1 convolution of the stride. The convolutions have biases.

    Args:
        in_channels: >= 1.
        out_channels: >= 1.
        stride: of conv1 and of the projection, >= 1.
        padding: "symmetric" (k // 2 on all sides, as in PyTorch) or "same" (the odd row and column at the end, as in
            TensorFlow); they agree if the stride is 1 or the size is odd.
        eps: of the batch norms, > 0; the default is the released one.
        momentum: of the batch norms; the default is the released one (0.99 in Keras is 0.01 in PyTorch).
        reduction: of the two MFAs.
        init: of the two MFAs.

    Shape: x `b in_channels h w` -> `b out_channels ceil(h / stride) ceil(w / stride)`.
        It takes no mask, for its convolutions mix positions.
    Raises: ValueError: an argument out of its range, or an input that is not `b in_channels h w`.
    Differs: the running variance is unbiased, as in PyTorch (the released layers store the biased one). The released notebooks
        call the block RGSA.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        padding: Padding = "symmetric",
        eps: float = 1e-3,
        momentum: float = 0.01,
        reduction: int | None = None,
        init: Init = "paper",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_channels, out_channels = count("RRA", "in_channels", in_channels), count("RRA", "out_channels", out_channels)
        stride = count("RRA", "stride", stride)
        if padding not in ("symmetric", "same"):
            raise ValueError(f'RRA expected padding "symmetric" or "same", got {padding!r}.')
        eps = number("RRA", "eps", eps, "> 0", lambda x: 0 < x < math.inf)
        momentum = number("RRA", "momentum", momentum, "in [0, 1]", lambda x: 0 <= x <= 1)
        self.in_channels, self.out_channels, self.stride, self.padding = in_channels, out_channels, stride, padding

        def norm() -> nn.BatchNorm2d:
            return nn.BatchNorm2d(out_channels, eps=eps, momentum=momentum, device=device, dtype=dtype)

        def attention() -> MFA:
            return MFA(out_channels, reduction=reduction, init=init, device=device, dtype=dtype)

        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, int(padding == "symmetric"), device=device, dtype=dtype)
        self.mfa1 = attention()
        self.bn1 = norm()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, device=device, dtype=dtype)
        self.mfa2 = attention()
        self.bn2 = norm()
        self.proj: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            conv = nn.Conv2d(in_channels, out_channels, 1, stride, device=device, dtype=dtype)
            self.proj = nn.Sequential(OrderedDict(conv=conv, bn=norm()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Paper initialisation: Glorot-uniform weights, zero biases, batch norms and MFAs at their start."""
        self.apply(glorot_)
        for module in self.modules():
            if isinstance(module, MFA | nn.BatchNorm2d):
                module.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """The block's output for features x `b c h w`."""
        check_features("RRA", x, self.in_channels, "b c ...")
        if x.ndim != 4:
            raise ValueError(f'RRA expected x "b c h w" with c={self.in_channels}, got {tuple(x.shape)}.')
        shortcut = x if self.proj is None else self.proj(x)
        if self.padding == "same":
            x = pad_same(x, 3, self.stride)
        z = F.relu(self.bn1(self.mfa1(self.conv1(x))))
        z = self.bn2(self.mfa2(self.conv2(z)))
        return F.relu(z + shortcut)

    def extra_repr(self) -> str:
        return f'{self.in_channels}, {self.out_channels}, stride={self.stride}, padding="{self.padding}"'
