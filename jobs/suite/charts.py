"""The plots and images of a suite's report.

Every figure is a PNG that stands by itself (`plots/`), and HTML for the page, drawn for light and for dark.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from ddpm_core import storage
from jobs.reports import charts, grids, metric_table
from jobs.reports.html import image
from jobs.reports.metric_table import METHODS
from jobs.suite import stress
from jobs.suite.plan import Figure, Measured, Section
from jobs.suite.results import Cell, Evaluation, Results

MARKERS = "osD^vPX*"
REFERENCES = {name: METHODS[name] for name in ("copy", "linear", "truth")}
"""What needs no network, measured beside each: name in metrics.json → in words."""
NUM_SHOWN = 6
"""Images side by side."""
Draw = Callable[[Any], None]
Found = tuple[bytes, dict[str, Any]] | str
"""A PNG and what the page shows, or why there is none."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A figure."""

    png: bytes
    shown: Mapping[str, Any]
    """What the page shows, by what it is: chart, image or stress."""


def draw(results: Results, section: Section, figure: Figure) -> Drawn | str:
    """The figure, or why there is none."""
    drawers = {"images": side_by_side, "tradeoff": tradeoff, "curves": curves, "bars": bars, "stress": stress.draw}
    found = drawers[figure.kind](results, section, figure)
    return Drawn(*found) if isinstance(found, tuple) else found


def shown_rows(section: Section, figure: Figure) -> list[Measured]:
    """The rows of a figure.

    Raises:
        ValueError: it names one that the section does not have.
    """
    there = {row.name: row for row in section.rows}
    if unknown := [name for name in figure.rows if name not in there]:
        raise ValueError(f"figure {figure.title!r} names {unknown[0]!r}, which is no row of section {section.key}")
    return [there[name] for name in figure.rows] or [*section.rows]


def domain_of(results: Results, rows: Sequence[Measured], figure: Figure) -> str:
    """The figure's, or the first that its rows were measured to."""
    if figure.domain:
        return figure.domain
    return next((name for row in rows for each in results.evaluations(row) for name in each.metrics["domains"]), "")


def _charted(drawer: Draw, caption: str, *, height: float = 3.7, grid: Literal["x", "y"] = "y") -> Found:
    chart = charts.chart(drawer, caption, height=height, grid=grid)
    return charts.render(drawer, "png", height=height, grid=grid), {"chart": chart}


# -- images -----------------------------------------------------------------------------------------------------


def side_by_side(results: Results, section: Section, figure: Figure) -> Found:
    """The same sources through several rows: source | row | row | … | truth. Of each row the first training seed."""
    rows = shown_rows(section, figure)
    domain = domain_of(results, rows, figure)
    found = {row.name: grid for row in rows if (grid := _grid(results.evaluations(row), domain)) is not None}
    if not found:
        return f"no images: {results.missing(rows[0].evaluations[0])}"
    common = set.intersection(*(set(shown) for shown, _ in found.values()))
    first, _ = next(iter(found.values()))
    ids = [name for name in first if name in common]
    ids = [ids[i] for i in np.unique(np.linspace(0, len(ids) - 1, min(len(ids), NUM_SHOWN)).round().astype(int))]
    if not ids:
        return "no images: the rows do not show the same ones"
    truths = [(shown, last) for shown, last in found.values() if last][:1]
    columns = ["source", *found, *(last for _, last in truths)]
    table = [
        [first[name][0], *(shown[name][1] for shown, _ in found.values()), *(shown[name][-1] for shown, _ in truths)]
        for name in ids
    ]
    png = grids.labelled_grid(columns, table)
    left_out = [row.name for row in rows if row.name not in found]
    caption = f"{figure.title}. {len(ids)} held-out images to {domain}, spread over the set and not chosen"
    if left_out:
        caption += f"; without {', '.join(left_out)}, which {'was' if len(left_out) == 1 else 'were'} not measured"
    return png, {"image": image(f"{caption}.", png, "film")}


def _grid(evaluations: Sequence[Evaluation], domain: str) -> tuple[dict[str, list[np.ndarray]], str] | None:
    """What the first evaluation shows: id → source, samples, truth; and what its last column is: truth, proxy, or ""
    where that is a sample."""
    uri, metrics = (evaluations[0].uri, evaluations[0].metrics) if evaluations else ("", {})
    name = metrics.get("grids", {}).get(domain)
    if name is None or domain not in metrics["domains"]:
        return None
    columns, cut = grids.ungrid(storage.read_bytes(storage.join(uri, name)))
    shown = dict(zip(metrics["domains"][domain]["shown"], cut, strict=True))
    return shown, columns[-1] if columns[-1] in ("truth", "proxy") else ""


# -- plots --------------------------------------------------------------------------------------------------------


def axis(metric: str) -> str:
    """What an axis says, the good direction with it."""
    text = metric_table.heading(metric) + (", %" if metric_table.of(metric).rate else "")
    return f"{text} ({metric_table.of(metric).better} is better)" if metric_table.has_direction(metric) else text


def _scaled(cell: Cell, metric: str) -> tuple[float, float, float, list[float]]:
    """mean, low, high and the seeds, rates in percent."""
    by = 100 if metric_table.of(metric).rate else 1
    at = cell.interval
    return by * at.mean, by * at.low, by * at.high, [by * seed for seed in cell.seeds]


