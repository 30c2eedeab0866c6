"""Computes MFA and MIFA with little memory: the fused operators and the choice between them and the reference equations.

Of the many maps that MFA and MIFA compute, only a few pooled vectors are needed. The fused operators compute these. For
backward they keep the vectors and x alone, and compute the maps a second time, a chunk that fits the cache at a time. There
are four implementations:

- reference: the equations of `functional`, which the others are tested against;
- grouped: MFA's equations without gradients on a CPU, for groups of samples whose maps fit the cache;
- chunked: the same in chunks, in plain PyTorch, on any device;
- triton: kernels that read x once, on a GPU.

`DRIFA_BACKEND` (auto, reference or fused) in the environment, or `use(mode)`, chooses; `explain(layer, x)` says which runs
and why. `torch.utils.flop_counter` counts the fused operators too: a counter that is running learns their formulas when one
is called.

MFA's operator runs up to the gain of each channel: the pooling, and what follows it, `tail`. On a GPU that is two launches.

To add an operator: its equation in `functional`; equal functions in the two backends, `chunked` and `triton`; a `define` in
`operators` and the function that the layers call; FLOPs in `flops`, if it has products.

Differs: the gradient of a maximum or minimum goes to the first of tied positions, where ties are those before σ. The reference
equations share it among them.
"""

from .choose import Choice, explain, is_fused, use, way
from .operators import gate, mfa, mfa_stats, mifa, mifa_stats

__all__ = ["Choice", "explain", "gate", "is_fused", "mfa", "mfa_stats", "mifa", "mifa_stats", "use", "way"]
