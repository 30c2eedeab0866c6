"""Compiles every launch configuration of the Triton kernels ahead of time, without a GPU, and reads the machine code.

`python -m benchmarks.kernels` prints a table and, if it is whole, writes it to `benchmarks/kernels.md`. The launches are those
of the operators: they run on meta tensors, and every kernel that they would launch is compiled for each compute capability
instead.
"""

import argparse
import datetime
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from .arguments import Parser, count, output

PACKAGE = "drifa_attn.ops.triton"
MODULES = ["common", "products", "mfa", "mfa_backward", "tail", "tail_backward", "mifa", "gate"]
CAPABILITIES = (80, 90)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes one program may use
POINTERS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.bool: "i1"}
FORWARD = ("chain_kernel", "layer_kernel", "pools_kernel", "gate_kernel", "finish_kernel", "tail_kernel")


class Launch(NamedTuple):
    """One kernel as an operator would launch it: all that the compiler sees, in types that can be pickled."""

    module: str
    kernel: str
    label: str
    capability: int
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[int, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, int], ...]


class Code(NamedTuple):
    """What the compiler made of a launch."""

    launch: Launch
    registers: int
    spills: int  # instructions that load from or store to local memory
    stack: int  # bytes a thread
    shared: int  # bytes a program
    tensor_cores: str


def described(kernel: Any, arguments: dict[str, Any], label: str, capability: int) -> Launch:
    """What Triton's launcher would specialise on: dtypes, ones, multiples of 16 and constants."""
    signature, constants, aligned = [], [], []
    for place, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        kind = "i32"
        if isinstance(value, torch.Tensor):
            kind = "*" + POINTERS[value.dtype]
            aligned.append(place)
        elif parameter.is_constexpr or value is None or value == 1:
            kind = "constexpr"
            constants.append((place, value))
        elif value % 16 == 0:
            aligned.append(place)
        signature.append((parameter.name, kind))
    options = tuple((name, arguments[name]) for name in ("num_warps", "num_stages") if name in arguments)
    module = kernel.fn.__module__.rpartition(".")[2]
    return Launch(module, kernel.fn.__name__, label, capability, tuple(signature), tuple(constants), tuple(aligned), options)


def recorded(op: Any, label: str, capability: int) -> list[Launch]:
    """The launches `op` makes on a device of this compute capability."""
    launches: list[Launch] = []

    def record(kernel: Any, programs: int, device_of: torch.Tensor, **arguments: Any) -> None:
        launches.append(described(kernel, arguments, label, capability))

    with ExitStack() as patches:
        patches.enter_context(patch("drifa_attn.ops.choose.tf32_allowed", lambda: "exact" not in label))
        for module in MODULES:
            patches.enter_context(patch(f"{PACKAGE}.{module}.launch", record))
        patches.enter_context(patch(f"{PACKAGE}.configs.capability", lambda device: capability))
        op()
    return launches


def features(c: int, n: int, layout: str, dtype: torch.dtype, b: int = 8) -> torch.Tensor:
    """`b c n` without values, in the memory of a contiguous (nchw) or channels-last (nhwc) map."""
    x = torch.empty(b, n, c, dtype=dtype, device="meta").mT
    return x if layout == "nhwc" else x.contiguous()


def weights(d: int, c: int) -> tuple[Any, ...]:
    """Five weights and biases of width d, and a squeeze from c unless c is d."""
    square, vector = torch.empty(d, d, device="meta"), torch.empty(d, device="meta")
    squeeze = (None, None) if c == d else (torch.empty(d, c, device="meta"), vector)
    return [square] * 5, [vector] * 5, *squeeze


def mfa(c: int, d: int, n: int, layout: str, dtype: torch.dtype) -> None:
    """MFA's gain and its gradient, in the form that `wrap` gives a layer."""
    ops = importlib.import_module(PACKAGE)
    x, given = features(c, n, layout, dtype), weights(d, c)
    vector, alpha = torch.empty(d, device="meta"), torch.empty(c, device="meta")
    head = [torch.empty(d, 2 * d, device="meta"), vector, torch.empty(d, d, device="meta"), vector, vector[:1], vector]
    expand = [] if c == d else [torch.empty(c, d, device="meta"), alpha]
    tail = head, [] if c == d else [vector] * 4, expand, alpha
    gain, stats, where = ops.mfa_gain_forward(x, *given, *tail)
    ops.mfa_gain_backward(gain, x, *given, *tail, stats, where)


