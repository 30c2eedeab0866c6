"""The fused operators in plain PyTorch, for any device: chunk by chunk, so that no map of the whole batch exists.

Nothing of the size of a map is kept for backward, which computes the maps a second time. Two savings pay for that. A maximum
over positions commutes with σ, so h4 is never formed. The gradient of a maximum is nonzero at one position per channel, so
the two backward products of conv4 are sums of b·d rows, not matrix products.

Axes: `b` batch, `c` channels of x, `d` the width that attention works at (c without a squeeze), `n` positions. A chunk is `s`
samples, or `p` positions of one large sample. Its maps have one row per position, `(s p) d`.

Weights are computed in the dtype that `functional` computes them in, sums over chunks in float32 at least. The order of every
sum is fixed.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from drifa_attn import functional
from drifa_attn.functional import Pair, Statistics, map_dtype, vector_dtype
from drifa_attn.layout import Layout, spread
from drifa_attn.layout import positions as flat

from . import tail as tails
from .tail import Tail, through_sigmoid

Weights = Sequence[Tensor]

CHUNK = 2**20  # elements of the map of a chunk: larger maps do not fit the cache
POSITIONS = 6  # per row of a weight, at least, if there are as many: smaller chunks are bound by loading the weights


class Chunk:
    """A few samples of a batch, or a part of the positions of one."""

    def __init__(self, samples: slice, positions: slice, batch: int) -> None:
        self.samples, self.positions = samples, positions
        self.s, self.p = min(samples.stop, batch) - samples.start, positions.stop - positions.start

    def read(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        """The chunk of x, `s c p`, float32 for float16; zeros for an absent sample."""
        part = x[self.samples, :, self.positions]
        part = part.float() if part.dtype == torch.float16 else part  # as in functional.as_map
        return part if present is None else torch.where(rearrange(present[self.samples], "s -> s 1 1"), part, 0)

    def split(self, rows: Tensor) -> Tensor:
        """A view of rows by sample: `(s p) d -> s p d`."""
        return rows.view(self.s, self.p, -1)

    def spread(self, vector: Tensor) -> Tensor:
        """The rows of a pooled vector for the samples of the chunk, broadcast over positions: `b d -> s 1 d`."""
        return rearrange(vector[self.samples], "s d -> s 1 d")


def chunks(b: int, n: int, d: int) -> Iterator[Chunk]:
    """The chunks of a batch: two at least, to save memory, unless it has few positions for its width."""
    count = min(max(math.ceil(b * n * d / CHUNK), 2), max(b * n // (POSITIONS * d), 1))
    samples = max(b // count, 1)
    step = math.ceil(n / math.ceil(n * d / (2 * CHUNK)))
    for i in range(0, b, samples):
        for j in range(0, n, step):
            yield Chunk(slice(i, i + samples), slice(j, min(j + step, n)), b)


def sigmoid_backward_(grad: Tensor, h: Tensor) -> Tensor:
    """`grad · h(1 − h)`, in the memory of `grad`."""
    return torch.ops.aten.sigmoid_backward.grad_input(grad, h, grad_input=grad)


class Mean:
    """The mean of a map over all n positions, summed chunk by chunk into `like`: `b d`."""

    def __init__(self, like: Tensor, n: int) -> None:
        self.value, self.n = torch.zeros_like(like), n

    def update(self, h: Tensor, chunk: Chunk) -> None:
        """Add one chunk."""
        self.value[chunk.samples] += chunk.split(h).sum(1, dtype=self.value.dtype) / self.n


class Extremum:
    """The largest (or least) value of a map so far and, if `places`, its first position: `b d` each."""

    def __init__(self, like: Tensor, *, places: bool, least: bool = False) -> None:
        self.least, self.places = least, places
        self.value = torch.full_like(like, math.inf if least else -math.inf)
        self.where = torch.zeros_like(like, dtype=torch.int32)

    def update(self, z: Tensor, chunk: Chunk) -> None:
        """Add one chunk; a NaN is both largest and least, as in `amax` and `amin`."""
        rows = chunk.split(z)
        best, place = self.value[chunk.samples], self.where[chunk.samples]
        if self.places:
            value, where = self.found(rows)
            better = (value < best if self.least else value > best) | value.isnan()
            place.copy_(torch.where(better, where + chunk.positions.start, place))
        else:
            value = rows.amin(1) if self.least else rows.amax(1)
        best.copy_((torch.minimum if self.least else torch.maximum)(best, value))

    def found(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The extremum over the middle axis and its first position, `s p d -> s d` each.

        It finds the best block of √p positions, then looks within it: `max` with indices takes ten times as long as `amax`.
        """
        values, search = (torch.amin, torch.min) if self.least else (torch.amax, torch.max)
        p = rows.shape[1]
        block = math.isqrt(p)
        whole = p // block * block
        best = values(rearrange(rows[:, :whole], "s (k block) d -> s k block d", block=block), 2)
        if whole < p:
            best = torch.cat([best, values(rows[:, whole:], 1, keepdim=True)], 1)
        value, k = search(best, 1, keepdim=True)
        places = (k * block + torch.arange(block, device=k.device)[:, None]).clamp_(max=p - 1)
        within = search(rows.gather(1, places), 1, keepdim=True).indices
        return value[:, 0], places.gather(1, within)[:, 0]


