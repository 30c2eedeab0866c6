"""The fused ops in plain PyTorch, for any device: exact, in chunks, and nothing of a map's size kept for backward.

Axes: `b` batch, `c` channels of x, `d` width attention works at (c without a squeeze), `n` positions. A chunk is a few samples,
or a part of one large sample, small enough that its maps stay in the cache; backward computes it anew. Two savings pay for
that: a maximum over positions commutes with σ, so h4 is never formed, and its gradient meets one position a channel, so
conv4's two backward products are sums of b·d rows, not matrix products.

Maps are computed in the dtype `functional` computes them in, sums over chunks in float32 at least. Every sum has one order.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from drifa_attn.functional import Linear, as_map, lin, vector_dtype
from drifa_attn.layout import Layout, spread
from drifa_attn.layout import positions as flat

# Elements of a chunk's map. Smaller ones fit a smaller cache, but a product of few positions spends its time on its weight:
# on two cores of an AVX-512 CPU one of a sample a chunk took 1.1 to 1.4 times as long as one of half a batch of 8.
CHUNK = 2**20


def chunks(b: int, n: int, d: int) -> Iterator[tuple[slice, slice]]:
    """The batch in pieces (samples, positions); never all samples at once, so that memory is saved at any width."""
    budget = max(CHUNK // d, 1)
    samples = max(min(budget // n, math.ceil(b / 2)), 1)
    parts = math.ceil(n / (2 * budget))
    step = math.ceil(n / parts)
    for i in range(0, b, samples):
        for j in range(0, n, step):
            yield slice(i, min(i + samples, b)), slice(j, min(j + step, n))


def read(x: Tensor, samples: slice, positions: slice, present: Tensor | None = None) -> Tensor:
    """One chunk of x in the dtype maps are computed in; zeros where a sample is absent."""
    x = as_map(x[samples, :, positions])
    return x if present is None else torch.where(rearrange(present[samples], "b -> b 1 1"), x, 0)


def sigmoid_backward_(grad: Tensor, h: Tensor) -> Tensor:
    """`grad · h(1 − h)`, in the memory of `grad`."""
    return torch.ops.aten.sigmoid_backward.grad_input(grad, h, grad_input=grad)


def slope(h: Tensor) -> Tensor:
    """The derivative of σ where it is h."""
    return h * (1 - h)


class Extremum:
    """The largest (or least) of each row of positions so far, and its first place: `b d` each."""

    def __init__(self, b: int, d: int, x: Tensor, *, places: bool, least: bool = False) -> None:
        self.least, self.places = least, places
        start = math.inf if least else -math.inf
        self.value = torch.full((b, d), start, dtype=vector_dtype(x), device=x.device)
        self.where = torch.zeros((b, d), dtype=torch.int32, device=x.device)

    def update(self, z: Tensor, samples: slice, positions: slice) -> None:
        """Take one chunk in; a NaN is both largest and least, as in `amax` and `amin`."""
        if not self.places:  # their search takes three times as long as the value's
            value = z.amin(-1) if self.least else z.amax(-1)
            best = self.value[samples]
            best.copy_((torch.minimum if self.least else torch.maximum)(best, value))
            return
        value, where = z.min(-1) if self.least else z.max(-1)
        best, place = self.value[samples], self.where[samples]
        if positions.start:
            better = value < best if self.least else value > best
            better |= value.isnan() & ~best.isnan()
            value, where = torch.where(better, value, best), torch.where(better, where + positions.start, place)
        best.copy_(value)
        place.copy_(where)


class Product:
    """Backward through one product `W t + bias` at every position, its weights' gradients summed over chunks."""

    def __init__(self, weight: Tensor, bias: Tensor, x: Tensor) -> None:
        self.weight, self.bias = weight, bias
        self.map = rearrange(weight.to(as_map(x[:0]).dtype), "d c -> d c 1")
        self.grads: list[Tensor] = []

    def back(self, q: Tensor, source: Tensor) -> Tensor:
        """The gradient of the input `source` for the output's gradient q; the weights' is added up."""
        d = len(self.bias)
        dx, *grads = torch.ops.aten.convolution_backward(
            q, source, self.map, [d], [1], [0], [1], False, [0], 1, [True, True, True]
        )
        self.add(grads[0][..., 0], grads[1])
        return dx

    def add(self, weight: Tensor, bias: Tensor) -> None:
        """Add a chunk's gradients of weight and bias."""
        dtype = vector_dtype(weight)
        if self.grads:
            for total, part in zip(self.grads, (weight, bias), strict=True):
                total += part
        else:
            self.grads = [weight.to(dtype), bias.to(dtype)]

    def result(self) -> Linear:
        """The gradients in the dtypes of weight and bias."""
        if not self.grads:  # an empty batch
            return torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        return self.grads[0].to(self.weight.dtype), self.grads[1].to(self.bias.dtype)


