"""Attention for a pretrained network in one line, and what it is worth: run it with `make demo`.

A ResNet-18 learns the digits 0-4, which makes it "pretrained" without a download. Then its weights stay as they are and it has
to tell 5-9 apart from 224 images: once with only a new head, once with drifa_attn and the new head.
"""

import argparse
import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean, stdev

import timm
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, TensorDataset

import drifa_attn

# Chosen on the validation images, the head's rate as the best one for the head alone. Attention gains more at a higher rate of
# its own, but then its sigmoids saturate: the gates become constants and no longer look at the image.
EPOCHS, HEAD_RATE, ATTENTION_RATE = 30, 0.05, 0.01
PRETRAINING_EPOCHS, PRETRAINING_RATE = 5, 0.003
HEAD, ATTENTION = "head only", "attention + head"
COLOURS = {HEAD: "#7f8c9b", ATTENTION: "#b2182b"}

Images = tuple[Tensor, Tensor]  # grey pixels b 1 32 32, classes b
Groups = list[tuple[Iterable[nn.Parameter], float]]  # parameters and their learning rate


def digits(first: int) -> Images:
    """The five digits from `first` on, of scikit-learn's 1797 scanned ones: 8x8 pixels, upscaled to 32x32."""
    pixels, classes = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    chosen = (classes >= first) & (classes < first + 5)
    pixels = pixels[chosen].float().reshape(-1, 1, 8, 8) / 8 - 1
    return interpolate(pixels, size=32, mode="bilinear"), classes[chosen] - first


def split(images: Images, share: float) -> tuple[Images, Images]:
    """Two parts with the same mix of classes, the first with this share of the images; always the same ones."""
    a, b, c, d = train_test_split(*images, train_size=share, stratify=images[1], random_state=0)
    return (a, c), (b, d)


