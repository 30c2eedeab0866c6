"""Figures 4 and 5, drawn from finished runs.

From the repository's root, of one run, or of several methods on the same images:

    python -m examples.drifa_net.figures outputs/drifa_net/fuse-seed0
    python -m examples.drifa_net.figures outputs/{mifa,gloria,mutual_attention,caf,mttu}/fuse-seed0

`gradcam.png`, Figure 4: of each class a test image, and over it where each method's evidence for that class is. The image is
one that most methods tell right; one that tells it wrong has a red frame with the class that it told. How far the maps of
methods are alike, and those of different images, is printed. `features.png`, Figure 5: t-SNE of what the heads read, of the
first methods.

Of one run with gates the columns are the network with all gates off (unfused) and on (fused), and `gates.png` shows how open
every gate is. Gates off means the same trained weights without the attention, which were trained with it: it shows what the
attention does in this network, not what a network trained without would do. That is `--model concat`, which has no gates.
Several runs have the same data, split, seed and size; size and data are theirs and need not be given.
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from examples.arguments import Parser, check_files, integer, output, source
from examples.drifa_net.embedding import check_neighbours, draw_features
from examples.drifa_net.evidence import described, evidence, pictured
from examples.drifa_net.methods import methods_of
from examples.drifa_net.networks import attentions
from examples.drifa_net.panels import draw_gradcam
from examples.drifa_net.strips import draw_gates

PICTURES = ("gradcam.png", "features.png", "gates.png")


def parser() -> Parser:
    """The command's options."""
    whole = Parser("python -m examples.drifa_net.figures", __doc__)
    add = whole.add_argument
    add("runs", nargs="+", type=source, help="the folder of a finished run, or of one run a method")
    add("--data", nargs="+", type=source, default=[], help="where their data is, if it has moved")
    add("--cache", type=output, default="outputs/cache", help="folder of decoded images (default: %(default)s)")
    add("--output", type=output, help="folder of the pictures (default: the run's; of several, the one that the first lies in)")
    add("--embedded", type=integer(1), default=3, help="t-SNE of so many methods, the first ones (default: %(default)s)")
    return whole


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Draw all that there is to draw; returns the paths."""
    whole = parser()
    options = whole.parse_args(argv)
    alone = len(options.runs) == 1
    folder = options.output or (options.runs[0] if alone else options.runs[0].resolve().parent)
    names = PICTURES if alone else PICTURES[:2]
    with whole.explained():
        check_files(folder, names)
        methods = methods_of(options.runs, options.data, options.cache)
        check_neighbours(methods[0].data)
        found = evidence(methods) if pictured(methods[0].data) else {}
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, soft_wrap=True)
    for branch, one in found.items():
        console.print(described(branch, one, methods))
    drawing = {"gradcam.png": lambda path: draw_gradcam(methods, found, path)} if found else {}
    drawing["features.png"] = lambda path: draw_features(methods[: options.embedded], path)
    if attentions(methods[-1].net) and alone:
        drawing["gates.png"] = lambda path: draw_gates(methods[-1], path)
    for name in (name for name in names if name not in drawing):
        console.print(f"No {name}: {'no branch sees images' if name == 'gradcam.png' else 'this network has none'}.")
    if len(methods) > options.embedded:
        left = ", ".join(method.title for method in methods[options.embedded :])
        console.print(f"features.png is without {left}: give --embedded {len(methods)}.")
    for name, draw in drawing.items():
        with console.status(f"drawing {name}"):
            draw(folder / name)
        console.print(str(folder / name), markup=False)
    return [folder / name for name in drawing]


if __name__ == "__main__":
    main()
