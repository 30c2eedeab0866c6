"""What `make bench` runs: the rows behind `README.md`, the most important first, in ten minutes at most."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch

import drifa_attn

from .cases import Options
from .layers import ALONE, RESNET18, RESNET50, stages
from .rows import COMPILED, RESULTS, device_name, slug
from .run import run
from .sites import SITES
from .wrap import NETWORKS, PEERS

LIBRARY = ("eager", "auto")  # the equations, and what the library makes of them
WITH_PEERS = (*LIBRARY, "peers")
PAIRED = ("resnet50 plain", "resnet50 SE", "resnet50 CBAM", "resnet50 MFA")
TRAINED = (*PAIRED, "resnet50 MFA block", "resnet18 plain", "resnet18 MFA block dense")
OTHERS = tuple(f"{name} {way}" for name in NETWORKS for way in (*PEERS, "MFA", "MFA paper") if f"{name} {way}" not in PAIRED)
IMAGES = (4, 3, 224, 224)


def on_cpu(start: Options) -> Iterator[tuple[str, Options]]:
    """Suites and options for two cores: float32, batch 8, whole backbones one image at a time."""
    dense = replace(start, ops=("MFA", f"MFA{ALONE}"), providers=WITH_PEERS)
    yield "layers", replace(dense, shapes=stages(8, RESNET18[1:], RESNET50))
    yield "layers", replace(start, providers=(*WITH_PEERS, "fused"), shapes=stages(8, RESNET18[:1]))
    yield "sites", replace(start, providers=WITH_PEERS, modes=("forward",), seconds=2, threads=1)
    yield "net", replace(start, providers=LIBRARY, seconds=4)
    yield "wrap", replace(start, ops=PAIRED, providers=WITH_PEERS, modes=("forward",), seconds=3)
    yield "wrap", replace(start, ops=TRAINED, providers=WITH_PEERS, modes=("full",), shapes=(IMAGES,), seconds=9)
    yield "scaling", replace(start, providers=LIBRARY, seconds=0.5)
    yield "ops", replace(start, providers=("eager", "fused"), shapes=stages(8, RESNET18[:2]), seconds=0.5)
    yield "layers", replace(start, ops=("MFA",), providers=("compile",), shapes=stages(8, RESNET18[:1]))
    one = stages(1, SITES[:1])
    yield "sites", replace(start, providers=COMPILED, modes=("forward",), shapes=one, seconds=2, threads=1)
    yield "wrap", replace(start, ops=OTHERS, providers=("auto", "peers"), modes=("forward",), seconds=0.5)


def on_gpu(start: Options) -> Iterator[tuple[str, Options]]:
    """Suites and options for a GPU: bfloat16, batch 64."""
    three = (*LIBRARY, "compile")
    first, rest = stages(64, RESNET18[:1]), stages(64, RESNET18[1:], RESNET50)
    yield "layers", replace(start, providers=(*three, "peers"), shapes=first)
    yield "layers", replace(start, ops=("MFA",), providers=three, shapes=rest)
    yield "sites", replace(start, providers=WITH_PEERS, modes=("forward",))
    yield "wrap", replace(start, ops=PAIRED, providers=WITH_PEERS, modes=("forward",))
    yield "wrap", replace(start, ops=TRAINED, providers=WITH_PEERS, modes=("full",))
    yield "net", replace(start, providers=LIBRARY)
    yield "scaling", replace(start, providers=LIBRARY)
    yield "ops", replace(start, providers=("eager", "fused"), shapes=stages(64, RESNET18, RESNET50))
    yield "wrap", replace(start, ops=OTHERS, providers=("auto", "peers"))
    yield "layers", replace(start, providers=("peers",), shapes=rest)


def bench(device: torch.device, suites: Mapping[str, ModuleType], deadline: float) -> Path:
    """Run the selection of a device; the CSVs of its suites and this version are overwritten. Returns their folder."""
    folder = RESULTS / drifa_attn.__version__
    name = slug(device_name(device))
    gpu = device.type == "cuda"
    start = Options(device=device, dtype="bf16" if gpu else "fp32", seconds=0.3 if gpu else 1.0, deadline=deadline)
    selected = list((on_gpu if gpu else on_cpu)(start))
    files = {suite: folder / f"{name}-{suite}.csv" for suite, _ in selected}
    for file in files.values():
        file.unlink(missing_ok=True)
    for suite, options in selected:
        run(suite, suites[suite].cases(options), replace(options, csv=files[suite]))
    return folder
