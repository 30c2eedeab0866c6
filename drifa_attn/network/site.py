"""A place in a network where features can be refined."""

from dataclasses import dataclass

from drifa_attn.layout import Place
from drifa_attn.trees import Path


@dataclass(frozen=True, kw_only=True)
class Site(Place):
    """One feature of a network: a tensor in the output of a module, and how to read it.

    Attributes:
        module: the module's name in the network.
        path: where in its output the tensor is; empty when the output is the tensor.
        folded: how many rows of the feature belong to each sample of the network: the frames of a video, the patches of a bag.
    """

    module: str
    path: Path = ()
    folded: int = 1

    @property
    def name(self) -> str:
        """The module's name, with the tensor's place in its output where that is not the whole."""
        return self.module + "".join(f"[{key}]" for key in self.path)
