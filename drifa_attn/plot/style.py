"""How all pictures look: sizes, colours that people who are colour-blind can tell apart, and the figure itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .picture import Picture

# Okabe and Ito's colours without yellow, which is too light for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
GREY = "#767676"
# Colour maps that people who are colour-blind can read: of numbers, of evidence over a grey image, and below and above nothing.
AMOUNT, HEAT, DIFFERENCE = "cividis", "plasma", "RdBu_r"
RULES: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.titlesize": 12,
    "figure.dpi": 110,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "image.interpolation": "nearest",
}


def need(owner: str, *modules: str) -> None:
    """Raise an `ImportError` that says what to install, unless these modules of the extra "plots" can be imported."""
    for module in modules or ("matplotlib.figure",):
        try:
            import_module(module)
        except ModuleNotFoundError as error:
            package = {"pytorch_grad_cam": "grad-cam"}.get(module, module.partition(".")[0])
            raise ImportError(f'{owner} needs {package}: pip install "drifa-attn[plots]".') from error


@contextmanager
def sheet(owner: str, width: float, height: float) -> Iterator["Picture"]:
    """An empty figure of this size in inches; what is drawn on it within this context follows the rules above."""
    need(owner)
    import matplotlib

    from .picture import Picture

    with matplotlib.rc_context(RULES):
        yield Picture(figsize=(width, height), layout="constrained")


def bare(axes: Any) -> None:
    """No ticks and no frame, for images."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def on_colour(share: float) -> str:
    """The colour of text on the colour map `AMOUNT` at this share of its range, so that it can be read."""
    return "black" if share > 0.5 else "white"
