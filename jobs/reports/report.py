"""report.html: one file that shows what a run or an evaluation came to; nothing in it is fetched from anywhere."""

import contextlib
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from ddpm_core import config as configs
from ddpm_core import storage
from jobs.common.intervals import ENOUGH, rests_on
from jobs.common.progress import duration
from jobs.reports import charts, metric_table
from jobs.reports.charts import MAX_LINES, draw_lines, draw_losses
from jobs.reports.grids import FILM_ROWS, FILM_STEPS, film_strip
from jobs.reports.html import CREDITS, REFRESH_S, Cell, Line, Table, image, render
from jobs.reports.metric_table import METRICS, base

PARTS = ("adversarial", "discriminator", "identity", "perceptual")
"""Training losses beside `loss`, as `jobs.training.methods` names them."""
SPEEDS = {
    "learning_rate": ("Learning rate", "learning rate"),
    "images_per_s": ("Images a second, all workers together", "images a second"),
}
"""Of the rows of training: what the page and the axis say."""
NOTES = (
    "Intervals are of 95 %: over images by the bootstrap (of few Student's, of shares Wilson's), of KID over 200 "
    "random subsets of the images. What a net measures compares only with figures of the same net, KID and the "
    "Fréchet distance also only with those of as many images. Coloured: the best mean of a column. The linear colour "
    "map is the best affine map from a pixel's colour to its counterpart's, fitted on all training pairs. Flip rate: "
    "the share of images that the classifier puts on the wanted side; rank-1: of those that are nearer to their own "
    "source than to every other; copied: of those nearer to a training image than 99 % of real ones are, 0.01 for new "
    "images."
)
NETS = {"features": "Feature net", "classifier": "Classifier", "identity": "Identity net"}


def write_report(
    output_uri: str,
    *,
    run_uri: str | None = None,
    evaluation: Mapping[str, Any] | None = None,
    images: Sequence[tuple[str, bytes]] = (),
    status: Mapping[str, Any] | None = None,
) -> str:
    """Write OUTPUT/report.html and return its URI.

    `run_uri`: a run's folder, for curves and configuration. `evaluation`: the content of a `metrics.json`.
    `images`: (caption, PNG) shown below the verdicts. `status`: of a run, as `jobs.training.monitor` tells it; then its
    images are shown too.
    """
    run = _read_run(run_uri) if run_uri else {}
    if run_uri and status:
        run["status"] = status
        run["samples"] = _samples(run_uri)
    page = build(run, evaluation or {}, images)
    uri = storage.join(output_uri, "report.html")
    storage.write_bytes(uri, page.encode())
    return uri


def build(run: Mapping[str, Any], evaluation: Mapping[str, Any], images: Sequence[tuple[str, bytes]]) -> str:
    """The page. `run`: config, environment, best, status, rows of metrics.jsonl; any may be missing."""
    status = run.get("status") or {}
    config = run.get("config") or evaluation.get("model") or {}
    rows = run.get("rows") or []
    data = {**(config.get("data") or {}), **(evaluation.get("data") or {})}
    asked = ("split", "seed", "sampling", "guides", "nets", "compute")
    running = status.get("state") == "running"
    title = _title(config, evaluation)
    curves = _curves(rows, config.get("method", "diffusion"))
    return render(
        "run",
        title=f"{status['step'] / status['total']:.0%} · {title}" if running else title,
        heading=title,
        refresh_s=REFRESH_S if running else None,
        facts=_facts(config, run, evaluation),
        where=[evaluation.get("checkpoint") or run.get("uri") or ""],
        status=_status(status, run) if status else None,
        domains=evaluation.get("domains", {}),
        images=[image(*each) for each in [*images, *run.get("samples", [])]],
        tables=[
            _metrics_table(f"{group}: to {name}", domain["methods"], metrics, domain.get("num_images", 0))
            for name, domain in evaluation.get("domains", {}).items()
            for group, metrics in _grouped(domain["methods"]).items()
        ],
        measured_with=_measured_with(evaluation),
        curves=[charts.chart(draw, caption) for caption, draw in curves.items()],
        curves_note=_curves_note(rows, config.get("method", "diffusion")),
        credits=[(label, data[key]) for key, label in CREDITS.items() if data.get(key)],
        blocks={
            "Model and training options": {
                key: value for key, value in config.items() if key not in ("format", "format_version")
            },
            "Options of the evaluation": {key: evaluation[key] for key in asked if key in evaluation},
            "Environment of the training": run.get("environment"),
            "Environment of the evaluation": evaluation.get("environment"),
        },
    )


