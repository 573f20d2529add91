"""report.html of a sweep: what was found, how much of it was luck, and every trial and point behind it.

trial   a training with options of the space; its loss is the lowest validation loss that it reached
point   a sampling of the winner's checkpoint with options of the sampling space; it has several objectives
lead    how far the winner was ahead of the hand choice in the search
gain    how far it is ahead on fresh noise and images; what the lead was more than that was luck
"""

import collections
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

from ddpm_core import storage
from jobs.common.intervals import ENOUGH, Interval, rests_on, significant
from jobs.common.progress import duration
from jobs.reports import charts, metric_table, sweep_charts
from jobs.reports.html import CREDITS, REFRESH_S, Cell, Line, Table, image, render
from jobs.reports.metric_table import OBJECTIVES
from jobs.reports.sweep_charts import Row, curve_of, given, is_number, loss_of, number_text, percent_text, value_text

Card = tuple[Literal["better", "worse", "even"], str, str]
"""How good it is, what holds, and the figures behind it."""
SWEEP: Row = {"data": {}, "space": {}, "sampling_space": {}, "options": {}, "environment": {}, "uri": "", "rule": ""}
RESULTS: Row = {"state": "", "message": "", "trials": [], "points": [], "importance": {}, "again": {}}
"""What stands for the parts that are missing."""
STATES = {
    "training": ("plain", "Training"),
    "sampling": ("plain", "Sampling"),
    "checking": ("plain", "Measuring again"),
    "finished": ("plain", "Finished"),
    "interrupted": ("even", "Interrupted"),
    "failed": ("bad", "Failed"),
}
ENDED = ("", "finished", "interrupted", "failed")
OUTCOMES = {"better": "good", "worse": "bad", "even": "even"}
"""What a comparison came to → its colour."""
SEARCHES = {"tpe": "Sobol, then TPE", "random": "random search"}
LEARNING_RATE = "optim.learning_rate"
MAX_PARETO = 4
"""As many pairs of objectives are drawn."""


PAIRS = (
    ("psnr", "kid"),
    ("psnr_to_source", "kid"),
    *(("nfe", name) for name in OBJECTIVES if name != "nfe"),
    ("identity_cosine", "kid"),
)
"""(x, y) of the charts that are drawn before all others."""
FRESH = (
    "Intervals are of 95 %; winner and hand choice are shown the same images and noise. Both are measured as they "
    "were trained: what another seed of training would change is not in the interval."
)
PED_ANOVA = (
    "PED-ANOVA (Watanabe et al. 2023): how well the values of one option alone tell the best trials from the others, "
    "as shares of 100 %. A few dozen trials tell the order at best."
)


def write(output: str, sweep: Row, results: Row, images: Sequence[tuple[str, bytes]] = ()) -> str:
    """Write OUTPUT/report.html and return its URI.

    `sweep`, `results`: the content of sweep.json and results.json. `images`: (caption, PNG).
    """
    uri = storage.join(output, "report.html")
    storage.write_bytes(uri, build(sweep, results, images).encode())
    return uri


def build(sweep: Row, results: Row, images: Sequence[tuple[str, bytes]] = ()) -> str:
    """The page; any part of the results may be missing."""
    sweep, results = ({**empty, **given(found)} for empty, found in ((SWEEP, sweep), (RESULTS, results)))
    trials, points, best = results["trials"], results["points"], results.get("best_trial")
    importance = {kind: shares for kind, shares in results["importance"].items() if num_told(kind, results) >= ENOUGH}
    heading = f"{sweep['data'].get('name', 'translation')}: sweep from {sweep.get('preset', 'a checkpoint')}"
    done, total = _progress(sweep, results)
    failures = _failures(points)
    return render(
        "sweep",
        title=f"{done / max(total, 1):.0%} · {heading}" if is_live(results) else heading,
        heading=heading,
        refresh_s=REFRESH_S if is_live(results) else None,
        facts=_facts(sweep, results),
        where=[sweep["uri"]],
        status=_status(sweep, results) if results["state"] else None,
        trained=_trained(sweep, results),
        sampled=_sampled(sweep, results),
        rule=sweep["rule"],
        history=_history(trials, best),
        slices=_slices(sweep["space"], trials, best),
        importance=_importance(importance),
        shares=_shares(importance),
        what_matters=_what_matters(importance, results),
        colored_by=_rate_or_name(colored_by(sweep["space"])),
        curves=_curves(sweep["space"], trials, best),
        tradeoffs=_tradeoffs(points),
        images=[image(caption, png, "film") for caption, png in images],
        trials=_trial_table(list(sweep["space"]), trials, best),
        points=_point_table(list(sweep["sampling_space"]), points),
        failures=[(_cut(error), count) for error, count in failures.most_common(8)],
        num_failed=f"{failures.total()} of {len(points)} points failed:",
        origin=_origin(sweep),
        command=sweep.get("command"),
        blocks={
            "Options of training that were searched": {key: allowed_text(each) for key, each in sweep["space"].items()},
            "Options of sampling that were searched": {
                key: allowed_text(each) for key, each in sweep["sampling_space"].items()
            },
            "Options that all trials share": sweep["options"],
            "Environment": sweep["environment"],
        },
    )


