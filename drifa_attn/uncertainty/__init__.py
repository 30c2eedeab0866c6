"""Several passes of a network, and what they tell about its predictions."""

from .dropout import add_dropout, remove_dropout
from .estimate import Uncertainty, ensemble, mc_dropout

__all__ = ["Uncertainty", "add_dropout", "ensemble", "mc_dropout", "remove_dropout"]