def _read_run(uri: str) -> dict[str, Any]:
    found: dict[str, Any] = {"uri": uri}
    for key, name in {"config": "config.json", "environment": "environment.json", "best": "best.json"}.items():
        with contextlib.suppress(FileNotFoundError):
            found[key] = storage.read_json(storage.join(uri, name))
    with contextlib.suppress(FileNotFoundError):
        found["rows"] = storage.read_json_lines(storage.join(uri, "metrics.jsonl"))
    return found


def _samples(uri: str) -> list[tuple[str, bytes, str]]:
    """The latest grid of the run's fixed images, and how the first of them came to be: captions, PNGs and kinds."""
    names = [name for name in storage.list_files(storage.join(uri, "samples")) if SAMPLE.fullmatch(name)]
    if not names:
        return []
    chosen = [names[round(i)] for i in np.linspace(0, len(names) - 1, min(len(names), FILM_STEPS))]
    grids = {int(name[5:13]): storage.read_bytes(storage.join(uri, "samples", name)) for name in chosen}
    last = max(grids)
    caption = f"Validation images after {last:,} steps: the same ones every time, from the same noise."
    found = [(caption, grids[last], "latest")]
    if len(grids) > 1:
        found.append((f"The first {FILM_ROWS} of them as training went on, by step.", film_strip(grids), "film"))
    return found


SAMPLE = re.compile(r"step-\d{8}\.png")
Draw = Callable[[Any], None]


# -- sections -----------------------------------------------------------------------------------------------------


