"""report.html: one file that shows what a run or an evaluation came to; nothing in it is fetched from anywhere."""

import base64
import contextlib
import functools
import html
import io
import json
import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ddpm_core import config as configs
from jobs import storage
from jobs.progress import duration

CELL = 128
"""Pictures in a grid are enlarged by whole factors to about this side."""
PARTS = ("adversarial", "discriminator", "identity", "perceptual")
"""Training losses beside `loss`, as `jobs.objectives` names them."""
HEADER, LINE, GAP = 26, 16, 4
"""Height of a grid's row of headings and of each further line in it, and what is left between its pictures, in
pixels."""
FILM_STEPS, FILM_ROWS, FILM_CELL = 6, 4, 96
"""How many steps and pictures a film strip has, and about the side of a picture."""
MAX_LINES = 8
"""As many can be told apart in a chart."""
REFRESH_S = 30
"""How often a browser loads the page of a running run again."""
CREDITS = {"licence": "Licence of the pictures", "credit": "Credit", "source": "Source"}
SPEEDS = {
    "learning_rate": ("Learning rate", "learning rate"),
    "images_per_s": ("Pictures a second, all workers together", "pictures a second"),
}
"""Of the rows of training: what the page and the axis say."""
NOTES = (
    "Intervals are of 95 %: over pictures by the bootstrap (of shares, Wilson's), of KID over 200 random halves of the "
    "pictures. What a net measures compares only with figures of the same net, KID and the Fréchet distance also only "
    "with those of as many pictures. The linear colour map is the best affine map from a pixel's colour to its "
    "counterpart's, fitted on all training pairs."
)
GROUPS = {
    "How faithful": ("psnr", "ssim", "perceptual"),
    "How real": ("kid", "fd"),
    "Domain and identity": ("flip_rate", "identity_cosine", "identity_rank_1"),
    "Variety and memory": ("diversity", "neighbor_distance", "copied"),
}
"""Tables of an evaluation, and the metrics in each, whatever they are measured to."""
DIGITS = {"psnr": 2, "kid": 4, "fd": 2, "perceptual": 4}
"""Digits worth showing; of the others 3."""
NETS = {"features": "Feature net", "classifier": "Classifier", "identity": "Identity net"}
LESS_IS_BETTER = ("kid", "fd", "perceptual")


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
    `images`: (caption, PNG) shown below the verdicts. `status`: of a run, as `jobs.watching` tells it; then its
    pictures are shown too.
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


def document(title: str, parts: Sequence[str], *, head: str = "", css: str = "") -> str:
    """A page of these parts of HTML; `head` and `css`: what it has beside what all have."""
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n{head}'
        f"<title>{html.escape(title)}</title>\n<style>{CSS}{css}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _read_run(uri: str) -> dict[str, Any]:
    found: dict[str, Any] = {"uri": uri}
    for key, name in {"config": "config.json", "environment": "environment.json", "best": "best.json"}.items():
        with contextlib.suppress(FileNotFoundError):
            found[key] = storage.read_json(storage.join(uri, name))
    with contextlib.suppress(FileNotFoundError):
        found["rows"] = storage.read_json_lines(storage.join(uri, "metrics.jsonl"))
    return found


