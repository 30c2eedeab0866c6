"""Every family of timm, by its smallest architecture; every architecture planned. Writes benchmarks/coverage.md."""

import copy
import os
import platform
from collections import Counter
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import drifa_attn
from drifa_attn import Plan
from drifa_attn.layout import positions
from drifa_attn.trees import tensors_in
from drifa_attn.wrapping.inject import hooks

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

FAMILIES = timm.list_modules()
REPORT = Path(__file__).parent.parent / "benchmarks" / "coverage.md"
WAYS = ("stage", "block")


@pytest.fixture(scope="module")
def coverage():
    """What the tests found, by family; written as the report if every family was run."""
    found = {"plans": {}, "runs": {}, "fused": {}}
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)  # whole networks, unlike the layers
    yield found
    torch.set_num_threads(threads)
    if all(set(part) == set(FAMILIES) for part in found.values()):
        REPORT.write_text(report(found))


def on_meta(name):
    with torch.device("meta"):
        return timm.create_model(name)


@cache
def planned(family):
    """The plans of every architecture of a family, by name and way; in place of a plan, the reason against it."""
    found = {}
    for name in timm.list_models(module=family):
        model = on_meta(name)
        for at in WAYS:
            try:
                plan = drifa_attn.plan(model, at)
            except ValueError as error:
                plan = str(error).partition("\n")[0]
            found.setdefault(name, {})[at] = plan
    return found


def smallest(family):
    """The architecture with the fewest parameters that has a plan."""
    sizes = {
        name: [plan.params for plan in plans.values() if isinstance(plan, Plan)] for name, plans in planned(family).items()
    }
    return min((name for name in sizes if sizes[name]), key=lambda name: min(sizes[name]))


@torch.no_grad()
def images(model):
    """A batch of two, at 160 pixels where the network takes that, or 224, else at its own size; and its output."""
    channels, *own = model.pretrained_cfg["input_size"]
    for size in ((160, 160), (224, 224)):
        x = torch.randn(2, channels, *size)
        try:
            return x, model(x)
        except Exception:  # noqa: BLE001, S112 - networks of one size refuse others in their own ways
            continue
    x = torch.randn(2, channels, *own)
    return x, model(x)


