"""The layers of the paper, one file per figure. This room knows tensors; it knows no network, no wrapping and no file."""

from drifa_attn.checks import Init

from .mfa import CLIA, HIFA, MFA
from .mifa import MGIFA, MIFA, MLIFA
from .refines import ATTENTIONS, Refines, Spec, build, cost
from .rra import RRA

__all__ = ["ATTENTIONS", "CLIA", "HIFA", "MFA", "MGIFA", "MIFA", "MLIFA", "RRA", "Init", "Refines", "Spec", "build", "cost"]
