"""What the library has to reach, and whether the rows say that it does."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from .rows import COMPILED, Row

OURS = "auto"  # the provider that is held to the targets: what the library does unless told otherwise
NO_GPU = "no GPU row yet: run `make bench` on one"


class Found:
    """Rows, looked up by what they are of; of several the last."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = [row for row in rows if not row.error]
        self.failed = [row for row in rows if row.error]

    def all(self, **of: object) -> list[Row]:
        """The rows with these values, in their order, each measurement once."""
        chosen = {}
        for row in self.rows:
            if all(getattr(row, name) == value for name, value in of.items()):
                chosen[row.suite, row.op, row.provider, row.mode, row.shape, row.layout, row.dtype, row.device] = row
        return list(chosen.values())

    def pairs(self, against: str, **of: object) -> list[tuple[Row, Row]]:
        """The library's rows, each with another provider's of the same op, mode and shape."""
        found = []
        for ours in self.all(provider=OURS, **of):
            same = {name: getattr(ours, name) for name in ("suite", "op", "mode", "shape", "layout", "dtype", "device")}
            found += [(ours, other) for other in self.all(provider=against, **same)]
        return found


class Ratio(NamedTuple):
    """One measured ratio and what it was measured at."""

    at: str
    value: float


class Target(NamedTuple):
    """A line of the first table. `met` judges one ratio; `measure` gives them all, none where there is no row."""

    what: str
    against: str
    target: str
    gpu: bool
    measure: Callable[[Found], list[Ratio]]
    met: Callable[[float], bool]


def at(row: Row) -> str:
    """A shape as the tables name it: c=64 at 56x56."""
    sizes = row.sizes
    return f"c={sizes[1]} at {'x'.join(map(str, sizes[2:]))}"


def ratios(pairs: Sequence[tuple[Row, Row]], column: str) -> list[Ratio]:
    """The library's value over the other's."""
    return [Ratio(at(ours), getattr(ours, column) / getattr(other, column)) for ours, other in pairs]


def layer_ratio(mode: str, column: str, gpu: bool = False) -> Callable[[Found], list[Ratio]]:
    """MFA at the stage shapes against eager."""
    return lambda found: [
        ratio
        for pair in found.pairs("eager", suite="layers", op="MFA", mode=mode)
        if pair[0].on_gpu == gpu
        for ratio in ratios([pair], column)
    ]


def net_ratio(mode: str, column: str) -> Callable[[Found], list[Ratio]]:
    """DRIFA-Net on a CPU against the eager layers."""

    def measure(found: Found) -> list[Ratio]:
        pairs = found.pairs("eager", suite="net", mode=mode)
        return [Ratio(ours.shape, getattr(ours, column) / getattr(o, column)) for ours, o in pairs if not ours.on_gpu]

    return measure


def attention_share(network: str, way: str) -> Callable[[Found], list[Ratio]]:
    """What attention adds to the peak of a training step, against what the eager layers add."""

    def measure(found: Found) -> list[Ratio]:
        shares = []
        for ours, eager in found.pairs("eager", suite="wrap", op=f"{network} {way}", mode="full"):
            same = {"shape": ours.shape, "device": ours.device, "dtype": ours.dtype, "mode": "full"}
            for plain in found.all(suite="wrap", op=f"{network} plain", **same):
                where = f"{network}, batch {ours.sizes[0]}{', GPU' if ours.on_gpu else ''}"
                shares.append(Ratio(where, (ours.peak - plain.peak) / (eager.peak - plain.peak)))
        return shares

    return measure


def overhead(found: Found) -> list[Ratio]:
    """What `wrap(resnet50)` adds to the latency of inference on a GPU, against what SE adds."""
    shares = []
    for ours in found.all(suite="wrap", op="resnet50 MFA", provider=OURS, mode="forward"):
        same = {"suite": "wrap", "mode": "forward", "shape": ours.shape, "device": ours.device, "dtype": ours.dtype}
        plain, se = found.all(op="resnet50 plain", **same), found.all(op="resnet50 SE", **same)
        if ours.on_gpu and plain and se:
            shares.append(Ratio(f"batch {ours.sizes[0]}", (ours.p50 - plain[0].p50) / (se[0].p50 - plain[0].p50)))
    return shares


def step(op: str) -> Callable[[Found], list[Ratio]]:
    """A network's training step on a CPU against that of the plain one."""

    def measure(found: Found) -> list[Ratio]:
        shares = []
        for ours in found.all(suite="wrap", op=op, provider=OURS, mode="full"):
            same = {"suite": "wrap", "mode": "full", "shape": ours.shape, "device": ours.device, "dtype": ours.dtype}
            plain = found.all(op=f"{op.split()[0]} plain", **same)
            shares += [Ratio(f"batch {ours.sizes[0]}", ours.p50 / other.p50) for other in plain if not ours.on_gpu]
        return shares

    return measure


def of_se(row: Row, found: Found) -> list[Ratio]:
    """A row of the sites against SE there; a compiled one against SE compiled."""
    same = {"suite": "sites", "mode": row.mode, "shape": row.shape, "device": row.device, "dtype": row.dtype}
    provider = "compile" if row.provider in COMPILED else "peers"
    return [Ratio(f"batch {row.sizes[0]}", row.p50 / se.p50) for se in found.all(op="SE", provider=provider, **same)]


