"""What `wrap` promises of every network, and a check for each promise.

A check raises `BrokenPromiseError` with what does not hold, or `NotAskedError` where the network itself, not wrapped, cannot do
what is asked.
"""

import copy
import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import drifa_attn
from drifa_attn.network.trace import FlopCount
from drifa_attn.wrapping.inject import placed

from .case import as_call, loss
from .compiled import graphs
from .fingerprint import changes, fingerprint, missing, unequal
from .leaves import difference, is_close
from .trial import NotAskedError, Trial, demand, move_, said

PROMISES = (
    "`plan` says where attention goes and what it costs, and `wrap` does that",
    "at the start the output is equal bit for bit, in eval mode",
    "the same in training mode under the same seed, and batch norms keep the same statistics",
    "the object, its class, its own keys, its attributes and its mode stay, and its checkpoint loads",
    "every weight of the attention gets a gradient once the gates have moved, and no other weight loses its own",
    "moved gates change the output, and `disabled` gives back the original bit for bit",
    "`save_attention` and `load_attention` on a fresh network give the same output bit for bit, and `state_dict` does",
    "a deep copy, and what `torch.save` writes, give the same output bit for bit and are independent",
    "`unwrap` gives back the original: output, keys and attributes",
    "`torch.compile` takes the wrapped network where it takes the bare one: whole where that is whole, else in at most one "
    "graph more for each site",
)


def one_planned(trial: Trial) -> None:
    """The sites are those of the plan, each runs once, and parameters and FLOPs are as many more as the plan says."""
    bare, wrapped = trial.case.bare(), trial.wrapped()
    before = fingerprint(bare)
    plan = trial.plan(bare)
    demand(changes(before, fingerprint(bare)), "plan touched the network")
    demand(difference(trial.output(bare), trial.expected), "plan touched the network")
    names = sorted(site.name for site in plan.sites)
    demand("" if all(name in str(plan) for name in names) else "the printed plan leaves sites out")
    unit = trial.case.unit(wrapped)
    demand(unequal("sites", names, sorted(site.name for site, _ in placed(unit))))
    fired: list[str] = []
    for site, attention in placed(unit):
        attention.register_forward_hook(lambda *_, name=site.name: fired.append(name))
    measured = flops(trial, unit) - flops(trial, trial.case.unit(bare))
    demand(unequal("calls", names, sorted(fired)))
    added = sum(parameter.numel() for parameter in drifa_attn.attention_parameters(unit))
    demand(unequal("parameters", sum(site.params for site in plan.sites), added))
    stated = sum(site.flops for site in plan.sites) * trial.case.samples()
    demand("" if abs(measured - stated) <= 0.02 * stated else f"{stated} FLOPs in the plan, {measured} measured")


@torch.no_grad()
def flops(trial: Trial, unit: nn.Module) -> int:
    """The FLOPs of one forward of what is wrapped, for the example input."""
    args, kwargs = as_call(trial.case.example())
    with FlopCount() as counter:
        unit(*args, **kwargs)
    return counter.total


def two_start(trial: Trial) -> None:
    """The output at the start."""
    demand(difference(trial.output(trial.wrapped()), trial.expected))


def three_training(trial: Trial) -> None:
    """The output at the start, and the buffers afterwards, in training mode."""
    bare, wrapped = trial.case.bare().train(), trial.wrapped().train()
    try:
        expected = trial.case.call(bare, training=True)
    except Exception as error:
        raise NotAskedError(f"the bare network does not run in training mode ({said(error)})") from error
    demand(difference(trial.case.call(wrapped, training=True), expected))
    buffers = dict(wrapped.named_buffers())
    for name, buffer in bare.named_buffers():
        demand(difference(buffers[name], buffer), f"buffer {name}")


def four_kept(trial: Trial) -> None:
    """What stays of the object."""
    bare, wrapped = trial.case.bare(), trial.wrapped()
    keys = list(bare.state_dict())
    demand(unequal("keys", keys, [key for key in wrapped.state_dict() if key in set(keys)]))
    new = {id(parameter) for parameter in drifa_attn.attention_parameters(trial.case.unit(wrapped))}
    own = dict(bare.named_parameters())
    strangers = [name for name, p in wrapped.named_parameters() if name not in own and id(p) not in new]
    demand(f"new parameters that are no attention: {strangers}" if strangers else "")
    demand(missing(fingerprint(bare), fingerprint(wrapped)))
    loaded = wrapped.load_state_dict(bare.state_dict(), strict=False)
    demand(f"the original checkpoint has unexpected keys: {loaded.unexpected_keys}" if loaded.unexpected_keys else "")
    demand("" if all("drifa_attn" in key for key in loaded.missing_keys) else f"missing keys: {loaded.missing_keys}")


