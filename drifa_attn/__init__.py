"""DRIFA's dual attention (WACV 2025, arXiv:2412.01248) for any network."""

from typing import TYPE_CHECKING

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
    "plot",
    "push_to_hub",
    "remove_dropout",
    "save_attention",
    "save_pretrained",
    "summary",
    "unwrap",
    "wrap",
]

if TYPE_CHECKING:
    from . import plot
else:

    def __getattr__(name):  # noqa: ANN001, ANN202 - checkers read the import above
        """`drifa_attn.plot`, which is loaded when it is first asked for."""
        if name != "plot":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return import_module(f"{__name__}.plot")