def is_live(results: Row) -> bool:
    return results["state"] not in ENDED


def num_told(kind: str, results: Row) -> int:
    """How many trials, or points, say something of what matters."""
    rows = results["trials" if kind == "training" else "points"]
    return sum(loss_of(row) is not None if kind == "training" else row["state"] == "complete" for row in rows)


def _what_matters(importance: Row, results: Row) -> str:
    """Where the shares come from, and why there are none."""
    words = {"training": "trials", "sampling": "points"}
    told = [PED_ANOVA] if importance else []
    told += [
        f"How much each option of {kind} matters is not shown: that takes {ENOUGH} {word}, there are {num}."
        for kind, word in words.items()
        if 0 < (num := num_told(kind, results)) < ENOUGH
    ]
    return " ".join(told)


def _progress(sweep: Row, results: Row) -> tuple[int, int]:
    """Trials and points that have ended, and how many there will be."""
    total = sweep.get("num_trials", 0) + sweep.get("num_points", 0)
    return min(len(_ended(results["trials"])) + len(_ended(results["points"])), total), total


def _ended(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["state"] != "running"]


def _facts(sweep: Row, results: Row) -> list[str]:
    """What stands below the title."""
    facts: list[str] = []
    if trials := sweep.get("num_trials"):
        facts.append(f"{trials:,} trials" + (f" of {sweep['epochs']:,} epochs" if sweep.get("epochs") else ""))
    if points := sweep.get("num_points"):
        facts.append(f"{points:,} points of sampling")
    if search := sweep.get("search"):
        facts.append(SEARCHES[search])
    if early := trials and sweep.get("early_stopping"):
        facts.append(f"ASHA: from epoch {early['grace_epochs']} on 1 in {early['reduction_factor']} goes on")
    elif trials:
        facts.append("no early stopping")
    facts.append(str(sweep["environment"].get("date") or results.get("at", ""))[:10])
    return [fact for fact in facts if fact]


def _status(sweep: Row, results: Row) -> dict[str, Any]:
    """How far the sweep is, or how it ended."""
    kind, word = STATES[results["state"]]
    (done, total), trials, points = _progress(sweep, results), _ended(results["trials"]), _ended(results["points"])
    counts = collections.Counter(row["state"] for row in trials)
    losses = [loss for row in trials if (loss := loss_of(row)) is not None]
    facts = {
        "Trials": _of(len(trials), sweep.get("num_trials", 0)) if trials else "",
        "Of them": ", ".join(
            f"{counts[state]} {sweep_charts.TRIALS[state][0]}" for state in sweep_charts.TRIALS if counts[state]
        ),
        "Points": _of(len(points), sweep.get("num_points", 0)) if points else "",
        "Lowest validation loss": number_text(min(losses)) if losses else "",
        "Time in trials": duration(sum(row.get("seconds") or 0 for row in trials)) if trials else "",
        "Time in points": duration(sum(row.get("seconds") or 0 for row in points)) if points else "",
        "Time left": duration(results["left_s"]) if is_live(results) and results.get("left_s") is not None else "",
    }
    lines = [results["message"]]
    if at := results.get("at"):
        lines.append(f"As of {datetime.fromisoformat(at).strftime('%Y-%m-%d %H:%M:%S UTC')}.")
    done = total if results["state"] == "finished" else done
    return {"kind": kind, "word": word, "done": done, "total": total, "facts": facts, "notes": lines}


def _of(done: int, total: int) -> str:
    return f"{done:,} of {total:,}" if done < total else f"{done:,}"


