"""The fused operators as Triton kernels, with the same functions as `ops.chunked`. Importing this imports triton."""

from .gate import gate_backward, gate_forward
from .mfa import mfa_backward, mfa_forward, mfa_gain_backward, mfa_gain_forward
from .mifa import mifa_backward, mifa_forward

__all__ = [
    "gate_backward",
    "gate_forward",
    "mfa_backward",
    "mfa_forward",
    "mfa_gain_backward",
    "mfa_gain_forward",
    "mifa_backward",
    "mifa_forward",
]
