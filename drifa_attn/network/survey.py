"""Runs copies of a network until one works, and writes down what it found at every module.

Nothing here knows a network by name.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from drifa_attn.layout import Layout
from drifa_attn.trees import tensors_in

from .causal import causal_notes
from .copies import copies
from .features import looked_through
from .inputs import Inputs, candidates, on_cpu, on_meta
from .record import Survey
from .trace import Traces, traces

Prepare = Callable[[nn.Module], object]


def survey(
    model: nn.Module,
    example_input: Any = None,
    *,
    prepare: Prepare | None = None,
    layouts: Mapping[str, Layout] | None = None,
    channels: Mapping[str, Collection[int]] | None = None,
) -> Survey:
    """Survey a network by running its copy; the network itself is untouched.

    The copy without memory runs first. Where that fails, or finds nothing in a network with hooks that are plain functions, it
    runs with copies of those hooks. Where both fail, a small real run is tried on the CPU: two samples of the example, in eval
    mode, with random numbers of its own.

    Args:
        model: the network.
        example_input: a tensor, a tuple of arguments or a dict of keyword arguments; None tries the network's own size.
        prepare: takes out of the copy what is to be left out.
        layouts: the layouts of modules where they are known.
        channels: the channels of modules where they are known.

    Raises: ValueError: the network cannot be copied or run.
    """
    inputs = candidates(model, example_input)
    failures: dict[str, Exception] = {}
    blind = None
    for is_real, is_whole, clone in copies(model):
        seen = clone if isinstance(clone, Exception) else seen_by(clone, inputs, prepare, is_real)
        if isinstance(seen, Exception) or isinstance(clone, Exception):
            failures.setdefault("on the CPU" if is_real else "on the meta device", seen)  # type: ignore[arg-type]
            continue
        record = read(clone, is_real, seen, layouts or {}, channels or {}, failures)
        record.notes += causal_notes(record, dict(model.named_buffers()), example_input)
        if is_whole or any(found.sites for found in record.found.values()):
            return record
        blind = blind or record
    if blind is not None:
        return blind
    raise refusal(type(model).__name__, inputs, example_input is not None, failures) from next(iter(failures.values()))


def seen_by(clone: nn.Module, inputs: Sequence[Inputs], prepare: Prepare | None, is_real: bool) -> Traces | Exception:
    """The traces of a copy, or the error that running it raised."""
    if prepare is not None:
        prepare(clone)
    try:
        return traces(clone, [(on_cpu if is_real else on_meta)(one) for one in inputs])
    except Exception as error:  # noqa: BLE001 - a network may fail in any way; the message names the error
        return error


def refusal(title: str, inputs: Sequence[Inputs], is_given: bool, failures: Mapping[str, Exception]) -> ValueError:
    """The message for a network of which no copy runs."""
    tried = ", ".join(str([tuple(tensor.shape) for _, tensor in tensors_in(one)]) for one in inputs)
    errors = " or ".join(f"{where} ({type(error).__name__}: {error})" for where, error in failures.items())
    advice = "check" if is_given else "pass"
    return ValueError(
        f"{title} could not be traced with inputs {tried} {errors}: {advice} example_input=, or wrap the part that maps a "
        "tensor to features, such as a detector's .backbone."
    )


def read(
    clone: nn.Module,
    is_real: bool,
    taken: Traces,
    layouts: Mapping[str, Layout],
    channels: Mapping[str, Collection[int]],
    failures: Mapping[str, Exception],
) -> Survey:
    """The record of a network from the traces of its copy."""
    stated: dict[str, list[int]] = {}
    for name, width in feature_entries(clone):
        stated.setdefault(name, []).append(width)
    modules = dict(clone.named_modules())
    record = Survey(
        type(clone).__name__,
        clone,
        modules,
        is_real,
        taken.inputs,
        taken.first,
        taken.second,
        taken.is_resized,
        stated,
        layouts,
    )
    known = stated | dict(channels)
    for name in taken.first.calls:
        record.found[name] = looked_through(record, name, known.get(name, ()), layouts.get(name))
    if taken.second is None:
        record.notes += (f"only one forward worked, so layouts are less certain ({taken.error})",)
    if is_real and failures:
        record.notes += (cost_note(clone, taken, next(iter(failures.values()))),)
    return record


def cost_note(clone: nn.Module, taken: Traces, error: Exception) -> str:
    """What the run on the CPU took, and why it was needed."""
    size = sum(t.numel() * t.element_size() for t in (*clone.parameters(), *clone.buffers())) / 2**20
    reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.100}"
    return f"a copy of {size:.1f} MiB ran on the CPU for {taken.seconds:.1f} s: the meta device cannot run it ({reason})"


def feature_entries(model: nn.Module) -> Iterator[tuple[str, int]]:
    """The `feature_info` of a network or of a part of it, its module names as they are in the network."""
    names = {name for name, _ in model.named_modules()}
    for prefix, module in model.named_modules():
        info: Any = getattr(module, "feature_info", None)
        entries = info.get_dicts() if hasattr(info, "get_dicts") else info
        if not isinstance(entries, list | tuple):
            continue
        found = []
        for entry in entries:
            spellings = [entry.get("module") or "", (entry.get("module") or "").replace(".", "_")]
            full = next((n for s in spellings if s and (n := f"{prefix}.{s}".lstrip(".")) in names), None)
            found += [(full, entry.get("num_chs"))] if full else []
        if found:
            yield from found
            return