# -- luck and gain ------------------------------------------------------------------------------------------------


def _trained(sweep: Row, results: Row) -> dict[str, Any] | None:
    """The winner beside the hand choice."""
    trials, again = results["trials"], results["again"].get("training") or {}
    if (winner := next((row for row in trials if row["number"] == results.get("best_trial")), None)) is None:
        return None
    hand = next((row for row in trials if row.get("hand")), winner)
    columns = {"winner": winner} if hand is winner else {"winner": winner, "hand": hand}
    fresh = {key: interval(value) for key, value in (again.get("fresh") or {}).items()}
    lines = _option_lines(sweep["space"], [row["values"] for row in columns.values()])
    for name, key in {"epochs trained": "epochs", "validation loss in the search": "loss"}.items():
        lines.append(Line(name, [value_text(row.get(key)) for row in columns.values()]))
    if fresh:
        lines.append(Line("loss on fresh noise", [_cell(fresh.get(key)) for key in columns]))
    among = f"the best of {(num := num_told('training', results))} trials"
    yet = " yet" * is_live(results)
    unknown = "even", f"Not measured again{yet}: it is {among}, and how much of that is luck is not known.", ""
    outcome, text, figures = unknown
    if num == 1:
        text = f"It is the only trial that came to its end{yet}: there is nothing to compare it with."
    elif winner.get("hand"):
        text = f"The search found nothing better: the hand choice itself is {among}."
    elif reason := why_no_gain(winner, hand):
        text = f"It is {among}. {reason}"
    else:
        outcome, text, figures = gain_in_loss(again) or unknown
    head = ["", f"winner, trial {winner['number']}", "hand choice"][: len(columns) + 1]
    return {
        "table": Table(head, lines, kind="chosen"),
        "card": (OUTCOMES[outcome], text, [figures]),
        "note": FRESH if fresh else "",
    }


def why_no_gain(winner: Row, hand: Row) -> str:
    """Why the winner cannot be said to be ahead of the hand choice, "" where it can."""
    if hand is winner:
        return "The hand choice lies outside the space and was not tried: what the search gained is not known."
    if (there := hand.get("epochs") or 0) < (wanted := winner.get("epochs") or 0):
        word = sweep_charts.TRIALS[hand["state"]][0]
        return f"The hand choice ({word}) was trained for {there} of {wanted} epochs: no gain is claimed over it."
    return ""


def gain_in_loss(again: Row) -> Card | None:
    """Winner against hand choice on fresh noise, and what that says of the lead in the search."""
    fresh, seen = again.get("fresh") or {}, again.get("seen") or {}
    winner, hand, gap = (interval(fresh.get(key)) for key in ("winner", "hand", "difference"))
    if winner is None or hand is None or gap is None:
        return None
    num = again.get("num_images") or 0
    if few := rests_on(num):
        return "even", f"Measured again, the losses are {_loss(winner.mean)} and {_loss(hand.mean)}. {few}", ""
    outcome = judged(gap, lower=True, num=num)
    chance = "no more than chance" if outcome == "even" else "more than chance"
    text = (
        f"On fresh noise the winner's loss is {_loss(winner.mean)}, the hand choice's {_loss(hand.mean)}: "
        f"{_relative(gap.mean / hand.mean)}, {chance} (difference {_span(gap)})."
    )
    if outcome == "worse":
        text += " The hand choice is the better one."
    told = ""
    if seen.get("winner") is not None and seen.get("hand"):
        lead = 1 - seen["winner"] / seen["hand"]
        gain = Interval(*(-value / hand.mean for value in (gap.mean, gap.high, gap.low)))
        told = f"Seen in the search it was {_loss(seen['winner'])} against {_loss(seen['hand'])}, "
        told += f"{_relative(-lead)}: {luck(lead, gain, num)}. "
    return outcome, text, told + _measured_on(again)


def judged(gap: Interval, *, lower: bool, num: int) -> Literal["better", "worse", "even"]:
    """What a difference over `num` images comes to where `lower` or higher is better."""
    if not significant(gap, num):
        return "even"
    return "better" if (gap.high < 0) == lower else "worse"


