"""`jobs.evaluate compare A B`: which differences between two evaluations are more than chance.

Both must be of the same rows of the same data. Images are compared by id, KID by the same random halves; every
interval is so wide (Bonferroni) that all of them hold together with 95 %.
"""

import dataclasses
import html
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow.parquet
import tyro

from ddpm_core import storage
from ddpm_core.errors import InputError
from jobs.common import cli, intervals
from jobs.common.intervals import Interval
from jobs.evaluation.metrics import halves_interval
from jobs.reports import metric_table

FORMAT, FORMAT_VERSION = "ddpm-translate-comparison", 1
READS = 2
"""Format version of the evaluations."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Two evaluations of the same images."""

    a: tyro.conf.Positional[str]
    """Folder or s3:// prefix of an evaluation."""
    b: tyro.conf.Positional[str]
    """The one to compare it with."""
    output: str | None = None
    """Folder or s3:// prefix for compare.json and report.html."""


@dataclasses.dataclass(frozen=True)
class Side:
    """One evaluation."""

    uri: str
    metrics: dict[str, Any]
    """metrics.json"""
    pictures: dict[str, dict[str, dict[str, float]]]
    """domain → metric → id → value, of the model."""
    halves: dict[str, np.ndarray]
    """domain → KID of each half, of the model."""


@dataclasses.dataclass(frozen=True)
class Compared:
    """One metric."""

    domain: str
    metric: str
    a: float
    b: float
    num: int
    """Images, or halves."""
    difference: Interval
    """A minus B."""
    words: str


def compare(argv: list[str]) -> int:
    """The command."""
    args = cli.parse(Args, argv, prog="jobs.evaluate compare", description=__doc__)
    uris = [storage.absolute(uri, flag=flag) for uri, flag in ((args.a, "A"), (args.b, "B"))]
    output = None if args.output is None else storage.absolute(args.output, flag="--output")
    a, b = (read(uri) for uri in uris)
    check_same(a, b)
    if output is not None:
        storage.check_writable(output)
    rows, left_out, level = differences(a, b)
    for line in as_text(a, b, rows, left_out, level):
        print(line)
    if output is not None:
        write(output, a, b, rows, left_out, level)
        print(f"report: {storage.join(output, 'report.html')}")
    return cli.DONE


def read(uri: str) -> Side:
    """An evaluation's folder.

    Raises:
        InputError: there is none, or one of another version.
    """
    try:
        found = storage.read_json(storage.join(uri, "metrics.json"))
        version = found["format_version"]
    except FileNotFoundError:
        raise InputError(
            f"{uri}: no evaluation here (no metrics.json); give a folder that jobs.evaluate wrote"
        ) from None
    except (*storage.NOT_JSON, KeyError, TypeError):
        raise InputError(f"{uri}/metrics.json is not an evaluation's; give a folder that jobs.evaluate wrote") from None
    if version != READS:
        raise InputError(
            f"{uri} is an evaluation of format version {version}, this program reads version {READS}; evaluate again"
        )
    pictures: dict[str, dict[str, dict[str, float]]] = {}
    for row in _rows(uri, "pictures.parquet"):
        if row["method"] == "model":
            for metric, value in row.items():
                if metric not in ("domain", "method", "id") and value is not None:
                    pictures.setdefault(row["domain"], {}).setdefault(metric, {})[row["id"]] = value
    halves: dict[str, dict[int, float]] = {}
    for row in _rows(uri, "halves.parquet"):
        if row["method"] == "model":
            halves.setdefault(row["domain"], {})[row["half"]] = row["kid"]
    return Side(uri, found, pictures, {name: np.array([of[i] for i in sorted(of)]) for name, of in halves.items()})


def _rows(uri: str, name: str) -> list[dict[str, Any]]:
    try:
        content = storage.read_bytes(storage.join(uri, name))
    except FileNotFoundError:
        raise InputError(f"{uri}: {name} is missing; evaluate again") from None
    try:
        return pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(f"{uri}/{name} is damaged ({str(error).splitlines()[0]}); evaluate again") from None


def check_same(a: Side, b: Side) -> None:
    """The same rows of the same data.

    Raises:
        InputError: naming what differs.
    """
    facts = {
        "data": lambda side: f"{side.metrics['data']['name']} (hash {side.metrics['data']['content_hash']})",
        "split": lambda side: side.metrics["split"],
    }
    for name, fact in facts.items():
        if fact(a) != fact(b):
            raise InputError(
                f"A was measured on {name} {fact(a)}, B on {fact(b)}; only evaluations of the same rows compare"
            )
    if not set(a.metrics["domains"]) & set(b.metrics["domains"]):
        ours, theirs = (", ".join(side.metrics["domains"]) for side in (a, b))
        raise InputError(f"A was measured to {ours}, B to {theirs}; only evaluations of the same domain compare")


