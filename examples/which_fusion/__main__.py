"""Which fusion? Every one of drifa_attn, on modalities of the same samples, by one protocol with paired seeds.

From the repository's root:

    python -m examples.which_fusion --quick                       # halves of scanned digits, under a minute, no result
    python -m examples.which_fusion                               # the same digits, measured
    python -m examples.which_fusion --data views.npz --views a b  # an archive: labels, and a view `n features` a name
    python -m examples.which_fusion --data skin.npz               # images, labels, classes, split, age, sex, localization
    python -m examples.which_fusion --data skin.npz cells.npz     # images of different patients, paired by chance, two tasks
    python -m examples.which_fusion --report                      # the tables and pictures from the rows in results/

Each run is a row that is written when it is finished. A stopped comparison goes on where it stopped.
"""

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console

import drifa_attn
from examples.arguments import Parser, check_files, integer, output, positive, probability, source
from examples.rows import Rows
from examples.steps import followed

from .arms import CALIBRATED, VARIANTS, arms
from .data import Collection, check, read
from .protocol import ROW, Protocol, runs, steps, total
from .report import files, report, stored

RESULTS = Path(__file__).parent / "results"
RUN_ONLY = ("data", "views", "arms", "variants", "seeds", "choosing", "samples", "steps", "batch", "rates", "modality_dropout")
USUAL = {"seeds": 5, "choosing": 1, "samples": 10_000, "steps": 100, "batch": 32, "rates": (3e-3, 1e-2, 3e-2)}
PRETRAINED = USUAL | {"samples": 1000, "steps": 150, "rates": (1e-3, 3e-3, 1e-2)}
QUICK = {"seeds": 2, "choosing": 1, "samples": 200, "steps": 10, "batch": 32, "rates": (1e-2,)}


def flags() -> Parser:
    """The options."""
    parser = Parser("python -m examples.which_fusion", __doc__)
    parser.add_argument("--data", nargs="+", type=source, default=[], help="npz archives; without them scikit-learn's digits")
    parser.add_argument("--views", nargs="+", metavar="NAME", help="views to use of an archive of views; all by default")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="a selection; by default all but the variants")
    parser.add_argument("--variants", action="store_true", help=f"these arms too: {', '.join(VARIANTS)}")
    parser.add_argument("--seeds", type=integer(1), help="of the test (default: 5)")
    parser.add_argument("--choosing", type=integer(1), help="seeds that rates are chosen with (default: 1)")
    parser.add_argument("--samples", type=integer(1), help="to train on, at most (default: all; of images 1000)")
    parser.add_argument("--steps", type=integer(2), help="of training (default: 100; of images 150)")
    parser.add_argument("--batch", type=integer(2), help="samples of a step (default: 32)")
    parser.add_argument(
        "--rates", nargs="+", type=positive, help="to choose from (default: 0.003 0.01 0.03; of images 0.001 0.003 0.01)"
    )
    parser.add_argument(
        "--modality-dropout", type=probability, default=0.3, help="how often a modality is dropped in training (default: 0.3)"
    )
    parser.add_argument("--output", type=output, help="folder of the rows, the tables and the pictures")
    parser.add_argument("--quick", action="store_true", help="unless given, 1 rate, 2 seeds, 10 steps: no result")
    parser.add_argument("--report", action="store_true", help="only write tables and pictures from the rows that are there")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then report."""
    parser = flags()
    options = parser.parse_args(argv)
    folder = options.output or (Path("outputs/which_fusion") if options.quick else RESULTS)
    console = Console(highlight=False, soft_wrap=True)
    if options.report:
        parser.refuse(options, RUN_ONLY, "is not for --report.")
        with parser.explained():
            if not stored(folder):
                raise ValueError(f"{folder} holds no rows of a test to report: run a comparison first, or name its --output.")
    else:
        with parser.explained():
            prepared = prepare(options, folder)
        run(*prepared, console)
    report(folder, console)


def prepare(options: argparse.Namespace, folder: Path) -> tuple[Collection, Protocol, Rows, list[str]]:
    """The samples, what all arms have in common, the rows so far and the arms; a `ValueError` unless every arm can run."""
    stored(folder)  # the report will read all of it
    collection = read(options.data, options.views)
    pretrained = any(view.branch.kind == "frozen" for view in collection.views.values())
    usual = QUICK if options.quick else PRETRAINED if pretrained else USUAL
    settings = {name: getattr(options, name) or value for name, value in usual.items()}
    settings["rates"] = tuple(dict.fromkeys(settings["rates"]))
    protocol = Protocol(**settings, modality_dropout=options.modality_dropout)
    check(collection, protocol.batch)
    known = arms(collection)
    names = list(dict.fromkeys(options.arms or ())) or [name for name in known if options.variants or name not in VARIANTS]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--arms: {collection.name} has no arm {unknown[0]!r}, only {', '.join(known)}.")
    if CALIBRATED in names and min(len(collection.divide(0)["train"]), protocol.samples) < 16:
        raise ValueError(f"the arm {CALIBRATED!r} needs 16 --samples: give more, or name the other --arms.")
    if min(len(collection.divide(0)["train"]), protocol.samples) < protocol.batch:
        raise ValueError(f"--samples {protocol.samples} are fewer than the {protocol.batch} of a --batch.")
    check_files(folder, files(collection.name))
    return collection, protocol, Rows(folder / f"{collection.name}.jsonl", protocol, ROW), names


def run(collection: Collection, protocol: Protocol, rows: Rows, names: list[str], console: Console) -> None:
    """Every run that has no row yet, and what a step costs."""
    rows.path.parent.mkdir(parents=True, exist_ok=True)
    followed(collection.name, runs(collection, protocol, names, rows), total(protocol, names), console)
    path = rows.path.with_name(f"{collection.name}-steps.json")
    found = json.loads(path.read_text()) if path.exists() else {"arms": {}}
    if missing := [name for name in names if name not in found["arms"]]:
        console.print("Measuring the time of a step, all arms side by side.")
        found = {
            "what": collection.what,
            "tasks": collection.tasks,
            "parts": {part: len(samples) for part, samples in collection.divide(0).items()},
            "threads": torch.get_num_threads(),
            "drifa_attn": drifa_attn.__version__,
            "arms": steps(collection, protocol, list(dict.fromkeys([*found["arms"], *missing]))),
        }
        path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
