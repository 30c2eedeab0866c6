"""One row of a result, and the CSV files rows live in."""

import csv
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
COMPILED = ("compile", "auto-compile")  # the providers that run what torch.compile made


@dataclass(frozen=True)
class Row:
    """One measurement: what was measured, how it went, where and when. A measurement that failed has `error` and no numbers.

    Attributes:
        suite, op, provider: what was measured; `op` names the layer, op or network, `provider` how it was computed.
        mode: "forward" (without gradients), "backward" (that pass alone), or "full" (both; of a network a training step).
        shape: of one input, as 8x64x56x56; with several modalities as 2*8x64x56x56.
        layout, dtype: of the input.
        p50, p20, p80: milliseconds a call.
        peak, kept: MiB allocated at most above what was live before the call; left behind by forward for backward.
        params, flops, bytes: of the module; of its equations in this mode; what has to move at least.
        error: why there are no numbers.
        process: "own" where the row was measured in a process of its own, as compiled rows are.
        device, torch, triton, timm, threads, commit, utc: where, with what and when.
    """

    suite: str
    op: str
    provider: str
    mode: str
    shape: str
    layout: str
    dtype: str
    p50: float | None = None
    p20: float | None = None
    p80: float | None = None
    peak: float | None = None
    kept: float | None = None
    params: int | None = None
    flops: int | None = None
    bytes: int | None = None
    error: str = ""
    process: str = ""
    device: str = ""
    torch: str = ""
    triton: str = ""
    timm: str = ""
    threads: int = 0
    commit: str = ""
    utc: str = ""

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU gave it."""
        return not self.device.startswith("CPU")

    @property
    def is_void(self) -> bool:
        """Whether the row says nothing: a compiled one that shared its process with other compiled ones."""
        return self.provider in COMPILED and not self.process

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of one input."""
        return tuple(int(size) for size in self.shape.rpartition("*")[2].split("x"))


NAMES = tuple(field.name for field in fields(Row))
BEFORE = tuple(name for name in NAMES if name != "process")  # of the files of 0.1.0
NUMBERS = {"p50": float, "p20": float, "p80": float, "peak": float, "kept": float, "params": int, "flops": int, "bytes": int}


def write(rows: Iterable[Row], path: Path) -> None:
    """Append rows to a CSV file, with its header where it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or not path.stat().st_size
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, NAMES, lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            values = asdict(row)
            writer.writerow({name: f"{v:.5g}" if isinstance(v, float) else v for name, v in values.items()})


def read(path: Path) -> list[Row]:
    """The rows of a CSV file; a `ValueError` if it is none of ours, or damaged."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        try:
            if tuple(reader.fieldnames or ()) not in (NAMES, BEFORE):
                raise ValueError(f"it has the columns {reader.fieldnames}, not {list(NAMES)}")
            return [parsed(line) for line in reader]
        except (ValueError, TypeError, csv.Error) as error:
            raise ValueError(f"{path}, line {reader.line_num}, holds no row of a benchmark: {error}.") from error


def check_appendable(path: Path) -> None:
    """Raise a `ValueError` unless rows can be appended to a file: it is new or empty, or holds whole rows of this form."""
    if not path.exists() or not path.stat().st_size:
        return
    read(path)
    text = path.read_text()
    if not text.endswith("\n") or tuple(text.partition("\n")[0].split(",")) != NAMES:
        raise ValueError(f"{path} ends within a row, or its rows are of 0.1.0: name a new file.")


def parsed(line: dict[str, str]) -> Row:
    """A row from its strings."""
    if None in line or None in line.values():
        raise ValueError("it has more or fewer cells than there are columns")
    values: dict[str, Any] = {**line, "threads": int(line["threads"])}
    for name, number in NUMBERS.items():
        values[name] = number(line[name]) if line[name] else None
    return Row(**values)


@cache
def installed(package: str) -> str:
    """The version of a package, or that it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


@cache
def device_name(device: torch.device) -> str:
    """The name of the device: of a GPU its own, of a CPU what the system says of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"CPU {found[1].strip() if found else platform.processor() or platform.machine()}"


def slug(device: str) -> str:
    """A device's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


@cache
def commit() -> str:
    """The commit of this checkout, marked where the library's files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent.parent)]
    try:
        found = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "diff", "--quiet", "HEAD", "--", "drifa_attn", "examples"], capture_output=True
        ).returncode
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return f"{found}-dirty" if changed else found


def environment(device: torch.device) -> dict[str, Any]:
    """Where and with what a row is measured."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "timm": installed("timm"),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "utc": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
