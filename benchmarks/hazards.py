"""What could go wrong at the first contact with a GPU: each is tried, and says ok, with what was found, or FAIL, with why.

`python -m benchmarks.hazards` runs them all, `--only` some. On a CPU those that need a GPU are left out.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import drifa_attn
from drifa_attn import MFA, MIFA, ops

from .arguments import Parser
from .arguments import device as device_type
from .correctness import demand

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def off(found: Tensor, exact: Tensor) -> float:
    """The relative distance of a result from an exact one."""
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


def results(layer: nn.Module, x: Tensor, mode: Any, autocast: torch.dtype | None = None) -> tuple[Tensor, list[Tensor]]:
    """The output of a layer and the gradients of its input and weights, in a mode of `ops`."""
    u = x.detach().requires_grad_()
    with ops.use(mode), torch.autocast(x.device.type, autocast or BF16, enabled=autocast is not None):
        y = layer(u)
    total = y.to(torch.promote_types(y.dtype, FP32)).sin().sum()
    return y, list(torch.autograd.grad(total, [u, *layer.parameters()]))


def held(layer: MFA, x: Tensor, bound: float, *, autocast: torch.dtype | None = None) -> str:
    """How far the fused operator is from float64; a `ValueError` if that is more than `bound`.

    A nearly tied maximum may move, and its gradient with it: gradients may err three times as much as those of the equations.
    """
    exact, gradients = results(deepcopy(layer).double(), x.double(), "reference")
    _, plain = results(layer, x, "reference", autocast)
    y, fused = results(layer, x, "fused", autocast)
    counted = [i for i, g in enumerate(gradients) if g.norm() > 1e-3 * gradients[0].norm()]
    pairs = [(off(fused[i], gradients[i]), off(plain[i], gradients[i])) for i in counted]
    demand(off(y, exact) < bound, f"the output is off by {off(y, exact):.1e}, allowed {bound:.0e}")
    demand(all(a <= max(10 * bound, 3 * b) for a, b in pairs), f"gradients are off by {worded(pairs)} (those of the equations)")
    with ops.use("fused"):
        path = ops.explain(layer, x).path
    return f"output {off(y, exact):.1e}, gradient {worded([max(pairs)])} {path}"


def worded(pairs: list[tuple[float, float]]) -> str:
    """Errors, each with that of the equations."""
    return ", ".join(f"{a:.1e} ({b:.1e})" for a, b in pairs)


def made(device: torch.device, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Random features."""
    return torch.randn(shape, device=device).to(dtype)


def layer(device: torch.device, channels: int, dtype: torch.dtype = BF16, **options: Any) -> MFA:
    """An MFA."""
    return MFA(channels, device=device, dtype=dtype, **options)


def widths(device: torch.device) -> list[str]:
    """Widths that are and are not multiples of 16."""
    several = ((8, None), (12, None), (64, None), (72, None), (100, None), (130, None), (256, 16), (64, 16), (96, 4))
    return [f"{c}/{r}: {held(layer(device, c, reduction=r), made(device, 2, c, 9, 9), 1e-2)}" for c, r in several]


def chosen(device: torch.device) -> list[str]:
    """What `auto` takes for the sites of `wrap` in every dtype: on a GPU never the chunked operators."""
    found = []
    for dtype in (BF16, FP16, FP32):
        for channels in (64, 256, 512, 1024, 2048):
            x = torch.empty(2, channels, 14, 14, device=device, dtype=dtype)
            choice = ops.explain(layer(device, channels, dtype, reduction=16), x)
            demand(device.type != "cuda" or choice.path != "chunked", f"{channels} channels in {dtype}: {choice}")
            found.append(f"{channels} {str(dtype).removeprefix('torch.')}: {choice.path}")
    return found


def start(device: torch.device) -> str:
    """The identity start passes features on bit for bit: σ(0) is ½ and a statistic of zero and one changes nothing."""
    for dtype in (BF16, FP16, FP32):
        for channels, reduction in ((64, 16), (256, 16), (64, 1)):
            one, x = (
                layer(device, channels, dtype, reduction=reduction, init="identity"),
                made(device, 2, channels, 9, 9, dtype=dtype),
            )
            with ops.use("fused"):
                demand(torch.equal(one(x), x), f"{channels} channels, reduction {reduction}, {dtype}: the output is not x")
    return "the same bits"


def launched(device: torch.device) -> str:
    """Three launches forward, for a dense and a reduced layer, as `benchmarks.launches` counts them without a GPU."""
    from .launches import launches  # not above: it imports triton

    counts = {label: sum(launches(label, "fused")[0]) for label in ("dense c=64, 56²", "reduced c=256 (d=16), 56²")}
    demand(set(counts.values()) == {3}, f"the launches are {counts}")
    return "3"


def strides(device: torch.device) -> list[str]:
    """Features that lie in memory in other ways."""
    x, wide = made(device, 2, 64, 14, 14), made(device, 2, 128, 14, 14)
    lying = (x.to(memory_format=torch.channels_last), wide[:, ::2], x.mT, x[:, :, ::2], x[:1].expand(2, -1, -1, -1))
    return [held(layer(device, 64), one, 1e-2) for one in lying]


def tokens(device: torch.device) -> str:
    """Tokens with a class token before them."""
    return held(layer(device, 192, layout="b ... c", num_prefix_tokens=1), made(device, 2, 197, 192), 1e-2)


def few(device: torch.device) -> list[tuple[int, ...]]:
    """No sample, one position, two positions, vectors."""
    one = layer(device, 64)
    return [tuple(one(made(device, *shape)).shape) for shape in ((0, 64, 7, 7), (2, 64, 1, 1), (1, 64, 1, 2), (2, 64))]


