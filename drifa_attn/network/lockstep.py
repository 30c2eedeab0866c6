"""Cutting a network at its stages, so that several networks can advance together: each runs up to a stage, waits, and goes on.

A symbolic trace takes every module that has no stage inside as one step, and so records only the glue between stages. It is
cut after each stage; what later parts still need is handed on. Each part is a plain Python function of the untouched network:
weights, keys, hooks and modes stay the network's own, and `torch.compile` and `torch.export` read it like any other code. What
such a trace cannot follow is refused, and what it follows is compared with the network itself before it is used.
"""

import copy
import importlib
from collections.abc import Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from drifa_attn.trees import map_tensors, tensors_in

from .glue import NotCuttableError, enter, is_out_of_memory, leave, stage_end, traced
from .inputs import Inputs, batch_of, resized


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


def cut(network: nn.Module, stages: Sequence[str], inputs: Inputs) -> list[Part]:
    """The parts of a network between these stages, in its present mode.

    Args:
        network: a copy; one that lives on the meta device takes its inputs there.
        stages: names of modules, in the order of their calls, each called once.
        inputs: what it takes.

    Raises: NotCuttableError: the trace cannot follow the network. Running out of memory is not caught.
    """
    if hasattr(network, "set_grad_checkpointing"):
        network.set_grad_checkpointing(False)  # type: ignore[operator]
    nodes = list(traced(network, stages, inputs).nodes)
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


def check_parts(network: nn.Module, parts: Mapping[bool, Sequence[Part]], stages: Sequence[str], inputs: Inputs) -> None:
    """Check that the parts reproduce the network bit for bit, outputs and state, where the ends of its stages are changed.

    Both run the same instructions on the same operands. This is tried in eval and training mode, at two batch sizes.

    Raises: NotCuttableError: they do not. An error of the network itself, and running out of memory, are not caught.
    """
    more = map_tensors(inputs, partial(resized, batch=batch_of(inputs), axes=0))
    for training in (False, True):
        for given in (inputs, more):
            one, two = (copy.deepcopy(network).train(training) for _ in range(2))
            for name in stages:
                one.get_submodule(name).register_forward_hook(lambda _, args, output: changed(output))
                two.get_submodule(name).register_forward_hook(lambda *_: None)  # torch's layers look whether there are hooks
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.default_generator.manual_seed(0)  # torch.manual_seed would move those of other devices too
                args, kwargs = map_tensors(given, Tensor.clone)
                expected = one(*args, **kwargs)
                torch.default_generator.manual_seed(0)
                actual = run_parts(two, parts[training], map_tensors(given, Tensor.clone))
            pairs = [
                *zip(flat(expected), flat(actual), strict=True),
                *zip(two.state_dict().values(), one.state_dict().values(), strict=True),
            ]
            if not all(torch.equal(a, b) for a, b in pairs):
                mode = "training" if training else "eval"
                raise NotCuttableError(f"cut at its stages it gives another result in {mode} mode, batch {batch_of(given)}")


def run_parts(network: nn.Module, parts: Sequence[Part], inputs: Inputs) -> Any:
    """The network's output by its parts, with the end of every stage changed."""
    try:
        state: tuple[Any, ...] = (enter(network, *inputs),)
        for one in parts[:-1]:
            output, handed = one.run(network, *state)
            state = (changed(output), *handed)
        return leave(network, parts[-1].run(network, *state))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise NotCuttableError(f"cut at its stages it fails ({type(error).__name__}: {error})") from error


def changed(output: Any) -> Any:
    """What stands for a refinement at the end of a stage."""
    return map_tensors(output, lambda t: t * 1.25 if t.is_floating_point() else t)


def flat(tree: Any) -> list[Tensor]:
    """Every tensor of an output."""
    return [tensor for _, tensor in tensors_in(tree)]
