"""The trace of the glue between the stages of a network, on the meta device, with the value of every step known.

`torch.fx` replaces `nn.Module.__call__` and `__getattr__` while it traces, and this file stands in for torch's functions that
take sizes. All of that holds for the thread that traces; other threads get the functions themselves. One trace runs at a time.
"""

import functools
import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from drifa_attn.trees import parts, rebuilt

from .inputs import Inputs

# Functions that take sizes but no tensor: a proxy is no size to them, so they are replaced for the thread that traces.
FACTORIES = (
    "arange",
    "empty",
    "eye",
    "full",
    "linspace",
    "meshgrid",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "tensor",
    "zeros",
)


ONE_TRACE = threading.RLock()  # two traces at once would put back each other's replacements


class NotCuttableError(Exception):
    """The trace met something that it cannot follow."""


def expect(value: Any, traced: Any) -> None:
    """A check at run time: this value was a constant in the trace."""
    if value != traced:
        raise ValueError(
            f"this network was traced with {traced} and now sees {value}: pass example_inputs of the size that you use."
        )


def stage_end(output: Any, index: int) -> Any:
    """Marks in the trace where a stage ends."""
    return output


def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """What a module with stages inside reads: it is not called, but the pre-hooks that it has now run."""
    for key, hook in module._forward_pre_hooks.items():
        if key in module._forward_pre_hooks_with_kwargs:
            result = hook(module, args, kwargs)  # type: ignore[call-arg]
            args, kwargs = result if result is not None else (args, kwargs)
        else:
            result = hook(module, args)
            args = args if result is None else result if isinstance(result, tuple) else (result,)
    return args, kwargs


def leave(module: nn.Module, output: Any) -> Any:
    """What a module with stages inside gives: it is not called, but what it carries now runs.

    That is what its instance's `forward` does after its own (its `finish`), and then its forward hooks. They get no inputs:
    to hand those on to the end of the module would keep them in memory.
    """
    finish = getattr(module.__dict__.get("forward"), "finish", None)
    if finish is not None:
        output = finish(output)
    for key, hook in module._forward_hooks.items():
        with_kwargs = key in module._forward_hooks_with_kwargs
        result = hook(module, (), {}, output) if with_kwargs else hook(module, (), output)  # type: ignore[call-arg]
        output = output if result is None else result
    return output


def own_forward(module: nn.Module) -> Callable:
    """The forward of a module without what `leave` runs."""
    forward = module.__dict__.get("forward")
    if forward is None or not hasattr(forward, "finish"):
        return module.forward
    return forward.own or functools.partial(type(module).forward, module)


class ValueProxy(fx.Proxy):
    """A proxy with a known value, on the meta device; using it as a Python number adds a check at run time."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, value: Any) -> None:
        super().__init__(node, tracer)
        self.value = value

    def number(self, kind: Callable) -> Any:
        if isinstance(self.value, Tensor):
            raise NotCuttableError("its control flow depends on the values of a tensor")
        self.tracer.create_proxy("call_function", expect, (self, self.value), {})
        return kind(self.value)

    def __bool__(self) -> bool:
        return self.number(bool)

    def __int__(self) -> int:
        return self.number(int)

    def __index__(self) -> int:
        return self.number(operator.index)

    def __float__(self) -> float:
        return self.number(float)

    def __len__(self) -> int:
        size = self.shape[0] if isinstance(self.value, Tensor) else len(self.value)
        return int(size)

    def __iter__(self) -> Iterator[Any]:
        return iter([self[i] for i in range(len(self))])  # type: ignore[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.value, name)
        if callable(attribute) and not isinstance(attribute, Tensor | torch.dtype):
            return lambda *args, **kwargs: self.tracer.create_proxy("call_method", name, (self, *args), kwargs)
        if attribute is None or isinstance(attribute, str | bool):
            return attribute
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})


class GlueTracer(fx.Tracer):
    """Traces a network down to the modules without a stage inside, each step's value known."""

    proxy_buffer_attributes = True

    def __init__(self, stages: Sequence[str], inputs: tuple) -> None:
        super().__init__()
        self.stages = [f"network.{name}" for name in stages]
        self.inputs = iter(inputs)
        self.computes = False  # a step's value: everything runs as it is
        self.context = self.modes()
        self.thread: int | None = threading.get_ident()

    @staticmethod
    def modes() -> tuple[bool, ...]:
        return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not any(stage.startswith(f"{module_qualified_name}.") for stage in self.stages)

    @property
    def is_recording(self) -> bool:
        """Whether what is called now belongs to the trace: not in another thread, nor while a step's value is computed."""
        return not self.computes and threading.get_ident() == self.thread

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        if not self.is_recording:
            return forward(*args, **kwargs)
        name = self.path_of_module(m)
        if name == "network":  # who runs the parts runs what the network itself carries
            output = own_forward(m)(*args, **kwargs)
        elif self.is_leaf_module(m, name):
            output = self.create_proxy("call_module", name, args, kwargs)
        else:
            module = self.create_proxy("get_attr", name, (), {})
            args, kwargs = chosen((args, kwargs), self.create_proxy("call_function", enter, (module, args, kwargs), {}))
            output = self.create_proxy("call_function", leave, (module, own_forward(m)(*args, **kwargs)), {})
        if name in self.stages:
            output = self.create_proxy("call_function", stage_end, (output, self.stages.index(name)), {})
        return output

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict) -> Any:
        return super().getattr(attr, attr_val, parameter_proxy_cache) if self.is_recording else attr_val

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and a not in self.tensor_attrs:
            raise NotCuttableError("its forward uses a tensor that it does not hold as an attribute")
        return super().create_arg(plain(a))

    def create_proxy(self, kind: str, target: Any, args: tuple, kwargs: dict, *_: Any, **__: Any) -> Any:
        if self.modes() != self.context:
            raise NotCuttableError("its forward switches gradients or autocast on or off between stages")
        node = self.create_node(kind, target, self.create_arg(args), self.create_arg(kwargs))
        value = self.compute(kind, target, values(args), values(kwargs))
        return ValueProxy(node, self, value) if kind == "placeholder" else self.known(node, value)  # fx would flatten a nesting

    def compute(self, kind: str, target: Any, args: tuple, kwargs: dict) -> Any:
        """The value of a step."""
        self.computes = True
        try:
            if kind == "placeholder":
                return next(self.inputs)
            if kind == "get_attr":
                return operator.attrgetter(target)(self.root)
            if kind == "call_module":
                return self.root.get_submodule(target)(*args, **kwargs)
            if kind == "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            return target(*args, **kwargs) if kind == "call_function" else None
        finally:
            self.computes = False

    def known(self, node: fx.Node, value: Any) -> Any:
        """A proxy for a value, or the same nesting of proxies for its parts."""
        if value is None or isinstance(value, str):
            return value
        value = tuple(value) if isinstance(value, torch.Size) else value  # a size holds numbers alone
        inside = parts(value)
        if not inside:
            return value if isinstance(value, tuple | list | dict) else ValueProxy(node, self, value)
        take = operator.getitem if isinstance(value, Mapping | tuple | list) else getattr
        proxies = {key: self.create_proxy("call_function", take, (ValueProxy(node, self, value), key), {}) for key in inside}
        return rebuilt(value, proxies)