def layouts(sites):
    found = Counter(site.layout + (f", prefix {site.num_prefix_tokens}" if site.num_prefix_tokens else "") for site in sites)
    return "; ".join(f"`{layout}` × {number}" for layout, number in found.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_is_planned_or_refused_with_a_reason(family, coverage):
    plans = planned(family)
    assert list(plans) == timm.list_models(module=family)
    refused = {name: ways["stage"] for name, ways in plans.items() if not any(isinstance(p, Plan) for p in ways.values())}
    assert all(refused.values())
    coverage["plans"][family] = (plans.keys() - refused.keys(), refused)


@pytest.mark.parametrize("family", FAMILIES)
def test_smallest_architecture_of_every_family_wraps_exactly(family, coverage):
    torch.manual_seed(0)
    name = smallest(family)
    model = timm.create_model(name).eval()
    x, expected = images(model)
    state, kind = model.state_dict(), type(model)
    rows = {}
    for at in WAYS:
        try:
            plan = drifa_attn.plan(model, at)
        except ValueError as error:
            rows[at] = (None, str(error).partition("\n")[0])
            continue
        if at == "block" and rows["stage"][0] and rows["stage"][0].sites == plan.sites:
            rows[at] = rows["stage"]  # run already
            continue
        assert drifa_attn.wrap(model, at) is model
        assert type(model) is kind
        check_start(model, x, expected, state, [site.name for site in plan.sites])
        check_copy_trains(model, x)
        drifa_attn.unwrap(model)
        with torch.no_grad():
            assert torch.equal(model(x), expected)
        assert list(model.state_dict()) == list(state)
        rows[at] = (plan, "; ".join(dict.fromkeys(reason for _, reason in plan.skipped)))
    coverage["runs"][family] = (name, rows)
    assert any(plan for plan, _ in rows.values()), rows


@pytest.mark.parametrize("family", FAMILIES)
def test_smallest_architecture_of_every_family_advances_in_lockstep(family, coverage):
    torch.manual_seed(0)
    name = smallest(family)
    model = timm.create_model(name).eval()
    x, _ = images(model)
    try:
        net = drifa_attn.fuse({"a": model, "b": small()}, {"task": 3}, example_inputs={"a": x, "b": x[:, :1, :64, :64]}).eval()
    except ValueError as error:
        coverage["fused"][family] = str(error)
        raise
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(net.features({"a": x, "b": x[:, :1, :64, :64]})["a"], pooled(expected, net.outputs["a"]))
        for fusion in net.fusions:
            for strength in fusion.strengths:
                strength.normal_(std=0.5)
        assert not torch.equal(net.features({"a": x, "b": x[:, :1, :64, :64]})["a"], pooled(expected, net.outputs["a"]))
    coverage["fused"][family] = [sites["a"].name for sites in net.stages]


def small():
    """The other branch: four stages, one channel."""
    layers = [layer for i in range(4) for layer in (nn.Conv2d(1 if i == 0 else 8, 8, 3, 2, 1), nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def pooled(output, site):
    for key in site.path:
        output = output[key]
    return output if output.ndim == 2 else positions(output, site.layout, site.num_prefix_tokens).mean(-1)


def check_start(model, x, expected, state, names):
    """Bit-equal output, one call a site, the original's keys, and its checkpoint loads."""
    fired = []
    handles = [
        hook.attention.register_forward_hook(lambda *_, name=hook.site.name: fired.append(name)) for hook in hooks(model)
    ]
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    for handle in handles:
        handle.remove()
    assert sorted(fired) == sorted(names)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert len(missing) == sum(len(hook.attention.state_dict()) for hook in hooks(model))


def check_copy_trains(model, x):
    """A copy's training step moves every added parameter and leaves the model as it is."""
    trained = copy.deepcopy(model).train()
    with torch.no_grad():
        for hook in hooks(trained):
            hook.attention.strength.normal_(std=0.5)
        for parameter in trained.parameters():  # zero-initialised heads and norms would hide what lies behind them
            if parameter.numel() and not parameter.any():
                parameter.normal_(std=0.1)
    drifa_attn.freeze_backbone(trained, classifier=False)
    added = drifa_attn.attention_parameters(trained)
    before = [parameter.detach().clone() for parameter in added]
    optimizer = torch.optim.Rprop(added, lr=1e-3)  # steps by the gradient's sign: any but zero moves
    sum((output * torch.randn_like(output)).sum() for _, output in tensors_in(trained(x))).backward()
    optimizer.step()
    names = {id(parameter): name for name, parameter in trained.named_parameters()}
    still = [names[id(p)] for p, b in zip(added, before, strict=True) if torch.equal(p, b) or not p.isfinite().all()]
    assert not still
    assert all(not attention.strength.any() for attention in (hook.attention for hook in hooks(model)))


def report(found):
    """The coverage table."""
    planned = sum(len(plans) for plans, _ in found["plans"].values())
    refused = {name: why for _, left in found["plans"].values() for name, why in left.items()}
    wrapped = {at: sum(rows[at][0] is not None for _, rows in found["runs"].values()) for at in WAYS}
    either = sum(any(plan for plan, _ in rows.values()) for _, rows in found["runs"].values())
    fused = {family: stages for family, stages in found["fused"].items() if isinstance(stages, list)}
    lines = [
        "# Coverage of timm",
        "",
        f"Written by `make matrix` on {datetime.now(timezone.utc):%Y-%m-%d}: timm {timm.__version__}, "
        f"torch {torch.__version__}, Python {platform.python_version()}, CPU.",
        "",
        f"- **{either} of {len(FAMILIES)} families** wrapped for real, each by its smallest architecture: "
        f'{wrapped["stage"]} at `at="stage"`, {wrapped["block"]} at `at="block"`. For each: output bit-equal at the start, '
        "the original's keys and checkpoint, one call a site, an independent deep copy, a training step that moves every "
        "added parameter (strengths perturbed first), and after `unwrap` the original output and keys.",
        f"- **{planned} of {planned + len(refused)} architectures** planned, {len(refused)} refused with a reason.",
        f"- **{len(fused)} of {len(FAMILIES)} backbones** advanced by `fuse` in lockstep with another network: features "
        "bit-equal at the start, and other ones once the strengths move.",
        "",
        "A result is `exact` when all of the first held; `fused` counts the stages at which MIFA read the network. What was "
        "skipped, and why, stands in the last column.",
        "",
        "| family | smallest architecture | stage: sites | block: sites | result | fused | planned | skipped or refused |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        name, rows = found["runs"][family]
        plans, left = found["plans"][family]
        cells = [f"{len(plan.sites)}: {layouts(plan.sites)}" if plan else "–" for plan, _ in (rows[at] for at in WAYS)]
        reasons = "; ".join(f"{at}: {reason}" for at, (_, reason) in rows.items() if reason)
        lines.append(
            f"| {family} | {name} | {cells[0]} | {cells[1]} | exact | {len(fused.get(family, []))} "
            f"| {len(plans)}/{len(plans) + len(left)} | {reasons} |"
        )
    lines += [f"\nRefused: {name}: {why}" for name, why in refused.items()]
    lines += [f"\nNot fused: {family}: {why}" for family, why in found["fused"].items() if family not in fused]
    return "\n".join(lines) + "\n"
