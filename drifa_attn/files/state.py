"""Which part of a network's state dict a file holds, and how it gets back."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from drifa_attn.fusion import Fused
from drifa_attn.wrapping.active import attentions
from drifa_attn.wrapping.inject import detach

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def chosen_state(model: nn.Module, modules: Sequence[str], norms: Sequence[str]) -> dict[str, Tensor]:
    """The attention of a network, named modules, and the statistics of named batch norms; a shared tensor only once."""
    added = {id(tensor) for part in added_parts(model) for tensor in part.state_dict(keep_vars=True).values()}
    chosen: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        is_asked_for = any(name.startswith(f"{module}.") for module in modules)
        norm, _, last = name.rpartition(".")
        is_statistic = last in STATISTICS and norm in norms
        if id(tensor) in added or is_asked_for or is_statistic:
            chosen.setdefault(id(tensor), (name, tensor.detach()))
    return dict(chosen.values())


def added_parts(model: nn.Module) -> list[nn.Module]:
    """The attention of a network; of a fused one, whose readout is among it, also its heads."""
    return [*attentions(model).values(), *((model.heads,) if isinstance(model, Fused) else ())]


def check_state(model: nn.Module, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise a `ValueError` unless a file's tensors are those of this part of the network's state, by name and shape."""
    for name in state:
        if name not in tensors:
            raise ValueError(f"the file lacks {name!r}, which {type(model).__name__} has.")
    for name, tensor in tensors.items():
        if name not in state:
            raise ValueError(f"the file holds {name!r}, which {type(model).__name__} does not have, or not as its plan says.")
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"{name!r} is {tuple(tensor.shape)} in the file and {tuple(state[name].shape)} in {type(model).__name__}."
            )


def whole_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of a network; of a tensor with several names those that a checkpoint has, for some are written only once."""
    named: dict[int, dict[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        named.setdefault(id(tensor), {})[name] = tensor.detach()
    state: dict[str, Tensor] = {}
    for same in named.values():
        known = [name for name in same if name in tensors] or list(same)[:1]
        state |= {name: same[name] for name in known}
    return state


def load_state(model: nn.Module, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Load a file's tensors, which are to be those `expected` of the network; if that fails, all weights go back and the
    attention that `wrap` put there is taken out.
    """
    own = model.state_dict()
    before = [(tensor, tensor.clone()) for name, tensor in own.items() if name in tensors]
    state = OrderedDict(tensors)
    state._metadata = own._metadata  # type: ignore[attr-defined] # the versions of modules, which some ask for
    try:
        check_state(model, tensors, expected)
        model.load_state_dict(state, strict=False)
    except Exception:
        for tensor, value in before:
            tensor.copy_(value)
        detach(model)
        raise
