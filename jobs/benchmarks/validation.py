"""Why a validation curve bounces: the same checkpoints, validated in four ways.

    raw weights, fresh draws    the usual way: new timesteps and noise at every validation
    raw weights, fixed draws    each image keeps its timestep and noise; timesteps are spread evenly over the chain
    EMA, fresh draws
    EMA, fixed draws            jobs.train's own

All on the same images. `spread` is the standard deviation of the differences from epoch to epoch over the last ten
epochs, which a steady slope does not add to. `jobs.train` trains at three constant learning rates, keeping each epoch's
checkpoint, so that three causes can be told apart: the learning rate, the draws, and the averaging of the weights.
"""

import copy
import dataclasses
import io
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ddpm_core import checkpoint, provenance, storage
from ddpm_core.config import ModelConfig
from ddpm_core.diffusion import seeded
from ddpm_core.errors import InputError
from jobs import prepare, train
from jobs.common import cli
from jobs.datasets import cache
from jobs.training.batches import Share
from jobs.training.methods import Objective, objective
from jobs.training.options import TrainOptions
from jobs.training.validation import Validation

CPU = torch.device("cpu")
LAST = 10
"""Differences from epoch to epoch that the spread is taken over."""
WAYS = {
    "raw, fresh": "raw weights, fresh draws (the usual)",
    "raw, fixed": "raw weights, fixed draws",
    "ema, fresh": "EMA, fresh draws",
    "ema, fixed": "EMA, fixed draws (jobs.train)",
}
MANY = 20_000
"""Validation images of a large data set (CelebA has 19,867), for which the spreads are reckoned too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Why a validation curve bounces: raw or averaged weights, fresh or fixed draws, three learning rates."""

    output: str = "runs/benchmark/validation"
    """Folder or s3:// prefix for validation.json and validation.png."""
    learning_rates: tuple[float, ...] = (1e-4, 5e-4, 2e-3)
    """Constant ones, each of a run of its own."""
    epochs: int = 40
    """Of each run."""
    max_train_images: int = 512
    """Pairs to train on, and so the length of an epoch."""
    model_channels: int = 32
    """Of the network."""


def run(options: Options) -> int:
    """Train, validate, write validation.json and validation.png, print the spreads."""
    check(options)
    output = storage.absolute(options.output, flag="--output")
    storage.check_writable(output)
    torch.set_num_threads(1)
    began, began_cpu = time.monotonic(), time.process_time()
    result: dict[str, Any] = {
        "options": dataclasses.asdict(options),
        "environment": provenance.environment(),
        "load_before": os.getloadavg(),
    }
    with tempfile.TemporaryDirectory(prefix="ddpm-benchmark-") as folder:
        os.environ[cache.ROOT] = f"{folder}/cache"
        data = f"{folder}/data"
        prepare.main(["earth", "--image-size", "32", "--output", data])
        result["runs"] = [measure(data, folder, rate, options) for rate in options.learning_rates]
    result["num_pictures"] = result["runs"][0].pop("num_pictures")
    result["cpu_minutes"] = (time.process_time() - began_cpu) / 60
    result["minutes"] = (time.monotonic() - began) / 60
    for row in result["runs"]:
        row["spread"] = {way: spread(curve) for way, curve in row["curves"].items()}
        row["spread_of_many"] = of_many(row["spread"], result["num_pictures"])
    show(result)
    storage.write_bytes(storage.join(output, "validation.json"), json.dumps(result, indent=2).encode())
    storage.write_bytes(storage.join(output, "validation.png"), draw(result["runs"]))
    print(f"written: {storage.join(output, 'validation.json')}")
    return cli.DONE


def check(options: Options) -> None:
    if options.epochs <= LAST:
        raise InputError(f"--epochs is {options.epochs}; the last {LAST} differences need {LAST + 1} or more")
    if not options.learning_rates:
        raise InputError("--learning-rates is empty; give at least one")


def measure(data: str, folder: str, learning_rate: float, options: Options) -> dict[str, Any]:
    """The four curves of a run at this learning rate."""
    uri = f"{folder}/run-{learning_rate:g}"
    argv = command(data, uri, learning_rate, options)
    code = train.main(argv)
    assert code == cli.DONE, code
    validate = Validator(data, checkpoint.read_config(uri), train.parse(argv).options)
    curves: dict[str, list[float]] = {way: [] for way in WAYS}
    folders = sorted((Path(uri) / "checkpoints").iterdir())
    assert len(folders) == options.epochs, folders
    for epoch, each in enumerate(folders):
        for way, loss in validate(each, epoch).items():
            curves[way].append(loss)
    return {"learning_rate": learning_rate, "num_pictures": len(validate.ours.rows), "curves": curves}


