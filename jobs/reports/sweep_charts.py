"""The charts of a sweep, drawn on matplotlib's axes, and the words for what is in them."""

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from jobs.reports import charts, grids, metric_table
from jobs.reports.charts import COLORS, MUTED

Row = Mapping[str, Any]
"""A trial or a point, or another object of the two files."""
TRIALS = {
    "complete": ("complete", COLORS[0], "o"),
    "stopped": ("stopped early", COLORS[4], "s"),
    "running": ("running", MUTED, "D"),
    "diverged": ("diverged", COLORS[6], "x"),
    "failed": ("failed", COLORS[3], "x"),
}
"""State of a trial → in words, and how it is drawn."""
LOST = ("diverged", "failed")
RATES = ("#2f6fde", "#b565c0", "#e07b39", "#dcae3c")
"""A colour map from low to high, all of which can be seen on white and on black."""
RING = {"color": COLORS[2], "marker": "o", "markersize": 13, "fillstyle": "none", "linestyle": ""}
STAR = {"color": COLORS[1], "marker": "*", "markersize": 14, "linestyle": "", "zorder": 4}


def draw_history(axes: Any, trials: Sequence[Row], best: int | None) -> None:
    """Loss by trial, and the best so far."""
    if steps := best_so_far(trials):
        numbers, losses = zip(*steps, (max(trial["number"] for trial in trials), steps[-1][1]), strict=True)
        axes.step(numbers, losses, where="post", color=COLORS[0], linewidth=1.4, label="best so far")
    _scatter(axes, trials, {trial["number"]: trial["number"] for trial in trials}, best)
    axes.set_xlabel("trial")
    _whole_numbers(axes)


def draw_slice(axes: Any, trials: Sequence[Row], name: str, allowed: Row, best: int | None) -> None:
    """Loss by the value of an option; trials of the same category stand a little apart."""
    values = {trial["number"]: trial["values"][name] for trial in trials if name in trial["values"]}
    if "choices" in allowed:
        names = list(dict.fromkeys(value_text(value) for value in [*allowed["choices"], *values.values()]))
        places = {n: names.index(value_text(values[n])) + 0.3 * (n * 0.618 % 1 - 0.5) for n in values}
        _scatter(axes, trials, places, best)
        axes.set_xticks(range(len(names)), ["\n".join(grids.broken(each, 16, len)) for each in names])
        axes.set_xlim(-0.5, len(names) - 0.5)
    else:
        places = {n: float(value) for n, value in values.items() if is_number(value)}
        _scatter(axes, trials, places, best)
        if allowed.get("log"):
            _log_axis(axes, "x", list(places.values()))
    axes.set_xlabel("")
    _enlarge(axes)


def _scatter(axes: Any, trials: Sequence[Row], places: Mapping[int, float], best: int | None) -> None:
    """Trials by state at these places, those that were lost at the top edge."""
    there = [trial for trial in trials if trial["number"] in places]
    losses = {trial["number"]: loss for trial in there if (loss := loss_of(trial)) is not None}
    for state, (word, color, marker) in TRIALS.items():
        style: dict[str, Any] = {"color": color, "marker": marker, "linestyle": "", "markersize": 5.5, "label": word}
        if state in LOST:
            numbers = [trial["number"] for trial in there if trial["state"] == state]
            heights = [1.0] * len(numbers)
            style |= {"transform": axes.get_xaxis_transform(), "clip_on": False}
        else:
            numbers = [trial["number"] for trial in there if trial["state"] == state and trial["number"] in losses]
            heights = [losses[n] for n in numbers]
        if numbers:
            axes.plot([places[n] for n in numbers], heights, **style)
    picked = {
        "hand choice": (RING, {trial["number"] for trial in there if trial.get("hand")}),
        "winner": (STAR, {best}),
    }
    for label, (style, chosen) in picked.items():
        for number in losses.keys() & chosen:
            axes.plot([places[number]], [losses[number]], **style, label=label)
    charts.finish_axes(axes, list(losses.values()))
    axes.set_ylabel("validation loss")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.margins(x=0.05)
    _legend(axes)


def draw_importance(axes: Any, shares: Mapping[str, float]) -> None:
    """A bar an option, the most important on top."""
    names = sorted(shares, key=lambda name: shares[name])
    bars = axes.barh(names, [shares[name] for name in names], color=COLORS[0], height=0.6)
    axes.bar_label(bars, [percent_text(shares[name]) for name in names], padding=4)
    axes.set_xlim(0, 1.12 * max(*shares.values(), 0.01))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def draw_curves(axes: Any, trials: Sequence[Row], name: str, log: bool, best: int | None) -> None:
    """Validation loss by epoch, a line a trial, coloured by one of its options."""
    import matplotlib.cm
    import matplotlib.colors

    values = [float(trial["values"][name]) for trial in trials]
    low, high = min(values), max(values)
    if low == high:
        low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
    norm = matplotlib.colors.LogNorm(low, high) if log else matplotlib.colors.Normalize(low, high)
    colors: Any = matplotlib.cm.ScalarMappable(
        norm, matplotlib.colors.LinearSegmentedColormap.from_list("rates", RATES)
    )
    for trial, value in zip(trials, values, strict=True):
        won, color = trial["number"] == best, colors.to_rgba(value)
        epochs, losses = zip(*curve_of(trial), strict=True)
        line: Any = {
            "linewidth": 3.2 if won else 1.3,
            "zorder": 3 if won else 2,
            "ls": "--" if trial.get("hand") else "-",
        }
        end = {"marker": TRIALS[trial["state"]][2], "markersize": 4.5, "markevery": [len(epochs) - 1]}
        axes.plot(epochs, losses, color=color, **line, **end)
        if label := " = ".join(["winner"] * won + ["hand choice"] * bool(trial.get("hand"))):
            offset = (6, -8 if won else 2)  # the winner's is the lower one
            axes.annotate(label, (epochs[-1], losses[-1]), offset, textcoords="offset points", fontsize=9)
    bar = axes.figure.colorbar(colors, ax=axes, pad=0.02, label=name)
    bar.outline.set_visible(False)
    if log:
        _log_axis(bar.ax, "y", [low, high])
    charts.finish_axes(axes, [loss for trial in trials for _, loss in curve_of(trial)])
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation loss")
    _whole_numbers(axes)


