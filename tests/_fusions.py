"""The equations of the fusions in float64 NumPy, a second time and independently, for one sample at a time.

A sample is the modalities that it has: `xs` and `vs` are {number: array}, `c n` and `c`; `grids` are the sizes of the axes of
positions. An absent modality is in none of them, so that leaving it out is all that can be done with it. Weights are a state
dict.
"""

import itertools
import math

import numpy as np

from tests.reference import sigmoid, sub


def linear(w, name, t):
    """`c n` or `c`."""
    bias = w[f"{name}.bias"]
    return w[f"{name}.weight"] @ t + (bias if t.ndim == 1 else bias[:, None])


def softmax(t, axis):
    t = np.exp(t - t.max(axis, keepdims=True))
    return t / t.sum(axis, keepdims=True)


def resample(x, grid, to):
    """Every cell is repeated as often as there are new cells, and the copies averaged in groups."""
    if len(grid) != len(to):
        grid, to = (math.prod(grid),), (math.prod(to),)
    x = x.reshape(len(x), *grid)
    for axis, (before, after) in enumerate(zip(grid, to, strict=True), start=1):
        many = np.repeat(x, after, axis=axis)
        x = many.reshape(*many.shape[:axis], after, before, *many.shape[axis + 1 :]).mean(axis + 1)
    return x.reshape(len(x), -1)


def attention(q, k, v, heads):
    """What `d n` queries read of `d l` keys."""
    parts = []
    for qh, kh, vh in zip(*(np.split(t, heads) for t in (q, k, v)), strict=True):
        parts.append(vh @ softmax(qh.T @ kh / math.sqrt(len(qh)), 1).T)
    return np.concatenate(parts)


def scaled(parts, widths):
    """The vectors side by side, zeros where there is none, the others scaled."""
    factor = len(widths) / max(len(parts), 1)
    return np.concatenate([factor * parts[i] if i in parts else np.zeros(c) for i, c in enumerate(widths)])


# Refiners: {number: y}


def mmtm(w, xs, grids, widths, scale=2.0):
    if len(xs) < 2:
        return xs
    s = np.concatenate([xs[i].mean(1) if i in xs else np.zeros(c) for i, c in enumerate(widths)])
    e = np.maximum(linear(w, "squeeze", s), 0)
    return {i: x * scale * sigmoid(linear(w, f"excites.{i}", e))[:, None] for i, x in xs.items()}


def cross_attention(w, xs, grids, widths, heads=4):
    ys = {}
    for i, x in xs.items():
        rest = [j for j in xs if j != i]
        if not rest:
            return xs
        k, v = (np.concatenate([linear(w, f"{name}.{j}", xs[j]) for j in rest], 1) for name in ("keys", "values"))
        ys[i] = x + linear(w, f"outs.{i}", attention(linear(w, f"queries.{i}", x), k, v, heads))
    return ys


def mutual_attention(w, xs, grids, widths, heads=4):
    ys = {}
    for i, x in xs.items():
        k, v, added = linear(w, f"keys.{i}", x), linear(w, f"values.{i}", x), []
        for j in xs:
            if j != i:
                a = attention(linear(w, f"queries.{i}.{j}", xs[j]), k, v, heads)
                added.append(linear(w, f"outs.{i}", a).mean(1))
        ys[i] = x + np.mean(added, 0)[:, None] if added else x
    return ys


def coattention(w, xs, grids, widths):
    ys = {}
    for i, x in xs.items():
        added = []
        for j in xs:
            if j != i:
                z = resample(xs[j], grids[j], grids[i])
                a = softmax(linear(w, f"queries.{j}", z).T @ linear(w, f"keys.{j}", z), 1)
                added.append(linear(w, f"values.{i}", x) @ a.T)
        ys[i] = x + w[f"gammas.{i}"] * np.mean(added, 0) if added else x
    return ys


# Readouts: a vector. `maps` are the last stage's, or all stages' where a list is read.


def concat(w, vs, stages, widths):
    return scaled(vs, widths)


def summed(w, vs, stages, widths):
    parts = [linear(w, f"projections.{i}", v) for i, v in vs.items()]
    return len(widths) / max(len(vs), 1) * np.sum([*parts, np.zeros(max(widths))], 0)