def mfa_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    squeeze_weight: Tensor | None,
    squeeze_bias: Tensor | None,
    *,
    places: bool = True,
) -> tuple[Tensor, Tensor]:
    """What leaves MFA's maps: mean h1, max h2, mean h3, max h4, mean of CLIA's map, and where the two maxima are.

    Without `places` the second is zeros: only backward needs it.

    Shape: x `b c n`, weights five times `d d` (conv1, conv2, conv3, conv4, clia.conv1), biases five times `d`,
        squeeze_weight `d c` -> `5 b d`, `2 b d` (int32).
    """
    b, _, n = x.shape
    d = weights[0].shape[0]
    conv1, conv2, conv3, conv4, clia1 = zip(weights, biases, strict=True)
    means = torch.zeros((3, b, d), dtype=vector_dtype(x), device=x.device)
    max2, max4 = Extremum(b, d, x, places=places), Extremum(b, d, x, places=places)
    for samples, positions in chunks(b, n, d):
        z = squeezed(read(x, samples, positions), squeeze_weight, squeeze_bias)
        add_mean(means[2, samples], lin(z, clia1).sigmoid_(), n)
        h = lin(z, conv1).sigmoid_()
        add_mean(means[0, samples], h, n)
        z = lin(h, conv2)
        max2.update(z, samples, positions)
        h = lin(h.add_(z.sigmoid_()), conv3).sigmoid_()
        add_mean(means[1, samples], h, n)
        max4.update(lin(h, conv4), samples, positions)
    return (
        torch.stack([means[0], max2.value.sigmoid(), means[1], max4.value.sigmoid(), means[2]]),
        torch.stack([max2.where, max4.where]),
    )


