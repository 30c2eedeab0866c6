"""How attention gets into a network that does not know of it: a `forward` on the instance, and a child that owns the weights.

A module that carries something has a `forward` of its own, on the instance. It runs the class's forward and then the steps
that the module carries. The class of the module and the names of its weights stay as they are, which a wrapper module would
change. The compiler guards on such a `forward`; it does not guard on forward hooks. The weights are a child module, so that
`state_dict`, `to`, `parameters` and DDP see them, and each call looks the child up by its name: whatever replaces the child
is used.

A network that knows its mask (`mask_from`) carries it in the same way: its `forward` holds the mask while it runs.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from drifa_attn.attention import Refines, Spec, build
from drifa_attn.layout import Place, as_place
from drifa_attn.network.site import Site
from drifa_attn.randomness import forked
from drifa_attn.trees import Path, holds, replace_tensor

from .masking import MaskFrom, Masking
from .norms import forget, remember

Step = Callable[[nn.Module, Any], Any]
STEPS = "drifa_steps"  # the attribute of a module that lists the steps it carries
CHILD = "drifa_attn"
PLACED = "drifa_placed"  # an attribute of attention that `attach` put there


class Carried:
    """A `forward` on the instance: the module's own forward, then each step that the module carries."""

    def __init__(self, module: nn.Module, own: Callable | None) -> None:
        self.module = module
        self.own = own  # an instance forward that was there before, such as accelerate's; None: the class's
        self.masking: Masking | None = None  # what finds the mask of each call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.masking is None:
            return self.run(args, kwargs)
        before = self.masking.enter(args, kwargs)
        try:
            return self.run(args, kwargs)
        finally:
            self.masking.leave(before)

    def run(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The module's own forward, then the steps."""
        if self.own is not None:
            return self.finish(self.own(*args, **kwargs))
        return self.finish(type(self.module).forward(self.module, *args, **kwargs))

    def finish(self, output: Any) -> Any:
        """The output after the steps that the module carries now."""
        for step in getattr(self.module, STEPS, ()):
            output = step(self.module, output)
        return output

    def replicate(self) -> nn.Module:
        """A replica of the module for `nn.DataParallel`, which carries the same steps with weights of its own."""
        replica = type(self.module)._replicate_for_data_parallel(self.module)
        replica.forward = Carried(replica, self.own)
        replica.forward.masking = self.masking
        return replica

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.own or type(self.module).forward.__get__(self.module))

    @property
    def __globals__(self) -> Any:
        raise AttributeError(
            f"torch.jit.script cannot compile what drifa_attn put behind a {type(self.module).__name__}: use torch.jit.trace, "
            "torch.export or torch.compile, or take it out first."
        )


def carried(module: nn.Module) -> Carried:
    """The `forward` with which a module carries; it is put there where there is none."""
    if STEPS not in vars(module):
        forward = Carried(module, vars(module).get("forward"))
        setattr(module, STEPS, [])
        module.forward = forward
        module._replicate_for_data_parallel = forward.replicate  # type: ignore[method-assign, assignment]
    return vars(module)["_replicate_for_data_parallel"].__self__  # another tool may have put its own around `forward`


def carry(module: nn.Module, step: Step, *, first: bool = False) -> None:
    """Let a module carry one more step, as its last or as its first one."""
    carried(module)
    steps = vars(module)[STEPS]
    steps.insert(0 if first else len(steps), step)


def release(module: nn.Module, step: Step | None = None) -> None:
    """Let a module no longer carry this step, or None its mask; without any its `forward` is what it was before the first."""
    steps = vars(module)[STEPS]
    if step is None:
        carried(module).masking = None
    else:
        steps.remove(step)
    if steps or carried(module).masking is not None:
        return
    delattr(module, STEPS)
    del module._replicate_for_data_parallel
    forward = vars(module)["forward"]
    if isinstance(forward, Carried):  # what another tool put around it stays, and finds no step to run
        if forward.own is None:
            del module.forward
        else:
            module.forward = forward.own


def steps_of(module: nn.Module, kind: type) -> list[Any]:
    """The steps of this kind that a module carries."""
    return [step for step in vars(module).get(STEPS, ()) if isinstance(step, kind)]


@dataclass(frozen=True)
class Refinement:
    """A step that passes one tensor of a module's output through the attention below it.

    Attributes:
        child: the attention's name below the module that carries the step.
        beyond: the carrier's name below the module of the site; empty when that is the carrier itself.
        path: where in the output the tensor is.
        place: its channels, layout and size.
        folded: how many rows of the feature belong to each sample.
        label: the name of the site when it was made, for messages.
        masking: what holds the mask of the network's call; None where the attention takes none.
    """

    child: str
    beyond: str
    path: Path
    place: Place
    folded: int
    label: str
    masking: Masking | None = None

    def __call__(self, module: nn.Module, output: Any) -> Any:
        if self.path and not holds(output, self.path):
            raise ValueError(
                f"the attention at {self.label!r} expected a tensor there, but {type(module).__name__} gave "
                f"{type(output).__name__}, which has none: its output was another one when the network was wrapped. Wrap other "
                'modules, at=["..."].'
            )
        attention = self.attention(module)
        if self.masking is None or not getattr(attention, "enabled", True):
            return replace_tensor(output, self.path, attention)
        return replace_tensor(output, self.path, partial(self.masked, attention, self.masking))

    def masked(self, attention: nn.Module, masking: Masking, x: Tensor) -> Tensor:
        """The features x, refined at the positions that are real."""
        mask = masking.mask_of(self.label, x, self.place.layout, self.place.num_prefix_tokens)
        return attention(x) if mask is None else attention(x, mask=mask)

    def attention(self, module: nn.Module) -> nn.Module:
        """What is at the child's name now."""
        return reduce(getattr, self.child.split("."), module)  # type: ignore[arg-type, return-value]

    def site(self, carrier: str) -> Site:
        """The site under the name that its carrier has in a network."""
        module = carrier.removesuffix(self.beyond).removesuffix(".") if self.beyond else carrier
        return Site(module=module, path=self.path, folded=self.folded, **as_place(self.place))


