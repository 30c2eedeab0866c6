"""The fused ops as PyTorch operators: what compile, export, autocast and autograd see of them.

One operator each for a forward and a backward pass; its kernel takes lean or Triton by what it meets. Autocast passes
through: the dtypes are those of the equations. A backward pass is not differentiable, and says so.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from drifa_attn.functional import vector_dtype
from drifa_attn.layout import Layout, positions

from . import flops, lean
from .dispatch import implementation, kernels, undisturbed

Weights = Sequence[Tensor]
Some = Tensor | None

SQUEEZE = "Tensor? squeeze_weight, Tensor? squeeze_bias"
MFA = f"Tensor x, Tensor[] weights, Tensor[] biases, {SQUEEZE}"
MIFA = f"Tensor x, Tensor weight, Tensor bias, {SQUEEZE}, Tensor? present"


def listed(gradients: Sequence[Any]) -> list[Tensor]:
    """Gradients in one flat list, without those of a squeeze that is not there."""
    flat = [g for some in gradients for g in (some if isinstance(some, list) else [some])]
    return [g for g in flat if g is not None]


def likes(*tensors: Any) -> list[Tensor]:
    """Empty tensors like the given ones, as `listed` lists them."""
    return [torch.empty_like(t) for t in listed(tensors)]


def refuse(ctx: Any, *grads: Any) -> Any:
    """The derivative of a backward pass."""
    raise RuntimeError(
        "drifa_attn.ops: the fused ops have no second derivative. Run with DRIFA_FUSED=0, or within "
        'drifa_attn.ops.fused("0"), for the plain equations, which have all of them.'
    )


@torch.library.custom_op("drifa_attn::mfa_stats", mutates_args=(), schema=f"({MFA}, bool places) -> (Tensor, Tensor)")
def mfa_stats(x: Tensor, weights: Weights, biases: Weights, sw: Some, sb: Some, places: bool) -> tuple[Tensor, Tensor]:
    """The statistics of MFA, and where its maxima are, which only backward asks for."""
    with undisturbed(x):
        module = implementation(x, biases[0].shape[0], "mfa")
        options = {"places": places} if module is lean else {}
        return module.mfa_forward(x, weights, biases, sw, sb, **options)


@torch.library.custom_op(
    "drifa_attn::mfa_stats_backward",
    mutates_args=(),
    schema=f"(Tensor grads, {MFA}, Tensor stats, Tensor where) -> Tensor[]",
)
def mfa_stats_backward(grads: Tensor, x: Tensor, weights: Weights, biases: Weights, *rest: Any) -> list[Tensor]:
    """The gradients of x, five weights, five biases and the squeeze."""
    with undisturbed(x):
        run = implementation(x, biases[0].shape[0], "mfa").mfa_backward
        return listed(run(grads, x, weights, biases, *rest))


@torch.library.custom_op("drifa_attn::mifa_stats", mutates_args=(), schema=f"({MIFA}, bool places) -> (Tensor, Tensor)")
def mifa_stats(
    x: Tensor, weight: Tensor, bias: Tensor, sw: Some, sb: Some, present: Some, places: bool
) -> tuple[Tensor, Tensor]:
    """The statistics of one modality of MIFA, and where its extrema are, which only backward asks for."""
    with undisturbed(x):
        module = implementation(x, bias.shape[0], "mifa")
        options = {"places": places} if module is lean else {}
        return module.mifa_forward(x, weight, bias, sw, sb, present, **options)


@torch.library.custom_op(
    "drifa_attn::mifa_stats_backward",
    mutates_args=(),
    schema=f"(Tensor grads, {MIFA}, Tensor stats, Tensor where) -> Tensor[]",
)
def mifa_stats_backward(grads: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> list[Tensor]:
    """The gradients of x, weight, bias and the squeeze."""
    with undisturbed(x):
        return listed(implementation(x, bias.shape[0], "mifa").mifa_backward(grads, x, weight, bias, *rest))


@mfa_stats.register_fake
def _(x: Tensor, weights: Weights, biases: Weights, *rest: Any) -> tuple[Tensor, Tensor]:
    return vectors(x, 5, biases[0].shape[0]), places(x, 2, len(biases[0]))


@mfa_stats_backward.register_fake
def _(grads: Tensor, x: Tensor, weights: Weights, biases: Weights, sw: Some, sb: Some, *rest: Any) -> list[Tensor]:
    return likes(x, list(weights), list(biases), sw, sb)


@mifa_stats.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return vectors(x, 6, bias.shape[0]), places(x, 4, len(bias))


@mifa_stats_backward.register_fake
def _(grads: Tensor, x: Tensor, weight: Tensor, bias: Tensor, sw: Some, sb: Some, *rest: Any) -> list[Tensor]:
    return likes(x, weight, bias, sw, sb)


def vectors(x: Tensor, count: int, d: int) -> Tensor:
    """Room for pooled vectors: `count b d`."""
    return x.new_empty((count, x.shape[0], d), dtype=vector_dtype(x))


def places(x: Tensor, count: int, d: int) -> Tensor:
    """Room for the places of extrema: `count b d`."""
    return x.new_empty((count, x.shape[0], d), dtype=torch.int32)


def keep(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    """Keep for backward what the op read, which is x and weights, and the `b d` vectors it gave."""
    *inputs, _ = inputs
    ctx.lengths = [len(value) if isinstance(value, list) else None for value in inputs]
    flat = [t for value in inputs for t in (value if isinstance(value, list) else [value])]
    ctx.save_for_backward(*flat, *output)


def kept(ctx: Any) -> tuple[list[Any], list[Tensor]]:
    """The inputs as they were given, and the outputs."""
    saved = iter(ctx.saved_tensors)
    inputs = [next(saved) if length is None else [next(saved) for _ in range(length)] for length in ctx.lengths]
    return inputs, list(saved)


def mfa_gradients(ctx: Any, grads: Tensor, _: Tensor) -> tuple[Any, ...]:
    """The gradients of `mfa_stats`' inputs."""
    inputs, outputs = kept(ctx)
    dx, *rest = mfa_stats_backward(grads, *inputs, *outputs)
    return dx, rest[:5], rest[5:10], *(rest[10:] or (None, None)), None