def squeezed(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """`lin(squeeze, x)`, or x without a squeeze."""
    return x if weight is None or bias is None else lin(x, (weight, bias))


def add_mean(mean: Tensor, h: Tensor, n: int) -> None:
    """Add a chunk's share of the mean over n positions."""
    mean += h.sum(-1, dtype=mean.dtype) / n


class Sparse:
    """A gradient that meets one position a row, `factor` at `where`, as the part of it that lies in one chunk."""

    def __init__(self, where: Tensor, factor: Tensor, samples: slice, positions: slice) -> None:
        self.size = positions.stop - positions.start
        at = where[samples] - positions.start
        inside = (at >= 0) & (at < self.size)
        self.at = torch.where(inside, at, 0).long()
        self.factor = torch.where(inside, factor[samples], 0)

    def add_to(self, q: Tensor) -> Tensor:
        """`q` with this gradient added, in place."""
        return q.scatter_add_(2, self.at[..., None], self.factor[..., None].to(q.dtype))

    def rows(self) -> Tensor:
        """The places counted through the chunk, a row a position."""
        return self.at + self.size * torch.arange(len(self.at), device=self.at.device)[:, None]

    def back(self, product: Product, like: Tensor) -> Tensor:
        """`Wᵀ q` as a map: at each position the sum of the rows of W whose channel has its gradient there."""
        bag, order = self.rows().flatten().sort(stable=True)
        offsets = torch.searchsorted(bag, torch.arange(like.shape[0] * self.size, device=bag.device))
        factor = self.factor.flatten()[order].to(like.dtype)
        rows = product.map[..., 0]
        out = F.embedding_bag(order % len(rows), rows, offsets, mode="sum", per_sample_weights=factor)
        return rearrange(out, "(b n) d -> b d n", n=self.size)

    def add_gradient(self, product: Product, source: Tensor) -> None:
        """Add `q ⊗ source` and `q`, summed over the chunk's positions."""
        rows = rearrange(source, "b d n -> (b n) d").contiguous()
        factor = self.factor.t().contiguous()
        weight = F.embedding_bag(self.rows().t().contiguous(), rows, mode="sum", per_sample_weights=factor.to(rows.dtype))
        product.add(weight, factor.sum(1))


def mfa_backward(
    grads: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    squeeze_weight: Tensor | None,
    squeeze_bias: Tensor | None,
    stats: Tensor,
    where: Tensor,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor | None, Tensor | None]:
    """The gradients of x, weights, biases and squeeze for `grads` (`5 b d`) of the statistics; the maps are computed anew."""
    b, _, n = x.shape
    d = weights[0].shape[0]
    conv1, conv2, conv3, _, clia1 = zip(weights, biases, strict=True)
    products = [Product(weight, bias, x) for weight, bias in zip(weights, biases, strict=True)]
    squeeze = None if squeeze_weight is None or squeeze_bias is None else Product(squeeze_weight, squeeze_bias, x)
    g1, g2, g3, g4, gl = grads
    g1, g3, gl = (rearrange(g / n, "b d -> b d 1").to(as_map(x[:0]).dtype) for g in (g1, g3, gl))
    g2, g4 = g2 * slope(stats[1]), g4 * slope(stats[3])
    dx = torch.empty_like(x)
    for samples, positions in chunks(b, n, d):
        source = read(x, samples, positions)
        z = squeezed(source, squeeze_weight, squeeze_bias)
        h1 = lin(z, conv1).sigmoid_()
        h2 = lin(h1, conv2).sigmoid_()
        h12 = h1 + h2
        h3 = lin(h12, conv3).sigmoid_()
        q4 = Sparse(where[1], g4, samples, positions)
        q4.add_gradient(products[3], h3)
        q = sigmoid_backward_(torch.add(q4.back(products[3], h3), g3[samples], out=torch.empty_like(h3)), h3)
        s = products[2].back(q, h12)
        q = Sparse(where[0], g2, samples, positions).add_to(torch.ops.aten.sigmoid_backward(s, h2))
        q = sigmoid_backward_(s.add_(products[1].back(q, h1)).add_(g1[samples]), h1)
        dz = products[0].back(q, z)
        t = lin(z, clia1).sigmoid_()
        q = torch.ops.aten.sigmoid_backward(gl[samples].expand_as(t), t)
        dz += products[4].back(q, z)
        if squeeze is not None:
            dz = squeeze.back(dz, source)
        dx[samples, :, positions] = dz
    dw, db = zip(*(one.result() for one in products), strict=True)
    return dx, list(dw), list(db), *((None, None) if squeeze is None else squeeze.result())


def mifa_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    squeeze_weight: Tensor | None,
    squeeze_bias: Tensor | None,
    present: Tensor | None,
    *,
    places: bool = True,
) -> tuple[Tensor, Tensor]:
    """What leaves one modality of MIFA: min, mean, max of z and of t = σ(lin(weight, z)), and where the four extrema are.

    Without `places` the second is zeros: only backward needs it.

    Shape: x `b c n`, weight `d d`, bias `d`, squeeze_weight `d c`, present `b` -> `6 b d`, `4 b d` (int32).
    """
    b, _, n = x.shape
    d = weight.shape[0]
    means = torch.zeros((2, b, d), dtype=vector_dtype(x), device=x.device)
    low_z, high_z, low_t, high_t = (Extremum(b, d, x, places=places, least=least) for least in (True, False, True, False))
    for samples, positions in chunks(b, n, d):
        z = squeezed(read(x, samples, positions, present), squeeze_weight, squeeze_bias)
        t = lin(z, (weight, bias))
        for extremum, values in ((low_z, z), (high_z, z), (low_t, t), (high_t, t)):
            extremum.update(values, samples, positions)
        add_mean(means[0, samples], z, n)
        add_mean(means[1, samples], t.sigmoid_(), n)
    extrema = [low_z.value, means[0], high_z.value, low_t.value.sigmoid(), means[1], high_t.value.sigmoid()]
    return torch.stack(extrema), torch.stack([low_z.where, high_z.where, low_t.where, high_t.where])


