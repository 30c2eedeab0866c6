"""Where random numbers come from, and how to draw some without moving what the user draws from."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


def sources(*networks: nn.Module, beside: Iterable[Tensor] = ()) -> list[torch.Generator]:
    """The global generators of the CPU and of every device that networks, and tensors beside them, are on."""
    held = chain.from_iterable(chain(network.parameters(), network.buffers()) for network in networks)
    devices = {tensor.device for tensor in chain(held, beside)}
    found = [torch.default_generator]
    for device in sorted(devices, key=str):
        if device.type == "mps":
            found.append(torch.mps._get_default_mps_generator())
        elif device.type not in ("cpu", "meta"):
            found.append(torch.get_device_module(device).default_generators[device.index])
    return found


@contextmanager
def untouched(generators: Sequence[torch.Generator]) -> Iterator[None]:
    """Within this context anything may be drawn; afterwards, also after an error, these generators are where they were."""
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def seed_from(owner: str, generator: Any) -> int | None:
    """A seed that is drawn from a generator; None without one."""
    if generator is None:
        return None
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"{owner} expected a torch.Generator, got {generator!r}: torch.Generator().manual_seed(0).")
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


@contextmanager
def forked(seed: int | None, *networks: nn.Module) -> Iterator[None]:
    """Within this context random numbers follow the seed, or go on from where the global generators are.

    Afterwards the global generators of the CPU and of the networks' devices are where they were.
    """
    drawn_from = sources(*networks)
    with untouched(drawn_from):
        if seed is not None:
            for generator in drawn_from:
                generator.manual_seed(seed)
        yield
