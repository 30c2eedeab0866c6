"""Train DRIFA-Net, or a fusion of timm networks, or that without attention.

From the repository's root:

    python -m examples.drifa_net.train                                            # digits in two halves, about a minute
    python -m examples.drifa_net.train --data HAM10000/ SIPaKMeD/ --model fuse --backbones resnet10t --seeds 0 1 2
    torchrun --nproc-per-node 2 -m examples.drifa_net.train                       # several GPUs or CPU processes
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m examples.drifa_net.train

Every seed has a folder of its own: `OUTPUT/MODEL-seedN/run.json`, with configuration, versions, device, data, history and test
metrics, and `model.safetensors`, the weights of the best epoch. Killed at any time, the same command goes on where it was and,
on a CPU, ends with the same bits: each step's randomness follows from seed, epoch and step alone, and `checkpoint.pt` holds the
rest. A finished seed is not trained again.
"""

import json
import math
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn

from drifa_attn import Fused, TaskLoss
from examples.drifa_net.checkpoints import left, replace
from examples.drifa_net.data import Data, load
from examples.drifa_net.inference import metrics, predict
from examples.drifa_net.logs import log, trackers
from examples.drifa_net.metrics import absent
from examples.drifa_net.networks import build, calibrate, groups, named, paired_up, rehearse, scaled
from examples.drifa_net.options import check, configured, intended, parsed, parser
from examples.drifa_net.reading import reading
from examples.drifa_net.records import SOURCES, run_folder

WARMUP = 0.05  # the share of all steps in which the learning rate rises
PACKAGES = ("torch", "timm", "accelerate", "torchmetrics", "numpy")
COLUMNS = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()


class Learner(nn.Module):
    """A network and its loss in one module, so that data-parallel training sees the parameters of both.

    Shape: {branch: images or records}, present `b m` or None, {task: classes `b`} -> scalar.
    """

    def __init__(self, net: nn.Module, loss: TaskLoss) -> None:
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, inputs: dict[str, Tensor], present: Tensor | None, labels: dict[str, Tensor]) -> Tensor:
        """The loss of a batch."""
        logits = self.net(inputs, present)
        return self.loss(logits, labels, self.net.losses() if isinstance(self.net, Fused) else None)


