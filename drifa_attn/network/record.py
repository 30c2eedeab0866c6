"""What two traces of a network's copy tell: the record that all questions about a network are asked of."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from drifa_attn.layout import Layout

from .inputs import Inputs
from .site import Site
from .trace import Trace


@dataclass
class Found:
    """What a module's output holds.

    Attributes:
        sites: the tensors that can be refined.
        reasons: why each of its other tensors cannot.
        is_map: whether one of its tensors has more than one position, refinable or not.
        repeated: where the module runs more than once in a forward, the tensors that could be refined if it ran once.
    """

    sites: list[Site]
    reasons: list[str]
    is_map: bool
    repeated: list[Site] = field(default_factory=list)


@dataclass
class Survey:
    """What two traces of a network's copy tell.

    Attributes:
        title: what messages call the network.
        clone: the copy; modules: its modules by name.
        is_real: whether the copy has memory and ran on the CPU.
        inputs: what the copy was run with.
        first, second: the traces; second is None if only one forward worked.
        is_resized: whether the second trace had another image size.
        stated: the channels that `feature_info` states, by module.
        layouts: the layouts that the user stated, by module.
        found: what was found at every module that was called.
        notes: what the user should know about the traces.
    """

    title: str
    clone: nn.Module
    modules: dict[str, nn.Module]
    is_real: bool
    inputs: Inputs
    first: Trace
    second: Trace | None
    is_resized: bool
    stated: dict[str, list[int]]
    layouts: Mapping[str, Layout]
    found: dict[str, Found] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