def luck(lead: float, gain: Interval, num: int) -> str:
    """How much of a lead was luck, from what is left of it; both are positive where the winner is ahead."""
    if lead <= 0:
        return "there was no lead"
    if not significant(gain, num):
        return "the lead cannot be told from luck"
    if gain.mean < 0:
        return "all of the lead was luck"
    if gain.mean >= lead:
        return "the lead did not shrink, no sign of luck"
    most, least = (min(max(1 - left / lead, 0.0), 1.0) for left in (gain.low, gain.high))
    span = f"{percent_text(least)} to {percent_text(most)}"
    return f"about {percent_text(1 - gain.mean / lead)} of the lead was luck ({span})"


def _sampled(sweep: Row, results: Row) -> dict[str, Any] | None:
    """The chosen point beside the hand choice."""
    points, again = results["points"], results["again"].get("sampling") or {}
    there: dict[str, Row] = {key: next((row for row in points if row.get(key)), {}) for key in ("chosen", "hand")}
    values = {key: (again.get("values") or {}).get(key) or row.get("values") or {} for key, row in there.items()}
    if not values["chosen"]:
        return None
    measured, lines, counts = again.get("objectives") or {}, [], collections.Counter[str]()
    num = again.get("num_images") or 0
    for name in measured or objectives_of(points):
        seen = {key: (row.get("objectives") or {}).get(name) for key, row in there.items()}
        cells, outcome = _compared(name, {"seen": seen, **given(measured.get(name) or {})}, num)
        lines.append(Line(_heading(name), cells[: len(cells) if measured else 2]))
        counts[outcome] += 1
    head = ["", "chosen, seen", "hand, seen"]
    note = f"Not measured again{' yet' * is_live(results)}: how much of this is luck is not known."
    if measured:
        head += ["chosen, again", "hand, again", "difference", "chosen is", "luck"]
        outcomes = (
            f"Of {len(lines)} objectives the chosen sampling is better in {counts['better']}, worse in "
            f"{counts['worse']}, and in {counts['even']} as good or no more different than chance."
        )
        seen_by = "Seen: in the search, which chose by these very figures."
        note = f"{rests_on(num) or outcomes} {seen_by} {_measured_on(again)}"
    if "kid" not in (measured or objectives_of(points)):
        note += f" Realism was no objective: KID needs {ENOUGH} validation images of each side."
    options = _option_lines(sweep["sampling_space"], list(values.values()))
    return {
        "options": Table(["", "chosen", "hand choice"], options, kind="chosen"),
        "by_hand": bool(there["chosen"].get("hand")),
        "table": Table(head, lines, kind="dense"),
        "note": note,
    }


def _compared(name: str, measured: Row, num: int) -> tuple[list[Cell], str]:
    """Cells of an objective's line, measured again on `num` images, and the outcome."""
    digits, sign = metric_table.of(name).digits, -1 if metric_table.lower_is_better(name) else 1
    chosen, hand, gap = (interval(measured.get(key)) for key in ("chosen", "hand", "difference"))
    seen = [measured["seen"].get(key) for key in ("chosen", "hand")]
    counted = name == "nfe"  # not estimated
    if gap is None and chosen and hand and counted:
        gap = Interval(*[chosen.mean - hand.mean] * 3)
    cells = [_cell(each, digits) for each in (*map(interval, seen), chosen, hand)]
    cells.append(_cell(gap, digits, sign="+"))
    if gap is None:
        return [*cells, Cell(), Cell()], "not known"
    outcome = judged(gap, lower=sign < 0, num=ENOUGH if counted else num)
    if counted:
        word, part = outcome.replace("even", "the same"), "–"
    elif num < ENOUGH:
        word, part = "too few images to tell", "–"
    else:
        word = "no more than chance" if outcome == "even" else f"{outcome}, more than chance"
        low, high = sorted((sign * gap.low, sign * gap.high))
        lead = None if None in seen else sign * (seen[0] - seen[1])
        part = "–" if lead is None else luck(lead, Interval(sign * gap.mean, low, high), num)
    return [*cells, Cell(word, kind=OUTCOMES[outcome]), Cell(part, kind="words")], outcome


def _option_lines(space: Row, columns: Sequence[Row]) -> list[Line]:
    """A line for each option that was searched."""
    names = [name for name in space if any(name in values for values in columns)]
    return [Line(name, [_value(values, name) for values in columns]) for name in names]


# -- charts -------------------------------------------------------------------------------------------------------


Charts = list[dict[str, str]]


