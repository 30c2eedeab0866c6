"""Every family of timm, by its smallest architecture; every architecture planned. Writes `coverage.md`.

`python -m benchmarks.matrix` takes about half an hour on two cores. It keeps the families that are done in
`outputs/matrix.jsonl`, so that a run which was stopped goes on. Delete that file to begin again.
"""

import copy
import json
import os
import platform
import warnings
from collections import Counter
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from rich.progress import track
from torch import Tensor, nn

import drifa_attn
from drifa_attn import Plan
from drifa_attn.layout import positions
from drifa_attn.network.site import Site
from drifa_attn.trees import at_path, tensors_in
from drifa_attn.wrapping.inject import placed

from .arguments import Parser, output
from .correctness import demand

FAMILIES = timm.list_modules()
VERSIONS = {"timm": timm.__version__, "torch": torch.__version__, "drifa_attn": drifa_attn.__version__}
REPORT = Path(__file__).with_name("coverage.md")
DONE = Path("outputs/matrix.jsonl")
WAYS = ("stage", "block")


def on_meta(name: str) -> nn.Module:
    """A network without memory."""
    with torch.device("meta"):
        return timm.create_model(name)


@cache
def planned(family: str) -> dict[str, dict[str, Plan | str]]:
    """The plans of every architecture of a family, by name and way; in place of a plan, the reason against it."""
    found: dict[str, dict[str, Plan | str]] = {}
    for name in timm.list_models(module=family):
        model = on_meta(name)
        for at in WAYS:
            try:
                plan = drifa_attn.plan(model, at)
            except ValueError as error:
                plan = str(error).partition("\n")[0]
            found.setdefault(name, {})[at] = plan
    return found


def smallest(family: str) -> str:
    """The architecture with the fewest parameters that has a plan."""
    sizes = {
        name: [plan.params for plan in plans.values() if isinstance(plan, Plan)] for name, plans in planned(family).items()
    }
    return min((name for name in sizes if sizes[name]), key=lambda name: min(sizes[name]))


@torch.no_grad()
def images(model: nn.Module) -> tuple[Tensor, Any]:
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


def layouts(sites: Any) -> str:
    """How many sites have each layout."""
    found = Counter(site.layout + (f", prefix {site.num_prefix_tokens}" if site.num_prefix_tokens else "") for site in sites)
    return "; ".join(f"`{layout}` × {number}" for layout, number in found.items())


def plans_of(family: str) -> dict[str, Any]:
    """Which architectures of a family are planned, and why others are refused."""
    plans = planned(family)
    refused = {name: ways["stage"] for name, ways in plans.items() if not any(isinstance(p, Plan) for p in ways.values())}
    return {"planned": sorted(plans.keys() - refused.keys()), "refused": refused}


def wrapped(family: str) -> dict[str, Any]:
    """The smallest architecture of a family, wrapped for real each way: its sites and what was skipped, if all checks hold."""
    torch.manual_seed(0)
    name = smallest(family)
    model = timm.create_model(name).eval()
    x, expected = images(model)
    state = list(model.state_dict())
    rows: dict[str, Any] = {"architecture": name}
    for at in WAYS:
        try:
            plan = drifa_attn.plan(model, at)
        except ValueError as error:
            rows[at] = {"sites": 0, "reason": str(error).partition("\n")[0]}
            continue
        drifa_attn.wrap(model, at)
        check_start(model, x, expected, [site.name for site in plan.sites])
        check_copy_trains(model, x)
        drifa_attn.unwrap(model)
        with torch.no_grad():
            demand(torch.equal(model(x), expected), "after unwrap the output is another one")
        demand(list(model.state_dict()) == state, "after unwrap the keys are others")
        reasons = "; ".join(dict.fromkeys(reason for _, reason in plan.skipped))
        rows[at] = {"sites": len(plan.sites), "layouts": layouts(plan.sites), "reason": reasons}
    return rows


def fused(family: str) -> dict[str, Any]:
    """The smallest architecture of a family advanced in lockstep with another network: at how many stages, or why not."""
    torch.manual_seed(0)
    model = timm.create_model(smallest(family)).eval()
    x, _ = images(model)
    inputs = {"a": x, "b": x[:, :1, :64, :64]}
    try:
        net = drifa_attn.fuse({"a": model, "b": small()}, {"task": 3}, example_inputs=inputs).eval()
    except ValueError as error:
        return {"fused": 0, "reason": str(error)}
    with torch.no_grad():
        expected = pooled(model(x), net.outputs["a"])
        demand(torch.equal(net.features(inputs)["a"], expected), "fused, the features at the start are others")
        for refiner in net.refiners:
            for alpha in refiner.alphas:
                alpha.add_(torch.randn_like(alpha), alpha=0.5)
        demand(not torch.equal(net.features(inputs)["a"], expected), "the alphas move nothing")
    return {"fused": len(net.stages), "reason": ""}


