"""Where random numbers come from, and how to draw some without moving what the user draws from."""

import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def sources(*networks: nn.Module, beside: Iterable[Tensor] = ()) -> list[torch.Generator]:
    """The global generators of the CPU and of every device that networks, and tensors beside them, are on.

    Devices whose generators PyTorch does not list, as XLA's, are left out.
    """
    held = chain.from_iterable(chain(network.parameters(), network.buffers()) for network in networks)
    devices = {tensor.device for tensor in chain(held, beside)}
    found = [torch.default_generator]
    for device in sorted(devices, key=str):
        if device.type == "mps":
            found.append(torch.mps._get_default_mps_generator())
        elif device.type not in ("cpu", "meta"):
            listed = getattr(getattr(torch, device.type, None), "default_generators", ())
            found += listed[device.index : device.index + 1]
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


def seed_of(networks: Iterable[nn.Module]) -> int:
    """A seed for new weights in networks: made of the CPU's global random state, which it leaves, and of the networks' weights.

    So the state decides it, and yet two networks get two seeds. Of each weight one number is read; weights that are sharded or
    have no numbers are left out.
    """
    made_of = hashlib.sha256(bytes(torch.get_rng_state().tolist()))
    for network in networks:
        for weight in network.parameters():
            if is_lazy(weight) or weight.is_meta or hasattr(weight, "to_local") or not weight.is_floating_point():
                continue
            if weight.numel():
                made_of.update(struct.pack("d", weight.detach()[(0,) * weight.ndim].item()))
    return int.from_bytes(made_of.digest()[:7], "big")


@contextmanager
def forked(seed: int | None, *networks: nn.Module) -> Iterator[None]:
    """Within this context random numbers follow the seed, or without one `seed_of` the networks.

    Afterwards the global generators of the CPU and of the networks' devices are where they were.
    """
    drawn_from = sources(*networks)
    with untouched(drawn_from):
        seed = seed_of(networks) if seed is None else seed
        for generator in drawn_from:
            generator.manual_seed(seed)
        yield