def five_gradients(trial: Trial) -> None:
    """Which weights get gradients."""
    bare, wrapped = trial.case.bare(), trial.moved()
    try:
        training = bool(gradients(trial, bare, training=True))
    except Exception:  # noqa: S112 - some networks only run in eval mode
        bare, training = trial.case.bare(), False
    expected = gradients(trial, bare, training=training)
    names = gradients(trial, wrapped, training=training)
    by_name = {id(parameter): name for name, parameter in wrapped.named_parameters()}
    added = drifa_attn.attention_parameters(trial.case.unit(wrapped))
    still = [by_name[id(p)] for p in added if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()]
    demand(f"{len(still)} of {len(added)} weights without a gradient: {', '.join(still[:4])}" if still else "")
    lost = [name for name in expected if name not in names]
    demand(f"{len(lost)} weights of the network lost their gradient: {', '.join(lost[:4])}" if lost else "")


def gradients(trial: Trial, model: nn.Module, *, training: bool) -> list[str]:
    """The names of the weights that a backward pass reaches."""
    total = loss(trial.case.call(model.train(training), training=training))
    if not isinstance(total, Tensor):
        raise NotAskedError("nothing in the output of the bare network has a gradient")
    total.backward()
    return [name for name, parameter in model.named_parameters() if parameter.grad is not None]


def six_disabled(trial: Trial) -> None:
    """The switch."""
    model = trial.network
    demand("" if difference(trial.changed, trial.expected) else "moved gates do not change the output")
    with drifa_attn.disabled(trial.case.unit(model)):
        demand(difference(trial.output(model), trial.expected), "disabled")
    demand(difference(trial.output(model), trial.changed), "after disabled")


def seven_files(trial: Trial) -> None:
    """A file of the attention, and a checkpoint of the whole."""
    model, fresh = trial.network, trial.case.bare()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "attention.safetensors")
        drifa_attn.save_attention(trial.case.unit(model), path)
        drifa_attn.load_attention(trial.case.unit(fresh), path, example_input=trial.case.example())
    demand(difference(trial.output(fresh), trial.changed), "load_attention")
    again = trial.wrapped()
    again.load_state_dict(model.state_dict())
    demand(difference(trial.output(again), trial.changed), "load_state_dict")


def eight_copies(trial: Trial) -> None:
    """Copies in memory and on disk."""
    model, kept = trial.network, False
    for title, copied in (("deepcopy", copy.deepcopy), ("torch.save", saved)):
        try:
            ran = trial.case.bare()
            trial.output(ran)  # some networks hang hooks on themselves that cannot be written
            copied(ran)
        except Exception:  # noqa: S112 - then the wrapped one need not either
            continue
        kept = True
        twin = copied(model)
        demand(difference(trial.output(twin), trial.changed), title)
        move_(trial.case.unit(twin))
        demand("" if difference(trial.output(twin), trial.changed) else "its gates do nothing", title)
        demand(difference(trial.output(model), trial.changed), f"moving the gates of the {title}")
    if not kept:
        raise NotAskedError("the bare network cannot be copied")


def nine_unwrapped(trial: Trial) -> None:
    """The way back."""
    bare, model = trial.case.bare(), trial.moved()
    trial.output(bare)  # some networks note things about themselves when they run
    drifa_attn.unwrap(trial.case.unit(model))
    demand(difference(trial.output(model), trial.expected))
    demand(unequal("keys", list(bare.state_dict()), list(model.state_dict())))
    demand(changes(fingerprint(bare), fingerprint(model)))


def ten_compiled(trial: Trial) -> None:
    """What the compiler's front end makes of it; the code that it would generate is not run."""
    try:
        expected, output = graphs(trial.case.bare(), trial.output)
    except Exception as error:
        raise NotAskedError(f"the bare network does not compile ({said(error)})") from error
    if not is_close(output, trial.expected):
        raise NotAskedError("the bare network, compiled, gives something else")
    count, output = graphs(trial.network, trial.output)
    demand("" if is_close(output, trial.changed) else f"compiled, {difference(output, trial.changed)}")
    sites = len(list(placed(trial.case.unit(trial.network))))
    allowed = expected + sites * (expected > 1)  # where a carrier breaks, what stands behind it is a graph of its own
    demand("" if count <= allowed else f"{count} graphs instead of {expected}")


CHECKS: tuple[Callable[[Trial], None], ...] = (
    one_planned,
    two_start,
    three_training,
    four_kept,
    five_gradients,
    six_disabled,
    seven_files,
    eight_copies,
    nine_unwrapped,
    ten_compiled,
)


def saved(model: nn.Module) -> nn.Module:
    """What `torch.save` writes of a network, read back."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)