def gated(w, vs, stages, widths):
    every = np.concatenate([vs[i] if i in vs else np.zeros(c) for i, c in enumerate(widths)])
    parts = [sigmoid(linear(w, f"gates.{i}", every)) * np.tanh(linear(w, f"values.{i}", v)) for i, v in vs.items()]
    return np.sum([*parts, np.zeros(max(widths))], 0)


def lmf(w, vs, stages, widths):
    if not vs:
        return np.zeros(max(widths))
    z = w["bias"].copy()
    for r, weight in enumerate(w["weights"]):
        z = z + weight * np.prod([np.concatenate([[1], v]) @ w[f"factors.{i}"][r] for i, v in vs.items()], 0)
    return z


def norm(w, name, x, eps=1e-5):
    """A batch norm in eval mode on `c ...`."""
    shape = (-1, *[1] * (x.ndim - 1))
    mean, var, scale, shift = (w[f"{name}.{k}"].reshape(shape) for k in ("running_mean", "running_var", "weight", "bias"))
    return (x - mean) / np.sqrt(var + eps) * scale + shift


def bottleneck(w, u):
    return norm(w, "bn2", linear(w, "expand", np.maximum(norm(w, "bn1", linear(w, "reduce", u)), 0)))


def multiscale(w, u):
    return sigmoid(bottleneck(sub(w, "local."), u) + bottleneck(sub(w, "context."), u.mean(1, keepdims=True)))


def aff(w, vs, stages, widths, fold=None):
    xs, grids = stages[-1]
    z = None
    for i, x in xs.items():
        x = resample(x, grids[i], grids[0])
        x = linear(w, f"projections.{i}", x) if f"projections.{i}.weight" in w else x
        z = x if z is None else (fold or aff_fold)(w, z, x)
    return np.zeros(len(w["first.local.expand.bias"])) if z is None else z.mean(1)


def aff_fold(w, x, y):
    a = multiscale(sub(w, "first."), x + y)
    return 2 * (a * x + (1 - a) * y)


def iaff(w, vs, stages, widths):
    def fold(w, x, y):
        a = multiscale(sub(w, "first."), x + y)
        b = multiscale(sub(w, "second."), a * x + (1 - a) * y)
        return b * x + (1 - b) * y

    return aff(w, vs, stages, widths, fold)


def scores(w, x):
    return linear(w, "4", np.maximum(linear(w, "2", np.maximum(linear(w, "0", x), 0)), 0))


def convolution(w, name, x, stride):
    kernel, rank = w[f"{name}.weight"], x.ndim - 1
    x = np.pad(x, [(0, 0), *[(1, 1)] * rank])
    total = 0
    for offset in itertools.product(range(3), repeat=rank):
        window = tuple(slice(o, n - 2 + o, s) for o, n, s in zip(offset, x.shape[1:], stride, strict=True))
        total = total + np.tensordot(kernel[(..., *offset)], x[(slice(None), *window)], 1)
    return total + w[f"{name}.bias"].reshape(-1, *[1] * rank)


def residual(w, f, stride):
    ones = [1] * len(stride)
    y = np.maximum(norm(w, "bn1", convolution(w, "conv1", f, stride)), 0)
    y = norm(w, "bn2", convolution(w, "conv2", y, ones))
    if "proj.weight" in w:
        f = f[(slice(None), *(slice(None, None, s) for s in stride))]
        f = linear(w, "proj", f.reshape(len(f), -1)).reshape(y.shape)
    return np.maximum(y + f, 0)