def mifa(c: int, d: int, n: int, layout: str, dtype: torch.dtype) -> None:
    """MIFA's statistics of a modality some samples lack, and their gradient."""
    ops = importlib.import_module(PACKAGE)
    x, ([weight, *_], [bias, *_], *squeeze) = features(c, n, layout, dtype), weights(d, c)
    present = torch.empty(x.shape[0], dtype=torch.bool, device="meta")
    stats, where = ops.mifa_forward(x, weight, bias, *squeeze, present)
    ops.mifa_backward(stats, x, weight, bias, *squeeze, present, stats, where)


def gate(c: int, d: int, n: int, layout: str, dtype: torch.dtype) -> None:
    """The gate and its gradients."""
    ops = importlib.import_module(PACKAGE)
    x = features(c, n, layout, dtype)
    factor = torch.empty(x.shape[:2], device="meta")
    ops.gate_forward(x, factor, "b c ...", 0)
    ops.gate_backward(x, x, factor, "b c ...", 0)


WIDTHS = ((16, 16), (32, 32), (64, 64), (128, 128), (512, 512), (256, 32), (256, 64), (2048, 128))
SOME_WIDTHS = ((64, 64), (128, 128), (512, 512), (256, 64))
EXACT_WIDTHS = ((64, 8), (256, 16), (512, 32))  # in float32 without TF32, where no wider ones run


def cases() -> Iterable[tuple[Any, tuple[Any, ...], str]]:
    """Every op at every width that has a configuration of its own, and at some of them every dtype and layout."""
    variants = [(784, "nhwc", torch.bfloat16, WIDTHS), (784, "nchw", torch.bfloat16, SOME_WIDTHS)]
    variants += [(784, "nhwc", dtype, SOME_WIDTHS) for dtype in (torch.float16, torch.float32)]
    variants += [(49, "nchw", torch.bfloat16, SOME_WIDTHS)]
    variants += [(784, "nhwc", torch.float32, EXACT_WIDTHS)]
    for n, layout, dtype, widths in variants:
        for c, d in widths:
            name = "exact float32" if widths is EXACT_WIDTHS else str(dtype).removeprefix("torch.")
            label = f"{c}{'' if c == d else f'->{d}'} @ {n} {layout} {name}"
            for op in (mfa, mifa, gate):
                yield op, (c, d, n, layout, dtype), f"{op.__name__} {label}"


def same_code(launch: Launch) -> Any:
    """What tells launches apart: not who made them, nor constants that only place a result."""
    placing = {place for place, (name, _) in enumerate(launch.signature) if name in ("STATS", "STAT", "SPOTS", "SPOT")}
    return launch._replace(label="", constants=tuple(c for c in launch.constants if c[0] not in placing))


def launches(capabilities: Iterable[int], only: str = "") -> list[Launch]:
    """The distinct launches of all cases whose label contains `only`; a launch keeps the label it was first seen under."""
    distinct: dict[Any, Launch] = {}
    for capability in capabilities:
        for op, arguments, label in cases():
            if only in label:
                for launch in recorded(lambda op=op, arguments=arguments: op(*arguments), label, capability):
                    distinct.setdefault(same_code(launch), launch)
    return list(distinct.values())


def compiled(launch: Launch) -> Code:
    """Compile one launch and disassemble it, with the tools of the triton wheel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"{PACKAGE}.{launch.module}"), launch.kernel)
    constants = {(place,): value for place, value in launch.constants}
    attributes = {(place,): [["tt.divisibility", 16]] for place in launch.aligned}
    source = ASTSource(kernel, dict(launch.signature), constants, attributes)
    options = {**dict(launch.options), "enable_fp_fusion": True}
    result = triton.compile(source, target=GPUTarget("cuda", launch.capability, 32), options=options)
    usage, code = disassembled(result.asm["cubin"], Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    counts = Counter(re.findall(r"\b(LDL|STL|HGMMA|HMMA|UTCHMMA|UTCQMMA)\b", code))
    tensor_cores = " ".join(f"{name} {counts[name]}" for name in ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA") if counts[name])
    return Code(
        launch, used["REG"], counts["LDL"] + counts["STL"], used["STACK"], result.metadata.shared, tensor_cores or "none"
    )


def disassembled(cubin: bytes, tools: Path) -> tuple[str, str]:
    """The resource usage and the machine code of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        commands = ([tools / "cuobjdump", "-res-usage", file], [tools / "nvdisasm", "-c", file])
        usage, code = (subprocess.run(command, check=True, capture_output=True, text=True).stdout for command in commands)
    return usage, code


