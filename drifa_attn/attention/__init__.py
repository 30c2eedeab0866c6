"""The layers of the paper, one file per figure. This room knows tensors; it knows no network, no wrapping and no file."""

from drifa_attn.checks import Init

from .build import ATTENTIONS, build, cost
from .foreign import Foreign
from .mfa import CLIA, HIFA, MFA
from .mifa import MGIFA, MIFA, MLIFA
from .refines import Refines, Spec
from .rra import RRA

__all__ = [
    "ATTENTIONS",
    "CLIA",
    "HIFA",
    "MFA",
    "MGIFA",
    "MIFA",
    "MLIFA",
    "RRA",
    "Foreign",
    "Init",
    "Refines",
    "Spec",
    "build",
    "cost",
]
