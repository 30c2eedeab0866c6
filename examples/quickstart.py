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
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
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
COSTS = {HEAD: 1, ATTENTION: 3}  # of one image: attention needs a backward pass through the frozen network
COLOURS = {HEAD: "#7f8c9b", ATTENTION: "#b2182b"}

Images = tuple[Tensor, Tensor]  # grey pixels b 1 32 32, classes b
Groups = list[tuple[Iterable[nn.Parameter], float]]  # parameters and their learning rate
Scores = dict[str, list[list[float]]]  # accuracies by name, seed and epoch


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


def draw_curves(axes: Axes, curves: Scores, epochs: list[int], tests: dict[str, list[float]]) -> None:
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


class Demo:
    """What the four steps share: the options, the images, and one progress bar over all training.

    The bar counts images. An image that the whole network has to learn from, or pass gradients for, counts three times: that is
    about what it costs.
    """

    def __init__(self, output: Path, *, fast: bool, console: Console, progress: Progress) -> None:
        self.console, self.progress = console, progress
        self.seeds, self.epochs, self.pretraining = (1, 1, 1) if fast else (3, EPOCHS, PRETRAINING_EPOCHS)
        self.picture, self.small, self.whole = (output / f"quickstart.{suffix}" for suffix in ("png", "safetensors", "pt"))
        self.known, self.unseen = split(digits(0), 0.8)
        self.training, rest = split(digits(5), 0.25)
        self.validation, self.test = split(rest, 1 / 3)
        self.looks = [epoch for epoch in range(1, self.epochs + 1) if epoch in (1, self.epochs) or epoch % 3 == 0]
        comparisons = len(self.training[0]) * self.epochs * self.seeds * sum(COSTS.values())
        self.task = progress.add_task("", total=len(self.known[0]) * self.pretraining * COSTS[ATTENTION] + comparisons)

    def followed(self, run: Iterator[int], cost: int, what: str) -> Iterator[int]:
        """The epochs of a training run, told to the bar."""
        self.progress.update(self.task, description=what)
        for epoch in run:
            self.progress.advance(self.task, cost)
            yield epoch

    def pretrain(self) -> nn.Module:
        """Step 1: a ResNet-18 that knows the digits 0-4."""
        self.console.rule("1. A pretrained network")
        torch.manual_seed(0)
        model = timm.create_model("resnet18", in_chans=1, num_classes=5)
        groups: Groups = [(model.parameters(), PRETRAINING_RATE)]
        run = train(model, groups, self.known, epochs=self.pretraining, seed=0, frozen=False)
        list(self.followed(run, len(self.known[0]) * COSTS[ATTENTION], "ResNet-18 on digits 0-4"))
        self.console.print(f"It gets {accuracy(model, self.unseen):.1f} % of new images of 0-4 right.")
        return model

    def wrap(self, pretrained: nn.Module) -> None:
        """Step 2: attention in one line, which changes nothing yet."""
        self.console.rule("2. Attention in one line")
        model = downstream(pretrained, seed=0)
        self.console.print(str(drifa_attn.plan(model, example_input=self.test[0][:1])), markup=False)
        before = logits(model, self.test)
        drifa_attn.wrap(model)
        same = torch.equal(before, logits(model, self.test))
        self.console.print(
            f"Logits of {len(before)} images before and after drifa_attn.wrap(model): equal bit for bit: {same}."
        )

    def compare(self, pretrained: nn.Module) -> tuple[dict[str, nn.Module], Scores, dict[str, list[float]]]:
        """Step 3: learn 5-9 both ways, with every seed. Gives the first models, accuracies by epoch, and those in the test."""
        self.console.rule(f"3. Digits 5-9 from {len(self.training[0])} images, backbone frozen")
        models: dict[str, nn.Module] = {}
        curves: Scores = {HEAD: [], ATTENTION: []}
        tests: dict[str, list[float]] = {HEAD: [], ATTENTION: []}
        for name, seed in [(name, seed) for name in (HEAD, ATTENTION) for seed in range(self.seeds)]:
            model = downstream(pretrained, seed)
            groups: Groups = [(model.get_classifier().parameters(), HEAD_RATE)]
            if name == ATTENTION:
                drifa_attn.freeze_backbone(drifa_attn.wrap(model))
                groups.append((drifa_attn.attention_parameters(model), ATTENTION_RATE))
            else:
                model.requires_grad_(False).get_classifier().requires_grad_(True)
            run = train(model, groups, self.training, epochs=self.epochs, seed=seed, frozen=True)
            steps = self.followed(run, len(self.training[0]) * COSTS[name], f"{name}, seed {seed}")
            curves[name].append([accuracy(model, self.validation) for epoch in steps if epoch in self.looks])
            tests[name].append(accuracy(model, self.test))
            models.setdefault(name, model)
        return models, curves, tests

    def show(self, pretrained: nn.Module, models: dict[str, nn.Module], curves: Scores, tests: dict[str, list[float]]) -> None:
        """Step 4: the files, the table and the picture."""
        self.console.rule("4. Results")
        model = models[ATTENTION]
        drifa_attn.save_attention(model, self.small, classifier=True)
        torch.save(model.state_dict(), self.whole)
        fresh = drifa_attn.load_attention(downstream(pretrained, seed=1), self.small)
        same = torch.equal(logits(model, self.test), logits(fresh, self.test))
        self.draw(model, curves, tests)
        table = Table("trained", f"accuracy on {len(self.test[0])} test images", "trained parameters")
        for name, scores in tests.items():
            trained = sum(parameter.numel() for parameter in models[name].parameters() if parameter.requires_grad)
            table.add_row(name, summary(scores), f"{trained:,}")
        self.console.print(table)
        sizes = [f"{path.stat().st_size / 1000:,.0f} kB" for path in (self.small, self.whole)]
        self.console.print(f"The file of attention and head: {sizes[0]}; of the whole network: {sizes[1]}.")
        self.console.print(f"Logits after drifa_attn.load_attention on a fresh copy: equal bit for bit: {same}.")
        self.console.print(f"What the gates look at: {self.picture}")

    def draw(self, model: nn.Module, curves: Scores, tests: dict[str, list[float]]) -> None:
        """The picture: gates by digit, accuracies by epoch, and how far the gates of each site differ."""
        maps = drifa_attn.gates(model, self.test[0])
        labels = self.test[1]
        gates = {site: torch.stack([gate[labels == digit].mean(0) for digit in range(5)]) for site, gate in maps.items()}
        site = max(gates, key=lambda name: gates[name].std(0).mean().item())
        figure = Figure(figsize=(13, 8), layout="constrained")
        panels = figure.subplot_mosaic("gg;cs", height_ratios=[3, 2])
        draw_gates(panels["g"], gates[site], site, self.test)
        draw_curves(panels["c"], curves, self.looks, tests)
        draw_spread(panels["s"], gates)
        title = "Which channels of a frozen ResNet-18 the attention opens (red) and closes (blue) for which digit"
        figure.suptitle(title, size=16)
        figure.savefig(self.picture, dpi=150)


def main(argv: list[str] | None = None) -> None:
    """Pretrain, wrap, fine-tune, save, reload, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="folder for the picture and the files")
    parser.add_argument("--fast", action="store_true", help="one seed and one epoch of everything: seconds, and no result")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        "A small ResNet-18 is trained, wrapped and adapted in four steps. "
        "This takes about a minute on two idle cores, and a few minutes on busy ones."
    )
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        demo = Demo(options.output, fast=options.fast, console=console, progress=progress)
        pretrained = demo.pretrain()
        demo.wrap(pretrained)
        found = demo.compare(pretrained)
    demo.show(pretrained, *found)


if __name__ == "__main__":
    main()