def _history(trials: Sequence[Row], best: int | None) -> Charts:
    if all(loss_of(trial) is None for trial in trials):
        return []
    text = (
        "The lowest validation loss of each trial, in the order they began, and the best so far of the complete ones."
    )
    if any(trial["state"] in sweep_charts.LOST for trial in trials):
        text += " What diverged or failed is marked at the top edge."
    return [charts.chart(functools.partial(sweep_charts.draw_history, trials=trials, best=best), text)]


def _slices(space: Row, trials: Sequence[Row], best: int | None) -> Charts:
    there = {name for trial in trials if loss_of(trial) is not None for name in trial["values"]}
    return [
        charts.chart(
            functools.partial(sweep_charts.draw_slice, trials=trials, name=name, allowed=allowed, best=best), name
        )
        for name, allowed in space.items()
        if name in there
    ]


def _importance(importance: Row) -> Charts:
    if not (shares := given(importance.get("training") or {})):
        return []
    draw = functools.partial(sweep_charts.draw_importance, shares=shares)
    text = "Training: importance for the validation loss."
    return [charts.chart(draw, text, height=0.4 * len(shares) + 0.9, grid="x")]


def _shares(importance: Row) -> Table | None:
    """How much each option of sampling matters for each objective."""
    objectives = {name: given(shares) for name, shares in (importance.get("sampling") or {}).items() if shares}
    if not objectives:
        return None
    total = sum(map(collections.Counter, objectives.values()), collections.Counter[str]())
    lines = [Line(name, [_share(of.get(name)) for of in objectives.values()]) for name, _ in total.most_common()]
    return Table(["Sampling: importance for", *map(_heading, objectives)], lines, kind="dense shares")


def _share(share: float | None) -> Cell:
    return Cell() if share is None else Cell(percent_text(share), share=min(max(share, 0.0), 1.0))


def _curves(space: Row, trials: Sequence[Row], best: int | None) -> Charts:
    name = colored_by(space)
    drawn = [trial for trial in trials if curve_of(trial) and is_number(trial["values"].get(name))]
    if name is None or not drawn:
        return []
    log = bool(space[name].get("log")) and all(trial["values"][name] > 0 for trial in drawn)
    text = (
        "Validation loss by epoch, a line a trial. Validation uses the same images, noise and timesteps each time, and "
        "the averaged weights: where a line bounces, that is the doing of the training and not of the "
        "measure. Lines that end early were stopped or lost."
    )
    draw = functools.partial(sweep_charts.draw_curves, trials=drawn, name=name, log=log, best=best)
    return [charts.chart(draw, text, height=4.4)]


def _rate_or_name(name: str | None) -> str:
    return "learning rate" if name == LEARNING_RATE else name or ""


def colored_by(space: Row) -> str | None:
    """The option that colours the curves: the learning rate, or the first that has a range."""
    ranges = [name for name, allowed in space.items() if "low" in allowed]
    return LEARNING_RATE if LEARNING_RATE in ranges else next(iter(ranges), None)


def _tradeoffs(points: Sequence[Row]) -> Charts:
    return [
        charts.chart(
            functools.partial(sweep_charts.draw_pareto, points=points, x=x, y=y),
            f"{metric_table.heading(y)} against {metric_table.heading(x)}",
            height=4.2,
        )
        for x, y in pairs_of(objectives_of(points))
    ]


def objectives_of(points: Iterable[Row]) -> list[str]:
    """What any of the points was measured by."""
    found = {name for point in points for name in given(point.get("objectives") or {})}
    return [*(name for name in OBJECTIVES if name in found), *sorted(found - set(OBJECTIVES))]