def train(model: nn.Module, groups: Groups, images: Images, *, epochs: int, seed: int, frozen: bool) -> Iterator[int]:
    """Train the parameters of the groups; yields after every epoch."""
    shuffle = torch.Generator().manual_seed(seed)
    batches = DataLoader(TensorDataset(*images), batch_size=32, shuffle=True, generator=shuffle)
    optimizer = torch.optim.AdamW([{"params": list(parameters)} for parameters, _ in groups])
    rates = [rate for _, rate in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, epochs=epochs, steps_per_epoch=len(batches))
    for epoch in range(1, epochs + 1):
        # A frozen backbone also stays in eval mode: in training mode its batch norms would go on moving their statistics, and
        # it would no longer be the pretrained network that everyone has and that the small file is for.
        model.train(not frozen)
        for pixels, classes in batches:
            loss = cross_entropy(model(pixels), classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        yield epoch


@torch.inference_mode()
def logits(model: nn.Module, images: Images) -> Tensor:
    """What the network says of the images, in eval mode."""
    return model.eval()(images[0])


def accuracy(model: nn.Module, images: Images) -> float:
    """Per cent of the images that it gets right."""
    return 100 * (logits(model, images).argmax(1) == images[1]).float().mean().item()


def downstream(pretrained: nn.Module, seed: int) -> nn.Module:
    """A copy of the pretrained network with a new head for five new digits: the same head for the same seed."""
    model = copy.deepcopy(pretrained)
    torch.manual_seed(seed)
    model.reset_classifier(5)
    return model


def summary(scores: list[float]) -> str:
    """Their mean and, of several, standard deviation."""
    return f"{mean(scores):.1f} ± {stdev(scores):.1f} %" if len(scores) > 1 else f"{mean(scores):.1f} %"


def draw_gates(axes: Axes, gates: Tensor, site: str, test: Images) -> None:
    """Which channels open for which digit: mean gates `class channel` of one site, less their mean over the digits."""
    shown = gates.var(0).argsort(descending=True)[:64]
    difference = (gates - gates.mean(0))[:, shown]
    opened, digit = difference.max(0)
    columns = sorted(range(len(shown)), key=lambda column: (digit[column].item(), -opened[column].item()))
    limit = difference.abs().max().item()
    image = axes.imshow(difference[:, columns].numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    axes.vlines(digit.bincount(minlength=5).cumsum(0)[:4].numpy() - 0.5, -0.5, 4.5, color="black", linewidth=1)
    axes.hlines([0.5, 1.5, 2.5, 3.5], -0.5, len(shown) - 0.5, color="white", linewidth=4)
    axes.set(
        xticks=[],
        yticks=[],
        xlabel=f"the {len(shown)} of {gates.shape[1]} channels that differ most, by the digit they open for",
    )
    axes.spines[:].set_visible(False)
    axes.figure.colorbar(image, ax=axes, pad=0.01, aspect=30).set_label(f"gate at {site}, less its mean over the digits")
    for row in range(5):
        example = axes.inset_axes((-0.085, 1 - (row + 0.95) / 5, 0.08, 0.9 / 5))
        example.imshow(test[0][test[1] == row][0, 0].numpy(), cmap="gray_r")
        example.set_axis_off()


def draw_curves(axes: Axes, curves: dict[str, list[list[float]]], epochs: list[int], tests: dict[str, list[float]]) -> None:
    """Validation accuracy by epoch, every seed thin and their mean thick; the test accuracy in words."""
    for name, runs in curves.items():
        axes.plot(epochs, list(zip(*runs, strict=True)), color=COLOURS[name], linewidth=0.8, alpha=0.5)
        average = [mean(scores) for scores in zip(*runs, strict=True)]
        axes.plot(epochs, average, color=COLOURS[name], linewidth=3, label=f"{name}: {summary(tests[name])} on the test images")
    axes.set(title="Accuracy on the validation images, per cent", xlabel="epoch")
    axes.legend(frameon=False, loc="lower right", reverse=True)
    axes.spines[["top", "right"]].set_visible(False)


def draw_spread(axes: Axes, gates: dict[str, Tensor]) -> None:
    """How far the gates of each site depend on the digit at all."""
    bars = axes.barh(list(gates), [mean_gates.std(0).mean().item() for mean_gates in gates.values()], color="#2166ac")
    axes.bar_label(bars, fmt="%.4f", padding=4)
    axes.set(title="How far gates differ between the digits, by site", xticks=[])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def main(argv: list[str] | None = None) -> None:
    """Pretrain, wrap, fine-tune, save, reload, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="folder for the picture and the files")
    parser.add_argument("--fast", action="store_true", help="one seed and one epoch of everything: seconds, and no result")
    options = parser.parse_args(argv)
    seeds, epochs, pretraining = (1, 1, 1) if options.fast else (3, EPOCHS, PRETRAINING_EPOCHS)
    options.output.mkdir(parents=True, exist_ok=True)
    picture, small, whole = (options.output / f"quickstart.{suffix}" for suffix in ("png", "safetensors", "pt"))
    console = Console(highlight=False, soft_wrap=True)
    columns = TextColumn("{task.description:<23}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"), TimeElapsedColumn()

    console.rule("1. A pretrained network")
    torch.manual_seed(0)
    pretrained = timm.create_model("resnet18", in_chans=1, num_classes=5)
    known, unseen = split(digits(0), 0.8)
    with Progress(*columns, console=console) as progress:
        groups: Groups = [(pretrained.parameters(), PRETRAINING_RATE)]
        run = train(pretrained, groups, known, epochs=pretraining, seed=0, frozen=False)
        list(progress.track(run, total=pretraining, description="ResNet-18 on digits 0-4"))
    console.print(f"It gets {accuracy(pretrained, unseen):.1f} % of the images of 0-4 right that it has not seen.")

    console.rule("2. Attention in one line")
    training, rest = split(digits(5), 0.25)
    validation, test = split(rest, 1 / 3)
    model = downstream(pretrained, seed=0)
    console.print(str(drifa_attn.plan(model, example_input=test[0][:1])), markup=False)
    before = logits(model, test)
    drifa_attn.wrap(model)
    same = torch.equal(before, logits(model, test))
    console.print(f"Logits of {len(before)} images before and after drifa_attn.wrap(model): equal to the last bit: {same}.")

    console.rule(f"3. Digits 5-9 from {len(training[0])} images, backbone frozen")
    models: dict[str, nn.Module] = {}  # of the first seed
    curves: dict[str, list[list[float]]] = {HEAD: [], ATTENTION: []}
    tests: dict[str, list[float]] = {HEAD: [], ATTENTION: []}
    looks = [epoch for epoch in range(1, epochs + 1) if epoch in (1, epochs) or epoch % 3 == 0]
    with Progress(*columns, console=console) as progress:
        for name, seed in [(name, seed) for name in (HEAD, ATTENTION) for seed in range(seeds)]:
            model = downstream(pretrained, seed)
            groups = [(model.get_classifier().parameters(), HEAD_RATE)]
            if name == ATTENTION:
                drifa_attn.freeze_backbone(drifa_attn.wrap(model))
                groups.append((drifa_attn.attention_parameters(model), ATTENTION_RATE))
            else:
                model.requires_grad_(False).get_classifier().requires_grad_(True)
            run = train(model, groups, training, epochs=epochs, seed=seed, frozen=True)
            steps = progress.track(run, total=epochs, description=f"{name}, seed {seed}")
            curves[name].append([accuracy(model, validation) for epoch in steps if epoch in looks])
            tests[name].append(accuracy(model, test))
            models.setdefault(name, model)

    console.rule("4. Results")
    model = models[ATTENTION]
    drifa_attn.save_attention(model, small, classifier=True)
    torch.save(model.state_dict(), whole)
    fresh = drifa_attn.load_attention(downstream(pretrained, seed=1), small)
    same = torch.equal(logits(model, test), logits(fresh, test))
    maps = drifa_attn.attention_maps(model, test[0])
    gates = {site: torch.stack([gate[test[1] == digit].mean(0) for digit in range(5)]) for site, gate in maps.items()}
    site = max(gates, key=lambda name: gates[name].std(0).mean().item())

    figure = Figure(figsize=(13, 8), layout="constrained")
    panels = figure.subplot_mosaic("gg;cs", height_ratios=[3, 2])
    draw_gates(panels["g"], gates[site], site, test)
    draw_curves(panels["c"], curves, looks, tests)
    draw_spread(panels["s"], gates)
    figure.suptitle("Which channels of a frozen ResNet-18 the attention opens (red) and closes (blue) for which digit", size=16)
    figure.savefig(picture, dpi=150)

    table = Table("trained", f"accuracy on {len(test[0])} test images", "trained parameters")
    for name, scores in tests.items():
        trained = sum(parameter.numel() for parameter in models[name].parameters() if parameter.requires_grad)
        table.add_row(name, summary(scores), f"{trained:,}")
    console.print(table)
    sizes = [f"{path.stat().st_size / 1000:,.0f} kB" for path in (small, whole)]
    console.print(f"The file of attention and head: {sizes[0]}; of the whole network: {sizes[1]}.")
    console.print(f"Logits after drifa_attn.load_attention on a fresh copy: equal to the last bit: {same}.")
    console.print(f"What the gates look at: {picture}")


if __name__ == "__main__":
    main()
