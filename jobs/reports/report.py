"""report.html: one file that shows what a run or an evaluation came to; nothing in it is fetched from anywhere."""

import contextlib
import functools
import html
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from ddpm_core import config as configs
from ddpm_core import storage
from jobs.common.progress import duration
from jobs.reports import metric_table
from jobs.reports.charts import MAX_LINES, chart, draw_lines, draw_losses
from jobs.reports.grids import FILM_ROWS, FILM_STEPS, film_strip
from jobs.reports.html import document, figure, table
from jobs.reports.metric_table import METRICS, base

PARTS = ("adversarial", "discriminator", "identity", "perceptual")
"""Training losses beside `loss`, as `jobs.training.methods` names them."""
REFRESH_S = 30
"""How often a browser loads the page of a running run again."""
CREDITS = {"licence": "Licence of the images", "credit": "Credit", "source": "Source"}
SPEEDS = {
    "learning_rate": ("Learning rate", "learning rate"),
    "images_per_s": ("Images a second, all workers together", "images a second"),
}
"""Of the rows of training: what the page and the axis say."""
NOTES = (
    "Intervals are of 95 %: over images by the bootstrap (of shares, Wilson's), of KID over 200 random halves of the "
    "images. What a net measures compares only with figures of the same net, KID and the Fréchet distance also only "
    "with those of as many images. The linear colour map is the best affine map from a pixel's colour to its "
    "counterpart's, fitted on all training pairs. Flip rate: the share of images that the classifier puts on the "
    "wanted side; rank-1: of those that are nearer to their own source than to every other; copied: of those nearer to "
    "a training image than 99 % of real ones are, 0.01 for new images."
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
    parts = [
        _headline(config, run, evaluation),
        _status(status, run),
        *(_verdicts(name, domain) for name, domain in evaluation.get("domains", {}).items()),
        *(f"<section>{figure(caption, png)}</section>" for caption, png in images),
        *(
            f"<section>{figure(caption, png, kind)}</section>"
            for kind, (caption, png) in run.get("samples", {}).items()
        ),
        _metrics_tables(evaluation),
        _curves(rows, config.get("method", "diffusion")),
        _details(config, run, evaluation),
    ]
    title = _title(config, evaluation)
    if running := status.get("state") == "running":
        title = f"{status['step'] / status['total']:.0%} · {title}"
    return document(title, parts, head=f'<meta http-equiv="refresh" content="{REFRESH_S}">\n' if running else "")


def _read_run(uri: str) -> dict[str, Any]:
    found: dict[str, Any] = {"uri": uri}
    for key, name in {"config": "config.json", "environment": "environment.json", "best": "best.json"}.items():
        with contextlib.suppress(FileNotFoundError):
            found[key] = storage.read_json(storage.join(uri, name))
    with contextlib.suppress(FileNotFoundError):
        found["rows"] = storage.read_json_lines(storage.join(uri, "metrics.jsonl"))
    return found


def _samples(uri: str) -> dict[str, tuple[str, bytes]]:
    """The latest grid of the run's fixed images, and how the first of them came to be: captions and PNGs."""
    names = [name for name in storage.list_files(storage.join(uri, "samples")) if SAMPLE.fullmatch(name)]
    if not names:
        return {}
    chosen = [names[round(i)] for i in np.linspace(0, len(names) - 1, min(len(names), FILM_STEPS))]
    grids = {int(name[5:13]): storage.read_bytes(storage.join(uri, "samples", name)) for name in chosen}
    last = max(grids)
    found = {
        "latest": (
            f"Validation images after {last:,} steps: the same ones every time, from the same noise.",
            grids[last],
        )
    }
    if len(grids) > 1:
        found["film"] = (f"The first {FILM_ROWS} of them as training went on, by step.", film_strip(grids))
    return found


SAMPLE = re.compile(r"step-\d{8}\.png")


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


def _headline(config: Mapping[str, Any], run: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
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
    where = evaluation.get("checkpoint") or run.get("uri") or ""
    return (
        f"<header><h1>{html.escape(_title(config, evaluation))}</h1>"
        f'<p class="facts">{" · ".join(html.escape(fact) for fact in facts)}</p>'
        f'<p class="where">{html.escape(str(where))}</p></header>'
    )


STATES = {
    "running": ("even", "Running"),
    "finished": ("good", "Finished"),
    "interrupted": ("even", "Interrupted"),
    "diverged": ("bad", "Diverged"),
    "failed": ("bad", "Failed"),
    "stopped": ("even", "Stopped early"),
}


def _status(status: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """How far the run is, or how it ended."""
    if not status:
        return ""
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
    facts |= _best_checkpoint(run) | _times(status, run)
    items = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts.items())
    lines = [status.get("message") or "", *(status.get("warnings") or [])]
    if status["state"] in ("interrupted", "failed"):
        lines.append("The same command goes on from the last checkpoint.")
    if running:
        lines.append(
            f"As of {_clock(status['at'])}. Written anew at each validation and every five minutes: a page older than "
            "that is of a run that was killed; the same command goes on with it."
        )
    notes = "".join(f'<p class="note">{html.escape(line)}</p>' for line in lines if line)
    bar = f'<progress value="{step}" max="{total}" aria-label="steps done"></progress>' if step < total else ""
    return f'<section class="status"><h2 class="{kind}">{word}</h2>{bar}<dl class="tiles">{items}</dl>{notes}</section>'


def _best_checkpoint(run: Mapping[str, Any]) -> dict[str, str]:
    if not (best := run.get("best")):
        return {}
    return {"Best checkpoint": f"{best['checkpoint']}, validation loss {best['metric']['loss']:.4g}"}


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


def _verdicts(name: str, domain: Mapping[str, Any]) -> str:
    sign = {True: ("good", "✓"), False: ("bad", "✗"), None: ("even", "≈")}
    items = []
    for verdict in domain.get("verdicts", []):
        kind, mark = sign[verdict["better"]]
        items.append(
            f'<li class="{kind}"><span class="mark">{mark}</span>'
            f"<div><b>{html.escape(verdict['text'])}</b><br><span>{html.escape(verdict['figures'])}</span></div></li>"
        )
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in domain.get("notes", []))
    count = domain.get("num_images", 0)
    return (
        f"<section><h2>To {html.escape(name)}, {count:,} held-out images</h2>"
        f'<p class="headline">{html.escape(domain.get("headline", ""))}</p>'
        f'<ul class="verdicts">{"".join(items)}</ul>{notes}</section>'
    )


def _metrics_tables(evaluation: Mapping[str, Any]) -> str:
    domains = evaluation.get("domains", {})
    if not domains:
        return ""
    tables = "".join(
        _metrics_table(f"{title}: to {name}", domain, metrics)
        for name, domain in domains.items()
        for title, metrics in _grouped(domain["methods"]).items()
    )
    nets = evaluation.get("nets") or {"features": {"name": evaluation.get("feature_net", "")}}
    names = [f"{NETS.get(kind, kind)}: {net['name']}." for kind, net in nets.items() if net]
    facts = [NOTES, *names, _cost(evaluation.get("compute") or {})]
    return f'<section><h2>Measurements</h2>{tables}<p class="note">{html.escape(" ".join(facts).strip())}</p></section>'


def _cost(compute: Mapping[str, Any]) -> str:
    if not compute:
        return ""
    return (
        f"An image takes {compute['nfe']:g} passes through the network; one copy of it makes "
        f"{_number(compute['images_per_s'])} images a second ({compute['device']})."
    )


def _grouped(methods: Mapping[str, Any]) -> dict[str, list[str]]:
    """The metrics there are, by the table they stand in."""
    there = dict.fromkeys(metric for method in methods.values() for metric in method["metrics"])
    found: dict[str, list[str]] = {}
    for metric in sorted(there, key=lambda metric: [*METRICS, base(metric)].index(base(metric))):
        found.setdefault(metric_table.of(metric).group, []).append(metric)
    return found


def _metrics_table(caption: str, domain: Mapping[str, Any], metrics: Sequence[str]) -> str:
    methods = domain["methods"]
    head = "".join(f"<th>{html.escape(metric_table.column(metric))}</th>" for metric in metrics)
    best = {metric: _best(metric, methods) for metric in metrics}
    body = ""
    for key, method in methods.items():
        if not any(metric in method["metrics"] for metric in metrics):
            continue
        cells = ""
        for metric in metrics:
            value = method["metrics"].get(metric)
            mark = ' class="best"' if value is not None and key == best[metric] else ""
            cells += f"<td{mark}>{_interval(value, metric_table.of(metric).digits)}</td>"
        row = ' class="ours"' if key == "model" else ""
        body += f"<tr{row}><th>{html.escape(method['name'])}</th>{cells}</tr>"
    return (
        f'<div class="scroll"><table><caption>{html.escape(caption)}</caption>'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _best(metric: str, methods: Mapping[str, Any]) -> str | None:
    """The method with the best mean, where there is a better and a worse; real images do not compete, nor does a copy
    of the source in who is on it."""
    if not metric_table.has_direction(metric):
        return None
    idle = ("real", "truth", *(("copy",) if metric.startswith("identity") else ()))
    means = {
        key: method["metrics"][metric]["mean"]
        for key, method in methods.items()
        if key not in idle and method["metrics"].get(metric) is not None
    }
    if not means:
        return None
    choose = min if metric_table.lower_is_better(metric) else max
    return choose(means, key=means.__getitem__)


def _interval(value: Mapping[str, float] | None, digits: int) -> str:
    if value is None:
        return "–"
    return f"{value['mean']:.{digits}f} <small>{value['low']:.{digits}f} … {value['high']:.{digits}f}</small>"


def _curves(rows: Sequence[Mapping[str, Any]], method: str) -> str:
    val = [row for row in rows if row.get("split") == "val"]
    train = [row for row in rows if row.get("split") == "train"]
    charts = []
    if method in configs.ENCODERS:  # training minimises one thing, validation measures another
        if len(train) > 1:
            charts.append(("Loss that training minimises", lambda ax: draw_losses(ax, train, [])))
        if len(val) > 1:
            charts.append(("Validation loss with its 95 % band", lambda ax: draw_losses(ax, [], val)))
    elif len(val) + len(train) > 1:
        charts.append(("Loss: training, and validation with its 95 % band", lambda ax: draw_losses(ax, train, val)))
    bands, lengths = _named(val, "loss_band_"), _named(val, "loss_ema_")
    if bands and len(val) > 1:
        charts.append(("Validation loss by quarter of the noise chain", lambda ax: draw_lines(ax, val, bands)))
    if len(lengths) > 1 and len(val) > 1:
        charts.append(("Validation loss by length of the weights' average", lambda ax: draw_lines(ax, val, lengths)))
    others = {
        key: key.replace("_", " ")
        for key in dict.fromkeys(key for row in val for key, value in row.items() if isinstance(value, float))
        if not key.startswith("loss") and key != "ema_sigma_rel"
    }
    if len(others) > MAX_LINES:  # of each of many attributes: the mean alone is drawn
        others = {key: name for key, name in others.items() if not key.startswith("accuracy_")}
    if others and len(val) > 1:
        alt = "What else was measured of the validation images"
        charts.append((alt, lambda ax: draw_lines(ax, val, others, unit="mean")))
    parts = {f"loss_{name}": name for name in PARTS}
    parts = {key: name for key, name in parts.items() if any(key in row for row in train)}
    if parts and len(train) > 1:
        charts.append(("The other training losses", lambda ax: draw_lines(ax, train, parts)))
    for key, (alt, unit) in SPEEDS.items():
        if sum(key in row for row in train) > 1:
            charts.append((alt, functools.partial(draw_lines, rows=train, labels={key: ""}, unit=unit)))
    if not charts:
        return ""
    noise = ", timesteps and noise" if bands else ""
    other = " It is not what training minimises: compare it with itself only." if method in configs.ENCODERS else ""
    figures = "".join(f"<figure>{chart(draw, alt)}<figcaption>{alt}</figcaption></figure>" for alt, draw in charts)
    return (
        f'<section><h2>Training</h2><div class="charts">{figures}</div>'
        f'<p class="note">Validation uses the EMA weights, and the same images{noise} every time, so '
        f"the curve moves only when the network does.{other}</p></section>"
    )


def _named(rows: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, str]:
    """The keys of `rows` that start so, each with what a legend says of it."""
    keys = sorted({key for row in rows for key in row if key.startswith(prefix)})
    if prefix == "loss_ema_":
        return {key: f"{float(key.removeprefix(prefix)):.1%} of the run" for key in keys}
    ends = {keys[0]: " (least noisy)", keys[-1]: " (noisiest)"} if keys else {}
    return {key: f"t in quarter {i + 1}{ends.get(key, '')}" for i, key in enumerate(keys)}


def _details(config: Mapping[str, Any], run: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    data = {**(config.get("data") or {}), **(evaluation.get("data") or {})}
    credits = "".join(
        f"<dt>{label}</dt><dd>{html.escape(str(data[key]))}</dd>" for key, label in CREDITS.items() if data.get(key)
    )
    shown = {key: value for key, value in config.items() if key not in ("format", "format_version")}
    asked = {
        key: evaluation[key] for key in ("split", "seed", "sampling", "guides", "nets", "compute") if key in evaluation
    }
    blocks = {
        "Model and training options": shown,
        "Options of the evaluation": asked,
        "Environment of the training": run.get("environment"),
        "Environment of the evaluation": evaluation.get("environment"),
    }
    folds = "".join(
        f'<details><summary>{title}</summary><div class="scroll">{table(values)}</div></details>'
        for title, values in blocks.items()
        if values
    )
    if not credits and not folds:
        return ""
    credit_list = f"<dl>{credits}</dl>" if credits else ""
    return f"<section><h2>Where it comes from</h2>{credit_list}{folds}</section>"
