"""The model card of a network's attention: what a repository says of itself, written from the plan and what the user knows."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from drifa_attn.fusion import Fused
from drifa_attn.fusion.plan import features, flops, size
from drifa_attn.network.site import Site
from drifa_attn.wrapping.inject import placed
from drifa_attn.wrapping.table import count, layout_text, share

Row = tuple[Site, int, int]  # a site with the parameters and the FLOPs of its attention


def site_rows(model: nn.Module) -> list[Row]:
    """Where `wrap` put attention into a network, and what it costs there, counted on copies without memory."""
    return [(site, size(layer), flops(layer, features([site])) * site.folded) for site, layer in placed(model)]


def backbone_call(model: nn.Module, backbone: str | None, what: str = "backbone") -> str:
    """The expression that builds a network; a `ValueError` where the network does not say it, and the user did not."""
    config = getattr(model, "pretrained_cfg", None) or {}
    if backbone is None:
        if not config.get("architecture"):
            raise ValueError(
                f"{type(model).__name__} does not say how it is built: pass {what}= as a name of timm, or as the expression "
                "that builds the network."
            )
        backbone = f"{config['architecture']}.{config['tag']}" if config.get("tag") else config["architecture"]
    if "(" in backbone:
        return backbone
    classes = getattr(model, "num_classes", None)
    other = f", num_classes={classes}" if classes and classes != config.get("num_classes", 1000) else ""
    return f'timm.create_model("{backbone}", pretrained=True{other})'


def backbone_calls(model: nn.Module, backbone: Any) -> str:
    """The expression that builds a network, or of a fused one the dict of its branches."""
    if not isinstance(model, Fused):
        if backbone is not None and not isinstance(backbone, str):
            raise TypeError(f"backbone expected a string for one network, got {type(backbone).__name__}.")
        return backbone_call(model, backbone)
    if backbone is not None and (not isinstance(backbone, Mapping) or set(backbone) != set(model.branches)):
        raise TypeError(f"backbone expected {{modality: string}} for {list(model.branches)}, got {backbone!r}.")
    named = {name: (backbone or {}).get(name) for name in model.branches}
    built = [f'"{name}": {backbone_call(model.branches[name], one, f"backbone[{name!r}]")}' for name, one in named.items()]
    return f"{{{', '.join(built)}}}"


def base_model(model: nn.Module, backbone: Any) -> dict[str, Any]:
    """The network on the hub that a timm network says it is, as front matter; nothing where the user says how it is built."""
    config = getattr(model, "pretrained_cfg", None) or {}
    name = config.get("hf_hub_id")
    if not name or backbone is not None or isinstance(model, Fused):
        return {}
    return {"base_model": f"{name}{config['architecture']}.{config['tag']}" if name.endswith("/") else name}


def checked_metrics(metrics: Any) -> dict[str, dict[str, Any]]:
    """The metrics by data set; those without a data set under an empty name."""
    if not isinstance(metrics, Mapping):
        raise TypeError(f"metrics expected {{name: number}} or {{data set: {{name: number}}}}, got {type(metrics).__name__}.")
    plain = {name: value for name, value in metrics.items() if not isinstance(value, Mapping)}
    sets = {name: dict(value) for name, value in metrics.items() if isinstance(value, Mapping)}
    found = {"": plain, **sets} if plain else sets
    for value in (value for values in found.values() for value in values.values()):
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise TypeError(f"metrics expected numbers, or words such as '91.2 ± 0.4', got {value!r}: float(...) makes one.")
    return found


def card_text(
    model: nn.Module,
    plan: Mapping[str, Any],
    left: int,
    *,
    name: str,
    address: str,
    backbone: str,
    license: str | None,
    metrics: Mapping[str, Mapping[str, Any]],
    more: Mapping[str, Any],
) -> str:
    """The whole card: front matter as the hub reads it, then Markdown.

    `plan` is that of the attention's file, `left` the number of trainable weights that are not in it. `address` is that of the
    folder or repository and `backbone` the expression that builds the network, for the lines that load it. `metrics` are by
    data set, and `more` belongs into the front matter.
    """
    sections = [
        f"# {name}",
        about(model, plan),
        *([remark(left)] if left else []),
        "## Load it",
        f"```python\n{loading(plan, backbone, address)}\n```",
        "`load_attention` reads data and executes nothing. `drifa-attn inspect attention.safetensors` prints what the file "
        "holds; `plan.json` says the same to programs.",
        "## Where the attention is, and what it costs",
        *costs(model),
        *(["## Metrics", metrics_table(metrics)] if metrics else []),
    ]
    return f"---\n{front_matter(license, metrics, more)}\n---\n\n" + "\n\n".join(sections) + "\n"


def front_matter(license: str | None, metrics: Mapping[str, Mapping], more: Mapping[str, Any]) -> str:
    """The YAML at the head of a card."""
    from huggingface_hub import ModelCardData  # a dependency of timm; importing the package does not need it

    names = list(dict.fromkeys(metric for values in metrics.values() for metric in values))
    data: dict[str, Any] = {"library_name": "drifa_attn", "license": license, "tags": ["attention", "drifa"]}
    return ModelCardData(**data | ({"metrics": names} if names else {}) | dict(more)).to_yaml()


def about(model: nn.Module, plan: Mapping[str, Any]) -> str:
    """What the repository holds, in words."""
    kind = type(model).__name__
    if isinstance(model, Fused):
        what = f"A fusion of {', '.join(model.branches)}, `{plan['fused']['options']['fusion']}`"
    elif plan["sites"]:
        options = ", ".join(f"{key}={value!r}" for key, value in plan["attention"]["options"].items())
        what = f"Attention `{plan['attention']['name']}({options})` for a `{kind}`"
    else:
        what = f"The attention of a `{kind}`"
    others = ["the readout and the heads"] if isinstance(model, Fused) else []
    others += [f"`{name}`" for name in plan["classifier"]]
    others += [f"the statistics of {len(plan['batch_norm'])} batch norms"] if plan["batch_norm"] else []
    beside = f", beside it {', '.join(others)}" if others else ""
    return (
        f"{what}, by drifa_attn ([DRIFA, WACV 2025](https://arxiv.org/abs/2412.01248)). This repository holds the attention"
        f"{beside}, and not the other weights of the network."
    )


def remark(left: int) -> str:
    """What a reader must know of weights that are not in the file."""
    return (
        f"When this was written, {count(left)} weights of the network that are not in the file could be trained. If they were, "
        "the lines below give another network."
    )


def loading(plan: Mapping[str, Any], backbone: str, address: str) -> str:
    """The lines that load the attention."""
    made = plan.get("attention", {}).get("name", "")
    own = f", attention={callable_name(made)}" if ":" in made else ""
    mask = f", mask_from={callable_name(plan['mask']['mask_from'])}" if "mask" in plan else ""
    imports = "import drifa_attn, timm" if "timm." in backbone else "import drifa_attn"
    return f'{imports}\n\nbackbone = {backbone}\nmodel = drifa_attn.load_attention(backbone, "{address}"{own}{mask})'


def callable_name(written: str) -> str:
    """A callable by its last name, which the reader must have; an ellipsis where it has none."""
    name = re.split(r"[.:]", written)[-1]
    return name if name.isidentifier() else "..."


def costs(model: nn.Module) -> list[str]:
    """The tables of sites with their costs, as paragraphs of Markdown."""
    if isinstance(model, Fused):
        inside = [(name, site_rows(branch)) for name, branch in model.branches.items()]
        tables = [f"Within {name}:\n\n{sites_table(rows)}" for name, rows in inside if rows]
        return [f"```text\n{model.plan}\n```", *tables]
    rows = site_rows(model)
    if not rows:
        return ["It is part of the network's own code."]
    params, whole = sum(row[1] for row in rows), size(model)
    total = (
        f"{len(rows)} sites add {count(params)} parameters ({share(params, whole - params)} of {count(whole - params)}) and "
        f"{count(sum(row[2] for row in rows))} FLOPs per sample."
    )
    return [sites_table(rows), total]


def sites_table(rows: Sequence[Row]) -> str:
    """The sites as a table of Markdown."""
    cells = [
        (f"`{s.name}`", "×".join(map(str, s.shape)), f"`{layout_text(s)}`", str(s.channels), count(params), count(flops))
        for s, params, flops in rows
    ]
    return markdown(("site", "features", "layout", "channels", "parameters", "FLOPs"), cells)


def metrics_table(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """The metrics as a table of Markdown."""
    rows = [(name or "–", metric, str(value)) for name, values in metrics.items() for metric, value in values.items()]
    return markdown(("data", "metric", "value"), rows)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