def _samples(uri: str) -> dict[str, tuple[str, bytes]]:
    """The latest grid of the run's fixed pictures, and how the first of them came to be: captions and PNGs."""
    names = [name for name in storage.list_files(storage.join(uri, "samples")) if SAMPLE.fullmatch(name)]
    if not names:
        return {}
    chosen = [names[round(i)] for i in np.linspace(0, len(names) - 1, min(len(names), FILM_STEPS))]
    grids = {int(name[5:13]): storage.read_bytes(storage.join(uri, "samples", name)) for name in chosen}
    last = max(grids)
    found = {
        "latest": (
            f"Validation pictures after {last:,} steps: the same ones every time, from the same noise.",
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
        facts.append(f"{seen:,} pictures seen")
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
        facts["Pictures a second"] = _number(status["images_per_s"])
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
        f"<section><h2>To {html.escape(name)}, {count:,} held-out pictures</h2>"
        f'<p class="headline">{html.escape(domain.get("headline", ""))}</p>'
        f'<ul class="verdicts">{"".join(items)}</ul>{notes}</section>'
    )


def figure(caption: str, png: bytes, kind: str = "") -> str:
    """`kind`: how the page lays it out, `latest` (not higher than a screen), `film` (not narrower than it can be read)
    or as any other."""
    with Image.open(io.BytesIO(png)) as image:
        width, height = image.size
    caption = html.escape(caption)
    return (
        f'<figure><div class="scroll"><img class="grid {kind}" src="{data_uri(png)}" width="{width}" '
        f'height="{height}" alt="{caption}"></div><figcaption>{caption}</figcaption></figure>'
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
        f"A picture takes {compute['nfe']:g} passes through the network; one copy of it makes "
        f"{_number(compute['images_per_s'])} pictures a second ({compute['device']})."
    )


def _grouped(methods: Mapping[str, Any]) -> dict[str, list[str]]:
    """The metrics there are, by the table they stand in."""
    there = list(dict.fromkeys(metric for method in methods.values() for metric in method["metrics"]))
    known = [name for names in GROUPS.values() for name in names]
    groups = {**GROUPS, "Others": tuple(_base(metric) for metric in there if _base(metric) not in known)}
    found = {title: [metric for metric in there if _base(metric) in names] for title, names in groups.items()}
    return {title: metrics for title, metrics in found.items() if metrics}


def _base(metric: str) -> str:
    """The metric without what it is measured to."""
    return metric.partition("_to_")[0]


def _metrics_table(caption: str, domain: Mapping[str, Any], metrics: Sequence[str]) -> str:
    methods, labels = domain["methods"], domain.get("metric_labels", {})
    head = "".join(f"<th>{html.escape(labels.get(metric, metric))}</th>" for metric in metrics)
    best = {metric: _best(metric, methods) for metric in metrics}
    body = ""
    for key, method in methods.items():
        if not any(metric in method["metrics"] for metric in metrics):
            continue
        cells = ""
        for metric in metrics:
            value = method["metrics"].get(metric)
            mark = ' class="best"' if value is not None and key == best[metric] else ""
            cells += f"<td{mark}>{_interval(value, DIGITS.get(_base(metric), 3))}</td>"
        row = ' class="ours"' if key == "model" else ""
        body += f"<tr{row}><th>{html.escape(method['name'])}</th>{cells}</tr>"
    return (
        f'<div class="scroll"><table><caption>{html.escape(caption)}</caption>'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _best(metric: str, methods: Mapping[str, Any]) -> str | None:
    """The method with the best mean, where there is a better and a worse; real pictures do not compete, nor does a copy
    of the source in who is on it."""
    if metric.endswith("_to_source") or _base(metric) in GROUPS["Variety and memory"]:
        return None
    idle = ("real", "truth", *(("copy",) if metric.startswith("identity") else ()))
    means = {
        key: method["metrics"][metric]["mean"]
        for key, method in methods.items()
        if key not in idle and method["metrics"].get(metric) is not None
    }
    if not means:
        return None
    choose = min if _base(metric) in LESS_IS_BETTER else max
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
        alt = "What else was measured of the validation pictures"
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
        f'<p class="note">Validation uses the EMA weights, and the same pictures{noise} every time, so '
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
        f'<details><summary>{title}</summary><div class="scroll">{_table(values)}</div></details>'
        for title, values in blocks.items()
        if values
    )
    if not credits and not folds:
        return ""
    credit_list = f"<dl>{credits}</dl>" if credits else ""
    return f"<section><h2>Where it comes from</h2>{credit_list}{folds}</section>"


def _table(values: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in flat(values))
    return f'<table class="options">{rows}</table>'


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{key}", " ".join(map(str, value)) or "–"
        else:
            yield f"{prefix}{key}", "–" if value in (None, "") else str(value)


# -- charts -------------------------------------------------------------------------------------------------------

INK = {"light": "#5b6270", "dark": "#a7afbd"}
TRAIN, VAL = "#9aa3b2", "#2f6fde"
BANDS = ("#9ecae9", "#5b9bd5", "#2f6fde", "#173f8f")
BANDS_DARK = ("#d3e6fb", "#8fc1f5", "#4f94ea", "#2f6fde")


def chart(draw: Any, alt: str, *, height: float = 3.7, grid: Literal["x", "y"] = "y") -> str:
    """The chart drawn twice, for light and for dark pages. `draw` gets matplotlib's axes; `height`: inches at a width
    of 6.4."""
    light, dark = (data_uri(render(draw, theme, height=height, grid=grid)) for theme in ("light", "dark"))
    alt = html.escape(alt)
    dark_source = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
    return f'<picture>{dark_source}<img src="{light}" alt="{alt}"></picture>'


def render(draw: Any, theme: str, *, height: float = 3.7, grid: Literal["x", "y"] = "y") -> bytes:
    """The chart as PNG on a transparent ground; for the theme `paper` on white, to stand by itself."""
    import cycler
    import matplotlib
    import matplotlib.figure
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    ink = INK["dark" if theme == "dark" else "light"]
    style: Any = {
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.6,
        "text.parse_math": False,  # names of attributes may hold a $
        "axes.prop_cycle": cycler.cycler(color=BANDS_DARK if theme == "dark" else BANDS),
    }
    with matplotlib.rc_context(style):
        figure = matplotlib.figure.Figure(figsize=(6.4, height), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        draw(axes)
        axes.grid(axis=grid, color=ink, alpha=0.18, linewidth=0.6)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", transparent=theme != "paper")
    return buffer.getvalue()


def draw_losses(axes: Any, train: Sequence[Mapping[str, Any]], val: Sequence[Mapping[str, Any]]) -> None:
    """Training loss (each row, and its running median) and validation loss with its band."""
    if train:
        x, y = points(train, "loss")
        axes.plot(x, y, color=TRAIN, linewidth=0.7, alpha=0.45)
        axes.plot(x, _running_median(y), color=TRAIN, linewidth=1.6, label="train")
    if val:
        x, y = points(val, "loss")
        axes.plot(x, y, color=VAL, linewidth=2, marker="o", markersize=3, label="validation")
        bounds = [_bounds(row) for row in val]
        if all(bound is not None for bound in bounds):
            low, high = zip(*[bound for bound in bounds if bound is not None], strict=True)
            axes.fill_between(x, low, high, color=VAL, alpha=0.18, linewidth=0)
    finish_axes(axes, [row["loss"] for row in [*train, *val] if row.get("loss")])


def draw_lines(axes: Any, rows: Sequence[Mapping[str, Any]], labels: Mapping[str, str], *, unit: str = "loss") -> None:
    """A line for each of these keys of the rows, in this order; `unit`: what the axis says."""
    values = []
    for key, label in labels.items():
        x, y = points(rows, key)
        values += y
        color = {"color": VAL} if len(labels) == 1 else {}
        axes.plot(x, y, linewidth=2, marker="o" if len(x) < 60 else "", markersize=3, label=label, **color)
    finish_axes(axes, values, unit)


def points(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Pictures seen, and the value of `key`, of those rows of metrics.jsonl that have it."""
    rows = [row for row in rows if row.get(key) is not None]
    return [float(row.get("images_seen", row.get("step", 0))) for row in rows], [float(row[key]) for row in rows]


def _bounds(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """`loss_ci` is the half-width of the 95 % interval."""
    width = row.get("loss_ci")
    if width is None or row.get("loss") is None:
        return None
    return max(row["loss"] - width, 0.0), row["loss"] + width


def _running_median(values: Sequence[float]) -> list[float]:
    half = max(len(values) // 40, 1)
    return [statistics.median(values[max(i - half, 0) : i + half + 1]) for i in range(len(values))]


def finish_axes(axes: Any, values: Sequence[float], unit: str = "loss") -> None:
    """Of a curve against pictures seen; losses that fall far get a logarithmic axis."""
    import matplotlib.ticker

    positive = [value for value in values if value > 0 and math.isfinite(value)]
    if unit != "loss":
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", scilimits=(-2, 5))
    elif positive and max(positive) > 8 * min(positive):
        axes.set_yscale("log")
        axes.set_ylim(0.8 * min(positive), 1.25 * max(positive))  # an interval that touches 0 would have no end
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter("")
    axes.set_xlabel("pictures seen")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}")
    axes.margins(x=0.01)
    if any(axes.get_legend_handles_labels()[1]):
        axes.legend(frameon=False, fontsize=9)


# -- pictures -----------------------------------------------------------------------------------------------------


def labelled_grid(
    columns: Sequence[str], rows: Sequence[Sequence[UInt8[np.ndarray, "s s 3"]]], *, cell: int = CELL
) -> bytes:
    """Rows of equally sized pictures under headings, enlarged by a whole factor to about `cell` without smoothing, as
    PNG; `ungrid` takes them out again. Headings too long for a column are broken into lines."""
    from ddpm_core import images

    scale = max(round(cell / rows[0][0].shape[0]), 1)
    grid = images.grid([list(row) for row in rows], gap=GAP, scale=scale)
    side, font = rows[0][0].shape[1] * scale, ImageFont.load_default(14)
    lines_of = [broken(text, side, font.getlength) for text in columns]
    header = HEADER + LINE * (max(len(lines) for lines in lines_of) - 1)
    canvas = Image.new("RGB", (grid.shape[1], grid.shape[0] + header), "white")
    canvas.paste(Image.fromarray(grid), (0, header))
    draw = ImageDraw.Draw(canvas)
    for i, lines in enumerate(lines_of):
        for j, text in enumerate(lines):
            at = (i * (side + GAP) + side / 2, header / 2 + LINE * (j - (len(lines) - 1) / 2))
            draw.text(at, text, fill=(70, 76, 88), font=font, anchor="mm")
    layout = PngInfo()
    facts = {"columns": list(columns), "side": side, "scale": scale, "header": header}
    layout.add_text("grid", json.dumps(facts))
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG", pnginfo=layout)
    return buffer.getvalue()


def broken(text: str, width: float, length: Callable[[str], float]) -> list[str]:
    """The text in lines no longer than `width` where its words allow that."""
    lines: list[str] = []
    for word in text.split():
        if lines and length(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines or [""]


def ungrid(png: bytes) -> tuple[list[str], list[list[UInt8[np.ndarray, "s s 3"]]]]:
    """The headings and the rows of pictures of a `labelled_grid`."""
    with Image.open(io.BytesIO(png)) as image:
        layout = json.loads(image.text["grid"])  # type: ignore[attr-defined]
        pixels = np.asarray(image)[layout.get("header", HEADER) :]
    side, scale = layout["side"], layout["scale"]
    lefts = [i * (side + GAP) for i in range(len(layout["columns"]))]
    tops = range(0, len(pixels), side + GAP)
    cut = [[pixels[top : top + side : scale, left : left + side : scale] for left in lefts] for top in tops]
    return layout["columns"], cut


def film_strip(grids: Mapping[int, bytes]) -> bytes:
    """From the grids of some steps, each source | translated | …, one grid: the source, what was made of it after each
    step, and what else the last grid shows."""
    last_columns, last = ungrid(grids[max(grids)])
    films = [[row[1] for row in ungrid(grids[step])[1][:FILM_ROWS]] for step in sorted(grids)]
    rows = [[row[0], *(film[i] for film in films), *row[2:]] for i, row in enumerate(last[:FILM_ROWS])]
    rows = [[_reduced(picture) for picture in row] for row in rows]
    columns = [last_columns[0], *(f"{step:,}" for step in sorted(grids)), *last_columns[2:]]
    return labelled_grid(columns, rows, cell=FILM_CELL)


def _reduced(picture: UInt8[np.ndarray, "s s 3"]) -> UInt8[np.ndarray, "r r 3"]:
    """By a whole factor to about FILM_CELL: the page of a run at 256 px is written and loaded often."""
    return np.asarray(Image.fromarray(picture).reduce(max(picture.shape[0] // FILM_CELL, 1)))


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


CSS = """
:root { --ink: #1d222b; --soft: #5b6270; --line: #e2e5ea; --page: #f6f7f9; --card: #fff; --accent: #2f6fde;
  --good: #1c7f4a; --bad: #b3372f; --even: #8a6d1d; --good-bg: #e9f6ef; --bad-bg: #fbeceb; --even-bg: #faf4e3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #a7afbd; --line: #303642; --page: #14171c;
  --card: #1c2027; --accent: #7aa9f7; --good: #6fd39b; --bad: #f0918a; --even: #e0c46c; --good-bg: #17291f;
  --bad-bg: #2f1d1c; --even-bg: #2a2515; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 40px 20px 80px; }
header { margin-bottom: 28px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 14px; }
.facts, .where, .note, figcaption { color: var(--soft); margin: 0; }
.where { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.note { font-size: 14px; margin-top: 12px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 22px; margin: 0 0 18px; }
.headline { font-size: 18px; margin: 0 0 16px; }
.verdicts { list-style: none; margin: 0; padding: 0; display: grid; gap: 10px;
  grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); }
.verdicts li { display: flex; gap: 12px; padding: 12px 14px; border-radius: 8px; font-size: 14px; }
.verdicts span { color: var(--soft); }
.verdicts .mark { font-size: 20px; line-height: 1.1; font-weight: 700; }
.good { background: var(--good-bg); } .good b, .good .mark { color: var(--good); }
.bad { background: var(--bad-bg); } .bad b, .bad .mark { color: var(--bad); }
.even { background: var(--even-bg); } .even b, .even .mark { color: var(--even); }
.status h2 { display: inline-block; padding: 4px 12px; border-radius: 999px; margin: 0 0 14px; font-size: 16px; }
h2.good { color: var(--good); } h2.bad { color: var(--bad); } h2.even { color: var(--even); }
progress { display: block; width: 100%; height: 8px; margin: 0 0 18px; appearance: none; border: 0;
  border-radius: 4px; background: var(--line); overflow: hidden; accent-color: var(--accent); }
progress::-webkit-progress-bar { background: var(--line); }
progress::-webkit-progress-value { background: var(--accent); }
progress::-moz-progress-bar { background: var(--accent); }
dl.tiles { grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); gap: 16px; margin: 0; }
.tiles dd { font-size: 16px; font-variant-numeric: tabular-nums; }
figure { margin: 0; }
figcaption { font-size: 14px; margin-top: 8px; }
img { max-width: 100%; height: auto; }
img.grid { display: block; margin: 0 auto; background: #fff; padding: 6px; border-radius: 6px; }
img.latest { max-height: 760px; width: auto; }
@media (max-width: 700px) { img.film { max-width: none; width: 640px; } }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); gap: 22px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
table + table, .scroll + .scroll { margin-top: 20px; }
caption { text-align: left; color: var(--soft); padding-bottom: 6px; }
th, td { text-align: right; padding: 7px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { font-weight: 600; color: var(--soft); }
tbody th, tr > th:first-child { text-align: left; font-weight: 400; white-space: normal; }
td small { color: var(--soft); margin-left: 6px; }
tbody .ours th, .ours td { font-weight: 600; }
.best { color: var(--accent); }
details { border-top: 1px solid var(--line); padding: 10px 0; }
summary { cursor: pointer; }
.options { margin-top: 8px; }
.options th { color: var(--soft); width: 34%; }
.options td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
dl { margin: 0 0 14px; display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px; font-size: 14px; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
"""