def differences(a: Side, b: Side) -> tuple[list[Compared], list[str], float]:
    """Every metric that both have, why others are left out, and the level of each interval."""
    pairs: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
    left_out: dict[str, None] = {}
    for domain in [name for name in a.metrics["domains"] if name in b.metrics["domains"]]:
        ours, theirs = a.pictures.get(domain, {}), b.pictures.get(domain, {})
        for metric in dict.fromkeys([*ours, *theirs, "kid"]):
            if reason := _unlike(a, b, domain, metric):
                left_out[f"{metric}: {reason}"] = None
            elif metric == "kid":
                pairs[domain, metric] = a.halves[domain], b.halves[domain]
            else:
                common = sorted(ours[metric].keys() & theirs[metric].keys())
                pairs[domain, metric] = tuple(np.array([of[metric][i] for i in common]) for of in (ours, theirs))  # type: ignore[assignment]
        models = [side.metrics["domains"][domain]["methods"]["model"]["metrics"] for side in (a, b)]
        if any("fd" in model for model in models):
            left_out["fd: no parts of it are kept whose difference could be taken; each report has its interval"] = None
    level = intervals.bonferroni(max(len(pairs), 1))
    rows = [_compared(domain, metric, x, y, level) for (domain, metric), (x, y) in pairs.items()]
    return rows, list(left_out), level


def _unlike(a: Side, b: Side, domain: str, metric: str) -> str:
    """Why this metric cannot be compared, "" where it can."""
    sides = {"A": a, "B": b}
    measured = {
        name: domain in side.halves if metric == "kid" else bool(side.pictures.get(domain, {}).get(metric))
        for name, side in sides.items()
    }
    if not all(measured.values()):
        missing = [name for name, there in measured.items() if not there]
        return f"not measured in {' and '.join(missing)}"
    if net := metric_table.of(metric).net:
        ours, theirs = ((side.metrics["nets"][net] or {}) for side in (a, b))
        if ours.get("fingerprint") != theirs.get("fingerprint"):
            return f"measured with different nets ({ours.get('name')}; {theirs.get('name')})"
    if metric == "kid":
        of = [side.metrics["domains"][domain] for side in (a, b)]
        if a.metrics["seed"] != b.metrics["seed"]:
            return f"different seeds ({a.metrics['seed']}, {b.metrics['seed']}) give different halves"
        ids = [set(next(iter(side.pictures[domain].values()))) for side in (a, b)]
        if ids[0] != ids[1] or of[0]["num_real_images"] != of[1]["num_real_images"]:
            return "measured on different images, so the halves are not the same"
    elif not a.pictures[domain][metric].keys() & b.pictures[domain][metric].keys():
        return "no image in common"
    return ""


def _compared(domain: str, metric: str, a: np.ndarray, b: np.ndarray, level: float) -> Compared:
    gap = halves_interval(a - b, level=level) if metric == "kid" else intervals.difference(a, b, level=level)
    words = "no clear difference"
    if intervals.significant(gap):
        ahead = "A" if (gap.mean > 0) != metric_table.lower_is_better(metric) else "B"
        words = f"{ahead} is {'better' if metric_table.has_direction(metric) else 'larger'}"
    return Compared(domain, metric, float(a.mean()), float(b.mean()), len(a), gap, words)


# -- telling ------------------------------------------------------------------------------------------------------

HEAD = ("to", "metric", "A", "B", "A - B", "interval", "of", "")


def _cells(row: Compared) -> tuple[str, ...]:
    gap = row.difference
    of = f"{row.num} {'halves' if row.metric == 'kid' else 'images'}"
    interval = f"{gap.low:+.4g} to {gap.high:+.4g}"
    return (row.domain, row.metric, f"{row.a:.4g}", f"{row.b:.4g}", f"{gap.mean:+.4g}", interval, of, row.words)


def _footnote(rows: list[Compared], level: float) -> str:
    return (
        f"{len(rows)} comparisons: each interval is of {level:.2%}, so that all of them hold with 95 %. They are over "
        "images (KID: random halves of them), of one training run each: another seed of the training may differ more."
    )


def as_text(a: Side, b: Side, rows: list[Compared], left_out: list[str], level: float) -> list[str]:
    """The comparison in lines for a terminal."""
    table = [HEAD, *map(_cells, rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    reasons = [f"left out, {reason}" for reason in left_out]
    return [f"A  {a.uri}", f"B  {b.uri}", "", *lines, "", *reasons, _footnote(rows, level)]


def write(output: str, a: Side, b: Side, rows: list[Compared], left_out: list[str], level: float) -> None:
    """report.html, then compare.json."""
    from jobs.reports.html import document

    head = "".join(f"<th>{html.escape(each)}</th>" for each in HEAD)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in _cells(row))}</tr>" for row in rows)
    reasons = "".join(f'<p class="note">Left out, {html.escape(reason)}</p>' for reason in left_out)
    where = "".join(f'<p class="where">{name}: {html.escape(side.uri)}</p>' for name, side in (("A", a), ("B", b)))
    parts = [
        f"<header><h1>Two evaluations on {html.escape(a.metrics['data']['name'])}</h1>{where}</header>",
        f'<section><div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f'{reasons}<p class="note">{_footnote(rows, level)}</p></section>',
    ]
    page = document("Two evaluations", parts)
    storage.write_bytes(storage.join(output, "report.html"), page.encode())
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "a": _facts(a),
        "b": _facts(b),
        "level": level,
        "metrics": [dataclasses.asdict(row) for row in rows],
        "left_out": left_out,
    }
    text = json.dumps(content, indent=2, allow_nan=False)
    storage.write_bytes(storage.join(output, "compare.json"), text.encode())


def _facts(side: Side) -> Mapping[str, Any]:
    names = ("checkpoint", "options", "sampling", "nets")
    return {"uri": side.uri, **{name: side.metrics[name] for name in names}}
