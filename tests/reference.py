"""SPEC's equations in float64 NumPy, a second time and independently: the layers' weights come as their state dict.

Features are `b c ...`; a gate is `b c`. Nothing here knows how the package computes anything.
"""

import numpy as np


def sigmoid(t):
    return 0.5 + 0.5 * np.tanh(0.5 * t)


def sub(w, prefix):
    """The entries of `w` below `prefix`, without it."""
    return {name[len(prefix) :]: value for name, value in w.items() if name.startswith(prefix)}


def lin(w, name, t):
    """The same matrix at every position: `b c ... -> b d ...`; a pooled vector has no position left."""
    moved = np.moveaxis(t, 1, -1) @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    return np.moveaxis(moved, -1, 1)


def over_positions(reduction, t):
    return reduction(t.reshape(*t.shape[:2], -1), axis=2)


def times(x, gain):
    """Multiply channel by channel."""
    return x * gain.reshape(*gain.shape, *[1] * (x.ndim - 2))


# Fig. 2


def hifa(w, x):
    h1 = sigmoid(lin(w, "conv1", x))
    h2 = sigmoid(lin(w, "conv2", h1))
    h3 = sigmoid(lin(w, "conv3", h1 + h2))
    h4 = sigmoid(lin(w, "conv4", h3))
    u = over_positions(np.mean, h1) + over_positions(np.max, h2)
    v = over_positions(np.mean, h3) + over_positions(np.max, h4)
    return sigmoid(lin(w, "dense", np.concatenate([u, v], axis=1)))


def clia(w, x):
    p = over_positions(np.mean, sigmoid(lin(w, "conv1", x)))
    return p + sigmoid(lin(w, "conv2", p))


def weighed(w, global_info, local_info):
    if "global_center" in w:
        global_info = (global_info - w["global_center"]) / w["global_spread"]
        local_info = (local_info - w["local_center"]) / w["local_spread"]
    return w["global_scale"] * global_info + w["local_scale"] * local_info


def mfa_gate(w, x):
    z = lin(w, "squeeze", x) if "squeeze.weight" in w else x
    fused = weighed(w, hifa(sub(w, "hifa."), z), clia(sub(w, "clia."), z))
    return sigmoid(lin(w, "expand", fused) if "expand.weight" in w else fused)


def mfa(w, x):
    return times(x, mfa_gate(w, x) * w["alpha"])


# Fig. 3: one sample at a time, with the list of the modalities it has


def one_sample(xs, b, present):
    return [(i, x[b : b + 1]) for i, x in enumerate(xs) if present is None or present[b, i]]


def mgifa(w, xs, present=None):
    rows = []
    for b in range(len(xs[0])):
        total = 0
        for r in (np.min, np.mean, np.max):
            pooled = sum((over_positions(r, x) for _, x in one_sample(xs, b, present)), np.zeros((1, xs[0].shape[1])))
            total = total + sigmoid(lin(w, "dense", pooled))
        rows.append(total)
    return np.concatenate(rows)


def mlifa(w, xs, present=None):
    rows = []
    for b in range(len(xs[0])):
        maps = [sigmoid(lin(w, f"convs.{i}", x)) for i, x in one_sample(xs, b, present)]
        zeros = np.zeros((1, xs[0].shape[1]))
        rows.append(sum((over_positions(r, t) for r in (np.min, np.mean, np.max) for t in maps), zeros))
    return np.concatenate(rows)


def mifa_gates(w, xs, present=None):
    wide = "squeezes.0.weight" in w
    zs = [lin(w, f"squeezes.{i}", x) for i, x in enumerate(xs)] if wide else xs
    fused = weighed(w, mgifa(sub(w, "mgifa."), zs, present), mlifa(sub(w, "mlifa."), zs, present))
    return [sigmoid(lin(w, f"expands.{i}", fused) if wide else fused) for i in range(len(xs))]


def mifa(w, xs, present=None):
    ys = []
    for i, (x, gate) in enumerate(zip(xs, mifa_gates(w, xs, present), strict=True)):
        y = times(x, gate * w[f"alphas.{i}"])
        ys.append(y if present is None else np.where(present[:, i].reshape(-1, *[1] * (x.ndim - 1)), y, x))
    return ys


# Fig. 1C


def conv2d(w, name, x, stride, padding):
    kernel = w[f"{name}.weight"]
    k = kernel.shape[-1]
    before_after = [(k // 2, k // 2)] * 2
    if padding == "same":  # ceil(size / stride) outputs, the odd row and column at the end
        totals = [max((-(-size // stride) - 1) * stride + k - size, 0) for size in x.shape[2:]]
        before_after = [(total // 2, total - total // 2) for total in totals]
    x = np.pad(x, ((0, 0), (0, 0), *before_after))
    windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), axis=(2, 3))[:, :, ::stride, ::stride]
    return np.einsum("bchwij,dcij->bdhw", windows, kernel) + w[f"{name}.bias"][:, None, None]


def batch_norm(w, name, x, eps, momentum, training, after):
    """Normalise; in training put the running statistics that follow (PyTorch's unbiased variance) into `after`."""
    mean, var = w[f"{name}.running_mean"], w[f"{name}.running_var"]
    if training:
        old = mean, var
        mean, var, count = x.mean((0, 2, 3)), x.var((0, 2, 3)), x[:, 0].size
        after[f"{name}.running_mean"] = (1 - momentum) * old[0] + momentum * mean
        after[f"{name}.running_var"] = (1 - momentum) * old[1] + momentum * var * count / (count - 1)
    scale = w[f"{name}.weight"] / np.sqrt(var + eps)
    return (x - mean[:, None, None]) * scale[:, None, None] + w[f"{name}.bias"][:, None, None]


def rra(w, x, stride=1, padding="symmetric", eps=1e-3, momentum=0.01, training=False):
    """The block's output, and the running statistics after a training step."""
    after = {}
    norm = {"eps": eps, "momentum": momentum, "training": training, "after": after}
    z = mfa(sub(w, "mfa1."), conv2d(w, "conv1", x, stride, padding))
    z = np.maximum(batch_norm(w, "bn1", z, **norm), 0)
    z = mfa(sub(w, "mfa2."), conv2d(w, "conv2", z, 1, padding))
    z = batch_norm(w, "bn2", z, **norm)
    shortcut = x
    if "proj.conv.weight" in w:
        shortcut = batch_norm(w, "proj.bn", conv2d(w, "proj.conv", x, stride, padding), **norm)
    return np.maximum(z + shortcut, 0), after
