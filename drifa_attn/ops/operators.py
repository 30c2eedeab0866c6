"""The functions that the layers call, and the fused operators behind them as PyTorch sees them.

`mfa`, `mifa` and `gate` run the reference equations or a fused operator. A fused operator is a forward and a backward pass,
each one `torch.library` operator, for compile, export, autocast and autograd. When it runs, it calls the functions of one
backend. Autocast does not reach its dtypes. A backward pass cannot be differentiated, and says so.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from einops import rearrange, reduce
from torch import Tensor

from drifa_attn import functional
from drifa_attn.functional import Linear, Masks, Pair, Statistics, vector_dtype
from drifa_attn.layout import Layout, positions, scale

from . import choose, flops, grouped
from .choose import Way, backend, is_fused

Weights = Sequence[Tensor]

SQUEEZE = "Tensor? squeeze_weight, Tensor? squeeze_bias"
MFA = f"Tensor x, Tensor[] weights, Tensor[] biases, {SQUEEZE}"
TAIL = "Tensor[] head, Tensor[] measured, Tensor[] expand, Tensor? alpha"
MIFA = f"Tensor x, Tensor weight, Tensor bias, {SQUEEZE}, Tensor? present"
GATE = "Tensor x, Tensor factor, str layout, int num_prefix_tokens"


def mfa(
    x: Tensor,
    hifa_weights: Sequence[Linear],
    clia_weights: Sequence[Linear],
    global_scale: Tensor,
    local_scale: Tensor,
    *,
    squeeze: Linear | None = None,
    expand: Linear | None = None,
    statistics: Statistics | None = None,
    mask: Tensor | None = None,
    alpha: Tensor | None = None,
    way: Way | None = None,
) -> Tensor:
    """The gate of MFA by the reference equations, in groups or by a fused operator: `functional.mfa`, with two arguments more.

    With `alpha` it is the gain, `functional.gain`. `way` is what `ops.way` answered for x, the linear maps and the mask; None
    asks it.
    """
    if way is None:
        way = choose.way(x, local_scale.shape[0], [*hifa_weights, *clia_weights, squeeze, expand], mask)
    if way != "fused":
        weights: Any = hifa_weights, clia_weights, global_scale, local_scale
        options: Any = {"squeeze": squeeze, "expand": expand, "statistics": statistics}
        a = grouped.mfa(x, *weights, **options) if way == "grouped" else functional.mfa(x, *weights, **options, mask=mask)
        return a if alpha is None else functional.gain(a, alpha)
    *convs, dense = cast(Any, hifa_weights)  # pairs: it is fused
    clia1, clia2 = cast(Any, clia_weights)
    w, b = zip(*convs, clia1, strict=True)
    inputs = x, list(w), list(b), *(cast(Any, squeeze) or (None, None))
    tail = [*dense, *clia2, global_scale, local_scale], list(statistics or ()), list(cast(Any, expand) or ()), alpha
    return call(mfa_gain_op, *inputs, *tail, torch.is_grad_enabled())[0]


def mifa(
    xs: Sequence[Tensor],
    mgifa_dense: Linear,
    mlifa_convs: Sequence[Linear],
    global_scale: Tensor,
    local_scale: Tensor,
    *,
    present: Tensor | None = None,
    mask: Masks = None,
    squeezes: Sequence[Linear] | None = None,
    expands: Sequence[Linear] | None = None,
    statistics: Statistics | None = None,
    fused: bool | None = None,
) -> list[Tensor]:
    """The gates of MIFA by the reference equations or by a fused operator: `functional.mifa`, with one argument more.

    `fused` is what `is_fused` answered for xs, the linear maps and the mask; None asks it.
    """
    if fused is None:
        fused = is_fused(xs, local_scale.shape[0], [mgifa_dense, *mlifa_convs, *(squeezes or ()), *(expands or ())], mask)
    if not fused:
        weights = (mgifa_dense, mlifa_convs, global_scale, local_scale)
        wide: dict[str, Any] = {"squeezes": squeezes, "expands": expands}
        return functional.mifa(xs, *weights, present=present, mask=mask, **wide, statistics=statistics)
    masks: Sequence[Tensor | None] = [None] * len(xs) if present is None else present.unbind(1)
    maps: Sequence[Linear | None] = [None] * len(xs) if squeezes is None else squeezes
    parts: Any = zip(xs, mlifa_convs, maps, masks, strict=True)  # pairs: it is fused
    pools = torch.stack([mifa_stats(*part) for part in parts])  # m (2 r) b d
    with functional.without_autocast(xs[0]):
        if present is not None:
            pools = torch.where(rearrange(present, "b m -> m 1 b 1"), pools, 0)
        of_x, of_maps = reduce(pools, "m (two r) b d -> two r b d", "sum", two=2)
        global_info = functional.mgifa_info(of_x, mgifa_dense)
        local_info = reduce(of_maps, "r b d -> b d", "sum")
        shared = global_info, local_info, global_scale, local_scale
        return functional.fusion_gates(*shared, expands, statistics, modalities=len(xs))


def gate(
    x: Tensor,
    factor: Tensor,
    layout: Layout = "b c ...",
    num_prefix_tokens: int = 0,
    *,
    mask: Tensor | None = None,
    fused: bool | None = None,
) -> Tensor:
    """`x · factor` with one factor per channel; the fused operator keeps no map of products for backward.

    `fused` is what `is_fused` answered for the forward that this product belongs to; None asks it for x and the mask.

    Shape: x of the layout, factor `b c`, float32 at least, mask `b n` -> as x: same dtype and strides; prefix tokens, and what
        is False in the mask, unchanged. The product is rounded once.
    Differs: the paper has no prefix tokens and no mask.
    """
    if fused is None:
        fused = is_fused(positions(x, layout), factor.shape[1], mask=mask)
    return gate_op(x, factor, layout, num_prefix_tokens) if fused else scale(x, factor, layout, num_prefix_tokens, mask)


def mfa_stats(x: Tensor, weights: Sequence[Pair], squeeze: Pair | None = None) -> Tensor:
    """The five pooled maps of HIFA and CLIA (Fig. 2): mean h1, max h2, mean h3, max h4, and the mean of CLIA's map.

    Args:
        x: features of any strides.
        weights: HIFA's conv1, conv2, conv3, conv4 and CLIA's conv1, each `d d`.
        squeeze: `d c`; None, only if d = c, reads x itself.

    Shape: x `b c n` -> `5 b d`, float32 at least.
    Differs: the gradient of a maximum goes to the first of tied positions.
    """
    w, b = zip(*weights, strict=True)
    return call(mfa_stats_op, x, list(w), list(b), *(squeeze or (None, None)), torch.is_grad_enabled())[0]


def mifa_stats(x: Tensor, conv: Pair, squeeze: Pair | None = None, present: Tensor | None = None) -> Tensor:
    """The poolings of one modality of MIFA (Fig. 3): min, mean, max of z, then of `t = σ(lin(conv, z))`.

    Args:
        x: features of any strides.
        conv: the convolution of this modality, `d d`.
        squeeze: `d c`, z = lin(squeeze, x); None, only if d = c, is z = x.
        present: which samples have this modality; the others count as zeros.

    Shape: x `b c n`, present `b` -> `6 b d`, float32 at least.
    Differs: the gradient of an extremum goes to the first of tied positions.
    """
    return call(mifa_stats_op, x, *conv, *(squeeze or (None, None)), present, torch.is_grad_enabled())[0]


def call(operator: Callable[..., Any], *args: Any) -> Any:
    """The result of an operator. A counter of FLOPs that is running learns the formulas first."""
    if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack():
        flops.register()
    return operator(*args)


def refuse(ctx: Any, *grads: Any) -> Any:
    """The derivative of a backward pass: an error."""
    raise RuntimeError(
        "drifa_attn.ops: the fused operators have no second derivative. Run with DRIFA_BACKEND=reference, or within "
        'drifa_attn.ops.use("reference"), for the reference equations, which have all derivatives.'
    )


def define(
    name: str,
    schema: str,
    function: str,
    *,
    fake: Callable[..., Any],
    x: int = 0,
    bias: int | None = None,
    gradients: Callable[..., Any] = refuse,
    keep: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Register one operator, `torch.ops.drifa_attn.<name>`, that a backend's `function` of the same arguments runs.

    `fake` gives empty results. `x` and `bias` say which arguments are the features and the bias (or the biases), whose length
    is the width. `gradients` is the backward function for autograd, and `keep` stores what it needs.
    """

    def run(*args: Any) -> Any:
        features = args[x]
        width = None if bias is None else len(args[bias][0] if isinstance(args[bias], list) else args[bias])
        with torch.autocast(features.device.type, enabled=False), torch.cuda.device_of(features):
            result = getattr(backend(features, width), function)(*args)
        return listed(result) if schema.endswith("[]") else result

    # Not `torch.library.custom_op`: its first call imports the compiler, which takes seconds.
    torch.library.define(f"drifa_attn::{name}", schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    torch.library.impl(f"drifa_attn::{name}", "default", run)
    torch.library.register_fake(f"drifa_attn::{name}", fake)
    torch.library.register_autograd(f"drifa_attn::{name}", gradients, setup_context=keep)
    return getattr(torch.ops.drifa_attn, name).default


def listed(gradients: Sequence[Any]) -> list[Tensor]:
    """Gradients in one flat list, without the None of an absent squeeze."""
    flat = [g for some in gradients for g in (some if isinstance(some, list) else [some])]
    return [g for g in flat if g is not None]


def pooled(count: int, extrema: int) -> Callable[..., Any]:
    """A fake of statistics: `count b d` vectors, and where their extrema are, `extrema b d`."""

    def fake(x: Tensor, weights: Any, biases: Any, *rest: Any) -> tuple[Tensor, Tensor]:
        b, d = x.shape[0], len(biases[0] if isinstance(biases, list) else biases)
        return x.new_empty((count, b, d), dtype=vector_dtype(x)), x.new_empty((extrema, b, d), dtype=torch.int32)

    return fake


def gained(x: Tensor, weights: Any, biases: Any, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A fake of the gain, and of the statistics behind it."""
    return x.new_empty(x.shape[:2], dtype=vector_dtype(x)), *pooled(5, 2)(x, weights, biases)


def like_gained(
    grad: Tensor,
    x: Tensor,
    weights: Any,
    biases: Any,
    sw: Any,
    sb: Any,
    head: Any,
    measured: Any,
    expand: Any,
    alpha: Any,
    *rest: Any,
) -> list[Tensor]:
    """A fake of the gradients: one like every input that has one."""
    return [torch.empty_like(t) for t in listed((x, weights, biases, sw, sb, head, expand, alpha))]


def like_inputs(grads: Tensor, x: Tensor, weights: Any, biases: Any, sw: Any, sb: Any, *rest: Any) -> list[Tensor]:
    """A fake of gradients: one like every input."""
    return [torch.empty_like(t) for t in listed((x, weights, biases, sw, sb))]


def keep(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    """Keep for backward what the operator read, x and the weights, and the statistics and positions that it gave."""
    *inputs, _ = inputs
    ctx.set_materialize_grads(False)  # statistics and positions that nobody reads have no gradient, not zeros
    ctx.lengths = [len(value) if isinstance(value, list) else None for value in inputs]
    flat = [t for value in inputs for t in (value if isinstance(value, list) else [value])]
    ctx.save_for_backward(*flat, *output[-2:])


def kept(ctx: Any) -> list[Any]:
    """What `keep` kept: the inputs as they were given, then the outputs."""
    saved = iter(ctx.saved_tensors)
    inputs = [next(saved) if length is None else [next(saved) for _ in range(length)] for length in ctx.lengths]
    return [*inputs, *saved]


def mfa_gradients(ctx: Any, grads: Tensor, _: Tensor) -> tuple[Any, ...]:
    """The gradients of the inputs of `mfa_stats_op`."""
    dx, *rest = call(mfa_stats_backward_op, grads, *kept(ctx))
    return dx, rest[:5], rest[5:10], *(rest[10:] or (None, None)), None


def mfa_gain_gradients(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    """The gradients of the inputs of `mfa_gain_op`; the measured statistics have none."""
    *inputs, head, measured, expand, alpha, _, _ = given = kept(ctx)
    dx, *rest = call(mfa_gain_backward_op, grad, *given)
    squeeze = rest[10 : len(rest) - len(head) - len(expand) - (alpha is not None)]
    tail = rest[10 + len(squeeze) :]
    of_expand, of_alpha = tail[6 : 6 + len(expand)], tail[-1] if alpha is not None else None
    before = dx, rest[:5], rest[5:10], *(squeeze or (None, None))
    return *before, tail[:6], [None] * len(measured), of_expand, of_alpha, None


def mifa_gradients(ctx: Any, grads: Tensor, _: Tensor) -> tuple[Any, ...]:
    """The gradients of the inputs of `mifa_stats_op`."""
    dx, dw, db, *rest = call(mifa_stats_backward_op, grads, *kept(ctx))
    return dx, dw, db, *(rest or (None, None)), None, None


def keep_gate(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    """Keep for backward what the gate read."""
    x, factor, *ctx.place = inputs
    ctx.save_for_backward(x, factor)


def gate_gradients(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    """The gradients of the inputs of `gate_op`."""
    return *gate_backward_op(dy, *ctx.saved_tensors, *ctx.place), None, None


mfa_stats_op = define(
    "mfa_stats",
    f"({MFA}, bool places) -> (Tensor, Tensor)",
    "mfa_forward",
    fake=pooled(5, 2),
    bias=2,
    gradients=mfa_gradients,
    keep=keep,
)
mfa_stats_backward_op = define(
    "mfa_stats_backward",
    f"(Tensor grads, {MFA}, Tensor stats, Tensor where) -> Tensor[]",
    "mfa_backward",
    fake=like_inputs,
    x=1,
    bias=3,
)
mfa_gain_op = define(
    "mfa_gain",
    f"({MFA}, {TAIL}, bool places) -> (Tensor, Tensor, Tensor)",
    "mfa_gain_forward",
    fake=gained,
    bias=2,
    gradients=mfa_gain_gradients,
    keep=keep,
)
mfa_gain_backward_op = define(
    "mfa_gain_backward",
    f"(Tensor grad, {MFA}, {TAIL}, Tensor stats, Tensor where) -> Tensor[]",
    "mfa_gain_backward",
    fake=like_gained,
    x=1,
    bias=3,
)
mifa_stats_op = define(
    "mifa_stats",
    f"({MIFA}, bool places) -> (Tensor, Tensor)",
    "mifa_forward",
    fake=pooled(6, 4),
    bias=2,
    gradients=mifa_gradients,
    keep=keep,
)
mifa_stats_backward_op = define(
    "mifa_stats_backward",
    f"(Tensor grads, {MIFA}, Tensor stats, Tensor where) -> Tensor[]",
    "mifa_backward",
    fake=like_inputs,
    x=1,
    bias=3,
)
gate_op = define(
    "gate",
    f"({GATE}) -> Tensor",
    "gate_forward",
    fake=lambda x, *rest: torch.empty_like(x),
    gradients=gate_gradients,
    keep=keep_gate,
)
gate_backward_op = define(
    "gate_backward",
    f"(Tensor dy, {GATE}) -> (Tensor, Tensor)",
    "gate_backward",
    fake=lambda dy, x, factor, *rest: (torch.empty_like(x), torch.empty_like(factor)),
    x=1,
)
