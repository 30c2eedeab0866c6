"""What a file of `save_attention` holds, and for which network it is."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from drifa_attn.files.format import read
from drifa_attn.files.recipe import site_of
from drifa_attn.files.source import SCHEME, located
from drifa_attn.wrapping.table import count, layout_text

from .show import Table, show, show_json

EXAMPLE = "drifa-attn inspect attention.safetensors"


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("file", help="of save_attention, a folder of save_pretrained, or hf://user/name")
    parser.add_argument("--json", action="store_true", help="the plan and the shapes of all tensors as JSON")


def run(options: argparse.Namespace) -> None:
    """Read, and show."""
    plan, tensors = read(located(options.file))
    try:
        notes = [*held(plan, tensors), loading(plan, options.file)]
        title = f"{options.file}: attention of {plan['network']}"
        whole = Table(title, ("site", "features", "layout", "channels"), rows(plan), notes, left=3)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{options.file} has a plan that was changed after save_attention wrote it: {error!r}.") from error
    if options.json:
        shapes = {name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype)[6:]} for name, tensor in tensors.items()}
        show_json({"plan": plan, "tensors": shapes})
    else:
        show(whole)


def rows(plan: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The sites of a wrapped network, or those at which a fused one reads each of its branches."""
    fused = plan.get("fused")
    if fused is None:
        found = [("", entry) for entry in plan["sites"]]
    else:
        stages = enumerate(fused["stages"])
        found = [(f"stage {k}, {name}: ", entry) for k, stage in stages for name, entry in stage.items()]
        branches = ((name, branch) for name, branch in fused["branches"].items() if branch)
        found += [(f"within {name}: ", entry) for name, branch in branches for entry in branch["sites"]]
    sites = [(before, site_of(entry)) for before, entry in found]
    return [(f"{a}{s.name}", "×".join(map(str, s.shape)), layout_text(s), str(s.channels)) for a, s in sites]


def held(plan: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """What else the file holds, in words."""
    numbers = sum(tensor.numel() for tensor in tensors.values())
    if "fused" in plan:
        tasks = ", ".join(f"{task} ({classes} classes)" for task, classes in plan["fused"]["tasks"].items())
        kind = f"a fusion of {', '.join(plan['fused']['branches'])} for {tasks}, {options_text(plan['fused']['options'])}"
    else:
        kind = f"attention {plan['attention']['name'] or 'in the code of the network'}"
        kind += f"({options_text(plan['attention']['options'])})"
    modules = ", ".join(plan["classifier"]) or "none"
    statistics = "with" if plan["batch_norm"] else "without"
    return [
        kind,
        f"{len(tensors)} tensors of {count(numbers)} numbers; modules besides attention: {modules}; {statistics} the "
        "statistics of batch norms",
    ]


def options_text(options: Mapping[str, Any]) -> str:
    """Options as arguments."""
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def loading(plan: Mapping[str, Any], file: str) -> str:
    """The call that loads the file."""
    name = file if file.startswith(SCHEME) else Path(file).name
    if "fused" in plan:
        names = ", ".join(f'"{name}": ...' for name in plan["fused"]["branches"])
        return f'load it: drifa_attn.load_attention({{{names}}}, "{name}")'
    return f'load it: drifa_attn.load_attention(network, "{name}"), where network is the same {plan["network"]}, unwrapped'