def _title(config: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    name = (config.get("data") or {}).get("name") or "translation"
    if (method := config.get("method")) in configs.ENCODERS:
        return f"{name}: {method}"
    domains = config.get("domains") or []
    made = list(evaluation.get("domains", {})) or config.get("target_domains") or domains
    sides = [side for side in domains if side not in made] if len(made) == 1 else []
    arrow = f"{' / '.join(sides)} → {made[0]}" if sides else " ⇄ ".join(domains)
    return f"{name}: {arrow}" if arrow else str(name)


def _facts(config: Mapping[str, Any], run: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[str]:
    """What stands below the title."""
    environment = evaluation.get("environment") or run.get("environment") or {}
    facts = []
    if config.get("image_size"):
        facts.append(f"{config['image_size']} × {config['image_size']} px")
    if pairing := (config.get("data") or {}).get("pairing"):
        facts.append(f"{pairing} training data")
    if seen := max((row.get("images_seen", 0) for row in run.get("rows") or []), default=0):
        facts.append(f"{seen:,} images seen")
    if waits := [row["data_wait_share"] for row in run.get("rows") or [] if "data_wait_share" in row]:
        facts.append(f"{np.mean(waits):.1%} of the time waiting for data")
    method = config.get("method", "diffusion")
    if method != "diffusion":
        facts.append(method)
    elif sampling := evaluation.get("sampling"):
        facts.append(f"{sampling['sampler']}, {sampling['num_steps']} steps, guidance {sampling['guidance_scale']:g}")
    if date := environment.get("date"):
        facts.append(str(date)[:10])
    return facts


STATES = {
    "running": ("plain", "Running"),
    "finished": ("plain", "Finished"),
    "interrupted": ("even", "Interrupted"),
    "diverged": ("bad", "Diverged"),
    "failed": ("bad", "Failed"),
    "stopped": ("even", "Stopped early"),
}


def _status(status: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """How far the run is, or how it ended."""
    kind, word = STATES[status["state"]]
    step, total, running = status["step"], status["total"], status["state"] == "running"
    facts = {"Step": f"{step:,} of {total:,}" if step < total else f"{step:,}"}
    epochs = ((run.get("config") or {}).get("training") or {}).get("epochs")
    if status.get("epoch") is not None:
        facts["Epoch"] = f"{status['epoch']:,}" + (f" of {epochs:,}" if epochs and step < total else "")
    if running and status.get("images_per_s"):
        facts["Images a second"] = _number(status["images_per_s"])
    if running and status.get("left_s") is not None:
        facts["Time left"] = duration(status["left_s"])
    if status.get("loss") is not None:
        facts["Training loss"] = f"{status['loss']:.4g}"
    lines = [status.get("message") or "", *(status.get("warnings") or [])]
    if best := run.get("best"):
        facts["Best checkpoint"] = f"{best['checkpoint']}, validation loss {best['metric']['loss']:.4g}"
        lines.append(_chosen_on(best, run.get("rows") or []))
    facts |= _times(status, run)
    if status["state"] in ("interrupted", "failed"):
        lines.append("The same command goes on from the last checkpoint.")
    if running:
        lines.append(
            f"As of {_clock(status['at'])}. Written anew at each validation and every five minutes: a page older than "
            "that is of a run that was killed; the same command goes on with it."
        )
    return {"kind": kind, "word": word, "done": step, "total": total, "facts": facts, "notes": lines}


def _chosen_on(best: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """What is said of a best checkpoint that few validation images have chosen."""
    num = next((row.get("num_images") for row in rows if row.get("split") == "val"), None)
    return "" if num is None else rests_on(num, "validation image", subject="The choice of the best checkpoint")


def _times(status: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, str]:
    """How long it took, and where it was taken up again."""
    attempts = (run.get("environment") or {}).get("attempts") or []
    train = [row for row in run.get("rows") or [] if row.get("split") == "train" and row.get("images_per_s")]
    seen = [0, *(row["images_seen"] for row in train)]
    facts = {}
    if train:
        spent_s = sum((b - a) / row["images_per_s"] for a, b, row in zip(seen, seen[1:], train, strict=False))
        facts["Time in steps"] = duration(spent_s)
    if attempts:
        began, at = (datetime.fromisoformat(text) for text in (attempts[0]["date"], status["at"]))
        facts["Since the first start"] = duration((at - began).total_seconds())
    if resumed := [f"{attempt['step']:,}" for attempt in attempts[1:]]:
        shown = resumed if len(resumed) <= 6 else [*resumed[:2], "…", *resumed[-3:]]
        facts["Taken up again"] = f"{len(resumed)} ×, at step {', '.join(shown)}"
    return facts


def _clock(moment: str) -> str:
    return datetime.fromisoformat(moment).strftime("%Y-%m-%d %H:%M:%S UTC")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _measured_with(evaluation: Mapping[str, Any]) -> str:
    """How intervals are made, the nets that judged, and what an image cost."""
    nets = evaluation.get("nets") or {"features": {"name": evaluation.get("feature_net", "")}}
    names = [f"{NETS.get(kind, kind)}: {net['name']}." for kind, net in nets.items() if net]
    cost = ""
    if compute := evaluation.get("compute"):
        cost = (
            f"An image takes {compute['nfe']:g} passes through the network; one copy of it makes "
            f"{_number(compute['images_per_s'])} images a second ({compute['device']})."
        )
    return " ".join([NOTES, *names, cost]).strip()


def _grouped(methods: Mapping[str, Any]) -> dict[str, list[str]]:
    """The metrics there are, by the table they stand in."""
    there = dict.fromkeys(metric for method in methods.values() for metric in method["metrics"])
    found: dict[str, list[str]] = {}
    for metric in sorted(there, key=lambda metric: [*METRICS, base(metric)].index(base(metric))):
        found.setdefault(metric_table.of(metric).group, []).append(metric)
    return found


def _metrics_table(caption: str, methods: Mapping[str, Any], metrics: Sequence[str], num_images: int) -> Table:
    best = {metric: _best(metric, methods) if num_images >= ENOUGH else None for metric in metrics}
    lines = [
        Line(
            method["name"],
            [_interval(method["metrics"].get(metric), metric, best=key == best[metric]) for metric in metrics],
            kind="ours" if key == "model" else "",
        )
        for key, method in methods.items()
        if any(metric in method["metrics"] for metric in metrics)
    ]
    return Table(["", *map(metric_table.column, metrics)], lines, caption=caption)


def _best(metric: str, methods: Mapping[str, Any]) -> str | None:
    """The method with the best mean of several, where there is a better and a worse; real images do not compete, nor
    does a copy of the source in who is on it."""
    if not metric_table.has_direction(metric):
        return None
    idle = ("real", "truth", *(("copy",) if metric.startswith("identity") else ()))
    means = {
        key: method["metrics"][metric]["mean"]
        for key, method in methods.items()
        if key not in idle and method["metrics"].get(metric) is not None
    }
    if len(means) < 2:
        return None
    choose = min if metric_table.lower_is_better(metric) else max
    return choose(means, key=means.__getitem__)


def _interval(value: Mapping[str, float] | None, metric: str, *, best: bool) -> Cell:
    if value is None:
        return Cell()
    mean, low, high = (f"{value[key]:.{metric_table.of(metric).digits}f}" for key in ("mean", "low", "high"))
    span = f"{low} … {high}" if value["low"] < value["high"] else ""  # a single image has none
    return Cell(mean, span, kind="best" if best else "")


def _curves(rows: Sequence[Mapping[str, Any]], method: str) -> dict[str, Draw]:
    """Caption → what draws it on matplotlib's axes."""
    val = [row for row in rows if row.get("split") == "val"]
    train = [row for row in rows if row.get("split") == "train"]
    drawn: dict[str, Draw] = {}
    if method in configs.ENCODERS:  # training minimises one thing, validation measures another
        if len(train) > 1:
            drawn["Loss that training minimises"] = lambda ax: draw_losses(ax, train, [])
        if len(val) > 1:
            drawn["Validation loss with its 95 % band"] = lambda ax: draw_losses(ax, [], val)
    elif len(val) + len(train) > 1:
        drawn["Loss: training, and validation with its 95 % band"] = lambda ax: draw_losses(ax, train, val)
    bands, lengths = _named(val, "loss_band_"), _named(val, "loss_ema_")
    if bands and len(val) > 1:
        drawn["Validation loss by quarter of the noise chain"] = lambda ax: draw_lines(ax, val, bands)
    if len(lengths) > 1 and len(val) > 1:
        drawn["Validation loss by length of the weights' average"] = lambda ax: draw_lines(ax, val, lengths)
    others = {
        key: key.replace("_", " ")
        for key in dict.fromkeys(key for row in val for key, value in row.items() if isinstance(value, float))
        if not key.startswith("loss") and key != "ema_sigma_rel"
    }
    if len(others) > MAX_LINES:  # of each of many attributes: the mean alone is drawn
        others = {key: name for key, name in others.items() if not key.startswith("accuracy_")}
    if others and len(val) > 1:
        drawn["What else was measured of the validation images"] = lambda ax: draw_lines(ax, val, others, unit="mean")
    parts = {f"loss_{name}": name for name in PARTS}
    parts = {key: name for key, name in parts.items() if any(key in row for row in train)}
    if parts and len(train) > 1:
        drawn["The other training losses"] = lambda ax: draw_lines(ax, train, parts)
    for key, (alt, unit) in SPEEDS.items():
        if sum(key in row for row in train) > 1:
            drawn[alt] = functools.partial(draw_lines, rows=train, labels={key: ""}, unit=unit)
    return drawn


def _curves_note(rows: Sequence[Mapping[str, Any]], method: str) -> str:
    noise = ", timesteps and noise" if _named(rows, "loss_band_") else ""
    other = " It is not what training minimises: compare it with itself only." if method in configs.ENCODERS else ""
    return (
        f"Validation uses the EMA weights, and the same images{noise} every time, so the curve moves only when the "
        f"network does.{other}"
    )


def _named(rows: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, str]:
    """The keys of `rows` that start so, each with what a legend says of it."""
    keys = sorted({key for row in rows for key in row if key.startswith(prefix)})
    if prefix == "loss_ema_":
        return {key: f"{float(key.removeprefix(prefix)):.1%} of the run" for key in keys}
    quarters = {key: int(key.removeprefix(prefix)) + 1 for key in keys}  # few rows leave some without any
    ends = {1: " (least noisy)", 4: " (noisiest)"}
    return {key: f"t in quarter {quarter}{ends.get(quarter, '')}" for key, quarter in quarters.items()}
