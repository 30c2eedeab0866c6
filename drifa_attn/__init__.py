"""DRIFA's dual attention (WACV 2025, arXiv:2412.01248) for any network."""

from . import functional as functional
from .checkpoint import load_attention as load_attention
from .checkpoint import save_attention as save_attention
from .mfa import CLIA as CLIA
from .mfa import HIFA as HIFA
from .mfa import MFA as MFA
from .mifa import MGIFA as MGIFA
from .mifa import MIFA as MIFA
from .mifa import MLIFA as MLIFA
from .plan import Plan as Plan
from .plan import plan as plan
from .rra import RRA as RRA
from .wrap import attention_maps as attention_maps
from .wrap import attention_parameters as attention_parameters
from .wrap import disabled as disabled
from .wrap import freeze_backbone as freeze_backbone
from .wrap import unwrap as unwrap
from .wrap import wrap as wrap

__version__ = "0.1.0"
