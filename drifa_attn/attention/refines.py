"""What every layer that refines features has in common: a switch, its gates, its start, and how to build it again."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Spec:
    """An attention without its weights, `Spec("mfa", {"reduction": 16, "init": "identity"})`; `build` makes it.

    Attributes:
        name: one that `ATTENTIONS` or `timm.layers.get_attn` knows, or "module:name" of a callable.
        options: the arguments that do not depend on the place; a file keeps them as JSON.
        factory: the callable itself; a file does not keep it.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    factory: Callable[..., nn.Module] | None = field(default=None, compare=False, repr=False)


class Refines:
    """A layer that refines features. It is a mixin: write `class MFA(Refines, nn.Module)`.

    Attributes:
        enabled: False makes `forward` pass features on untouched. Set it on the layer; a compiled layer sees the change. Copies
            and pickles keep what was set, but not what `disabled` did: they are in none of its contexts.
        part: the group of `parameter_groups` that its weights belong to, "attention" or "head".
    """

    enabled: bool = True
    part: str = "attention"
    _contexts: int = 0  # how many contexts of `disabled` the layer is in
    _outside: bool = True  # what `enabled` was before the first of them

    def pause(self) -> None:
        """Disable the layer until `resume` has been called as often."""
        if not self._contexts:
            self._outside = self.enabled
        self._contexts += 1
        self.enabled = False

    def resume(self) -> None:
        """Undo one `pause`; the last one puts `enabled` back to what it was before the first."""
        self._contexts -= 1
        if not self._contexts:
            self.enabled = self._outside

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take."""
        state = vars(self).copy()
        if state.pop("_contexts", 0):
            state["enabled"] = self._outside
        state.pop("_outside", None)
        return state

    def gates(self, *inputs: Any) -> Tensor | list[Tensor]:
        """The gates, `b c` per feature, in (0, 1), for what `forward` takes."""
        raise NotImplementedError(f"{type(self).__name__} has no gates: it does not multiply channels.")

    def gains(self, *inputs: Any) -> Tensor | list[Tensor]:
        """The factors, `b c` per feature, by which `forward` multiplies what it is given."""
        raise NotImplementedError(f"{type(self).__name__} has no gains: it does not multiply channels.")

    def is_start(self) -> bool:
        """Whether the layer still passes on what it is given, bit for bit, because training has not moved it yet."""
        raise NotImplementedError(f"{type(self).__name__} does not know its start.")

    def must_call(self) -> str | None:
        """Which linear map of the layer must be called, since another tool changed it, in words; None where none must."""
        return None

    def calibrate(self, *inputs: Any) -> None:
        """Fit the layer, at its start, to the features that `forward` takes; layers without a `calibrate` have none to fit."""
        raise NotImplementedError(f"{type(self).__name__} has nothing to calibrate.")

    def spec(self) -> Spec:
        """The description of this layer; `build` makes a new one from it."""
        raise NotImplementedError(f"{type(self).__name__} has no spec: define one to save it to a file.")
