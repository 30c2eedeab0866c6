"""Does attention help a pretrained network? Every arm, the same protocol, paired seeds.

From the repository's root:

    python -m examples.does_it_help --quick                  # scanned digits, two minutes, no result
    python -m examples.does_it_help --data cells.npz         # an archive: images, labels, classes, split
    python -m examples.does_it_help --data folder            # train/, validation/, test/ with a folder per class
    python -m examples.does_it_help --report                 # the tables and pictures from the rows in results/

Each run is a row that is written when it is finished. A stopped comparison goes on where it stopped.
"""

import argparse
import importlib.util
import json
from pathlib import Path

import timm
import torch
from rich.console import Console

import drifa_attn
from examples.arguments import Parser, check_files, integer, output, source
from examples.rows import Rows
from examples.steps import followed

from .arms import ARMS
from .data import Collection, check, read
from .networks import LITE0, SITES, lite0
from .protocol import ROW, Protocol, runs, steps
from .report import files, report, stored

RESULTS = Path(__file__).parent / "results"


RUN_ONLY = ("data", "size", "network", "sites", "arms", "seeds", "images", "epochs")
QUICK = {"seeds": 2, "images": 200, "epochs": 2, "rates": (1e-2,)}
USUAL = {"seeds": 5, "images": 1000, "epochs": 8, "rates": Protocol.rates}


def flags() -> Parser:
    """The options."""
    parser = Parser("python -m examples.does_it_help", __doc__)
    parser.add_argument("--data", type=source, help="a .npz archive, or a folder with train/, validation/ and test/")
    parser.add_argument("--size", type=integer(1), default=64, help="to which images of a folder are resized")
    parser.add_argument("--network", default=LITE0, help=f"a timm name; all but {LITE0} need a network connection")
    parser.add_argument("--sites", nargs="+", default=list(SITES), help="where attention goes")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--seeds", type=integer(1), help="of the test (default: 5)")
    parser.add_argument("--images", type=integer(1), help="how many training images, drawn anew by each seed (default: 1000)")
    parser.add_argument("--epochs", type=integer(1), help="of every run (default: 8)")
    parser.add_argument("--output", type=output, help="folder of the rows, the tables and the pictures")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one rate and, unless given, 2 seeds, 200 images, 2 epochs: about two minutes, and no result",
    )
    parser.add_argument("--report", action="store_true", help="only write tables and pictures from the rows that are there")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then report."""
    parser = flags()
    options = parser.parse_args(argv)
    output = options.output or (Path("outputs/does_it_help") if options.quick else RESULTS)
    console = Console(highlight=False, soft_wrap=True)
    if options.report:
        parser.refuse(options, RUN_ONLY, "is not for --report.")
        with parser.explained():
            if not stored(output):
                raise ValueError(f"{output} holds no rows of a test to report: run a comparison first, or name its --output.")
    else:
        if options.data is None or options.data.is_file():
            parser.refuse(options, ("size",), "is for folders of images.")
        with parser.explained():
            prepared = prepare(options, output)
        run(*prepared, options.arms, console)
    report(output, console)


def prepare(options: argparse.Namespace, output: Path) -> tuple[Collection, Protocol, Rows]:
    """The images, what all arms have in common, and the rows so far; a `ValueError` unless every arm can run."""
    settings = {name: getattr(options, name, None) or usual for name, usual in (QUICK if options.quick else USUAL).items()}
    protocol = Protocol(network=options.network, sites=tuple(options.sites), **settings)
    if "LoRA" in options.arms and importlib.util.find_spec("peft") is None:
        raise ValueError("the arm LoRA needs peft: pip install peft, or name the other --arms.")
    collection = read(options.data, options.size)
    check(collection, protocol.images, protocol.batch)
    check_files(output, files(collection.name))
    stored(output)  # the report will read all of it
    rows = Rows(output / f"{collection.name}.jsonl", protocol, ROW)
    if protocol.network == LITE0:
        lite0()  # whose weights come in a package
    if not timm.is_model(protocol.network):
        raise ValueError(f"--network: timm has no network {protocol.network!r}.")
    with torch.device("meta"):
        drifa_attn.plan(timm.create_model(protocol.network), options.sites, example_input=collection.parts["train"].images[:1])
    return collection, protocol, rows


def run(collection: Collection, protocol: Protocol, rows: Rows, arms: list[str], console: Console) -> None:
    """Every run that has no row yet."""
    rows.path.parent.mkdir(parents=True, exist_ok=True)
    total = len(arms) * (protocol.seeds + len(protocol.rates))
    followed(collection.name, runs(collection, protocol, arms, rows), total, console)
    timed = rows.path.with_name(f"{collection.name}-steps.json")
    if not timed.exists():
        console.print("Measuring the time of a step, all arms side by side.")
        timed.write_text(json.dumps(steps(collection, protocol, arms), indent=1) + "\n")


if __name__ == "__main__":
    main()