def draw_pareto(axes: Any, points: Sequence[Row], x: str, y: str) -> None:
    """One objective against another: all points pale, the front strong, the hand choice ringed, the chosen starred."""
    there = [point for point in points if {x, y} <= given(point.get("objectives") or {}).keys()]
    dot = {"marker": "o", "markersize": 5, "linestyle": ""}
    for label, style, belongs in (
        ("other points", {**dot, "color": MUTED, "alpha": 0.4}, lambda point: not point.get("front")),
        ("front", {**dot, "color": COLORS[0]}, lambda point: point.get("front")),
        ("hand choice", RING, lambda point: point.get("hand")),
        ("chosen", STAR, lambda point: point.get("chosen")),
    ):
        if places := [(point["objectives"][x], point["objectives"][y]) for point in there if belongs(point)]:
            axes.plot(*zip(*places, strict=True), **style, label=label)
            if label == "chosen":
                axes.annotate(label, places[0], (9, 5), textcoords="offset points", weight="bold")
    if x == "nfe":
        _log_axis(axes, "x", [point["objectives"][x] for point in there])
    axes.set_xlabel(f"{metric_table.heading(x)} {_direction(x)}")
    axes.set_ylabel(f"{metric_table.heading(y)}\n{_direction(y)}")
    _legend(axes)
    _enlarge(axes)


def _direction(objective: str) -> str:
    return f"({'lower' if metric_table.lower_is_better(objective) else 'higher'} is better)"


def best_so_far(trials: Iterable[Row]) -> list[tuple[int, float]]:
    """(number, lowest loss up to it) of the complete trials."""
    losses = {trial["number"]: loss_of(trial) for trial in trials if trial["state"] == "complete"}
    complete = sorted((number, loss) for number, loss in losses.items() if loss is not None)
    return list(itertools.accumulate(complete, lambda best, next: (next[0], min(best[1], next[1]))))


def _log_axis(axes: Any, which: Literal["x", "y"], values: Sequence[float]) -> None:
    """Logarithmic where the values allow it, with as many marks as can be read."""
    import matplotlib.ticker

    if not values or min(values) <= 0:
        return
    spread = max(values) / min(values)
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    subs = (1, 2, 3, 5, 7) if spread < 5 else (1, 2, 5) if spread < 200 else (1,)
    axis.set_major_locator(matplotlib.ticker.LogLocator(subs=subs))
    axis.set_major_formatter(lambda value, _: number_text(value))
    axis.set_minor_locator(matplotlib.ticker.NullLocator())


def _whole_numbers(axes: Any) -> None:
    import matplotlib.ticker

    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _legend(axes: Any) -> None:
    """Above the axes, where it hides nothing."""
    place: Any = {"loc": "lower left", "bbox_to_anchor": (0, 1.02), "ncols": 4, "borderaxespad": 0.2}
    axes.legend(frameon=False, fontsize=9, columnspacing=1.2, handletextpad=0.4, **place)


def _enlarge(axes: Any) -> None:
    """For a chart that stands beside another."""
    axes.tick_params(labelsize=13)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_fontsize(13)
    for text in axes.get_legend().get_texts():
        text.set_fontsize(11)


def loss_of(trial: Row) -> float | None:
    """The trial's lowest validation loss, where it means something."""
    loss = trial.get("loss")
    return loss if is_number(loss) and trial["state"] not in LOST else None


def curve_of(trial: Row) -> list[tuple[float, float]]:
    return [(epoch, loss) for epoch, loss in trial.get("curve") or [] if is_number(loss)]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def value_text(value: Any) -> str:
    """What an option or a measurement is, as a table has it."""
    if isinstance(value, list | tuple):
        return ", ".join(map(value_text, value)) or "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number_text(value) if isinstance(value, float) else "–" if value is None else str(value)


def number_text(value: float) -> str:
    """Four digits; 1e-5 and not 1e-05."""
    return re.sub("^-", "−", f"{value:.4g}").replace("e-0", "e-")


def percent_text(share: float) -> str:
    return f"{100 * share:.2g} %" if 0 < abs(share) < 0.0995 else f"{100 * share:.0f} %"


def given(values: Row) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
