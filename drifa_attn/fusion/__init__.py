"""Several networks in lockstep, and what happens between and behind them."""

from .collate import collate
from .fuse import fuse
from .fused import Fused
from .losses import TaskLoss
from .protocol import Readout, Refiner
from .systems import FUSIONS

__all__ = ["FUSIONS", "Fused", "Readout", "Refiner", "TaskLoss", "collate", "fuse"]
