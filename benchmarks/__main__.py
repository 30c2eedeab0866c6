"""`python -m benchmarks`: list the suites, run one, run the selection of `make bench`, or redraw plots and tables."""

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own notes, read when torch is loaded

import torch

from . import layers, net, ops, scaling, wrap
from .cases import DTYPES, LAYOUTS, MODES, PROVIDERS, Options, shape
from .run import run

SUITES = {"ops": ops, "layers": layers, "wrap": wrap, "net": net, "scaling": scaling}


def chosen(name: str) -> torch.device:
    """The device a flag names; "auto" is a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(f"--device {name}: torch.cuda.is_available() is False on this machine.")
    return torch.device(name)


def flags() -> argparse.ArgumentParser:
    """The command line, the same for every suite."""
    parser = argparse.ArgumentParser("python -m benchmarks", description="What drifa_attn costs. Without a suite: list them.")
    commands = parser.add_subparsers(dest="suite", metavar="suite")
    for name, module in SUITES.items():
        suite = commands.add_parser(name, help=module.__doc__.splitlines()[0], description=module.__doc__)
        suite.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
        suite.add_argument("--dtype", choices=DTYPES, help="fp32 on a CPU, bf16 on a GPU unless given")
        suite.add_argument("--layout", choices=LAYOUTS, default="contiguous", help="memory format of maps")
        suite.add_argument("--provider", nargs="+", choices=PROVIDERS, default=["eager", "compile", "fused", "peers"])
        suite.add_argument("--op", nargs="+", default=[], help='names as in the rows, or patterns, as "resnet50 *"')
        suite.add_argument("--shape", nargs="+", type=shape, default=[], help="of one input, as 8x64x56x56")
        suite.add_argument("--mode", nargs="+", choices=MODES, default=["forward", "full"])
        suite.add_argument("--seconds", type=float, default=1.0, help="spent on timing one row (default 1)")
        suite.add_argument("--csv", type=Path, help="append the rows to this file")
    bench = commands.add_parser("bench", help="The selection behind README.md: CSVs, plots and tables, in ten minutes.")
    bench.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    bench.add_argument("--limit", type=float, default=540, help="seconds after which no further row is begun (default 540)")
    commands.add_parser("report", help="Draws plots and writes tables from the CSVs again; measures nothing.")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = flags()
    given = parser.parse_args(arguments)
    if given.suite is None:
        parser.print_help()
    elif given.suite == "report":
        from .report import report

        report()
    elif given.suite == "bench":
        from .report import report
        from .selection import bench

        bench(chosen(given.device), SUITES, time.monotonic() + given.limit)
        report()
    else:
        device = chosen(given.device)
        options = Options(
            device=device,
            dtype=given.dtype or ("bf16" if device.type == "cuda" else "fp32"),
            layout=given.layout,
            providers=tuple(given.provider),
            ops=tuple(given.op),
            shapes=tuple(given.shape),
            modes=tuple(given.mode),
            seconds=given.seconds,
            csv=given.csv,
        )
        run(given.suite, SUITES[given.suite].cases(options), options)


if __name__ == "__main__":
    main()