def plain(tree: Any) -> Any:
    """The nesting with plain dicts in the place of other mappings, which a graph would read as lists of their keys."""
    inside = {key: plain(value) for key, value in parts(tree).items()}
    return inside if isinstance(tree, Mapping) else rebuilt(tree, inside) if inside else tree


def chosen(given: Any, entered: Any) -> Any:
    """What a module's pre-hooks give in the place of every proxy; constants stay as they were."""
    if isinstance(given, dict):
        return {key: chosen(value, entered[key]) for key, value in given.items()} if len(given) == len(entered) else entered
    if type(given) in (tuple, list):
        pairs = zip(given, entered, strict=False)
        return type(given)(chosen(*pair) for pair in pairs) if len(given) == len(entered) else entered
    return entered if isinstance(given, fx.Proxy) or isinstance(entered, fx.Proxy) and isinstance(given, Tensor) else given


def values(tree: Any) -> Any:
    """The nesting with the value in place of every proxy."""
    if isinstance(tree, ValueProxy):
        return tree.value
    if isinstance(tree, slice):
        return slice(values(tree.start), values(tree.stop), values(tree.step))
    inside = {key: values(value) for key, value in parts(tree).items()}
    return rebuilt(tree, inside) if inside else tree


@contextmanager
def recorded_factories(tracer: GlueTracer) -> Iterator[None]:
    """While tracing, a function that takes sizes is a step like any other, in the thread that traces."""
    saved = {name: getattr(torch, name) for name in FACTORIES}

    def stand_in(function: Callable) -> Callable:
        @functools.wraps(function)
        def record(*args: Any, **kwargs: Any) -> Any:
            if tracer.is_recording and hasattr(tracer, "root"):
                return tracer.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return record

    try:
        for name, function in saved.items():
            setattr(torch, name, stand_in(function))
        yield
    finally:
        for name, function in saved.items():
            setattr(torch, name, function)


class Root(nn.Module):
    """A root above the network, so that the network itself is no root: its hooks and signature stay out of the trace."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, given: Inputs) -> Any:
        args, kwargs = given
        return self.network(*args, **kwargs)


def traced(network: nn.Module, stages: Sequence[str], inputs: Inputs) -> fx.Graph:
    """The graph of the glue, with a `stage_end` after every stage; names of modules in it begin with "network."."""
    tracer = GlueTracer(stages, (inputs,))
    try:
        with ONE_TRACE, recorded_factories(tracer):
            return tracer.trace(Root(network))
    except (MemoryError, torch.OutOfMemoryError, NotCuttableError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise NotCuttableError(f"its forward cannot be traced ({type(error).__name__}: {error})") from error
    finally:
        tracer.thread = None  # whoever kept one of the stand-ins gets the function itself from now on


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch's allocator for the CPU gave up: it raises a plain `RuntimeError`."""
    return "DefaultCPUAllocator" in str(error)