def at_sites(batch: int, provider: str = OURS) -> Callable[[Found], list[Ratio]]:
    """The reduced MFA at the five sites of ResNet-50 on a CPU, against SE there."""

    def measure(found: Found) -> list[Ratio]:
        rows = found.all(suite="sites", op="MFA /16", provider=provider, mode="forward")
        return [ratio for row in rows if row.sizes[0] == batch and not row.on_gpu for ratio in of_se(row, found)]

    return measure


def gpu_speedup(mode: str, against: str, channels: Callable[[int], bool]) -> Callable[[Found], list[Ratio]]:
    """MFA on a GPU at these channels."""

    def measure(found: Found) -> list[Ratio]:
        pairs = found.pairs(against, suite="layers", op="MFA", mode=mode, dtype="bf16")
        chosen = [(ours, other) for ours, other in pairs if ours.on_gpu and channels(ours.sizes[1])]
        return [Ratio(at(ours), other.p50 / ours.p50) for ours, other in chosen]

    return measure


def at_most(bound: float) -> Callable[[float], bool]:
    """Whether a ratio, to three digits, is at most this."""
    return lambda ratio: float(f"{ratio:.3g}") <= bound


def at_least(bound: float) -> Callable[[float], bool]:
    """Whether a ratio, to three digits, is at least this."""
    return lambda ratio: float(f"{ratio:.3g}") >= bound


def lowest_speedups(mode: str, against: str, bounds: dict[int, float]) -> list[Target]:
    """One target for each number of channels."""
    title = {"forward": "GPU forward", "full": "GPU forward and backward"}[mode]
    targets = []
    for c, bound in bounds.items():
        many = c >= 1024
        chosen = (lambda c_: lambda channels: channels >= c_)(c) if many else (lambda c_: lambda channels: channels == c_)(c)
        what = f"{title}, bf16, batch 64, c {'≥' if many else '='} {c}"
        name = "torch.compile" if against == "compile" else against
        targets.append(Target(what, name, f"at least {bound:g}x", True, gpu_speedup(mode, against, chosen), at_least(bound)))
    return targets


TARGETS = (
    Target("kept for backward by one MFA, besides x", "eager", "at most 0.1", False, layer_ratio("full", "kept"), at_most(0.1)),
    Target("the same on a GPU", "eager", "at most 0.1", True, layer_ratio("full", "kept", gpu=True), at_most(0.1)),
    Target(
        "attention's share of a training step's peak memory, ResNet-50 with MFA at every block",
        "eager",
        "at most 0.25",
        False,
        attention_share("resnet50", "MFA block"),
        at_most(0.25),
    ),
    Target(
        "the same, ResNet-18, reduction None",
        "eager",
        "at most 0.25",
        False,
        attention_share("resnet18", "MFA block dense"),
        at_most(0.25),
    ),
    Target("CPU forward of MFA, batch 8: time", "eager", "at most 1.0", False, layer_ratio("forward", "p50"), at_most(1)),
    Target("the same: peak memory", "eager", "at most 1/3", False, layer_ratio("forward", "peak"), at_most(0.333)),
    Target("CPU training step of MFA, batch 8: time", "eager", "at most 1.1", False, layer_ratio("full", "p50"), at_most(1.1)),
    Target("the same: kept for backward", "eager", "at most 0.1", False, layer_ratio("full", "kept"), at_most(0.1)),
    Target(
        "CPU, DRIFA-Net 128 px, batch 8, forward: time", "eager", "at most 1.0", False, net_ratio("forward", "p50"), at_most(1)
    ),
    Target("the same, training step: time", "eager", "at most 1.1", False, net_ratio("full", "p50"), at_most(1.1)),
    Target(
        "the same: peak memory above weights and optimizer",
        "eager",
        "at most 0.5",
        False,
        net_ratio("full", "peak"),
        at_most(0.5),
    ),
    Target("CPU, the five sites of `wrap(resnet50)`, one image", "SE there", "at most 3.3", False, at_sites(1), at_most(3.3)),
    Target("the same, batch 8", "SE there", "at most 3.5", False, at_sites(8), at_most(3.5)),
    Target(
        "the same, one image, compiled", "SE there, compiled", "at most 5.5", False, at_sites(1, "auto-compile"), at_most(5.5)
    ),
    Target("CPU, a training step of `wrap(resnet50)`", "plain", "at most 1.1", False, step("resnet50 MFA"), at_most(1.1)),
    *lowest_speedups("forward", "eager", {64: 3.5, 128: 2.5, 256: 2, 512: 1.5, 1024: 1}),
    *lowest_speedups("forward", "compile", {64: 2.2, 128: 1.6, 256: 1.4, 512: 1.1, 1024: 1}),
    *lowest_speedups("full", "eager", {64: 3.5, 128: 2.5, 256: 1.8}),
    *lowest_speedups("full", "compile", {64: 1.5, 128: 1.3, 256: 1.2}),
    Target("overhead of `wrap(resnet50)` at inference", "SE, same sites", "at most 1.0", True, overhead, at_most(1)),
)


def verdict(target: Target, found: Found) -> tuple[str, str]:
    """The measured ratios, shortened to their range, and "met" or "missed" with where."""
    measured = target.measure(found)
    if not measured:
        return (NO_GPU if target.gpu else "no row yet: run `make bench`"), ""
    missed = [ratio for ratio in measured if not target.met(ratio.value)]
    shown = "; ".join(f"{ratio.value:.3g} ({ratio.at})" for ratio in measured)
    if not missed:
        return shown, "met"
    return shown, "missed" if len(missed) == len(measured) else f"missed at {len(missed)} of {len(measured)}"
