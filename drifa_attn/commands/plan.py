"""Where attention would go in a network of timm, and at what cost. No weight is loaded."""

import argparse
from dataclasses import asdict
from typing import Any

from drifa_attn.wrapping.plan import Plan
from drifa_attn.wrapping.plan import plan as planned
from drifa_attn.wrapping.table import plan_parts

from .arguments import at_least_one
from .networks import example, on_meta
from .show import Table, show, show_json

EXAMPLE = "drifa-attn plan resnet50 --at block --attention eca"


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("network", help="a name of timm")
    parser.add_argument("--at", nargs="+", default=["stage"], help="stage (default), block, conv, a regex, or names of modules")
    parser.add_argument("--attention", default="mfa", help="mfa (default), or a name that timm knows: se, eca, cbam, ...")
    parser.add_argument("--reduction", type=reduction, default=16, help="of mfa: a divisor of the width, or none (default: 16)")
    parser.add_argument("--variant", choices=["paper"], help="the paper's block, RRA, instead of --at and --reduction")
    parser.add_argument("--size", type=at_least_one, help="height and width of the images (default: the network's own)")
    parser.add_argument("--json", action="store_true", help="the plan as JSON")


def reduction(text: str) -> int | None:
    """A divisor of the width, or None."""
    return None if text == "none" else at_least_one(text)


def run(options: argparse.Namespace) -> None:
    """Plan, and show."""
    if options.reduction != 16 and options.attention != "mfa":
        raise ValueError(f"--reduction is of mfa alone, and --attention is {options.attention}: leave it out.")
    model = on_meta(options.network, options.size)
    plan = planned(
        model,
        options.at[0] if len(options.at) == 1 else options.at,
        attention=options.attention,
        variant=options.variant,
        reduction=options.reduction,
        example_input=example(model, options.size),
    )
    if options.json:
        show_json(as_data(options.network, plan))
    else:
        show(Table(*plan_parts(plan), left=3))


def as_data(name: str, plan: Plan) -> dict[str, Any]:
    """A plan in plain values."""
    return {
        "name": name,
        "network": plan.network,
        "at": plan.at,
        "attention": {"name": plan.spec.name, "options": dict(plan.spec.options)},
        "sites": [{"name": site.name, **asdict(site)} for site in plan.sites],
        "skipped": [{"name": name, "reason": reason} for name, reason in plan.skipped],
        "notes": list(plan.notes),
        "params": plan.params,
        "flops": plan.flops,
    }