def half(device: torch.device) -> str:
    """float16, and near its largest number."""
    large = 3e4 * torch.ones(1, 64, 9, 9, device=device, dtype=FP16)
    demand(bool(layer(device, 64, FP16)(large).isfinite().all()), "features of 3e4 overflow")
    return held(layer(device, 64, FP16), made(device, 2, 64, 28, 28, dtype=FP16), 3e-3)


def autocast(device: torch.device) -> list[str]:
    """float32 weights under autocast to either half precision."""
    return [held(layer(device, 64, FP32), made(device, 2, 64, 14, 14, dtype=t), 1e-2, autocast=t) for t in (BF16, FP16)]


def single(device: torch.device) -> str:
    """float32 without TF32."""
    return held(layer(device, 64, FP32), made(device, 2, 64, 28, 28, dtype=FP32), 1e-5)


def tf32(device: torch.device) -> str:
    """float32 with TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        return held(layer(device, 64, FP32), made(device, 2, 64, 28, 28, dtype=FP32), 2e-3)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@contextmanager
def deterministic() -> Iterator[None]:
    """Within this context PyTorch refuses what may differ between runs."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def repeatable(device: torch.device) -> str:
    """Gradients are the same bits in two runs, in deterministic mode."""
    for channels, dtype in ((64, BF16), (256, BF16), (64, FP32)):
        one, x = layer(device, channels, dtype), made(device, 4, channels, 28, 28, dtype=dtype)
        with deterministic():
            (_, first), (_, second) = (results(one, x, "fused") for _ in range(2))
        same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        demand(same, f"at {channels} channels in {dtype} two runs differ")
    return "the same bits"


def modalities(device: torch.device) -> str:
    """MIFA over a map and tokens, some of them absent."""
    layer = MIFA([64, 96], layout=["b c ...", "b ... c"], device=device, dtype=BF16)
    xs = [made(device, 3, 64, 14, 14).requires_grad_(), made(device, 3, 49, 96).requires_grad_()]
    present = torch.tensor([[1, 1], [1, 0], [0, 1]], device=device).bool()
    found = []
    for mode in ("reference", "fused"):
        with ops.use(mode):  # type: ignore[arg-type]
            ys = layer(xs, present=present)
        gradients = torch.autograd.grad(sum(y.float().sin().sum() for y in ys), [*xs, *layer.parameters()])
        found.append([*ys, *gradients])
    return f"off from the equations by {max(off(a, b) for a, b in zip(*reversed(found), strict=True)):.1e} at most"


def captured(device: torch.device) -> str:
    """A CUDA graph that is captured and replayed on other features."""
    one, x = layer(device, 64), made(device, 4, 64, 28, 28)
    with torch.no_grad():
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):
                one(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = one(x)
        x.copy_(made(device, 4, 64, 28, 28))
        graph.replay()
        torch.cuda.synchronize()
        demand(torch.equal(y, one(x)), "the replay gives another result")
    return "the same bits"


def large(device: torch.device) -> str:
    """More than 2³¹ elements, on a GPU."""
    side = 1024 if device.type == "cuda" else 8
    x, one = torch.randn(40, 64, side, side, device=device, dtype=BF16), layer(device, 64)
    with ops.use("fused"), torch.no_grad():
        demand(off(one(x)[-1:], one(x[-1:])) < 1e-2, "the last sample is not what it is alone")
    return f"{x.numel()} elements"


def compiled(device: torch.device, mode: str | None = None) -> str:
    """A wrapped network, compiled without graph breaks."""
    model = drifa_attn.wrap(timm.create_model("resnet18", num_classes=5)).to(device, BF16).eval()
    for parameter in drifa_attn.attention_parameters(model):
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    x, fast = made(device, 2, 3, 64, 64), torch.compile(model, mode=mode, fullgraph=True)
    with torch.no_grad():
        found = [fast(x).clone() for _ in range(3)][-1]
        demand(off(found, model(x)) < 0.1, f"compiled it is off by {off(found, model(x)):.1e}")
        return f"off from eager by {off(found, model(x)):.1e}"


def reduce_overhead(device: torch.device) -> str:
    """The same with CUDA graphs by the compiler."""
    return compiled(device, "reduce-overhead")


HAZARDS: dict[str, Callable[[torch.device], Any]] = {
    one.__name__: one
    for one in (
        widths,
        chosen,
        start,
        launched,
        strides,
        tokens,
        few,
        half,
        autocast,
        single,
        tf32,
        repeatable,
        modalities,
        captured,
        large,
    )
} | {"compiled": compiled, "reduce_overhead": reduce_overhead}
ON_GPU = ("captured", "reduce_overhead")


def main(arguments: list[str] | None = None) -> None:
    """Try each; exit status 1 if one failed."""
    parser = Parser("python -m benchmarks.hazards", description=__doc__)
    parser.add_argument("--device", type=device_type, default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    parser.add_argument("--only", nargs="+", choices=HAZARDS, metavar="HAZARD", help=", ".join(HAZARDS))
    options = parser.parse_args(arguments)
    failed = 0
    for name in options.only or HAZARDS:
        if name in ON_GPU and options.device.type != "cuda":
            print("left out:", name, "needs a GPU", flush=True)
            continue
        try:
            print("ok  ", name, HAZARDS[name](options.device), flush=True)
        except Exception as failure:
            failed += 1
            where = [
                f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(failure.__traceback__)[-4:]
            ]
            reason = " ".join(str(failure).split())[:300]
            print("FAIL", name, f"{type(failure).__name__}: {reason}", *where, flush=True)
    if failed:
        parser.exit(1)


if __name__ == "__main__":
    main()