def attempt(launch: Launch) -> Code | tuple[Launch, str]:
    """The code of a launch, or why there is none."""
    try:
        return compiled(launch)
    except Exception as error:  # a configuration that does not compile is a row of the table
        return launch, f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"


def configuration(launch: Launch) -> str:
    """The launch's tile sizes, warps and stages."""
    names = {place: name for place, (name, _) in enumerate(launch.signature)}
    known = {names[place]: value for place, value in launch.constants}
    tiles = [f"{name.lower()} {known[name]}" for name in ("D", "ROWS", "POSITIONS", "TILES", "DEPTH") if name in known]
    return ", ".join([*tiles, *(f"{name.removeprefix('num_')} {value}" for name, value in launch.options)])


def table(results: Iterable[Code | tuple[Launch, str]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| kernel | launched by | configuration | capability | registers | spill instructions | stack B | shared B "
        "| tensor cores |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        launch = result[0]
        known = f"| {launch.kernel} | {launch.label} | {configuration(launch)} | {launch.capability / 10} |"
        if isinstance(result, Code):
            code = result
            lines.append(f"{known} {code.registers} | {code.spills} | {code.stack} | {code.shared} | {code.tensor_cores} |")
        else:
            lines.append(f"{known} {result[1]} | | | | |")
    return "\n".join(lines)


def spilling(codes: list[Code]) -> str:
    """How many of the launches spill or use a stack, by compute capability."""
    counts = []
    for capability in sorted({code.launch.capability for code in codes}):
        mine = [code.spills or code.stack for code in codes if code.launch.capability == capability]
        counts.append(f"{sum(map(bool, mine))} of {len(mine)} at {capability / 10}")
    return ", ".join(counts)


def report(results: list[Code | tuple[Launch, str]], chosen: list[Launch]) -> str:
    """The file `benchmarks/kernels.md`."""
    triton = importlib.import_module("triton")
    codes = [result for result in results if isinstance(result, Code)]
    forward = [code for code in codes if code.launch.kernel in FORWARD]
    backward = [code for code in codes if code.launch.kernel not in FORWARD]
    day = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}"
    inputs = ", ".join(dict.fromkeys(launch.label.partition(" @ ")[2] for launch in chosen))
    return f"""# The Triton kernels, compiled

Written by `python -m benchmarks.kernels` on {day} with torch {torch.__version__}, triton {triton.__version__}.
No GPU took part, and none of this is a timing. The configurations were chosen for compute capability 8.0 and 9.0;
10.0 takes those of 9.0. {len(results)} distinct launches, for inputs (positions, layout, dtype) {inputs}.

- {len(results) - len(codes)} do not compile.
- Forward launches that spill or use a stack: {spilling(forward)}.
- Others: {spilling(backward)}, with at most {max((code.stack for code in codes), default=0)} bytes a thread.
- The largest shared memory is {max((code.shared for code in codes), default=0)} bytes.

A launch is listed under the first op that makes it.

{table(results)}
"""


def flags() -> Parser:
    """The command line."""
    parser = Parser("python -m benchmarks.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(SHARED_LIMIT)
    parser.add_argument("--capability", type=int, nargs="+", default=known, choices=known, help="80 for 8.0 (default: all)")
    parser.add_argument(
        "--only", default="", help="launches of ops whose label contains this, such as '784 nhwc' (default: all)"
    )
    parser.add_argument("--out", type=output, help="default: kernels.md for the whole table; a part of it is only printed")
    parser.add_argument("--jobs", type=count, default=os.cpu_count())
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Compile, print, write."""
    parser = flags()
    options = parser.parse_args(arguments)
    is_whole = not options.only and set(options.capability) == set(SHARED_LIMIT)
    with parser.explained():
        out = options.out or (output(str(Path(__file__).with_suffix(".md"))) if is_whole else None)
        chosen = launches(options.capability, options.only)
        if not chosen:
            raise ValueError(f"--only {options.only!r} is in no label; one is {next(iter(cases()))[2]!r}.")
    results = []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for result in pool.map(attempt, chosen):
            results.append(result)
            print(f"{len(results)} of {len(chosen)}", end="\r", file=sys.stderr)
    print(table(results))
    if out:
        out.write_text(report(results, chosen))


if __name__ == "__main__":
    main()