class Product:
    """One product `W t + bias` at every position, and its gradients; those of its weights are summed over chunks.

    In float32 on a CPU it is the 1x1 convolution of a channels-last image of one column. PyTorch computes convolutions with
    oneDNN and matrix products with MKL, which took twice as long on the AMD machine that it was measured on.
    """

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        self.weight, self.bias = weight, bias
        self.matrix, self.offset = weight.to(dtype), bias.to(dtype)
        self.is_convolution = weight.device.type == "cpu" and dtype == torch.float32
        self.grads: list[Tensor] = []

    def __call__(self, rows: Tensor) -> Tensor:
        """The product for rows of positions: `r c -> r d`."""
        if self.is_convolution:
            return unimage(F.conv2d(image(rows), self.matrix[..., None, None], self.offset))
        return F.linear(rows, self.matrix, self.offset)

    def back(self, q: Tensor, source: Tensor, onto: Tensor | None = None) -> Tensor:
        """The gradient of the input `source` for the gradient q of the output, added to `onto`; the weights' is kept."""
        if not self.is_convolution:
            self.add(q.t() @ source, q.sum(0, dtype=vector_dtype(q)))
            return q @ self.matrix if onto is None else onto.addmm_(q, self.matrix)
        as_product = 4 * len(q) < len(self.bias)  # few positions: a convolution's weight gradient takes three times as long
        operands = image(q), image(source), self.matrix[..., None, None], [len(self.bias)]
        options = [1, 1], [0, 0], [1, 1], False, [0, 0], 1  # stride, padding, dilation, transposed, output padding, groups
        wanted = [True, not as_product, not as_product]
        dx, weight, bias = torch.ops.aten.convolution_backward(*operands, *options, wanted)
        if as_product:
            self.add(q.t() @ source, q.sum(0))
        else:
            self.add(weight[..., 0, 0], bias)
        return unimage(dx) if onto is None else onto.add_(unimage(dx))

    def add(self, weight: Tensor, bias: Tensor) -> None:
        """Add a chunk's gradients of weight and bias."""
        if self.grads:
            for total, part in zip(self.grads, (weight, bias), strict=True):
                total += part
        else:
            self.grads = [weight.to(vector_dtype(weight)), bias.to(vector_dtype(bias))]

    def result(self) -> Pair:
        """The gradients in the dtypes of weight and bias."""
        if not self.grads:  # an empty batch
            return torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        return self.grads[0].to(self.weight.dtype), self.grads[1].to(self.bias.dtype)


def image(rows: Tensor) -> Tensor:
    """Rows as a channels-last image of one column: a view, `r c -> 1 c r 1`."""
    return rows[None, :, None].permute(0, 3, 1, 2)


def unimage(column: Tensor) -> Tensor:
    """A channels-last image of one column as rows: a view, `1 c r 1 -> r c`."""
    return column[0, :, :, 0].t()


