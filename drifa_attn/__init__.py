"""DRIFA's dual attention (WACV 2025, arXiv:2412.01248) for any network."""

from . import functional
from .attention.mfa import CLIA, HIFA, MFA
from .attention.mifa import MGIFA, MIFA, MLIFA
from .attention.rra import RRA
from .files.checkpoint import load_attention, save_attention
from .fusion.fuse import Fused, fuse
from .fusion.losses import TaskLoss
from .uncertainty.dropout import add_dropout, remove_dropout
from .uncertainty.estimate import Uncertainty, ensemble, mc_dropout
from .wrapping.plan import Plan, plan
from .wrapping.wrap import attention_maps, attention_parameters, disabled, freeze_backbone, unwrap, wrap

__version__ = "0.1.0"

__all__ = [
    "CLIA",
    "HIFA",
    "MFA",
    "MGIFA",
    "MIFA",
    "MLIFA",
    "RRA",
    "Fused",
    "Plan",
    "TaskLoss",
    "Uncertainty",
    "add_dropout",
    "attention_maps",
    "attention_parameters",
    "disabled",
    "ensemble",
    "freeze_backbone",
    "functional",
    "fuse",
    "load_attention",
    "mc_dropout",
    "plan",
    "remove_dropout",
    "save_attention",
    "unwrap",
    "wrap",
]