def command(data: str, run: str, learning_rate: float, options: Options) -> list[str]:
    """Arguments of `jobs.train`: the mission's recipe, small; no validation of its own but the last."""
    flags: dict[str, Any] = {
        "data": data,
        "output": run,
        "preset": "day2night-64",
        "num-workers": 0,
        "epochs": options.epochs,
        "keep-every-epochs": 1,
        "validate-every-epochs": 10**6,
        "global-batch-size": 16,
        "max-train-images": options.max_train_images,
        "optim.learning-rate": learning_rate,
        "optim.ema-sigma-rels": 0.1,
        "sampling.num-steps": 1,
        "unet.model-channels": options.model_channels,
        "unet.condition-channels": options.model_channels,
        "unet.num-res-blocks": 1,
    }
    argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [*argv, "--unet.channel-mult", "1", "2", "2", "--unet.attn-resolutions", "16"]


class Validator:
    """The four ways, on the same rows."""

    def __init__(self, data: str, config: ModelConfig, options: TrainOptions) -> None:
        self.config = config
        self.method: Objective = objective(config, options, CPU)
        rows = cache.load(data, "val")
        self.ours = Validation(rows, config, options, self.method, CPU, Share(rank=0, world=1))

    def __call__(self, folder: Path, epoch: int) -> dict[str, float]:
        """The loss that each way finds in a checkpoint; `epoch` is the seed of what is drawn afresh."""
        content = (folder / "train_state" / "state.pt").read_bytes()
        state = torch.load(io.BytesIO(content), weights_only=True)
        (averaged,) = state["ema"].values()
        found = {}
        for name, weights in {"raw": state["model"], "ema": averaged}.items():
            network = copy.deepcopy(self.method.network).eval().requires_grad_(False)
            network.load_state_dict(weights)
            found[f"{name}, fresh"] = self.fresh(network, epoch)
            found[f"{name}, fixed"] = float(self.ours.measure({0.0: network})[0.0]["loss"].mean())
        return found

    @torch.no_grad()
    def fresh(self, network: nn.Module, epoch: int) -> float:
        """The mean loss at timesteps and with noise drawn for this validation alone."""
        generator = seeded("fresh", epoch)
        rows, losses = self.ours.rows, []
        for first in range(0, len(rows), self.ours.batch_size):
            mine = rows[first : first + self.ours.batch_size]
            draw = self.ours.sampler.validation(mine, np.zeros(len(mine), np.int64))
            draw = dataclasses.replace(
                draw,
                t=torch.randint(self.config.diffusion.num_timesteps, (len(mine),), generator=generator),
                noise=torch.randn(draw.noise.shape, generator=generator),
            )
            losses.append(self.method.validation_loss(network, draw.to(CPU, shown=self.config.shown)))
        return float(torch.cat(losses).double().mean())


def spread(curve: list[float]) -> float:
    """Standard deviation of the last differences from epoch to epoch."""
    return float(np.std(np.diff(curve)[-LAST:], ddof=1))


def of_many(spreads: dict[str, float], num_pictures: int) -> dict[str, float]:
    """What the spreads would be with MANY images: the part that fresh draws add falls as their number's root."""
    found = dict(spreads)
    for name in ("raw", "ema"):
        added = max(spreads[f"{name}, fresh"] ** 2 - spreads[f"{name}, fixed"] ** 2, 0.0)
        found[f"{name}, fresh"] = math.sqrt(spreads[f"{name}, fixed"] ** 2 + added * num_pictures / MANY)
    return found


def show(result: dict[str, Any]) -> None:
    print(f"\nspread over the last {LAST} epochs, {result['num_pictures']} images; {result['cpu_minutes']:.1f} CPU-min")
    print("| learning rate | " + " | ".join(WAYS.values()) + " | ours / usual |")
    print("|---" * (len(WAYS) + 2) + "|")
    for row in result["runs"]:
        spreads = row["spread"]
        cells = " | ".join(f"{spreads[way]:.2e}" for way in WAYS)
        print(f"| {row['learning_rate']:g} | {cells} | {spreads['ema, fixed'] / spreads['raw, fresh']:.3f} |")
    print(f"reckoned for {MANY:,} images, where fresh draws add less:")
    for row in result["runs"]:
        cells = ", ".join(f"{way} {value:.2e}" for way, value in row["spread_of_many"].items())
        print(f"learning rate {row['learning_rate']:g}: {cells}")


def draw(runs: list[dict[str, Any]]) -> bytes:
    """A panel for each learning rate, four curves in each; PNG."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(4 * len(runs), 3.6), layout="constrained")
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    styles = {"raw, fresh": ("#c44", 1.2), "raw, fixed": ("#e9a13b", 1.2), "ema, fresh": ("#7a9cc6", 1.2)}
    for axes, row in zip(panels, runs, strict=True):
        for way, label in WAYS.items():
            color, width = styles.get(way, ("#123", 2.2))
            epochs = range(1, len(row["curves"][way]) + 1)
            axes.plot(epochs, row["curves"][way], color=color, linewidth=width, label=label)
        ratio = row["spread"]["ema, fixed"] / row["spread"]["raw, fresh"]
        axes.set(
            title=f"learning rate {row['learning_rate']:g}: {ratio:.2f} of the spread", xlabel="epoch", yscale="log"
        )
    panels[0].set_ylabel("validation loss")
    panels[-1].legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return buffer.getvalue()