@dataclass(frozen=True, kw_only=True)
class Slot(Site):
    """A site with the place of its attention.

    Attributes:
        carrier: the module that carries the step: of a plain `nn.Sequential` its last step, for timm's gradient checkpointing
            runs the steps without the `Sequential`.
        owner: the module whose child the attention becomes: the carrier, or a module within it.
        is_masked: whether the mask of the network's call is used here.
    """

    carrier: str
    owner: str
    is_masked: bool = False


def placed(model: nn.Module) -> Iterator[tuple[Site, nn.Module]]:
    """Every site that `wrap` made, under its name in this network, with what is there now in the place of its attention."""
    for name, module in model.named_modules():
        for step in steps_of(module, Refinement):
            yield step.site(name), step.attention(module)


def slotted(model: nn.Module) -> Iterator[Slot]:
    """The same sites, each with the modules that carry and own its attention."""
    for name, module in model.named_modules():
        for step in steps_of(module, Refinement):
            site, below = step.site(name), step.child.rpartition(".")[0]
            yield Slot(
                module=site.module,
                path=site.path,
                folded=site.folded,
                carrier=name,
                owner=f"{name}.{below}".strip("."),
                is_masked=step.masking is not None,
                **as_place(site),
            )


def masks(model: nn.Module) -> tuple[MaskFrom | None, list[str]]:
    """What a network finds its mask with, and the names of the sites that use it."""
    steps = [(name, step) for name, module in model.named_modules() for step in steps_of(module, Refinement) if step.masking]
    return (steps[0][1].masking.mask_from if steps else None), [step.site(name).name for name, step in steps]


def attach(
    model: nn.Module, slots: Sequence[Slot], spec: Spec, mask_from: MaskFrom | None = None, *, seed: int | None = None
) -> None:
    """Put attention into every slot of a network; all of it is built before anything changes.

    Its weights follow the seed, or go on from where the global generators are; no global random state is moved.
    """
    masking = None if mask_from is None else Masking(mask_from)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    built = []
    with forked(seed, model), torch.inference_mode(False):  # what is built in inference mode could never be trained
        for slot in sorted(slots, key=lambda slot: order[slot.carrier]):
            attention = build(spec, slot, **factory_kwargs(model, slot.carrier))
            built.append((slot, attention.train(model.get_submodule(slot.carrier).training)))
    for slot, attention in built:
        owner = model.get_submodule(slot.owner)
        child = free_name(owner)
        owner.add_module(child, attention)
        setattr(attention, PLACED, True)
        below = slot.owner.removeprefix(slot.carrier).removeprefix(".")
        beyond = slot.carrier.removeprefix(slot.module).removeprefix(".")
        place = Place(**as_place(slot))
        path = f"{below}.{child}".removeprefix(".")
        held = masking if slot.is_masked else None
        step = Refinement(path, beyond, slot.path, place, slot.folded, slot.name, held)
        carry(model.get_submodule(slot.carrier), step)
    if masking is not None:
        carried(model).masking = masking
    remember(model)


def free_name(owner: nn.Module) -> str:
    """A name for the attention that the owner does not use yet."""
    name, number = CHILD, 1
    while hasattr(owner, name):
        number += 1
        name = f"{CHILD}_{number}"
    return name


def detach(model: nn.Module) -> None:
    """Take everything that `attach` put there out of a network."""
    for module in list(model.modules()):
        for step in steps_of(module, Refinement):
            owner, _, child = step.child.rpartition(".")
            delattr(module.get_submodule(owner), child)
            release(module, step)
        if STEPS in vars(module) and carried(module).masking is not None:
            release(module)
    forget(model)


def factory_kwargs(model: nn.Module, name: str) -> dict[str, Any]:
    """Device and dtype of the weights in a module, or else in the nearest one around it."""
    parts = name.split(".") if name else []
    for i in range(len(parts), -1, -1):
        for parameter in model.get_submodule(".".join(parts[:i])).parameters():
            if parameter.is_floating_point():
                return {"device": parameter.device, "dtype": parameter.dtype}
    return {"device": None, "dtype": None}


def spec_of(attention: nn.Module) -> Spec | None:
    """How to build what is at a site once more; None for what is not of this library."""
    return next((module.spec() for module in attention.modules() if isinstance(module, Refines)), None)
