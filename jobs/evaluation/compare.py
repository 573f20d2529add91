"""`jobs.evaluate compare A B`: which differences between two evaluations are more than chance.

Both must be of the same rows of the same data. Images are compared by id, KID by the same random subsets; every
interval is so wide (Bonferroni) that all of them hold together with 95 %.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import tyro

from ddpm_core import storage
from jobs.common import cli, kinds
from jobs.reports.html import Line, Table, render

if TYPE_CHECKING:
    from jobs.evaluation.results import Difference, Evaluation

FORMAT, FORMAT_VERSION = "ddpm-translate-comparison", 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Two evaluations of the same images."""

    a: tyro.conf.Positional[str]
    """Folder or s3:// prefix of an evaluation."""
    b: tyro.conf.Positional[str]
    """The one to compare it with."""
    output: str | None = None
    """Folder or s3:// prefix for compare.json and report.html."""


def compare(argv: Sequence[str]) -> int:
    """The command."""
    args = cli.parse(Args, argv, prog="jobs.evaluate compare", description=__doc__)
    from jobs.evaluation.results import check_same, differences, read  # seconds, which --help need not wait for

    uris = [storage.absolute(uri, flag=flag) for uri, flag in ((args.a, "A"), (args.b, "B"))]
    output = None if args.output is None else storage.absolute(args.output, flag="--output")
    a, b = (read(uri) for uri in uris)
    check_same(a, b)
    if output is not None:
        kinds.check_output(output, "comparison", {})
        storage.check_writable(output)
    rows, left_out, level = differences(a, b)
    for line in as_text(a, b, rows, left_out, level):
        print(line)
    if output is not None:
        write(output, a, b, rows, left_out, level)
        print(f"report: {storage.join(output, 'report.html')}")
    return cli.DONE


# -- telling ------------------------------------------------------------------------------------------------------

HEAD = ("to", "metric", "A", "B", "A - B", "interval", "of", "")


def _cells(row: "Difference") -> tuple[str, ...]:
    gap = row.difference
    of = f"{row.num} {'subsets' if row.metric == 'kid' else 'images'}"
    interval = f"{gap.low:+.4g} to {gap.high:+.4g}"
    return (row.domain, row.metric, f"{row.a:.4g}", f"{row.b:.4g}", f"{gap.mean:+.4g}", interval, of, row.words)


def _footnote(rows: "list[Difference]", level: float) -> str:
    return (
        f"{len(rows)} comparisons: each interval is of {level:.2%}, so that all of them hold with 95 %. They are over "
        "images (KID: random subsets of them), of one training run each: another seed of the training may differ more."
    )


def as_text(a: "Evaluation", b: "Evaluation", rows: "list[Difference]", left_out: list[str], level: float) -> list[str]:
    """The comparison in lines for a terminal."""
    table = [HEAD, *map(_cells, rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    reasons = [f"left out, {reason}" for reason in left_out]
    return [f"A  {a.uri}", f"B  {b.uri}", "", *lines, "", *reasons, _footnote(rows, level)]


def write(
    output: str, a: "Evaluation", b: "Evaluation", rows: "list[Difference]", left_out: list[str], level: float
) -> None:
    """report.html, then compare.json."""
    page = render(
        "comparison",
        title="Two evaluations",
        heading=f"Two evaluations on {a.metrics['data']['name']}",
        refresh_s=None,
        facts=[],
        where=[f"A: {a.uri}", f"B: {b.uri}"],
        table=Table(HEAD, [Line(head, cells) for head, *cells in map(_cells, rows)]),
        notes=[*(f"Left out, {reason}" for reason in left_out), _footnote(rows, level)],
    )
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


def _facts(side: "Evaluation") -> Mapping[str, Any]:
    names = ("checkpoint", "options", "sampling", "nets")
    return {"uri": side.uri, **{name: side.metrics[name] for name in names}}
