"""Records a forward pass of a copy: every module call, and what each tensor depends on.

Shapes and Python control flow are the network's own. On the meta device no number is computed.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from drifa_attn.trees import Path, map_tensors, replace_tensor, tensors_in

from .direction import BACK, direction
from .inputs import Inputs, batch_of, resized
from .modes import own_randomness

Shape = tuple[int, ...]

ADDITIONS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
OTHER_SUMS = {
    *(torch.sub, torch.subtract, Tensor.sub, Tensor.sub_, Tensor.__sub__, Tensor.__rsub__, Tensor.__isub__),
    *(torch.lerp, Tensor.lerp, Tensor.lerp_, torch.addcmul, Tensor.addcmul, Tensor.addcmul_),
}
CONCATENATIONS = {torch.cat, torch.concat, torch.concatenate}
POINTWISE = ADDITIONS | {
    *(F.layer_norm, F.linear, F.dropout, F.gelu, F.relu, F.silu, torch.mul, torch.sub, torch.sigmoid, torch.tanh),
    *(Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__rmul__, Tensor.sub, Tensor.__sub__, Tensor.sigmoid, Tensor.tanh),
    *(Tensor.to, Tensor.float, Tensor.type_as, Tensor.contiguous, Tensor.clone, getattr(F, "rms_norm", F.layer_norm)),
}
MOST_PREFIX = 16  # no published network has more class and register tokens than this


@dataclass
class Dependency:
    """What a tensor depends on, as bit sets of marks.

    Attributes:
        reach: everything it depends on.
        through_positions: what it depends on through positions other than prefix tokens.
        mixed: what was mixed over positions on the way.
    """

    tensor: Tensor  # held, so that its id stays its own
    reach: int = 0
    through_positions: int = 0
    mixed: int = 0


@dataclass
class Output:
    """One tensor of a module's output."""

    shape: Shape
    mark: int
    is_floating: bool


@dataclass
class Call:
    """A module's last call: when it was complete, its input and output, and how many calls there were."""

    order: int
    count: int = 0
    outputs: dict[Path, Output] = field(default_factory=dict)
    input_mark: int = 0
    input_reach: int = 0
    input_shapes: list[Shape] = field(default_factory=list)
    is_dict: bool = False


@dataclass
class Trace:
    """The record of one forward, `calls` by module name."""

    batch: int
    calls: dict[str, Call] = field(default_factory=dict)
    additions: list[tuple[str, int, int]] = field(default_factory=list)  # frame, reach of either operand
    other_sums: set[str] = field(default_factory=set)  # frames that add in other words: a difference, a stack that is summed
    concatenations: set[str] = field(default_factory=set)  # frames
    normed: set[str] = field(default_factory=set)  # modules whose output a norm reads
    causal: set[str] = field(default_factory=set)  # modules in which a position reads those before it alone
    flops: int = 0
    output_reach: int = 0
    output_through_positions: int = 0
    output_producers: set[str] = field(default_factory=set)


def reads_prefix(function: Callable, args: tuple) -> bool:
    """Whether this operation reads only the first few entries of axis 1, as class-token heads do."""
    if function is not Tensor.__getitem__ or args[0].ndim != 3:
        return False
    index = args[1]
    if not isinstance(index, tuple) or len(index) < 2 or index[0] != slice(None):
        return False
    stop = index[1].stop if isinstance(index[1], slice) else index[1] + 1 if isinstance(index[1], int) else None
    return isinstance(stop, int) and 0 < stop <= min(MOST_PREFIX, args[0].shape[1] - 1)