def hyperbranch(w, vs, stages, widths):
    f = old = None
    for s, (xs, grids) in enumerate(stages):
        here, to = sub(w, f"stages.{s}."), grids[0]
        us = {}
        for i, x in xs.items():
            u = resample(x, grids[i], to)
            us[i] = linear(here, f"projs.{i}", u) if f"projs.{i}.weight" in here else u
        if not us:
            continue
        weights = softmax(np.stack([scores(sub(here, f"scores.{i}."), u)[0] for i, u in us.items()]), 0)
        g = sum(weight * u for weight, u in zip(weights, us.values(), strict=True))
        if f is not None:
            if len(old) == len(to) and all(a % b == 0 for a, b in zip(old, to, strict=True)):
                f, stride = f.reshape(len(f), *old), [a // b for a, b in zip(old, to, strict=True)]
            else:
                f, stride = resample(f, old, to).reshape(len(f), *to), [1] * len(to)
            f = residual(sub(here, "blocks.0."), f, stride)
            f = residual(sub(here, "blocks.1."), f, [1] * len(to)).reshape(len(g), -1)
            a, b = softmax(np.concatenate([scores(sub(here, "mixes.0."), g), scores(sub(here, "mixes.1."), f)]), 0)
            g = a * g + b * f
        f, old = g, to
    last = len(w[f"stages.{len(stages) - 1}.scores.0.0.weight"][0])
    return np.concatenate([scaled(vs, widths), np.zeros(last) if f is None else f.mean(1)])


def layer_norm(w, name, t, eps=1e-5):
    """Over channels, tokens `n d`."""
    t = (t - t.mean(1, keepdims=True)) / np.sqrt(t.var(1, keepdims=True) + eps)
    return t * w[f"{name}.weight"] + w[f"{name}.bias"]


def mttu(w, vs, stages, widths, heads=8):
    xs, _ = stages[-1]
    d = len(w["norm.weight"])
    parts = scaled({i: x.mean(1) for i, x in xs.items()}, widths), scaled({i: x.max(1) for i, x in xs.items()}, widths)
    if not xs:
        return np.concatenate([*parts, np.zeros(2 * d)])
    t = np.concatenate([linear(w, f"projections.{i}", x).T + w[f"positions.{i}"] for i, x in xs.items()])
    for k in range(4):
        here = sub(w, f"layers.{k}.")
        q, k, v = np.split(here["qkv.weight"] @ layer_norm(here, "norm1", t).T, 3)
        t = t + linear(here, "proj", attention(q, k, v, heads)).T
        hidden = linear(here, "fc1", layer_norm(here, "norm2", t).T)
        t = t + linear(here, "fc2", hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))).T
    t = layer_norm(w, "norm", t)
    return np.concatenate([*parts, t.mean(0), t.max(0)])


def gloria_context(region, word, temperature=4.0):
    a = softmax(temperature * softmax(region.T @ word, 1), 0)
    return region @ a


def gloria(w, vs, stages, widths):
    xs, _ = stages[-1]
    d, asked = len(w["global_embedders.0.bias"]), {}
    local = {i: linear(w, f"local_embedders.{i}", x) for i, x in xs.items()}
    for i in xs:
        contexts = [gloria_context(local[i], local[j]).mean(1) for j in xs if j != i]
        asked[i] = np.mean(contexts, 0) if contexts else local[i].mean(1)
    g = {i: linear(w, f"global_embedders.{i}", v) for i, v in vs.items()}
    return np.concatenate([scaled(g, [d] * len(widths)), scaled(asked, [d] * len(widths))])


def cosine(a, b):
    return a @ b / math.sqrt((a @ a) * (b @ b))


def crossed(table):
    """The cross entropies of both directions, averaged over samples."""
    rows = [-math.log(softmax(t[:, a], 0)[a]) for t in (table, table.T) for a in range(len(table))]
    return sum(rows) / max(len(table), 1)


def gloria_losses(w, samples, weight=0.1):
    """The local and the global loss of samples [(vs, xs)], averaged over ordered pairs of modalities."""
    numbers = range(len([name for name in w if name.startswith("local_embedders") and name.endswith("bias")]))
    found = []
    for i, j in itertools.permutations(numbers, 2):
        both = [(vs, xs) for vs, xs in samples if i in xs and j in xs]
        local, whole = np.zeros((2, len(both), len(both)))
        for a, (va, xa) in enumerate(both):
            for b, (vb, xb) in enumerate(both):
                word = linear(w, f"local_embedders.{j}", xb[j])
                c = gloria_context(linear(w, f"local_embedders.{i}", xa[i]), word)
                local[a, b] = 10 * math.log(sum(math.exp(5 * cosine(c[:, t], word[:, t])) for t in range(word.shape[1])))
                g = linear(w, f"global_embedders.{i}", va[i]), linear(w, f"global_embedders.{j}", vb[j])
                whole[a, b] = 10 * cosine(*g)
        found.append((crossed(local), crossed(whole)))
    return [weight * one for one in np.mean(found, 0)]


REFINERS = {"mmtm": mmtm, "cross_attention": cross_attention, "mutual_attention": mutual_attention, "caf": coattention}
READOUTS = {
    **{"concat": concat, "sum": summed, "gated": gated, "lmf": lmf, "caf": hyperbranch, "mttu": mttu, "gloria": gloria},
    **{"aff": aff, "iaff": iaff},
}