def mifa_gradients(ctx: Any, grads: Tensor, _: Tensor) -> tuple[Any, ...]:
    """The gradients of `mifa_stats`' inputs."""
    inputs, outputs = kept(ctx)
    dx, dw, db, *rest = mifa_stats_backward(grads, *inputs, *outputs)
    return dx, dw, db, *(rest or (None, None)), None, None


@torch.library.custom_op(
    "drifa_attn::gate", mutates_args=(), schema="(Tensor x, Tensor factor, str layout, int prefix) -> Tensor"
)
def gate(x: Tensor, factor: Tensor, layout: Layout, prefix: int) -> Tensor:
    """The features x times one factor a channel."""
    with undisturbed(x):
        flat = positions(x, layout)
        if not kernels(flat, None)[0]:
            return lean.gate_forward(x, factor, layout, prefix)
        triton = import_module(".triton_gate", __package__)
        return unflatten(triton.gate_forward(flat, factor, prefix), x, layout)


@torch.library.custom_op(
    "drifa_attn::gate_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor factor, str layout, int prefix) -> (Tensor, Tensor)",
)
def gate_backward(dy: Tensor, x: Tensor, factor: Tensor, layout: Layout, prefix: int) -> tuple[Tensor, Tensor]:
    """The gradients of x and factor."""
    with undisturbed(x):
        flat = positions(x, layout)
        if not kernels(flat, None)[0]:
            return lean.gate_backward(dy, x, factor, layout, prefix)
        triton = import_module(".triton_gate", __package__)
        dx, dfactor = triton.gate_backward(positions(dy, layout), flat, factor, prefix)
        return unflatten(dx, x, layout), dfactor


def unflatten(y: Tensor, x: Tensor, layout: Layout) -> Tensor:
    """`b c n` back in the shape of x."""
    return (y if layout == "b c ..." else rearrange(y, "b c n -> b n c")).view(x.shape)


@gate.register_fake
def _(x: Tensor, factor: Tensor, layout: Layout, prefix: int) -> Tensor:
    return torch.empty_like(x)


@gate_backward.register_fake
def _(dy: Tensor, x: Tensor, factor: Tensor, layout: Layout, prefix: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(factor)


def keep_gate(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    """Keep for backward what the gate read."""
    x, factor, *ctx.place = inputs
    ctx.save_for_backward(x, factor)


def gate_gradients(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    """The gradients of the gate's inputs."""
    return *gate_backward(dy, *ctx.saved_tensors, *ctx.place), None, None


gate.register_autograd(gate_gradients, setup_context=keep_gate)
gate_backward.register_autograd(refuse)
mfa_stats.register_autograd(mfa_gradients, setup_context=keep)
mifa_stats.register_autograd(mifa_gradients, setup_context=keep)
mfa_stats_backward.register_autograd(refuse)
mifa_stats_backward.register_autograd(refuse)
flops.register_when_imported()