class Source:
    """What attention reads, `z = x` or `lin(squeeze, x)`, chunk by chunk, and the gradient of x.

    A squeeze reads channels-first features in their own memory order: to transpose them costs more than all the narrow maps.
    """

    def __init__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, present: Tensor | None = None) -> None:
        self.x, self.present, self.dtype, self.vectors = x, present, map_dtype(x), vector_dtype(x)
        self.squeeze = None if weight is None or bias is None else self.product(weight, bias)

    def product(self, weight: Tensor, bias: Tensor) -> Product:
        """A product in the dtype of the maps."""
        return Product(weight, bias, self.dtype)

    def vector(self, d: int) -> Tensor:
        """An empty pooled vector, `b d`."""
        return self.x.new_empty((self.x.shape[0], d), dtype=self.vectors)

    def read(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """The rows of z, `(s p) d`, and the part of x that backward needs."""
        part = chunk.read(self.x, self.present)
        if self.squeeze is not None and self.x.stride(1) != 1:
            z = F.conv1d(part, self.squeeze.matrix[..., None], self.squeeze.offset)
            return rearrange(z, "s d p -> (s p) d"), part
        rows = rearrange(part, "s c p -> (s p) c")
        return (rows if self.squeeze is None else self.squeeze(rows)), rows

    def back(self, dz: Tensor, part: Tensor, chunk: Chunk, dx: Tensor) -> None:
        """Write the gradient of this chunk of x to `dx`; the gradients of the squeeze are kept."""
        place = chunk.samples, slice(None), chunk.positions
        if self.squeeze is not None and part.ndim == 3:
            q = rearrange(dz, "(s p) d -> s d p", p=chunk.p)
            self.squeeze.add((q @ part.mT).sum(0), dz.sum(0, dtype=vector_dtype(dz)))
            dx[place] = self.squeeze.matrix.t() @ q
        else:
            dz = dz if self.squeeze is None else self.squeeze.back(dz, part)
            dx[place] = rearrange(dz, "(s p) c -> s c p", p=chunk.p)

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of the weight and bias of the squeeze."""
        return (None, None) if self.squeeze is None else self.squeeze.result()


class Sparse:
    """A gradient that is nonzero at one position per channel, `factor` at `where` (`b d` each): its part in one chunk."""

    def __init__(self, where: Tensor, factor: Tensor, chunk: Chunk) -> None:
        self.chunk = chunk
        at = where[chunk.samples] - chunk.positions.start
        inside = (at >= 0) & (at < chunk.p)
        self.at = torch.where(inside, at, 0).long()
        self.factor = torch.where(inside, factor[chunk.samples], 0)
        self.rows = self.at + chunk.p * torch.arange(chunk.s, device=at.device)[:, None]

    def add_to(self, q: Tensor) -> Tensor:
        """`q` with this gradient added, in place."""
        self.chunk.split(q).scatter_add_(1, self.at[:, None], self.factor[:, None].to(q.dtype))
        return q

    def back(self, product: Product, source: Tensor) -> Tensor:
        """`product.back` for this gradient: every position sums the rows of W of the channels whose gradient is there."""
        rows = self.rows.t().contiguous()  # d s
        weight = F.embedding_bag(rows, source, mode="sum", per_sample_weights=self.factor.t().to(source.dtype).contiguous())
        product.add(weight, self.factor.sum(0))
        bag, order = self.rows.flatten().sort(stable=True)
        offsets = torch.searchsorted(bag, torch.arange(len(source), device=bag.device))
        factor = self.factor.flatten()[order].to(source.dtype)
        return F.embedding_bag(order % len(rows), product.matrix, offsets, mode="sum", per_sample_weights=factor)


def mfa_forward(
    x: Tensor,
    weights: Weights,
    biases: Weights,
    squeeze_weight: Tensor | None,
    squeeze_bias: Tensor | None,
    places: bool = True,
) -> tuple[Tensor, Tensor]:
    """The pooled maps of MFA: mean h1, max h2, mean h3, max h4, mean of CLIA's map, and the positions of the two maxima.

    Without `places` the positions are zeros: only backward needs them.

    Shape: x `b c n`, weights five times `d d` (conv1, conv2, conv3, conv4, clia.conv1), biases five times `d`,
        squeeze_weight `d c` -> `5 b d`, `2 b d` (int32).
    """
    b, d = x.shape[0], weights[0].shape[0]
    source = Source(x, squeeze_weight, squeeze_bias)
    conv1, conv2, conv3, conv4, clia1 = (source.product(*pair) for pair in zip(weights, biases, strict=True))
    vector = source.vector(d)
    mean1, mean3, mean_t = (Mean(vector, x.shape[2]) for _ in range(3))
    max2, max4 = (Extremum(vector, places=places) for _ in range(2))
    for chunk in chunks(b, x.shape[2], d):
        z = source.read(chunk)[0]
        mean_t.update(clia1(z).sigmoid_(), chunk)
        h = conv1(z).sigmoid_()
        mean1.update(h, chunk)
        del z  # at most two maps of a chunk exist at a time
        z = conv2(h)
        max2.update(z, chunk)
        h += z.sigmoid_()
        del z
        h = conv3(h).sigmoid_()
        mean3.update(h, chunk)
        max4.update(conv4(h), chunk)
    return (
        torch.stack([mean1.value, max2.value.sigmoid(), mean3.value, max4.value.sigmoid(), mean_t.value]),
        torch.stack([max2.where, max4.where]),
    )


def mfa_backward(
    grads: Tensor,
    x: Tensor,
    weights: Weights,
    biases: Weights,
    squeeze_weight: Tensor | None,
    squeeze_bias: Tensor | None,
    stats: Tensor,
    where: Tensor,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor | None, Tensor | None]:
    """The gradients of x, weights, biases and squeeze for `grads` (`5 b d`) of the statistics; it recomputes the maps."""
    b, n, d = x.shape[0], x.shape[2], weights[0].shape[0]
    source = Source(x, squeeze_weight, squeeze_bias)
    products = [source.product(*pair) for pair in zip(weights, biases, strict=True)]
    conv1, conv2, conv3, conv4, clia1 = products
    g1, g2, g3, g4, gl = grads
    g1, g3, gl = ((g / n).to(conv1.matrix.dtype) for g in (g1, g3, gl))
    g2, g4 = through_sigmoid(g2, stats[1]), through_sigmoid(g4, stats[3])
    dx = torch.empty_like(x)
    for chunk in chunks(b, n, d):
        z, part = source.read(chunk)
        h1 = conv1(z).sigmoid_()
        h2 = conv2(h1).sigmoid_()
        h12 = h1 + h2
        h3 = conv3(h12).sigmoid_()
        s = Sparse(where[1], g4, chunk).back(conv4, h3)
        chunk.split(s).add_(chunk.spread(g3))
        s = conv3.back(sigmoid_backward_(s, h3), h12)
        q = Sparse(where[0], g2, chunk).add_to(torch.ops.aten.sigmoid_backward(s, h2))
        s = conv2.back(q, h1, onto=s)
        chunk.split(s).add_(chunk.spread(g1))
        dz = conv1.back(sigmoid_backward_(s, h1), z)
        t = clia1(z).sigmoid_()
        q = torch.ops.aten.sigmoid_backward(chunk.spread(gl).expand(-1, chunk.p, -1), chunk.split(t))
        source.back(clia1.back(rearrange(q, "s p d -> (s p) d"), z, onto=dz), part, chunk, dx)
    dw, db = zip(*(one.result() for one in products), strict=True)
    return dx, list(dw), list(db), *source.gradients()


def gain_of(stats: Tensor, tail: Tail) -> Tensor:
    """The gain `a · alpha` from the pooled maps, or without alpha the gate a: `5 b d -> b c`."""
    h1, h2, h3, h4, p = stats.unbind(0)
    dense_weight, dense_bias, conv2_weight, conv2_bias, *scales = tail.head
    global_info = functional.hifa_info(h1, h2, h3, h4, (dense_weight, dense_bias))
    local_info = functional.clia_info(p, (conv2_weight, conv2_bias))
    measured = Statistics(*tail.measured) if tail.measured else None
    expand = (tail.expand[0], tail.expand[1]) if tail.expand else None
    a = functional.fusion_gate(global_info, local_info, scales[0], scales[1], expand, measured)
    return a if tail.alpha is None else functional.gain(a, tail.alpha)


def mfa_gain_forward(
    x: Tensor,
    weights: Weights,
    biases: Weights,
    squeeze_weight: Tensor | None,
    squeeze_bias: Tensor | None,
    head: Weights,
    measured: Weights,
    expand: Weights,
    alpha: Tensor | None,
    places: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gain of MFA, `b c`, and what `mfa_forward` gives; the weights behind the pooling as in `tail.Tail`."""
    stats, where = mfa_forward(x, weights, biases, squeeze_weight, squeeze_bias, places)
    return gain_of(stats, Tail(head, measured, expand, alpha)), stats, where


def mfa_gain_backward(
    grad: Tensor,
    x: Tensor,
    weights: Weights,
    biases: Weights,
    squeeze_weight: Tensor | None,
    squeeze_bias: Tensor | None,
    head: Weights,
    measured: Weights,
    expand: Weights,
    alpha: Tensor | None,
    stats: Tensor,
    where: Tensor,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor | None, Tensor | None, list[Tensor]]:
    """The gradients of `mfa_gain_forward` for that of the gain: those of `mfa_backward`, then those of the tail's weights."""
    grads, through = tails.backward(grad, stats, Tail(head, measured, expand, alpha))
    return *mfa_backward(grads, x, weights, biases, squeeze_weight, squeeze_bias, stats, where), through


def mifa_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    squeeze_weight: Tensor | None,
    squeeze_bias: Tensor | None,
    present: Tensor | None,
    places: bool = True,
) -> tuple[Tensor, Tensor]:
    """The poolings of one modality of MIFA: min, mean, max of z, then of t = σ(lin(weight, z)), and where the extrema are.

    Shape: x `b c n`, weight `d d`, bias `d`, squeeze_weight `d c`, present `b` -> `6 b d`, `4 b d` (int32).
    """
    b, d = x.shape[0], weight.shape[0]
    source = Source(x, squeeze_weight, squeeze_bias, present)
    conv, vector = source.product(weight, bias), source.vector(d)
    mean_z, mean_t = (Mean(vector, x.shape[2]) for _ in range(2))
    low_z, high_z, low_t, high_t = (Extremum(vector, places=places, least=least) for least in (True, False, True, False))
    for chunk in chunks(b, x.shape[2], d):
        z = source.read(chunk)[0]
        t = conv(z)
        for extremum, values in ((low_z, z), (high_z, z), (low_t, t), (high_t, t)):
            extremum.update(values, chunk)
        mean_z.update(z, chunk)
        mean_t.update(t.sigmoid_(), chunk)
    extrema = [low_z.value, mean_z.value, high_z.value, low_t.value.sigmoid(), mean_t.value, high_t.value.sigmoid()]
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
    """The gradients of x, weight, bias and squeeze for `grads` (`6 b d`) of the statistics; it recomputes t."""
    b, n, d = x.shape[0], x.shape[2], weight.shape[0]
    source = Source(x, squeeze_weight, squeeze_bias, present)
    conv = source.product(weight, bias)
    low_z, mean_z, high_z, low_t, mean_t, high_t = grads
    mean_z, mean_t = ((g / n).to(conv.matrix.dtype) for g in (mean_z, mean_t))
    points = list(zip(where, (low_z, high_z, through_sigmoid(low_t, stats[3]), through_sigmoid(high_t, stats[5])), strict=True))
    dx = torch.empty_like(x)
    for chunk in chunks(b, n, d):
        z, part = source.read(chunk)
        t = conv(z).sigmoid_()
        at = [Sparse(place, factor, chunk) for place, factor in points]
        q = torch.ops.aten.sigmoid_backward(chunk.spread(mean_t).expand(-1, chunk.p, -1), chunk.split(t))
        q = at[3].add_to(at[2].add_to(rearrange(q, "s p d -> (s p) d")))
        dz = conv.back(q, z)
        chunk.split(dz).add_(chunk.spread(mean_z))
        source.back(at[1].add_to(at[0].add_to(dz)), part, chunk, dx)
    if present is not None:
        dx.masked_fill_(rearrange(~present, "b -> b 1 1"), 0)
    return dx, *conv.result(), *source.gradients()


