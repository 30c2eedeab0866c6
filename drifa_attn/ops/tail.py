"""The gradients of the last steps of MFA, from the five pooled maps to the gain of each channel, in plain PyTorch.

    u = mean1 + max2    v = mean3 + max4    G = σ(lin(dense, [u ; v]))    L = p + σ(lin(conv2, p))
    a = σ(lin(expand, global_scale · G + local_scale · L))                gain = a · alpha

These are vectors, so they cost no arithmetic, but in PyTorch every step is a kernel. As one operator with the pooling, they
keep nothing for backward, which computes them a second time. The forward is that of `functional`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Tail(NamedTuple):
    """The weights behind the pooling: `head` is dense, conv2 (weight and bias each), global_scale and local_scale.

    `measured` are the four of `Statistics`, or none; `expand` is a weight and a bias, or none.
    """

    head: Sequence[Tensor]
    measured: Sequence[Tensor]
    expand: Sequence[Tensor]
    alpha: Tensor | None

    def weights(self) -> list[Tensor]:
        """What has gradients, in the order of `backward`'s."""
        return [*self.head, *self.expand, *(() if self.alpha is None else (self.alpha,))]


def written(outs: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    """`outs`, with the values of `given` in each that is another tensor; on a GPU all are copied in one launch."""
    copies = [(out, tensor) for out, tensor in zip(outs, given, strict=True) if out is not tensor]
    if copies:
        torch._foreach_copy_([out for out, _ in copies], [tensor for _, tensor in copies])
    return list(outs)


def in_dtype(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in one dtype."""
    return written([t if t.dtype == dtype else torch.empty_like(t, dtype=dtype) for t in tensors], tensors)


def cast_like(gradients: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each gradient in the dtype and the strides of its tensor."""
    pairs = zip(gradients, tensors, strict=True)
    same = [g if (g.dtype, g.stride()) == (t.dtype, t.stride()) else torch.empty_like(t) for g, t in pairs]
    return written(same, gradients)


def through_sigmoid(grad: Tensor, h: Tensor) -> Tensor:
    """The gradient of z where `h = σ(z)`: `grad · h · (1 − h)`."""
    return torch.ops.aten.sigmoid_backward(grad, h)


def backward(grad: Tensor, stats: Tensor, tail: Tail) -> tuple[Tensor, list[Tensor]]:
    """The gradients of the pooled maps, `5 b d`, and of `tail.weights()`, for that of the gain, `b c`.

    Statistics are measured, not trained: they have none.
    """
    given = in_dtype([*tail.head, *tail.measured, *tail.expand, *(() if tail.alpha is None else (tail.alpha,))], stats.dtype)
    dense, dense_bias, conv2, conv2_bias, global_scale, local_scale, *given = given
    measured, expand = given[: len(tail.measured)], given[len(tail.measured) :][: len(tail.expand)]
    h1, h2, h3, h4, p = stats.unbind(0)
    uv = torch.cat([h1 + h2, h3 + h4], 1)
    info, q = F.linear(uv, dense, dense_bias).sigmoid(), F.linear(p, conv2, conv2_bias).sigmoid()
    above, below = info, p + q
    if measured:
        above, below = (above - measured[0]) / measured[1], (below - measured[2]) / measured[3]
    s = torch.addcmul(local_scale * below, global_scale, above)
    a = (F.linear(s, *expand) if expand else s).sigmoid()
    da = through_sigmoid(grad if tail.alpha is None else grad * given[-1], a)
    ds = da @ expand[0] if expand else da
    d_global, d_local = global_scale * ds, local_scale * ds
    if measured:
        d_global, d_local = d_global / measured[1], d_local / measured[3]
    d_info, d_q = through_sigmoid(d_global, info), through_sigmoid(d_local, q)
    du, dv = (d_info @ dense).chunk(2, 1)
    gradients = [d_info.t() @ uv, d_info.sum(0), d_q.t() @ p, d_q.sum(0), (ds * above).sum()[None], (ds * below).sum(0)]
    gradients += [da.t() @ s, da.sum(0)] if expand else []
    gradients += [] if tail.alpha is None else [(grad * a).sum(0)]
    return torch.stack([du, du, dv, dv, d_local + d_q @ conv2]), cast_like(gradients, tail.weights())
