"""What attention adds to the communication of data-parallel training: counted in real processes.

    python -m benchmarks.processes resnet50 --processes 2 4

Each process holds the network in `DistributedDataParallel` and takes one training step. A communication hook counts the bytes
of the gradients that are averaged: they have to be the size of the trained weights. Gates are computed from each process's own
samples, so nothing else is exchanged but the buffers: running statistics of batch norms, and the four vectors a site that
`calibrate` fits. The first process sends them to the others, unless `broadcast_buffers=False`. Their size is in the table too.

With `--step` and `--link`, the time of a step in one process and the speed of the link, both your own numbers, the command adds
a simulation of weak scaling: a ring sends `2 (n - 1) / n` times the gradients of each process, while nothing else is computed.
"""

import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import drifa_attn

from .arguments import Parser, count, seconds
from .report import table

WAYS = ("plain", "wrapped", "wrapped, backbone frozen")
SIMULATED = (2, 4, 8, 16, 64)


def network(name: str, way: str) -> nn.Module:
    """A timm network of three classes, as it is trained."""
    model = timm.create_model(name, num_classes=3)
    if way != "plain":
        drifa_attn.wrap(model)
    if way == "wrapped, backbone frozen":
        drifa_attn.freeze_backbone(model)
    return model


def trained_bytes(model: nn.Module) -> int:
    """Bytes of the gradients of a step."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def buffer_bytes(model: nn.Module) -> int:
    """Bytes of the buffers, which `DistributedDataParallel` broadcasts before each step."""
    return sum(b.numel() * b.element_size() for b in model.buffers())


def step(rank: int, processes: int, name: str, way: str, side: int, port: int, folder: str) -> None:
    """In one process: a training step, and the bytes it averaged, in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)
    torch.manual_seed(0)
    model = DistributedDataParallel(network(name, way), find_unused_parameters=False)
    sent = [0]
    model.register_comm_hook(sent, counting)
    torch.manual_seed(rank)
    model(torch.randn(2, 3, side, side)).square().sum().backward()
    torch.save(sent[0], Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def counting(sent: list[int], bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The mean of a bucket of gradients over processes, as DDP takes it; its bytes are added up."""
    gradients = bucket.buffer()
    sent[0] += gradients.numel() * gradients.element_size()
    gradients.div_(dist.get_world_size())
    return dist.all_reduce(gradients, async_op=True).get_future().then(lambda done: done.value()[0])


def averaged_bytes(name: str, way: str, processes: int, side: int) -> int:
    """Bytes that each of several processes averaged in one step; a `ValueError` if they do not agree."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(step, (processes, name, way, side, port, folder), nprocs=processes)
        found = {torch.load(Path(folder) / f"{rank}.pt") for rank in range(processes)}
    if len(found) != 1:
        raise ValueError(f"{name}, {way}: the processes averaged different numbers of bytes: {sorted(found)}.")
    return found.pop()


def efficiency(step_seconds: float, sent: int, processes: int, link: float) -> float:
    """The share of a step that computes, where a ring of processes averages `sent` bytes over `link` bytes a second."""
    return step_seconds / (step_seconds + 2 * (processes - 1) / processes * sent / link)


def counted(name: str, processes: Sequence[int], side: int) -> dict[str, int]:
    """The bytes of a step in each way; a `ValueError` if they are not the size of the trained weights."""
    found = {}
    for way in WAYS:
        expected = trained_bytes(network(name, way))
        for number in processes:
            sent = averaged_bytes(name, way, number, side)
            if sent != expected:
                raise ValueError(
                    f"{name}, {way}: {number} processes averaged {sent} bytes, its trained weights have {expected}."
                )
        found[way] = expected
    return found


def simulated(sizes: dict[str, int], step_seconds: float, link: float) -> str:
    """A table of efficiencies."""
    rows = [
        (way, *(f"{efficiency(step_seconds, sent, number, link):.1%}" for number in SIMULATED)) for way, sent in sizes.items()
    ]
    return table(("network", *(f"{number} processes:" for number in SIMULATED)), rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, and simulate where it is asked for."""
    parser = Parser("python -m benchmarks.processes", description=__doc__.partition("\n")[0])
    parser.add_argument("network", help="a name of timm")
    parser.add_argument("--processes", nargs="+", type=count, default=[2], help="how many to count with (default 2)")
    parser.add_argument("--side", type=count, default=64, help="pixels a side of the images (default 64)")
    parser.add_argument("--step", type=seconds, help="seconds of a step in one process; with --link, simulates weak scaling")
    parser.add_argument("--link", type=seconds, help="gigabytes a second that a process sends")
    given: Any = parser.parse_args(arguments)
    with parser.explained():
        if (given.step is None) != (given.link is None):
            raise ValueError("--step and --link belong together: give both, or neither.")
        if not timm.is_model(given.network):
            raise ValueError(f"timm has no network {given.network!r}: timm.list_models() names them.")
        sizes = counted(given.network, given.processes, given.side)
        plain = sizes["plain"]
        rows = [
            (way, f"{sent:,}", f"{sent / plain:.2%}", f"{buffer_bytes(network(given.network, way)):,}")
            for way, sent in sizes.items()
        ]
        header = ("network", "bytes of gradients averaged in a step:", "of the plain network's:", "bytes of buffers sent:")
        print(table(header, rows))
        print(f"\nCounted in {', '.join(map(str, given.processes))} processes: the size of the trained weights, and no more.")
        if given.step:
            print(f"\nWeak scaling, simulated from a step of {given.step:g} s and a link of {given.link:g} GB/s:\n")
            print(simulated(sizes, given.step, given.link * 1e9))


if __name__ == "__main__":
    main()