class Tracer(TorchFunctionMode):
    """Records module calls (by hooks on the copy) and what each tensor depends on (by watching every torch function)."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.trace = Trace(batch)
        self.flows: dict[int, Dependency] = {}
        self.frames: list[str] = []
        self.producers: dict[int, set[str]] = {}
        self.stacks: dict[int, Tensor] = {}  # of tensors that depend on the input of the module they are stacked in
        self.directions: dict[int, tuple[Tensor, str]] = {}  # what `direction` said of them
        self.marks = 0

    def flow(self, tensor: Tensor) -> Dependency:
        return self.flows.setdefault(id(tensor), Dependency(tensor))

    def new_mark(self) -> int:
        self.marks += 1
        return 1 << self.marks

    def mark(self, tensor: Tensor, bit: int) -> None:
        flow = self.flow(tensor)
        flow.reach |= bit
        flow.through_positions |= bit

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        inputs = [self.flows[id(t)] for _, t in tensors_in((args, kwargs or {})) if id(t) in self.flows]
        if inputs and self.frames:
            self.note_merge(function, args, result)
        if self.frames:
            self.note_direction(function, args, kwargs or {}, result)
        outputs = [t for _, t in tensors_in(result)]
        name = getattr(function, "__name__", "")
        if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or name.startswith("__i"):
            outputs += [t for t in args[:1] if isinstance(t, Tensor)]
            outputs += [t._base for t in outputs if t._base is not None]
        if inputs:
            self.propagate(function, args, inputs, outputs)
        return result

    def propagate(self, function: Any, args: tuple, inputs: list[Dependency], outputs: list[Tensor]) -> None:
        """The outputs of an operation depend on what its inputs depend on."""
        reach = through = mixed = 0
        for flow in inputs:
            reach, through, mixed = reach | flow.reach, through | flow.through_positions, mixed | flow.mixed
        if reads_prefix(function, args):
            through = mixed
        elif function not in POINTWISE:
            mixed = through
        for tensor in outputs:
            flow = self.flow(tensor)
            flow.reach |= reach
            flow.through_positions |= through
            flow.mixed |= mixed

    def note_merge(self, function: Any, args: tuple, result: Any) -> None:
        """Record a sum or concatenation of two tensors that both depend on the input of the module it stands in."""
        frame = self.frames[-1]
        bit = self.trace.calls[frame].input_mark
        if function in ADDITIONS and isinstance(result, Tensor):
            reaches = [self.flow(t).reach for t in args[:2] if isinstance(t, Tensor) and t.shape == result.shape]
            if len(reaches) == 2 and all(reach & bit for reach in reaches):
                self.trace.additions.append((frame, reaches[0], reaches[1]))
        elif function in CONCATENATIONS and args:
            if sum(bool(self.flow(t).reach & bit) for t in args[0]) > 1:
                self.trace.concatenations.add(frame)
        elif function in OTHER_SUMS and isinstance(result, Tensor):
            summed = [t for t in args if isinstance(t, Tensor) and t.shape == result.shape]
            if sum(bool(self.flow(t).reach & bit) for t in summed) > 1:
                self.trace.other_sums.add(frame)
        elif function is torch.stack and sum(bool(self.flow(t).reach & bit) for t in args[0]) > 1:
            self.stacks[id(result)] = result
        elif function in (torch.sum, Tensor.sum) and self.stacks.get(id(args[0])) is args[0]:
            self.trace.other_sums.add(frame)

    def note_direction(self, function: Any, args: tuple, kwargs: dict, result: Any) -> None:
        """Record an operation by which a position reads those before it alone."""
        found = direction(function, args, kwargs, self.direction_of(args[0]) if args else "")
        if found == BACK:
            self.trace.causal.add(self.frames[-1])
        elif found:
            self.directions[id(result)] = result, found

    def direction_of(self, value: Any) -> str:
        """What `direction` said of a tensor."""
        tensor, found = self.directions.get(id(value), (None, ""))
        return found if tensor is value else ""

    def enter(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before a module's forward."""
        call = self.trace.calls.setdefault(name, Call(order=0))
        call.count += 1
        call.input_mark = self.new_mark()
        call.is_dict |= any(isinstance(value, dict) for value in (*args, *kwargs.values()))
        is_norm = "norm" in type(module).__name__.lower()
        call.input_shapes = []
        for _, tensor in tensors_in((args, kwargs)):
            self.mark(tensor, call.input_mark)
            call.input_reach |= self.flow(tensor).reach
            call.input_shapes.append(tuple(tensor.shape))
            if is_norm:
                self.trace.normed |= self.producers.get(id(tensor), set())
        self.frames.append(name)

    def leave(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """After a module's forward. It gives views of the output: one tensor may stand there twice, or be the input too."""
        self.frames.pop()
        call = self.trace.calls[name]
        call.order = self.marks
        call.is_dict |= isinstance(output, dict)
        inputs = [self.flow(t) for _, t in tensors_in((args, kwargs))]
        call.outputs = {}
        for path, tensor in tensors_in(output):
            if id(tensor) not in self.flows:  # made by something no torch function shows, such as a scripted one
                self.propagate(None, (), inputs, [tensor])
            mark, view = self.new_mark(), tensor.view_as(tensor)
            self.flows[id(view)] = replace(self.flow(tensor), tensor=view)
            self.mark(view, mark)
            self.directions[id(view)] = view, self.direction_of(tensor)
            self.producers[id(view)] = self.producers.get(id(tensor), set()) | {name}
            call.outputs[path] = Output(tuple(tensor.shape), mark, tensor.is_floating_point())
            output = replace_tensor(output, path, lambda _, view=view: view)  # type: ignore[misc]
        return output


class FlopCount(TorchDispatchMode):
    """Counts the FLOPs of products and convolutions by torch's own formulas.

    `FlopCounterMode` does the same, but some networks break its module tracker.
    """

    def __init__(self) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry  # not above: it loads triton where there is one

        self.formulas = flop_registry
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        formula = self.formulas.get(function._overloadpacket)
        self.total += formula(*args, **(kwargs or {}), out_val=result) if formula else 0
        return result


@dataclass
class Traces:
    """Two forwards of a copy, the second one with another batch and, where the network takes it, another image size.

    Attributes:
        inputs: what the first forward took.
        first: its record.
        second: the other record; None if no second forward worked.
        is_resized: whether the second one had another image size.
        error: why no second forward worked.
        seconds: how long both took.
    """

    inputs: Inputs
    first: Trace
    second: Trace | None = None
    is_resized: bool = False
    error: str = ""
    seconds: float = 0.0


def traces(clone: nn.Module, candidates: Sequence[Inputs]) -> Traces:
    """Trace a copy with the first of these inputs that it takes, and once more at another size.

    Raises: the error of the last input, if it takes none of them.
    """
    error: Exception | None = None
    for inputs in candidates:
        started = time.perf_counter()
        try:
            found = Traces(inputs, trace(clone, *inputs))
        except Exception as exception:  # noqa: BLE001 - a network may fail in any way on a guessed input
            error = exception
            continue
        add_second(clone, found)
        found.seconds = time.perf_counter() - started
        return found
    raise error or ValueError("no input to trace with")


def add_second(clone: nn.Module, found: Traces) -> None:
    """Take the second trace: with a larger image, or else with the same one; or say why neither works."""
    for axes in (3, 2, 0):
        inputs = map_tensors(found.inputs, partial(resized, batch=found.first.batch, axes=axes))
        try:
            found.second, found.is_resized = trace(clone, *inputs), axes > 0
            return
        except Exception as exception:  # noqa: BLE001 - the first trace still stands; the survey notes the error
            found.error = f"{type(exception).__name__}: {str(exception).partition(chr(10))[0]}"


def trace(clone: nn.Module, args: tuple, kwargs: dict | None = None) -> Trace:
    """Run one forward of a copy of the network and return its record; the copy keeps no hook.

    The hooks of the tracer come before those that the copy has, which may keep features for later.
    """
    kwargs = kwargs or {}
    tracer = Tracer(batch_of((args, kwargs)))
    with ExitStack() as stack:
        for name, module in clone.named_modules():
            enter, leave = partial(tracer.enter, name), partial(tracer.leave, name)
            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave, with_kwargs=True, prepend=True).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(own_randomness())
        counter = stack.enter_context(FlopCount())
        stack.enter_context(tracer)
        output = clone(*args, **kwargs)
    for _, tensor in tensors_in(output):
        flow = tracer.flow(tensor)
        tracer.trace.output_reach |= flow.reach
        tracer.trace.output_producers |= tracer.producers.get(id(tensor), set())
        tracer.trace.output_through_positions |= flow.through_positions
    tracer.trace.flops = counter.total
    return tracer.trace
