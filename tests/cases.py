"""A small example of every layer, for the tests all layers share, and the tools to feed one."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from drifa_attn import CLIA, HIFA, MFA, MGIFA, MIFA, MLIFA, RRA


class Case(NamedTuple):
    layer: Callable[..., nn.Module]  # takes device and dtype
    shapes: tuple[tuple[int, ...], ...]  # one per modality, without the batch
    masked: bool = False

    def module(self, *, device=None, dtype=None):
        """The layer in eval mode, no weight at its start, so that none is a zero or a one that hides a mistake."""
        return perturb_(self.layer(device=device, dtype=dtype)).eval()

    def args(self, batch=2, *, device=None, dtype=None, grad=False):
        """What forward takes: one tensor, or a list of them and perhaps a mask with an absence in every sample but one."""
        xs = [torch.randn(batch, *shape).to(device, dtype).requires_grad_(grad) for shape in self.shapes]
        if len(xs) == 1:
            return (xs[0],)
        present = (torch.arange(batch)[:, None] + torch.arange(len(xs))) % 3 != 0
        return (xs, present.to(device)) if self.masked else (xs,)


CASES = {
    "hifa": Case(partial(HIFA, 7), ((7, 5, 4),)),
    "clia": Case(partial(CLIA, 7), ((7, 5, 4),)),
    "mfa": Case(partial(MFA, 7), ((7, 5, 4),)),
    "mfa-reduced-identity": Case(partial(MFA, 33, reduction=2, init="identity"), ((33, 6),)),
    "mfa-tokens": Case(partial(MFA, 8, layout="b ... c", num_prefix_tokens=2), ((9, 8),)),
    "mgifa": Case(partial(MGIFA, 7), ((7, 5, 4), (7, 3)), masked=True),
    "mlifa": Case(partial(MLIFA, 7), ((7, 5, 4), (7, 3)), masked=True),
    "mifa": Case(partial(MIFA, 8), ((8, 5, 4), (8, 3, 2))),
    "mifa-three-masked": Case(
        partial(MIFA, (3, 17, 8), init="identity", layout=("b c ...", "b c ...", "b ... c"), num_prefix_tokens=(0, 0, 1)),
        ((3, 5, 4), (17,), (6, 8)),
        masked=True,
    ),
    "rra": Case(partial(RRA, 8, 8), ((8, 5, 4),)),
    "rra-projection-same": Case(partial(RRA, 3, 8, 2, padding="same"), ((3, 6, 5),)),
}


@torch.no_grad()
def perturb_(module, amount=0.3):
    """Move every parameter and running statistic off its start; variances stay positive."""
    for p in module.parameters():
        p.add_((amount * torch.randn(p.shape)).to(p))
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.add_(torch.rand(buffer.shape).to(buffer))
    return module


def listed(value):
    """One tensor or several, as a list."""
    return [value] if isinstance(value, torch.Tensor) else list(value)


def loss(ys):
    """A scalar of any outputs whose gradient is of no special direction."""
    return sum((y * torch.arange(1.0, y.numel() + 1, device=y.device).sin().view_as(y)).sum() for y in listed(ys))


def gradients(module, args):
    """The gradients of `loss` for every parameter, then for every input that asks for one."""
    leaves = [*module.parameters(), *(x for x in listed(args[0]) if x.requires_grad)]
    return torch.autograd.grad(loss(module(*args)), leaves)


def backward(value, leaves):
    """The gradients for the leaves as `backward` leaves them there, which checkpoints that run again in it ask for."""
    for leaf in leaves:
        leaf.grad = None
    value.backward()
    return [leaf.grad for leaf in leaves]


def weights(module):
    """The state dict as the NumPy reference takes it."""
    return {name: value.detach().double().cpu().numpy() for name, value in module.state_dict().items()}
