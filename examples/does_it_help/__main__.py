"""Does attention help a pretrained network? Every arm, the same protocol, paired seeds.

From the repository's root:

    python -m examples.does_it_help --quick                  # scanned digits, two minutes, no result
    python -m examples.does_it_help --data cells.npz         # an archive: images, labels, classes, split
    python -m examples.does_it_help --data folder            # train/, validation/, test/ with a folder per class
    python -m examples.does_it_help --report                 # the tables and pictures from the rows in results/

Each run is a row that is written when it is finished. A stopped comparison goes on where it stopped.
"""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .arms import ARMS
from .data import read
from .networks import LITE0, SITES
from .protocol import Protocol, Rows, runs, steps
from .report import report

RESULTS = Path(__file__).parent / "results"


def parsed(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m examples.does_it_help", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="a .npz archive, or a folder with train/, validation/ and test/")
    parser.add_argument("--size", type=int, default=64, help="to which images of a folder are resized")
    parser.add_argument("--network", default=LITE0, help=f"a timm name; all but {LITE0} need a network connection")
    parser.add_argument("--sites", nargs="+", default=list(SITES), help="where attention goes")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--images", type=int, default=1000, help="how many training images, drawn anew by each seed")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--output", type=Path, help="folder of the rows, the tables and the pictures")
    parser.add_argument(
        "--quick", action="store_true", help="two seeds, two epochs, one rate: about two minutes, and no result"
    )
    parser.add_argument("--report", action="store_true", help="only write tables and pictures from the rows that are there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then report."""
    options = parsed(argv)
    output = options.output or (Path("outputs/does_it_help") if options.quick else RESULTS)
    console = Console(highlight=False, soft_wrap=True)
    if not options.report:
        run(options, output, console)
    report(output, console)


def run(options: argparse.Namespace, output: Path, console: Console) -> None:
    """Every run that has no row yet."""
    output.mkdir(parents=True, exist_ok=True)
    collection = read(options.data, options.size)
    settings = {"seeds": 2, "images": 200, "epochs": 2, "rates": (1e-2,)} if options.quick else {}
    protocol = Protocol(
        network=options.network,
        sites=tuple(options.sites),
        **({"seeds": options.seeds, "images": options.images, "epochs": options.epochs} | settings),
    )
    rows = Rows(output / f"{collection.name}.jsonl", protocol)
    columns = (
        TextColumn("{task.description:<40}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(collection.name, total=len(options.arms) * (protocol.seeds + len(protocol.rates)))
        for description, finished in runs(collection, protocol, options.arms, rows):
            progress.update(task, description=description, completed=finished)
    timed = output / f"{collection.name}-steps.json"
    if not timed.exists():
        console.print("Measuring the time of a step, all arms side by side.")
        timed.write_text(json.dumps(steps(collection, protocol, options.arms), indent=1) + "\n")


if __name__ == "__main__":
    main()
