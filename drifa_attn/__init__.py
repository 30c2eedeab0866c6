"""DRIFA's dual attention (WACV 2025, arXiv:2412.01248) for any network."""

from . import functional as functional
from .mfa import CLIA as CLIA
from .mfa import HIFA as HIFA
from .mfa import MFA as MFA
from .mifa import MGIFA as MGIFA
from .mifa import MIFA as MIFA
from .mifa import MLIFA as MLIFA
from .rra import RRA as RRA

__version__ = "0.1.0"
