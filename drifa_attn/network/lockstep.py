"""Cutting a network at its stages, so that several can advance together: each runs up to a stage, waits, and goes on.

A symbolic trace that takes every module without a stage inside as one step records only the glue between stages. It is cut
after each stage; what later parts still need is handed on. Each part is a plain Python function of the untouched network:
its weights, keys, hooks and modes stay its own, and `torch.compile` and `torch.export` read it like any other code. What
such a trace cannot follow is refused, and what it follows is compared with the network itself before it is used.
"""

import copy
import functools
import importlib
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from drifa_attn.trees import map_tensors, tensors_in
from drifa_attn.wrapping.inject import AttentionHook

# Functions that take sizes but no tensor: a proxy is no size to them, so they are stood in for while tracing.
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


class NotCuttableError(Exception):
    """The trace met something that it cannot follow."""


def expect(value: Any, traced: Any) -> None:
    """A step of a cut network where the trace took a branch, or a size for a number: it holds for that value alone."""
    if value != traced:
        raise ValueError(f"a fused network was cut where {traced} held, got {value}: fuse it with example_inputs of this size.")


def stage_end(output: Any, index: int) -> Any:
    """Marks in the trace where a stage ends."""
    return output


def left(module: nn.Module, output: Any) -> Any:
    """Where a module with stages inside ends: it is not called, but attention that `wrap` put there, at any time, works."""
    for hook in module._forward_hooks.values():
        if isinstance(hook, AttentionHook):
            output = hook(module, (), output)
    return output


class Known(fx.Proxy):
    """A proxy that knows the value it stands for, on the meta device; a number it must give away becomes an expectation."""

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

    @staticmethod
    def modes() -> tuple[bool, ...]:
        return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not any(stage.startswith(f"{module_qualified_name}.") for stage in self.stages)

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        if self.computes:
            return forward(*args, **kwargs)
        name = self.path_of_module(m)
        output = super().call_module(m, forward, args, kwargs)
        if name != "network" and not self.is_leaf_module(m, name):
            output = self.create_proxy("call_function", left, (self.create_proxy("get_attr", name, (), {}), output), {})
        if name in self.stages:
            output = self.create_proxy("call_function", stage_end, (output, self.stages.index(name)), {})
        return output

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict) -> Any:
        return attr_val if self.computes else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and a not in self.tensor_attrs:
            raise NotCuttableError("its forward uses a tensor that it does not hold as an attribute")
        return super().create_arg(a)

    def create_proxy(self, kind: str, target: Any, args: tuple, kwargs: dict, *_: Any, **__: Any) -> Any:
        if self.modes() != self.context:
            raise NotCuttableError("its forward switches gradients or autocast on or off between stages")
        node = self.create_node(kind, target, self.create_arg(args), self.create_arg(kwargs))
        return self.known(node, self.compute(kind, target, values(args), values(kwargs)))

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
        if isinstance(value, tuple | list | dict):
            keys = value if isinstance(value, dict) else range(len(value))
            parts = {
                key: self.create_proxy("call_function", operator.getitem, (Known(node, self, value), key), {}) for key in keys
            }
            return parts if isinstance(value, dict) else (list if isinstance(value, list) else tuple)(parts.values())
        return Known(node, self, value)


def values(tree: Any) -> Any:
    """The nesting with the value in place of every proxy."""
    if isinstance(tree, Known):
        return tree.value
    if isinstance(tree, slice):
        return slice(values(tree.start), values(tree.stop), values(tree.step))
    if isinstance(tree, dict):
        return {key: values(value) for key, value in tree.items()}
    return type(tree)(map(values, tree)) if type(tree) in (tuple, list) else tree


@contextmanager
def recorded_factories(tracer: GlueTracer) -> Iterator[None]:
    """While tracing, a function that takes sizes is a step like any other."""
    saved = {name: getattr(torch, name) for name in FACTORIES}

    def stand_in(function: Callable) -> Callable:
        @functools.wraps(function)
        def record(*args: Any, **kwargs: Any) -> Any:
            plain = tracer.computes or not hasattr(tracer, "root")
            return function(*args, **kwargs) if plain else tracer.create_proxy("call_function", function, args, kwargs)

        return record

    try:
        for name, function in saved.items():
            setattr(torch, name, stand_in(function))
        yield
    finally:
        for name, function in saved.items():
            setattr(torch, name, function)


class Whole(nn.Module):
    """A root above the network, so that the network itself is no root: its hooks and signature stay out of the trace."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        return self.network(x)


class Part:
    """One part of a cut network: a function of the network, of the stage's output and of what was handed on."""

    def __init__(self, source: str, names: Mapping[str, Any]) -> None:
        self.source, self.names = source, dict(names)
        scope = dict(names)
        exec(compile(source, "<part of a cut network>", "exec"), scope)
        self.run = scope["forward"]

    def __reduce__(self) -> tuple:
        names = {key: (True, v.__name__) if isinstance(v, ModuleType) else (False, v) for key, v in self.names.items()}
        return restored, (self.source, names)

    def __deepcopy__(self, memo: dict) -> "Part":
        return self  # it holds no state


