"""Several passes of a network, and what they tell about its predictions."""

from .dropout import add_dropout, remove_dropout
from .estimate import ensemble, mc_dropout
from .result import RegressionUncertainty, Uncertainty

__all__ = ["RegressionUncertainty", "Uncertainty", "add_dropout", "ensemble", "mc_dropout", "remove_dropout"]
