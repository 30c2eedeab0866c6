"""DRIFA's dual attention (WACV 2025, arXiv:2412.01248) for any network."""

from . import functional, ops
from .attention import CLIA, HIFA, MFA, MGIFA, MIFA, MLIFA, RRA
from .files import from_pretrained, load_attention, push_to_hub, save_attention, save_pretrained
from .fusion import Fused, TaskLoss, collate, fuse
from .uncertainty import RegressionUncertainty, Uncertainty, add_dropout, ensemble, mc_dropout, remove_dropout
from .wrapping import (
    Plan,
    Summary,
    attention_parameters,
    calibrate,
    disabled,
    freeze_backbone,
    gains,
    gates,
    parameter_groups,
    plan,
    summary,
    unwrap,
    wrap,
)

__version__ = "0.2.0"

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
    "RegressionUncertainty",
    "Summary",
    "TaskLoss",
    "Uncertainty",
    "add_dropout",
    "attention_parameters",
    "calibrate",
    "collate",
    "disabled",
    "ensemble",
    "freeze_backbone",
    "from_pretrained",
    "functional",
    "fuse",
    "gains",
    "gates",
    "load_attention",
    "mc_dropout",
    "ops",
    "parameter_groups",
    "plan",
    "push_to_hub",
    "remove_dropout",
    "save_attention",
    "save_pretrained",
    "summary",
    "unwrap",
    "wrap",
]
