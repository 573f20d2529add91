"""Charts of curves against images seen, for light and dark pages."""

import io
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jobs.reports.html import data_uri

MAX_LINES = 8
"""As many can be told apart in a chart."""


# -- charts -------------------------------------------------------------------------------------------------------

INK = "#5b6270"
TRAIN, VAL = "#9aa3b2", "#2f6fde"
BANDS = ("#9ecae9", "#5b9bd5", "#2f6fde", "#173f8f")
DARK = {
    INK: "#a7afbd",
    **dict(zip(BANDS, ("#d3e6fb", "#8fc1f5", "#4f94ea", "#2f6fde"), strict=True)),
}
"""What is another colour on dark pages."""


def chart(draw: Any, caption: str, *, height: float = 3.7, grid: Literal["x", "y"] = "y") -> dict[str, str]:
    """The chart for light and for dark pages: the two addresses and the caption. `draw` gets matplotlib's axes;
    `height`: inches at a width of 6.4."""
    light = render(draw, "svg", height=height, grid=grid).decode()
    dark = re.sub("|".join(DARK), lambda found: DARK[found[0]], light)  # once: one colour's dark is another's light
    drawn = {theme: data_uri(svg.encode(), "svg+xml") for theme, svg in (("light", light), ("dark", dark))}
    return {**drawn, "caption": caption}


def render(draw: Any, kind: Literal["svg", "png"], *, height: float = 3.7, grid: Literal["x", "y"] = "y") -> bytes:
    """The chart as SVG on a transparent ground, for pages, or as PNG on white, to stand by itself."""
    import cycler
    import matplotlib
    import matplotlib.figure

    style: Any = {
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.6,
        "text.parse_math": False,  # names of attributes may hold a $
        "axes.prop_cycle": cycler.cycler(color=BANDS),
        "svg.hashsalt": "chart",  # equal charts are equal files
    }
    with matplotlib.rc_context(style):
        figure = matplotlib.figure.Figure(figsize=(6.4, height), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.grid(axis=grid, color=INK, alpha=0.18, linewidth=0.6)
        buffer = io.BytesIO()
        about = {"metadata": {"Date": None}} if kind == "svg" else {}
        figure.savefig(buffer, format=kind, transparent=kind == "svg", **about)
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
    """Images seen, and the value of `key`, of those rows of metrics.jsonl that have it."""
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
    """Of a curve against images seen; losses that fall far get a logarithmic axis."""
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
    axes.set_xlabel("images seen")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}")
    axes.margins(x=0.01)
    if any(axes.get_legend_handles_labels()[1]):
        axes.legend(frameon=False, fontsize=9)


COLORS = ("#4a86e8", "#e07b39", "#2fa56c", "#b565c0", "#c09a2b", "#3aa7b8", "#d4566e", "#8a92a0")
"""To be told apart on white and on black, and by those who see fewer colours: markers differ too."""
MUTED = "#8a92a0"