def gate_forward(x: Tensor, factor: Tensor, layout: Layout, num_prefix_tokens: int) -> Tensor:
    """`x · factor` in the dtype and memory order of x, rounded once; prefix tokens are copied."""
    return multiplied(x, factor, layout, num_prefix_tokens, torch.empty_like(x))


def multiplied(x: Tensor, factor: Tensor, layout: Layout, num_prefix_tokens: int, out: Tensor) -> Tensor:
    """`gate_forward` into `out`."""
    factor = spread(factor, x, layout, num_prefix_tokens)
    step = max(x.shape[0], 1) if x.dtype == factor.dtype else 1  # with two dtypes, the product is first a map of another dtype
    for i in range(0, x.shape[0], step):
        torch.mul(x[i : i + step], factor[i : i + step], out=out[i : i + step])
    return out


def gate_backward(dy: Tensor, x: Tensor, factor: Tensor, layout: Layout, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """The gradients of x and factor: `dy · factor`, and `Σ_positions dy · x` without a map of the products."""
    dfactor = torch.zeros_like(factor)
    dys, xs = flat(dy, layout, num_prefix_tokens), flat(x, layout, num_prefix_tokens)
    for chunk in chunks(xs.shape[0], xs.shape[2], xs.shape[1]):
        part = chunk.samples, slice(None), chunk.positions
        dfactor[chunk.samples] += (dys[part].to(factor.dtype) * xs[part]).sum(-1)
    return multiplied(dy, factor, layout, num_prefix_tokens, torch.empty_like(x)), dfactor
