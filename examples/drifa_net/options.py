"""The options of a training run: read, checked, and written down."""

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

import drifa_attn
from examples.drifa_net.data import Data
from examples.drifa_net.networks import MODELS


def parser(description: str) -> argparse.ArgumentParser:
    """The command's options."""
    whole = argparse.ArgumentParser(
        prog="python -m examples.drifa_net.train", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = whole.add_argument
    add("--data", nargs="*", type=Path, default=[], help="a folder or .npz for each branch; none: scikit-learn's digits")
    add("--model", choices=MODELS, default="drifa_net", help="concat is fuse without attention (default: %(default)s)")
    add("--fusion", choices=drifa_attn.fusion.FUSIONS, default="mifa", help="of the model fuse (default: %(default)s)")
    add("--backbones", nargs="+", default=["resnet10t"], help="timm networks of fuse and concat, one or one a branch")
    add("--pretrained", action="store_true", help="download the backbones' weights")
    add("--width", type=positive, default=16, help="channels of DRIFA-Net's first stage; the paper: 64 (default: %(default)s)")
    add("--reduction", type=positive, help="of DRIFA-Net's attention (default: none, the paper's dense form)")
    add("--losses", choices=("fixed", "uncertainty"), default="fixed", help="task weights: equal, or learned")
    add("--epochs", type=positive, default=20, help="(default: %(default)s)")
    add("--batch-size", type=positive, default=64, help="pairs a step, over all processes (default: %(default)s)")
    add("--lr", type=rate, default=2e-3, help="AdamW's highest learning rate (default: %(default)s)")
    add("--patience", type=positive, help="stop after so many epochs without a lower validation loss (default: never)")
    add("--size", type=positive, help="height and width of the images (default: the data's own)")
    add("--seeds", nargs="+", type=int, default=[0], help="one run each (default: 0)")
    add("--output", type=Path, default=Path("outputs/drifa_net"), help="(default: %(default)s)")
    add("--save-every", type=positive, default=100, help="steps between checkpoints within an epoch (default: %(default)s)")
    add("--mixed-precision", choices=("no", "fp16", "bf16"), help="(default: accelerate's own setting)")
    add("--workers", type=int, default=0, help="processes that load images (default: %(default)s)")
    return whole


def positive(text: str) -> int:
    """An integer >= 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text}")
    return int(text)


def rate(text: str) -> float:
    """A finite number > 0."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number > 0, got {text}")
    return float(text)


def configured(options: argparse.Namespace, seed: int, data: Data, accelerator: Accelerator) -> dict[str, Any]:
    """What decides a run's result, as plain values; of paths only the names."""
    kept = {name: value for name, value in vars(options).items() if name not in ("data", "seeds", "output", "mixed_precision")}
    names = [path.name for path in options.data]
    kind = {"precision": accelerator.mixed_precision, "processes": accelerator.num_processes}
    return {"data": names or ["digits"], "branches": list(data.branches), **kept, "seed": seed, **kind}


def check(options: argparse.Namespace, data: Data, accelerator: Accelerator) -> None:
    """Raise a `ValueError` unless the options go with the data and the processes."""
    if options.batch_size % accelerator.num_processes:
        raise ValueError(f"--batch-size {options.batch_size} cannot be shared by {accelerator.num_processes} processes.")
    if options.batch_size > len(data.train):
        raise ValueError(f"--batch-size {options.batch_size} is more than the {len(data.train)} training pairs.")
    if options.batch_size // accelerator.num_processes < 2:
        raise ValueError("--batch-size must give each process at least 2 pairs: batch norm needs them.")
    if options.output.exists() and not options.output.is_dir():
        raise ValueError(f"--output {options.output} is a file: name a folder.")
    if len(set(options.seeds)) < len(options.seeds) or min(options.seeds) < 0:
        raise ValueError(f"--seeds expected different integers >= 0, got {options.seeds}.")


@contextmanager
def explained(whole: argparse.ArgumentParser) -> Iterator[None]:
    """Within this context a mistake in options or data ends the command with its message alone."""
    try:
        yield
    except (ValueError, OSError) as error:
        whole.exit(2, f"{whole.prog}: error: {error}\n")