def pairs_of(objectives: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs that are drawn: (x, y)."""
    pairs = [pair for pair in PAIRS if set(pair) <= set(objectives)]
    pairs += [pair for pair in itertools.combinations(objectives, 2) if {pair, pair[::-1]}.isdisjoint(pairs)]
    return list(dict.fromkeys(pairs))[:MAX_PARETO]


# -- tables -------------------------------------------------------------------------------------------------------


def _trial_table(names: Sequence[str], trials: Sequence[Row], best: int | None) -> Table:
    lines = []
    for trial in trials:
        won = trial["number"] == best
        cells: list[Cell | str] = [
            sweep_charts.TRIALS[trial["state"]][0],
            *(_value(trial["values"], name) for name in names),
        ]
        cells += [value_text(trial.get(key)) for key in ("loss", "epochs", "steps")]
        cells += [_time(trial), Cell(_cut(trial.get("error") or ""), kind="error")]
        marks = ["winner"] * won + ["hand choice"] * bool(trial.get("hand"))
        href = f"{trial['run']}/report.html" if trial.get("run") else ""
        lines.append(Line(str(trial["number"]), cells, kind="ours" if won else "", marks=marks, href=href))
    return Table(["trial", "state", *names, "validation loss", "epochs", "steps", "time", "error"], lines, kind="dense")


def _point_table(names: Sequence[str], points: Sequence[Row]) -> Table:
    """The source, as it is; the front; the chosen one and the hand choice wherever they are."""
    lines, objectives = [], objectives_of(points)

    def figures(measured: Row) -> list[Cell | str]:
        return [_cell(interval(measured.get(name)), metric_table.of(name).digits) for name in objectives]

    if source := next((point["source"] for point in points if point.get("source")), None):
        lines.append(Line("the source itself", [*("–" for _ in names), *figures(source), "–"]))
    for point in points:
        chosen, hand = bool(point.get("chosen")), bool(point.get("hand"))
        if point.get("front") or chosen or hand:
            cells: list[Cell | str] = [_value(point["values"], name) for name in names]
            cells += figures(point.get("objectives") or {})
            marks = ["chosen"] * chosen + ["hand choice"] * hand + ["not on the front"] * (not point.get("front"))
            marks += ["no better than the source"] * (point.get("translates") is False)
            lines.append(Line(str(point["number"]), [*cells, _time(point)], kind="ours" if chosen else "", marks=marks))
    return Table(["point", *names, *map(_heading, objectives), "time"], lines, kind="dense")


def _failures(points: Sequence[Row]) -> collections.Counter[str]:
    return collections.Counter(point.get("error") or "no reason told" for point in points if point["state"] == "failed")


def _origin(sweep: Row) -> list[tuple[str, Any]]:
    data = sweep["data"]
    facts = {label: data.get(key) for key, label in CREDITS.items()}
    facts |= {"Pairing": data.get("pairing"), "Content hash": data.get("content_hash")}
    facts |= {"Checkpoint": sweep.get("checkpoint"), "Seed": sweep.get("seed")}
    return list(given(facts).items())


def allowed_text(allowed: Row) -> str:
    """What an option may be."""
    if "choices" in allowed:
        return f"one of {', '.join(map(value_text, allowed['choices']))}"
    kinds = [", whole numbers"] * bool(allowed.get("integer")) + [", log scale"] * bool(allowed.get("log"))
    return f"{value_text(allowed['low'])} to {value_text(allowed['high'])}{''.join(kinds)}"


# -- words and cells ----------------------------------------------------------------------------------------------


def interval(value: Any) -> Interval | None:
    """Of {mean, low, high}; of a number just that."""
    if isinstance(value, Mapping):
        return Interval(*(float(value[key]) for key in ("mean", "low", "high")))
    return Interval(*[float(value)] * 3) if is_number(value) else None


def _heading(name: str) -> str:
    return f"{metric_table.heading(name)} {'↓' if metric_table.lower_is_better(name) else '↑'}"


def _value(values: Row, name: str) -> str:
    return value_text(values[name]) if name in values else ""


def _loss(value: float) -> str:
    """Three digits, zeros too, so that two can be compared."""
    return f"{value:#.3g}".rstrip(".")


def _relative(change: float) -> str:
    return f"{percent_text(abs(change))} {'lower' if change < 0 else 'higher'}"


def _span(gap: Interval) -> str:
    mean, low, high = (f"{value:+.3g}".replace("-", "−", 1) for value in (gap.mean, gap.low, gap.high))
    return f"{mean}, {low} to {high}"


def _measured_on(again: Row) -> str:
    count = again.get("num_images")
    return f"Measured again on {count:,} images of {again.get('split') or 'the data'}." if count else ""


def _time(row: Row) -> str:
    return "" if row.get("seconds") is None else duration(row["seconds"])


def _cut(error: str) -> str:
    return error if len(error) <= 300 else f"{error[:300]} …"


def _cell(value: Interval | None, digits: int | None = None, sign: str = "") -> Cell:
    """A mean with its interval, where it has one."""
    if value is None:
        return Cell()
    mean, low, high = (
        number_text(each) if digits is None else f"{each:{sign}.{digits}f}".replace("-", "−")
        for each in (value.mean, value.low, value.high)
    )
    return Cell(mean, f"{low} … {high}" if value.low < value.high else "")