def restored(source: str, names: Mapping[str, tuple[bool, Any]]) -> Part:
    """A part out of a pickle."""
    return Part(source, {key: importlib.import_module(v) if is_module else v for key, (is_module, v) in names.items()})


def cut(network: nn.Module, stages: Sequence[str], x: Tensor) -> list[Part]:
    """The parts of a network between these stages, in its present mode.

    Args:
        network: on the meta device, as `x`.
        stages: names of modules, in the order of their calls, each called once.
        x: an input.

    Raises: NotCuttableError: the trace cannot follow the network; any other error: nor could its forward be traced at all.
    """
    if hasattr(network, "set_grad_checkpointing"):
        network.set_grad_checkpointing(False)  # type: ignore[operator]
    tracer = GlueTracer(stages, (x,))
    with recorded_factories(tracer):
        graph = tracer.trace(Whole(network))
    nodes = list(graph.nodes)
    ends = [i for i, node in enumerate(nodes) if node.target is stage_end]
    found = [nodes[i].args[1] for i in ends]
    if found != list(range(len(stages))):
        raise NotCuttableError(f"its stages end in the order {[stages[i] for i in found]}, not {list(stages)}")
    parts = []
    handed: list[fx.Node] = [node for node in nodes if node.op == "placeholder"]
    for start, end in zip([-1, *ends], [*ends, len(nodes) - 1], strict=True):
        output = nodes[end]
        needed = {used for node in nodes[end + 1 :] for used in node.all_input_nodes}
        rest = [n for n in nodes[:end] if n in needed and n.op != "get_attr"]
        given = handed if start < 0 else [nodes[start], *handed]
        parts.append(part(given, nodes[start + 1 : end], output.args[0], rest if end != len(nodes) - 1 else None))
        handed = rest
    return parts


def part(given: Sequence[fx.Node], body: Sequence[fx.Node], result: Any, rest: Sequence[fx.Node] | None) -> Part:
    """The function that runs these nodes and returns the result, with the rest that later parts need unless it is None."""
    graph, copies = fx.Graph(), {}
    for i, node in enumerate(given):
        copies[node] = graph.placeholder(f"given_{i}")

    def local(node: fx.Node) -> fx.Node:
        if node not in copies and node.op == "get_attr":
            copies[node] = graph.get_attr(node.target.removeprefix("network."))  # type: ignore[union-attr]
        return copies[node]

    for node in body:
        if node.op not in ("placeholder", "get_attr"):
            copies[node] = graph.node_copy(node, local)
            if node.op == "call_module":
                copies[node].target = node.target.removeprefix("network.")  # type: ignore[union-attr]
    outputs = fx.node.map_arg(result, local)
    graph.output(outputs if rest is None else (outputs, tuple(local(node) for node in rest)))
    code = graph.python_code("self")
    return Part(code.src, code.globals)


def check_parts(network: nn.Module, parts: Mapping[bool, Sequence[Part]], stages: Sequence[str], x: Tensor) -> None:
    """Raise a `NotCuttableError` unless the parts do to the bit what a copy of the network does, its stages' ends changed.

    In eval and training mode, at two batch sizes, outputs and state.
    """

    def changed(output: Any) -> Any:
        return map_tensors(output, lambda t: t * 1.25 if t.is_floating_point() else t)

    for training in (False, True):
        for batch in (len(x), len(x) + 1):
            sample = torch.cat([x, x[:1]])[:batch]
            one, two = (copy.deepcopy(network).train(training) for _ in range(2))
            for name in stages:
                one.get_submodule(name).register_forward_hook(lambda _, args, output: changed(output))
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(0)
                expected = one(sample.clone())
                torch.manual_seed(0)
                output, handed = parts[training][0].run(two, sample.clone())
                for middle in parts[training][1:-1]:
                    output, handed = middle.run(two, changed(output), *handed)
                actual = parts[training][-1].run(two, changed(output), *handed)
            pairs = [
                *zip(flat(expected), flat(actual), strict=True),
                *zip(two.state_dict().values(), one.state_dict().values(), strict=True),
            ]
            if not all(torch.equal(a, b) for a, b in pairs):
                mode = "training" if training else "eval"
                raise NotCuttableError(f"cut at its stages it gives another result in {mode} mode, batch {batch}")


def flat(tree: Any) -> Iterable[Tensor]:
    """Every tensor of an output."""
    return [tensor for _, tensor in tensors_in(tree)]
