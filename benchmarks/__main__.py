"""`python -m benchmarks`: list the suites, run one, run the selection of `make bench`, or redraw plots and tables."""

import os
import time
from fnmatch import fnmatch

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own notes, read when torch is loaded

from . import growth, layers, net, ops, scaling, sites, wrap
from .arguments import Parser, count, device, output, seconds, shape
from .cases import DTYPES, LAYOUTS, MODES, PROVIDERS, Case, Options
from .rows import RESULTS, check_appendable
from .run import run

SUITES = {"ops": ops, "layers": layers, "sites": sites, "wrap": wrap, "net": net, "scaling": scaling, "growth": growth}


def flags() -> Parser:
    """The command line, the same for every suite."""
    parser = Parser("python -m benchmarks", description="What drifa_attn costs. Without a suite: list them.")
    commands = parser.add_subparsers(dest="suite", metavar="suite")
    for name, module in SUITES.items():
        suite = commands.add_parser(name, help=module.__doc__.splitlines()[0], description=module.__doc__)
        suite.add_argument("--device", type=device, default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
        suite.add_argument("--dtype", choices=DTYPES, help="fp32 on a CPU, bf16 on a GPU unless given")
        suite.add_argument("--layout", choices=LAYOUTS, default="contiguous", help="memory format of maps")
        suite.add_argument("--provider", nargs="+", choices=PROVIDERS, help=f"default: {' '.join(Options.providers)}")
        suite.add_argument("--op", nargs="+", default=[], help='names as in the rows, or patterns, as "resnet50 *"')
        suite.add_argument("--shape", nargs="+", type=shape, default=[], help="of one input, as 8x64x56x56")
        suite.add_argument("--mode", nargs="+", choices=MODES, default=["forward", "full"])
        suite.add_argument("--seconds", type=seconds, default=1.0, help="spent on timing one row (default 1)")
        suite.add_argument("--threads", type=count, help="of PyTorch on a CPU (default: as many as it takes)")
        suite.add_argument("--csv", type=output, help="append the rows to this file; it is new, or holds such rows")
    bench = commands.add_parser("bench", help="The selection behind README.md: CSVs, plots and tables, in ten minutes.")
    bench.add_argument("--device", type=device, default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    bench.add_argument("--limit", type=seconds, default=540, help="seconds after which no further row is begun (default 540)")
    commands.add_parser("report", help="Draws plots and writes tables from the CSVs again; measures nothing.")
    return parser


def selected(suite: str, options: Options, *, providers: list[str]) -> list[list[Case]]:
    """The cases of a suite; a `ValueError` if a pattern of `--op`, or one of the providers that were named, meets none."""
    groups = list(SUITES[suite].cases(options))
    wanted = [case for group in groups for case in group if case.provider in options.providers]
    for pattern in options.ops:
        if not any(fnmatch(case.op, pattern) for case in wanted):
            known = dict.fromkeys(f"{case.op} by {case.provider}" for group in groups for case in group)
            raise ValueError(f"--op {pattern!r} is nothing that {suite} measures by these providers: it has {', '.join(known)}")
    for provider in providers:
        if not any(case.provider == provider and options.wants(case.op, provider) for case in wanted):
            raise ValueError(f"--provider {provider} computes none of what {suite} is to measure.")
    return groups


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = flags()
    given = parser.parse_args(arguments)
    if given.suite is None:
        parser.print_help()
    elif given.suite == "report":
        from .report import report

        with parser.explained():
            report()
    elif given.suite == "bench":
        from .report import report
        from .selection import bench

        with parser.explained():
            output(str(RESULTS / "rows.csv"))
        bench(given.device, SUITES, time.monotonic() + given.limit)
        report()
    else:
        options = Options(
            device=given.device,
            dtype=given.dtype or ("bf16" if given.device.type == "cuda" else "fp32"),
            layout=given.layout,
            providers=tuple(given.provider or Options.providers),
            ops=tuple(given.op),
            shapes=tuple(given.shape),
            modes=tuple(given.mode),
            seconds=given.seconds,
            threads=given.threads,
            csv=given.csv,
        )
        with parser.explained():
            groups = selected(given.suite, options, providers=given.provider or [])
            if given.csv:
                check_appendable(given.csv)
        rows = run(given.suite, groups, options)
        if all(row.error for row in rows if not row.op.startswith("roofline")):
            parser.exit(1, f"{parser.prog}: no row could be measured; the lines above say why.\n")


if __name__ == "__main__":
    main()