class Run:
    """One seed from its first step, or its checkpoint, to its test metrics."""

    def __init__(self, configuration: dict[str, Any], data: Data, accelerator: Accelerator, output: Path, console: Console):
        self.configuration, self.data, self.accelerator, self.console = configuration, data, accelerator, console
        self.folder = run_folder(output, configuration["model"], configuration["seed"])
        self.record: dict[str, Any] | None = None  # once the run is finished
        seed_everything(configuration["seed"])
        kind = "uncertainty" if configuration["losses"] == "uncertainty" else None
        weights = data.class_weights() if configuration["balance"] == "weights" else None
        loss = TaskLoss(list(data.tasks), kind, class_weights=weights)
        net = build(configuration, data)
        calibrate(net, data)
        self.learner = Learner(net, loss)
        weights = groups(net, configuration["lr"])
        optimizer = torch.optim.AdamW([*weights, {"params": list(loss.parameters())}], lr=configuration["lr"])
        self.shares = [group["lr"] / configuration["lr"] for group in optimizer.param_groups]
        self.parallel, self.optimizer = accelerator.prepare(self.learner, optimizer)
        self.batch = configuration["batch_size"]
        self.steps = len(data.train) // self.batch
        # Where the run stands. With the weights and AdamW's moments, this is all that a checkpoint has to hold.
        self.epoch = self.step = 0
        self.total = torch.zeros((), dtype=torch.float64, device=accelerator.device)  # of this epoch's losses
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {"loss": math.inf, "epoch": -1, "weights": None}
        self.seconds, self.since = 0.0, time.monotonic()

    @property
    def stopped(self) -> bool:
        """Whether the validation loss has not fallen for too long."""
        patience = self.configuration["patience"]
        return patience is not None and len(self.history) - 1 - self.best["epoch"] >= patience

    def finish(self) -> dict[str, Any]:
        """Train what is left and test; returns the record."""
        if self.record is None:
            if self.accelerator.is_main_process:
                sources = json.dumps({"data": list(self.data.paths)}, indent=1) + "\n"
                replace(self.folder / SOURCES, lambda path: path.write_text(sources))
            self.train()
            self.record = self.test()
            self.accelerator.wait_for_everyone()
        return self.record

    def train(self) -> None:
        """All epochs that are left."""
        self.trackers = trackers(self.configuration["log"], self.folder)
        for epoch in self.history:
            log(self.trackers, epoch)
        epochs = self.configuration["epochs"]
        with Progress(*COLUMNS, console=self.console, disable=not self.accelerator.is_main_process) as progress:
            bar = progress.add_task(self.folder.name, total=epochs * self.steps, completed=self.epoch * self.steps + self.step)
            while self.epoch < epochs and not self.stopped:
                for _ in self.one_epoch():
                    progress.advance(bar)
                    if self.step % self.configuration["save_every"] == 0 and self.step < self.steps:
                        self.save()
                self.close_epoch(progress)
                self.save()
                log(self.trackers, self.history[-1])
        for one in self.trackers:
            one.finish()

    def one_epoch(self) -> Iterator[int]:
        """The steps of this epoch that are left; yields after each."""
        configuration, accelerator = self.configuration, self.accelerator
        # Splits are one for all seeds, what is drawn in training is not: the dataset draws it from the number it is given.
        self.data.train.set_epoch(configuration["seed"] * 100_000 + self.epoch)
        share = self.batch // accelerator.num_processes
        first = accelerator.process_index * share
        batches = [range(step * self.batch + first, step * self.batch + first + share) for step in range(self.step, self.steps)]
        self.parallel.train()
        for batch in self.data.loader(self.data.train, batches, workers=configuration["workers"]):
            seed_everything(configuration["seed"], self.epoch, self.step, accelerator.process_index)
            for group, share in zip(self.optimizer.param_groups, self.shares, strict=True):
                group["lr"] = share * self.rate()
            inputs, present, labels = named(batch, self.data, accelerator.device)
            loss = self.parallel(inputs, paired_up(present), labels)
            accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.total += loss.detach()
            self.step += 1
            yield self.step

    def rate(self) -> float:
        """The learning rate of this step: it rises, then falls to zero along half a cosine."""
        done, total = self.epoch * self.steps + self.step, self.configuration["epochs"] * self.steps
        rising = math.ceil(WARMUP * total)
        if done < rising:
            return self.configuration["lr"] * (done + 1) / rising
        return self.configuration["lr"] * (1 + math.cos(math.pi * (done - rising) / (total - rising))) / 2

    def close_epoch(self, progress: Progress) -> None:
        """Validate, remember the weights if they are the best so far, and go to the next epoch."""
        for buffer in self.learner.buffers():  # each process has collected its own batch-norm statistics: the first's count
            broadcast(buffer)
        loss = self.accelerator.reduce(self.total / self.steps, reduction="mean").item()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"The training loss of epoch {self.epoch} is {loss}: lower --lr, or choose --mixed-precision bf16 or no. "
                f"The checkpoint in {self.folder} is from before; other options need another --output."
            )
        found = metrics(predict(self.learner.net, self.data.validation, self.data, self.accelerator, self.batch))
        validation = sum(task["nll"] for task in found.values()) / len(found)
        self.history.append({"epoch": self.epoch, "loss": loss, "validation": found})
        if validation < self.best["loss"]:
            weights = {name: tensor.detach().cpu().clone() for name, tensor in self.learner.net.state_dict().items()}
            self.best = {"loss": validation, "epoch": self.epoch, "weights": weights}
        accuracies = ", ".join(f"{task} {100 * values['accuracy']:.1f} %" for task, values in found.items())
        progress.console.print(f"epoch {self.epoch}: loss {loss:.4f}, validation {validation:.4f}, {accuracies}")
        self.epoch, self.step = self.epoch + 1, 0
        self.total.zero_()

    def test(self) -> dict[str, Any]:
        """The run's record, with the metrics of its best weights; both are in its folder afterwards, the checkpoint is not."""
        self.learner.net.load_state_dict(self.best["weights"])
        predictions = predict(self.learner.net, self.data.test, self.data, self.accelerator, self.batch)
        found = metrics(predictions)
        record = {
            "configuration": self.configuration,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "device": device(self.accelerator),
            "data": self.data.report,
            "parameters": sum(parameter.numel() for parameter in self.learner.parameters()),
            "history": self.history,
            "best_epoch": self.best["epoch"],
            "stopped_early": len(self.history) < self.configuration["epochs"],
            "test": found,
            "absent": {task: absent(y, self.data.tasks[task]) for task, (_, y) in predictions.items()},
            "seconds": round(self.seconds + time.monotonic() - self.since, 1),
        }
        if self.accelerator.is_main_process:
            replace(self.folder / "model.safetensors", lambda path: save_file(self.best["weights"], path))
            replace(self.folder / "run.json", lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))
            (self.folder / "checkpoint.pt").unlink(missing_ok=True)
        return record

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "configuration": self.configuration,
                "learner": self.learner.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "place": (self.epoch, self.step, self.total.item()),
                "history": self.history,
                "best": self.best,
                "seconds": self.seconds + time.monotonic() - self.since,
            }
            self.folder.mkdir(parents=True, exist_ok=True)
            replace(self.folder / "checkpoint.pt", lambda path: torch.save(state, path))

    def resume(self) -> None:
        """Take the record of a finished run, or go to where the checkpoint was written. One process reads them for all."""
        path = self.folder / "checkpoint.pt"
        found = left(self.folder, self.configuration) if self.accelerator.is_main_process else [None, None]
        self.record, state = broadcast_object_list(found)
        if self.record is not None:
            self.console.print(f"{self.folder.name} is finished.")
        if state is None:
            return
        try:
            self.learner.load_state_dict(state["learner"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{path} does not fit this network: delete it to begin again. {error}") from error
        if state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, total = state["place"]
        self.total.fill_(total)
        self.history, self.best, self.seconds = state["history"], state["best"], state["seconds"]
        self.console.print(f"{self.folder.name} goes on at epoch {self.epoch}, step {self.step}.")


def seed_everything(*numbers: int) -> None:
    """Set torch's random state by these numbers alone."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))


def device(accelerator: Accelerator) -> dict[str, Any]:
    """What the run ran on."""
    kind = accelerator.device.type
    return {
        "type": kind,
        "name": torch.cuda.get_device_name(accelerator.device) if kind == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
    }


def shown(records: Sequence[Mapping[str, Any]]) -> Table:
    """The test metrics of all seeds."""
    names = ("samples", "accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece")
    table = Table("seed", "task", *names, title="test")
    for record in records:
        for task, values in record["test"].items():
            cells = [str(values[name]) if name == "samples" else f"{values[name]:.3f}" for name in names]
            table.add_row(str(record["configuration"]["seed"]), task, *cells)
    return table


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Train every seed; returns the records."""
    whole = parser(__doc__)
    options = parsed(whole, argv)
    with whole.explained():
        # Told so, accelerate joins the processes of torchrun on machines without a GPU too.
        accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=options.mixed_precision)
        for seed in options.seeds if accelerator.is_main_process else ():  # before images are read
            left(run_folder(options.output, options.model, seed), intended(options, seed))
        with accelerator.local_main_process_first():  # which decodes what the others then find
            progress = accelerator.is_local_main_process
            data = load(options.data, **reading(vars(options)), cache=options.cache, progress=progress)
        data = scaled(data, vars(options))
        check(options, data, accelerator)
        for seed in options.seeds if accelerator.is_main_process else ():
            left(run_folder(options.output, options.model, seed), configured(options, seed, data, accelerator))
    console = Console(highlight=False, quiet=not accelerator.is_main_process)
    records = []
    console.print(str(data), markup=False, soft_wrap=True)
    for seed in options.seeds:
        with whole.explained():
            one = Run(configured(options, seed, data, accelerator), data, accelerator, options.output, console)
            one.resume()
            rehearse(one.learner.net, data)
        records.append(one.finish())
    console.print(shown(records))
    for task, names in records[0].get("absent", {}).items():
        if names:
            console.print(f"{task}: no test sample is {', '.join(names)}; means over the classes leave it out.", markup=False)
    console.print(f"Records, weights: {options.output}", soft_wrap=True)
    return records


if __name__ == "__main__":
    main()
