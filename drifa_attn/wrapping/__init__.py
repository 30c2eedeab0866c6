"""Attention into one network, and the verbs for what a network holds."""

from .active import attention_parameters, disabled, freeze_backbone, gates
from .plan import Plan, plan
from .wrap import unwrap, wrap

__all__ = ["Plan", "attention_parameters", "disabled", "freeze_backbone", "gates", "plan", "unwrap", "wrap"]
