"""Pictures of what the library returns. Each function gives a matplotlib `Figure`, and shows and saves nothing itself.

    figure = drifa_attn.plot.spread(drifa_attn.gates(model, images))
    figure.savefig("spread.png")

A cell of a notebook that ends in a figure shows it. No global state of pyplot is used or changed. `import drifa_attn` does not
load this room, and matplotlib is loaded by the first picture: pip install "drifa-attn[plots]".
"""

from .cam import cam
from .coverage import risk_coverage
from .gates import gates
from .modalities import modalities
from .plan import plan
from .reliability import reliability
from .spread import spread

__all__ = ["cam", "gates", "modalities", "plan", "reliability", "risk_coverage", "spread"]