def small() -> nn.Module:
    """The other branch: four stages, one channel."""
    layers = [layer for i in range(4) for layer in (nn.Conv2d(1 if i == 0 else 8, 8, 3, 2, 1), nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def pooled(output: Any, site: Site) -> Tensor:
    """The output as `Fused` pools it."""
    output = at_path(output, site.path)
    return output if output.ndim == 2 else positions(output, site.layout, site.num_prefix_tokens).mean(-1)


def check_start(model: nn.Module, x: Tensor, expected: Tensor, names: list[str]) -> None:
    """The output is equal bit for bit, each site runs once, and only the attention's keys are new."""
    fired: list[str] = []
    handles = [
        attention.register_forward_hook(lambda *_, name=site.name: fired.append(name)) for site, attention in placed(model)
    ]
    with torch.no_grad():
        demand(torch.equal(model(x), expected), "at the start the output is another one")
    for handle in handles:
        handle.remove()
    demand(sorted(fired) == sorted(names), f"attention ran at {sorted(fired)}")


def check_copy_trains(model: nn.Module, x: Tensor) -> None:
    """A copy's training step moves every added parameter and leaves the model as it is."""
    trained = copy.deepcopy(model).train()
    with torch.no_grad():
        for _, attention in placed(trained):
            attention.alpha.add_(torch.randn_like(attention.alpha), alpha=0.5)
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
    demand(not still, f"not trained: {still}")
    demand(all(attention.is_start() for _, attention in placed(model)), "the copy is not independent")


def report(found: dict[str, dict[str, Any]]) -> str:
    """The coverage table."""
    planned = sum(len(row["plans"]["planned"]) for row in found.values())
    refused = {name: why for row in found.values() for name, why in row["plans"]["refused"].items()}
    wrapped = {at: sum(row["wrapped"][at]["sites"] > 0 for row in found.values()) for at in WAYS}
    either = sum(any(row["wrapped"][at]["sites"] for at in WAYS) for row in found.values())
    advanced = sum(row["fused"]["fused"] > 0 for row in found.values())
    lines = [
        "# Coverage of timm",
        "",
        f"Written by `make matrix` on {datetime.now(timezone.utc):%Y-%m-%d}: timm {timm.__version__}, "
        f"torch {torch.__version__}, Python {platform.python_version()}, CPU.",
        "",
        f"- **{either} of {len(FAMILIES)} families** wrapped for real, each by its smallest architecture: "
        f'{wrapped["stage"]} at `at="stage"`, {wrapped["block"]} at `at="block"`. For each, the output is equal bit for bit at '
        "the start, each site runs once, a deep copy is independent, a training step moves every added parameter (alphas "
        "perturbed first), and `unwrap` gives back the original output and keys.",
        f"- **{planned} of {planned + len(refused)} architectures** planned, {len(refused)} refused with a reason.",
        f"- **{advanced} of {len(FAMILIES)} backbones** advanced by `fuse` in lockstep with another network: features are "
        "equal bit for bit at the start, and others once the alphas move.",
        "",
        "A result is `exact` when all of the first held. `fused` counts the stages at which MIFA read the network. The last "
        "column says what was skipped, and why.",
        "",
        "| family | smallest architecture | stage: sites | block: sites | result | fused | planned | skipped or refused |",
        "|---|---|---|---|---|---|---|---|",
        *(line(family, found[family]) for family in FAMILIES),
        *(f"\nRefused: {name}: {why}" for name, why in refused.items()),
        *(f"\nNot fused: {family}: {row['fused']['reason']}" for family, row in found.items() if not row["fused"]["fused"]),
    ]
    return "\n".join(lines) + "\n"


def line(family: str, row: dict[str, Any]) -> str:
    """The table's row of a family."""
    ways = [row["wrapped"][at] for at in WAYS]
    cells = [f"{way['sites']}: {way['layouts']}" if way["sites"] else "–" for way in ways]
    reasons = "; ".join(f"{at}: {way['reason']}" for at, way in zip(WAYS, ways, strict=True) if way["reason"])
    number, left = len(row["plans"]["planned"]), len(row["plans"]["refused"])
    return (
        f"| {family} | {row['wrapped']['architecture']} | {cells[0]} | {cells[1]} | exact | {row['fused']['fused']} "
        f"| {number}/{number + left} | {reasons} |"
    )


def done() -> dict[str, dict[str, Any]]:
    """The families that an earlier run has finished; a `ValueError` if its file is damaged, or of other versions."""
    found: dict[str, dict[str, Any]] = {}
    for number, text in enumerate(DONE.read_text().splitlines() if DONE.exists() else (), 1):
        try:
            family, row = json.loads(text)
            same = row["versions"] == VERSIONS
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{DONE}, line {number}, is damaged ({error}): delete the line to do its family again.") from error
        if not same:
            raise ValueError(f"{DONE} is of {row['versions']}, this is {VERSIONS}: delete the file to begin again.")
        found[family] = row
    return found


def main(arguments: list[str] | None = None) -> None:
    """Run the families that are not done yet, and write the table when all are."""
    parser = Parser("python -m benchmarks.matrix", description=__doc__)
    parser.parse_args(arguments)
    with parser.explained():
        for path in (DONE, REPORT):
            output(str(path))
        found = done()
    torch.set_num_threads(os.cpu_count() or 1)
    DONE.parent.mkdir(exist_ok=True)
    for family in track([family for family in FAMILIES if family not in found], description="families of timm"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[family] = {"plans": plans_of(family), "wrapped": wrapped(family), "fused": fused(family)}
        found[family]["versions"] = VERSIONS
        with DONE.open("a") as file:
            file.write(json.dumps([family, found[family]]) + "\n")
    REPORT.write_text(report(found))


if __name__ == "__main__":
    main()
