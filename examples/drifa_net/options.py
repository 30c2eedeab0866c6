"""The options of a training run: read, checked, and written down."""

import argparse
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator

import drifa_attn
from examples.arguments import Parser, check_files, integer, output, positive
from examples.drifa_net.data import Data
from examples.drifa_net.logs import LOGS, check_logs
from examples.drifa_net.networks import MODELS
from examples.drifa_net.reading import add_options
from examples.drifa_net.records import FILES, run_folder

BALANCES = ("none", "weights", "sampling")


def parser(description: str) -> Parser:
    """The command's options."""
    whole = Parser("python -m examples.drifa_net.train", description)
    add = whole.add_argument
    add("--model", choices=MODELS, default="drifa_net", help="concat is fuse without attention (default: %(default)s)")
    add("--fusion", choices=drifa_attn.fusion.FUSIONS, default="mifa", help="of the model fuse (default: %(default)s)")
    add("--backbones", nargs="+", default=["resnet10t"], help="timm networks of fuse and concat, one or one a branch")
    add("--pretrained", action="store_true", help="download the backbones' weights")
    add("--width", type=integer(1), default=16, help="channels of DRIFA-Net's first stage; paper: 64 (default: %(default)s)")
    add("--reduction", type=integer(1), help="of DRIFA-Net's attention (default: none, the paper's dense form)")
    add("--losses", choices=("fixed", "uncertainty"), default="fixed", help="task weights: equal, or learned")
    add("--balance", choices=BALANCES, default="none", help="of rare classes: in the loss, or drawn as often (default: none)")
    add("--epochs", type=integer(1), default=20, help="(default: %(default)s)")
    add("--batch-size", type=integer(1), default=64, help="pairs a step, over all processes (default: %(default)s)")
    add("--lr", type=positive, default=2e-3, help="AdamW's highest learning rate (default: %(default)s)")
    add("--patience", type=integer(1), help="stop after so many epochs without a lower validation loss (default: never)")
    add("--seeds", nargs="+", type=integer(0), default=[0], help="one run each (default: 0)")
    add("--output", type=output, default="outputs/drifa_net", help="(default: %(default)s)")
    add("--save-every", type=integer(1), default=100, help="steps between checkpoints within an epoch (default: %(default)s)")
    add("--mixed-precision", choices=("no", "fp16", "bf16"), help="(default: accelerate's own setting)")
    add("--log", nargs="+", choices=LOGS, default=[], help="what follows the run, in its folder (default: nothing)")
    add("--workers", type=integer(0), default=0, help="processes that load images (default: %(default)s)")
    add_options(whole)
    return whole


def parsed(whole: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, each checked by itself, with the others, and with the files that a run will write."""
    options = whole.parse_args(argv)
    if len(set(options.seeds)) < len(options.seeds):
        whole.error(f"--seeds expected different integers >= 0, got {options.seeds}.")
    is_paper = options.model == "drifa_net"
    idle = ("backbones", "pretrained") if is_paper else ("width", "reduction")
    idle = idle if options.model == "fuse" else ("fusion", *idle)
    whole.refuse(options, idle, f"does nothing to --model {options.model}: leave it out, or name another --model.")
    with whole.explained():
        check_logs(options.log)
        for seed in options.seeds:
            check_files(run_folder(options.output, options.model, seed), FILES)
    return options


def intended(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """What the options say of a run's result, as plain values; of paths only the names."""
    left_out = ("data", "cache", "seeds", "output", "mixed_precision")
    kept = {name: value for name, value in vars(options).items() if name not in left_out}
    return {"data": [path.name for path in options.data] or ["digits"], **kept, "seed": seed}


def configured(options: argparse.Namespace, seed: int, data: Data, accelerator: Accelerator) -> dict[str, Any]:
    """All that decides a run's result."""
    kind = {"precision": accelerator.mixed_precision, "processes": accelerator.num_processes}
    return {**intended(options, seed), "branches": list(data.branches), **kind}


def check(options: argparse.Namespace, data: Data, accelerator: Accelerator) -> None:
    """Raise a `ValueError` unless the options go with the data and the processes."""
    if options.batch_size % accelerator.num_processes:
        raise ValueError(f"--batch-size {options.batch_size} cannot be shared by {accelerator.num_processes} processes.")
    if options.batch_size > len(data.train):
        raise ValueError(f"--batch-size {options.batch_size} is more than the {len(data.train)} training pairs.")
    if options.batch_size // accelerator.num_processes < 2:
        raise ValueError("--batch-size must give each process at least 2 pairs: batch norm needs them.")