def bars(results: Results, section: Section, figure: Figure) -> Found:
    """A row a line: mean and interval, each training seed as a small dot, and what needs no network below them."""
    rows = shown_rows(section, figure)
    domain = domain_of(results, rows, figure)
    cells = {row.name: cell for row in rows if (cell := results.cell(row, domain, figure.y)) is not None}
    if not cells:
        return f"nothing to draw: {results.why_not(rows[0], domain, figure.y)}"
    first = next(row for row in rows if row.name in cells)
    others = {words: results.cell(first, domain, figure.y, name) for name, words in REFERENCES.items()}
    lines = {**cells, **{words: cell for words, cell in others.items() if cell is not None}}

    def drawer(axes: Any) -> None:
        for place, (name, cell) in enumerate(lines.items()):
            mean, low, high, seeds = _scaled(cell, figure.y)
            color = charts.COLORS[0] if name in cells else charts.MUTED
            axes.plot([low, high], [place, place], color=color, linewidth=2.5, alpha=0.55, solid_capstyle="round")
            axes.plot([mean], [place], color=color, marker="o", markersize=7)
            if len(seeds) > 1 and name in cells:
                axes.plot(seeds, [place + 0.22] * len(seeds), color=color, marker="o", markersize=3, linestyle="")
        axes.set_yticks(range(len(lines)), ["\n".join(grids.broken(name, 28, len)) for name in lines])
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.set_xlabel(axis(figure.y))

    several = any(len(cell.seeds) > 1 for cell in cells.values())
    dots = "; small dots are training seeds" if several else "; one training seed: the interval is over images only"
    caption = f"{figure.title}. To {domain}, with 95 % intervals{dots}."
    return _charted(drawer, caption, height=max(0.42 * len(lines) + 0.9, 1.7), grid="x")


def tradeoff(results: Results, section: Section, figure: Figure) -> Found:
    """One thing against another, a line for each group."""
    rows = shown_rows(section, figure)
    groups = figure.groups or ("",) * len(rows)
    if len(groups) != len(rows):
        raise ValueError(f"figure {figure.title!r} has {len(rows)} rows and {len(groups)} groups")
    domain = domain_of(results, rows, figure)
    lines: dict[str, list[tuple[float, Cell]]] = {}
    for row, group in zip(rows, groups, strict=True):
        x, cell = _place(results, row, domain, figure.x), results.cell(row, domain, figure.y)
        if x is not None and cell is not None:
            lines.setdefault(group, []).append((x, cell))
    if not lines:
        return f"nothing to draw: {results.why_not(rows[0], domain, figure.y)}"

    def drawer(axes: Any) -> None:
        for i, (group, points) in enumerate(lines.items()):
            xs, cells = zip(*sorted(points, key=lambda point: point[0]), strict=True)
            means, lows, highs, _ = zip(*(_scaled(cell, figure.y) for cell in cells), strict=True)
            off = [np.subtract(means, lows).clip(0), np.subtract(highs, means).clip(0)]
            style = {
                "color": charts.COLORS[i % len(charts.COLORS)],
                "marker": MARKERS[i % len(MARKERS)],
                "markersize": 5,
            }
            axes.errorbar(xs, means, off, label=group, linewidth=1.8, elinewidth=1, capsize=2, **style)
        _scale(axes, [x for points in lines.values() for x, _ in points])
        axes.set_xlabel(axis(figure.x))
        axes.set_ylabel(axis(figure.y))
        if any(lines):
            axes.legend(frameon=False, fontsize=8.5, ncols=2 if len(lines) > 4 else 1)

    return _charted(drawer, f"{figure.title}. To {domain}, with 95 % intervals.", height=4.2)


def _place(results: Results, row: Measured, domain: str, x: str) -> float | None:
    cost = dataclasses.asdict(results.cost(row))
    if x in cost:
        return cost[x]
    cell = results.cell(row, domain, x)
    return None if cell is None else _scaled(cell, x)[0]


def _scale(axes: Any, xs: Sequence[float]) -> None:
    """Logarithmic where the places lie so, with the places themselves as marks."""
    import matplotlib.ticker

    marks = sorted(set(xs))
    if min(marks) > 0 and max(marks) > 6 * min(marks):
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter("")
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.set_xticks(marks if len(marks) <= 8 else marks[:: len(marks) // 8 + 1])
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def curves(results: Results, section: Section, figure: Figure) -> Found:
    """The validation loss of several runs on one axis; the seeds of one training in one colour."""
    found = {key: [line for line in results.curves(key) if line.get("split") == "val"] for key in figure.runs}
    there = {key: lines for key, lines in found.items() if len(lines) > 1}
    if not there:
        return "nothing to draw: " + (results.missing(figure.runs[0]) if figure.runs else "no runs are named")
    names = {key: _training_name(key) for key in there}
    colors = {name: charts.COLORS[i % len(charts.COLORS)] for i, name in enumerate(dict.fromkeys(names.values()))}

    def drawer(axes: Any) -> None:
        labelled = set()
        for key, lines in there.items():
            name = names[key]
            label = {} if name in labelled else {"label": name}
            labelled.add(name)
            xs, ys = charts.points(lines, "loss")
            axes.plot(xs, ys, color=colors[name], linewidth=1.6, marker="o", markersize=2.5, alpha=0.85, **label)
        charts.finish_axes(axes, [line["loss"] for lines in there.values() for line in lines if line.get("loss")])

    return _charted(drawer, f"{figure.title}. Validation loss; a line a run.")


def _training_name(key: str) -> str:
    """runs/paired/seed-0 → paired."""
    return key.removeprefix("runs/").rpartition("/seed-")[0] or key
