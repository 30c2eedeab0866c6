"""Attention into one network, and the verbs for what a network holds."""

from .active import attention_parameters, disabled, gains, gates
from .calibrate import calibrate
from .plan import Plan, plan
from .summary import Summary, summary
from .training import freeze_backbone, parameter_groups
from .wrap import unwrap, wrap

__all__ = [
    "Plan",
    "Summary",
    "attention_parameters",
    "calibrate",
    "disabled",
    "freeze_backbone",
    "gains",
    "gates",
    "parameter_groups",
    "plan",
    "summary",
    "unwrap",
    "wrap",
]