def mifa_backward(
    grads: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    squeeze_weight: Tensor | None,
    squeeze_bias: Tensor | None,
    present: Tensor | None,
    stats: Tensor,
    where: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, weight, bias and squeeze for `grads` (`6 b d`) of the statistics; t is computed anew."""
    b, _, n = x.shape
    d = weight.shape[0]
    product = Product(weight, bias, x)
    squeeze = None if squeeze_weight is None or squeeze_bias is None else Product(squeeze_weight, squeeze_bias, x)
    low_z, mean_z, high_z, low_t, mean_t, high_t = grads
    mean_z, mean_t = (rearrange(g / n, "b d -> b d 1").to(as_map(x[:0]).dtype) for g in (mean_z, mean_t))
    points = list(zip(where, (low_z, high_z, low_t * slope(stats[3]), high_t * slope(stats[5])), strict=True))
    dx = torch.empty_like(x)
    for samples, positions in chunks(b, n, d):
        source = read(x, samples, positions, present)
        z = squeezed(source, squeeze_weight, squeeze_bias)
        t = lin(z, (weight, bias)).sigmoid_()
        at = [Sparse(place, factor, samples, positions) for place, factor in points]
        q = torch.ops.aten.sigmoid_backward(mean_t[samples].expand_as(t), t)
        q = at[3].add_to(at[2].add_to(q))
        dz = at[1].add_to(at[0].add_to(product.back(q, z).add_(mean_z[samples])))
        if squeeze is not None:
            dz = squeeze.back(dz, source)
        dx[samples, :, positions] = dz
    if present is not None:
        dx.masked_fill_(rearrange(~present, "b -> b 1 1"), 0)
    return dx, *product.result(), *((None, None) if squeeze is None else squeeze.result())


def gate_forward(x: Tensor, factor: Tensor, layout: Layout, prefix: int) -> Tensor:
    """`x · factor` in the dtype and memory order of x, rounded once; prefix tokens as they are."""
    return multiply(x, factor, layout, prefix, torch.empty_like(x))


def multiply(x: Tensor, factor: Tensor, layout: Layout, prefix: int, y: Tensor) -> Tensor:
    """`x · factor` written to y."""
    factor = spread(factor, x, layout, prefix)
    step = max(x.shape[0], 1) if x.dtype == factor.dtype else 1  # else the product is first a map of another dtype
    for i in range(0, x.shape[0], step):
        torch.mul(x[i : i + step], factor[i : i + step], out=y[i : i + step])
    return y


def gate_backward(dy: Tensor, x: Tensor, factor: Tensor, layout: Layout, prefix: int) -> tuple[Tensor, Tensor]:
    """The gradients of x and factor: `dy · factor` and `Σ_positions dy · x`, the latter without a map of the products."""
    dfactor = torch.zeros_like(factor)
    dys, xs = flat(dy, layout, prefix), flat(x, layout, prefix)
    for samples, part in chunks(xs.shape[0], xs.shape[2], xs.shape[1]):
        dfactor[samples] += (dys[samples, :, part].to(factor.dtype) * xs[samples, :, part]).sum(-1)
    return multiply(dy, factor, layout, prefix, torch.empty_like(x)), dfactor
