"""report.html of a sweep: what was found, how much of it was luck, and every trial and point behind it.

trial   a training with options of the space; its loss is the lowest validation loss that it reached
point   a sampling of the winner's checkpoint with options of the sampling space; it has several objectives
lead    how far the winner was ahead of the hand choice in the search
gain    how far it is ahead on fresh noise and images; what the lead was more than that was luck
"""

import collections
import functools
import html
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

from ddpm_core import storage
from jobs.common.intervals import Interval, significant
from jobs.common.progress import duration
from jobs.reports import charts, metric_table, report
from jobs.reports.html import document, figure, flat
from jobs.reports.metric_table import OBJECTIVES, heading
from jobs.reports.sweep_charts import (
    LOST,
    TRIALS,
    Row,
    curve_of,
    draw_curves,
    draw_history,
    draw_importance,
    draw_pareto,
    draw_slice,
    given,
    is_number,
    loss_of,
    number_text,
    percent_text,
    value_text,
)

Card = tuple[Literal["better", "worse", "even"], str, str]
"""How good it is, what holds, and the figures behind it."""
SWEEP: Row = {"data": {}, "space": {}, "sampling_space": {}, "options": {}, "environment": {}, "uri": "", "rule": ""}
RESULTS: Row = {"state": "", "message": "", "trials": [], "points": [], "importance": {}, "again": {}}
"""What stands for the parts that are missing."""
STATES = {
    "training": ("even", "Training"),
    "sampling": ("even", "Sampling"),
    "checking": ("even", "Measuring again"),
    "finished": ("good", "Finished"),
    "interrupted": ("even", "Interrupted"),
    "failed": ("bad", "Failed"),
}
ENDED = ("", "finished", "interrupted", "failed")
OUTCOMES = {"better": ("good", "✓"), "worse": ("bad", "✗"), "even": ("even", "≈")}
SEARCHES = {"tpe": "Sobol, then TPE", "random": "random search"}
LEARNING_RATE = "optim.learning_rate"
MAX_ROWS, MAX_PARETO = 14, 4
"""A longer table is folded; as many pairs of objectives are drawn."""


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
    title = f"{sweep['data'].get('name', 'translation')}: sweep from {sweep.get('preset', 'a checkpoint')}"
    parts = [
        _header(title, sweep, results),
        _status(sweep, results),
        _section("What came of it" + " so far" * is_live(results), _trained(sweep, results), _sampled(sweep, results)),
        _history(trials, best),
        _slices(sweep["space"], trials, best),
        _importance(results["importance"]),
        _curves(sweep["space"], trials, best),
        _pareto(points),
        _section("Images", *(figure(caption, png, "film") for caption, png in images)),
        _section("Trials", _trial_table(list(sweep["space"]), trials, best)),
        _section("Points of sampling", _point_table(list(sweep["sampling_space"]), points), _failures(points)),
        _origin(sweep),
    ]
    head = ""
    if is_live(results):
        done, total = _progress(sweep, results)
        title = f"{done / max(total, 1):.0%} · {title}"
        head = f'<meta http-equiv="refresh" content="{report.REFRESH_S}">\n'
    return document(title, parts, head=head, css=CSS)


def is_live(results: Row) -> bool:
    return results["state"] not in ENDED


def _progress(sweep: Row, results: Row) -> tuple[int, int]:
    """Trials and points that have ended, and how many there will be."""
    total = sweep.get("num_trials", 0) + sweep.get("num_points", 0)
    return min(len(_ended(results["trials"])) + len(_ended(results["points"])), total), total


def _ended(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["state"] != "running"]


def _header(title: str, sweep: Row, results: Row) -> str:
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
    return (
        f'<header><h1>{html.escape(title)}</h1><p class="facts">{html.escape(" · ".join(filter(None, facts)))}</p>'
        f'<p class="where">{html.escape(sweep["uri"])}</p></header>'
    )


def _status(sweep: Row, results: Row) -> str:
    """How far the sweep is, or how it ended."""
    if not results["state"]:
        return ""
    kind, word = STATES[results["state"]]
    (done, total), trials, points = _progress(sweep, results), _ended(results["trials"]), _ended(results["points"])
    counts = collections.Counter(row["state"] for row in trials)
    losses = [loss for row in trials if (loss := loss_of(row)) is not None]
    facts = {
        "Trials": _of(len(trials), sweep.get("num_trials", 0)) if trials else "",
        "Of them": ", ".join(f"{counts[state]} {TRIALS[state][0]}" for state in TRIALS if counts[state]),
        "Points": _of(len(points), sweep.get("num_points", 0)) if points else "",
        "Lowest validation loss": number_text(min(losses)) if losses else "",
        "Time in trials": duration(sum(row.get("seconds") or 0 for row in trials)) if trials else "",
        "Time in points": duration(sum(row.get("seconds") or 0 for row in points)) if points else "",
        "Time left": duration(results["left_s"]) if is_live(results) and results.get("left_s") is not None else "",
    }
    items = "".join(f"<div><dt>{key}</dt><dd>{html.escape(text)}</dd></div>" for key, text in facts.items() if text)
    lines = [results["message"]]
    if at := results.get("at"):
        lines.append(f"As of {datetime.fromisoformat(at).strftime('%Y-%m-%d %H:%M:%S UTC')}.")
    bar = f'<progress value="{done}" max="{total}" aria-label="trials and points done"></progress>'
    bar = bar if done < total and results["state"] != "finished" else ""
    notes = "".join(_note(line) for line in lines if line)
    return f'<section class="status"><h2 class="{kind}">{word}</h2>{bar}<dl class="tiles">{items}</dl>{notes}</section>'


def _of(done: int, total: int) -> str:
    return f"{done:,} of {total:,}" if done < total else f"{done:,}"


# -- luck and gain ------------------------------------------------------------------------------------------------


def _trained(sweep: Row, results: Row) -> str:
    trials, again = results["trials"], results["again"].get("training") or {}
    if (winner := next((row for row in trials if row["number"] == results.get("best_trial")), None)) is None:
        return ""
    hand = next((row for row in trials if row.get("hand")), winner)
    columns = {"winner": winner} if hand is winner else {"winner": winner, "hand": hand}
    fresh = {key: interval(value) for key, value in (again.get("fresh") or {}).items()}
    rows = _chosen_rows(sweep["space"], [row["values"] for row in columns.values()])
    rows.append(_th("validation loss in the search") + _cells(value_text(row.get("loss")) for row in columns.values()))
    if fresh:
        rows.append(_th("loss on fresh noise") + "".join(_td(fresh.get(key)) for key in columns))
    among = f"the best of {sum(loss_of(row) is not None for row in trials)} trials"
    if winner.get("hand"):
        card = _card("even", f"The search found nothing better: the hand choice itself is {among}.")
    elif (told := gain_in_loss(again)) is not None:
        card = _card(*told)
    else:
        yet = " yet" * is_live(results)
        card = _card("even", f"Not measured again{yet}: it is {among}, and how much of that is luck is not known.")
    head = ["", f"winner, trial {winner['number']}", "hand choice"][: len(columns) + 1]
    return f"<h3>Training</h3>{_table('chosen', head, rows)}{card}{_note(FRESH) if fresh else ''}"


def gain_in_loss(again: Row) -> Card | None:
    """Winner against hand choice on fresh noise, and what that says of the lead in the search."""
    fresh, seen = again.get("fresh") or {}, again.get("seen") or {}
    winner, hand, gap = (interval(fresh.get(key)) for key in ("winner", "hand", "difference"))
    if winner is None or hand is None or gap is None:
        return None
    outcome = judged(gap, lower=True)
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
        told += f"{_relative(-lead)}: {luck(lead, gain)}. "
    return outcome, text, told + _pictures(again)


def judged(gap: Interval, *, lower: bool) -> Literal["better", "worse", "even"]:
    """What a difference comes to where `lower` or higher is better."""
    if not significant(gap):
        return "even"
    return "better" if (gap.high < 0) == lower else "worse"


def luck(lead: float, gain: Interval) -> str:
    """How much of a lead was luck, from what is left of it; both are positive where the winner is ahead."""
    if lead <= 0:
        return "there was no lead"
    if not significant(gain):
        return "the lead cannot be told from luck"
    if gain.mean < 0:
        return "all of the lead was luck"
    if gain.mean >= lead:
        return "the lead did not shrink, no sign of luck"
    most, least = (min(max(1 - left / lead, 0.0), 1.0) for left in (gain.low, gain.high))
    span = f"{percent_text(least)} to {percent_text(most)}"
    return f"about {percent_text(1 - gain.mean / lead)} of the lead was luck ({span})"


def _sampled(sweep: Row, results: Row) -> str:
    points, again = results["points"], results["again"].get("sampling") or {}
    there: dict[str, Row] = {key: next((row for row in points if row.get(key)), {}) for key in ("chosen", "hand")}
    values = {key: (again.get("values") or {}).get(key) or row.get("values") or {} for key, row in there.items()}
    if not values["chosen"]:
        return ""
    head = ["", "chosen", "hand choice"]
    options = _table("chosen", head, _chosen_rows(sweep["sampling_space"], list(values.values())))
    if there["chosen"].get("hand"):
        options += _card("even", "The hand choice itself is the chosen point.")
    measured, rows, counts = again.get("objectives") or {}, [], collections.Counter[str]()
    for name in measured or objectives_of(points):
        seen = {key: (row.get("objectives") or {}).get(name) for key, row in there.items()}
        cells, outcome = _compared(name, {"seen": seen, **given(measured.get(name) or {})})
        rows.append(_th(_heading(name)) + "".join(cells[: len(cells) if measured else 2]))
        counts[outcome] += 1
    head = ["", "chosen, seen", "hand, seen"]
    note = f"Not measured again{' yet' * is_live(results)}: how much of this is luck is not known."
    if measured:
        head += ["chosen, again", "hand, again", "difference", "chosen is", "luck"]
        note = (
            f"Of {len(rows)} objectives the chosen sampling is better in {counts['better']}, worse in "
            f"{counts['worse']}, and in {counts['even']} as good or no more different than chance. Seen: in the "
            f"search, which chose by these very figures. {_pictures(again)}"
        )
    rule = f'<p class="headline">{html.escape(sweep["rule"])}</p>'
    return f"<h3>Sampling</h3>{rule}{options}{_table('compared', head, rows)}{_note(note)}"


def _compared(name: str, measured: Row) -> tuple[list[str], str]:
    """Cells of an objective's row, and the outcome."""
    digits, sign = metric_table.of(name).digits, -1 if metric_table.lower_is_better(name) else 1
    chosen, hand, gap = (interval(measured.get(key)) for key in ("chosen", "hand", "difference"))
    seen = [measured["seen"].get(key) for key in ("chosen", "hand")]
    if gap is None and chosen and hand and chosen.low == chosen.high and hand.low == hand.high:
        gap = Interval(*[chosen.mean - hand.mean] * 3)  # counted, not estimated
    cells = [*(_td(interval(value), digits) for value in seen), _td(chosen, digits), _td(hand, digits)]
    cells.append(_td(gap, digits, sign="+"))
    if gap is None:
        return [*cells, "<td>–</td>", "<td>–</td>"], "not known"
    outcome = judged(gap, lower=sign < 0)
    if gap.low == gap.high:
        word, part = outcome.replace("even", "the same"), "–"
    else:
        word = "no more than chance" if outcome == "even" else f"{outcome}, more than chance"
        low, high = sorted((sign * gap.low, sign * gap.high))
        lead = None if None in seen else sign * (seen[0] - seen[1])
        part = "–" if lead is None else luck(lead, Interval(sign * gap.mean, low, high))
    return [*cells, f'<td class="{OUTCOMES[outcome][0]}"><b>{word}</b></td>', f'<td class="words">{part}</td>'], outcome


def _chosen_rows(space: Row, columns: Sequence[Row]) -> list[str]:
    """A row for each option that was searched."""
    names = [name for name in space if any(name in values for values in columns)]
    return [_th(name) + _cells(_value(values, name) for values in columns) for name in names]


# -- charts -------------------------------------------------------------------------------------------------------


def _history(trials: Sequence[Row], best: int | None) -> str:
    if all(loss_of(trial) is None for trial in trials):
        return ""
    text = (
        "The lowest validation loss of each trial, in the order they began, and the best so far of the complete ones."
    )
    if any(trial["state"] in LOST for trial in trials):
        text += " What diverged or failed is marked at the top edge."
    draw = functools.partial(draw_history, trials=trials, best=best)
    return _section("Optimisation history", _figure(draw, text))


def _slices(space: Row, trials: Sequence[Row], best: int | None) -> str:
    there = {name for trial in trials if loss_of(trial) is not None for name in trial["values"]}
    figures = "".join(
        _figure(functools.partial(draw_slice, trials=trials, name=name, allowed=allowed, best=best), name)
        for name, allowed in space.items()
        if name in there
    )
    return _section("Option by option", f'<div class="charts">{figures}</div>' if figures else "")


def _importance(importance: Row) -> str:
    body = ""
    if shares := given(importance.get("training") or {}):
        draw = functools.partial(draw_importance, shares=shares)
        text = "Training: importance for the validation loss."
        body += _figure(draw, text, height=0.4 * len(shares) + 0.9, grid="x")
    if objectives := {name: given(shares) for name, shares in (importance.get("sampling") or {}).items() if shares}:
        total = sum(map(collections.Counter, objectives.values()), collections.Counter[str]())
        rows = [
            _th(name) + "".join(_share(shares.get(name)) for shares in objectives.values())
            for name, _ in total.most_common()
        ]
        body += _table("shares", ["Sampling: importance for", *map(_heading, objectives)], rows)
    return _section("What matters", body + _note(PED_ANOVA) if body else "")


def _share(share: float | None) -> str:
    if share is None:
        return "<td>–</td>"
    return f'<td>{percent_text(share)}<i style="width:{min(max(share, 0.0), 1.0):.1%}"></i></td>'


def _curves(space: Row, trials: Sequence[Row], best: int | None) -> str:
    name = colored_by(space)
    drawn = [trial for trial in trials if curve_of(trial) and is_number(trial["values"].get(name))]
    if name is None or not drawn:
        return ""
    log = bool(space[name].get("log")) and all(trial["values"][name] > 0 for trial in drawn)
    what = "learning rate" if name == LEARNING_RATE else name
    text = (
        "Validation loss by epoch, a line a trial. Validation uses the same images, noise and timesteps each time, "
        f"and the averaged weights: where a line bounces, that is the doing of the {what} and not of the measure. "
        "Lines that end early were stopped or lost."
    )
    draw = functools.partial(draw_curves, trials=drawn, name=name, log=log, best=best)
    return _section(f"Training by {what}", _figure(draw, text, height=4.4))


def colored_by(space: Row) -> str | None:
    """The option that colours the curves: the learning rate, or the first that has a range."""
    ranges = [name for name, allowed in space.items() if "low" in allowed]
    return LEARNING_RATE if LEARNING_RATE in ranges else next(iter(ranges), None)


def _pareto(points: Sequence[Row]) -> str:
    figures = "".join(
        _figure(
            functools.partial(draw_pareto, points=points, x=x, y=y), f"{heading(y)} against {heading(x)}", height=4.2
        )
        for x, y in pairs_of(objectives_of(points))
    )
    note = _note("On the front is what no other point beats in all objectives together; a chart shows two of them.")
    return _section("Trade-offs of sampling", f'<div class="charts">{figures}</div>{note}' if figures else "")


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


def _trial_table(names: Sequence[str], trials: Sequence[Row], best: int | None) -> str:
    rows = {}
    for trial in trials:
        marks = {"winner": trial["number"] == best, "hand choice": trial.get("hand")}
        head = _th(str(trial["number"]), marks, f"{trial['run']}/report.html" if trial.get("run") else "")
        cells = [TRIALS[trial["state"]][0], *(_value(trial["values"], name) for name in names)]
        cells += [value_text(trial.get(key)) for key in ("loss", "epochs", "steps")] + [_time(trial)]
        error = f'<td class="error">{html.escape(_cut(trial.get("error") or ""))}</td>'
        rows[head + _cells(cells) + error] = marks["winner"]
    columns = ["trial", "state", *names, "validation loss", "epochs", "steps", "time", "error"]
    return _folded(f"Table of {len(rows)} trials", columns, rows)


def _point_table(names: Sequence[str], points: Sequence[Row]) -> str:
    """The front; the chosen one and the hand choice wherever they are."""
    rows, objectives = {}, objectives_of(points)
    for point in points:
        marks = {"chosen": point.get("chosen"), "hand choice": point.get("hand")}
        if point.get("front") or any(marks.values()):
            measured = point.get("objectives") or {}
            cells = _cells(_value(point["values"], name) for name in names)
            cells += "".join(_td(interval(measured.get(name)), metric_table.of(name).digits) for name in objectives)
            head = _th(str(point["number"]), {**marks, "not on the front": not point.get("front")})
            rows[head + cells + _cells([_time(point)])] = bool(point.get("chosen"))
    columns = ["point", *names, *map(_heading, objectives), "time"]
    return _folded(f"Table of {len(rows)} points: the front, the chosen one and the hand choice", columns, rows)


def _failures(points: Sequence[Row]) -> str:
    failed = collections.Counter(
        point.get("error") or "no reason told" for point in points if point["state"] == "failed"
    )
    items = "".join(f"<li>{count} × {html.escape(_cut(error))}</li>" for error, count in failed.most_common(8))
    return f"{_note(f'{failed.total()} of {len(points)} points failed:')}<ul>{items}</ul>" if items else ""


def _origin(sweep: Row) -> str:
    data = sweep["data"]
    facts = {label: data.get(key) for key, label in report.CREDITS.items()}
    facts |= {"Pairing": data.get("pairing"), "Content hash": data.get("content_hash")}
    facts |= {"Checkpoint": sweep.get("checkpoint"), "Seed": sweep.get("seed")}
    items = "".join(f"<dt>{key}</dt><dd>{html.escape(str(value))}</dd>" for key, value in given(facts).items())
    blocks = {
        "Options of training that were searched": {key: allowed_text(each) for key, each in sweep["space"].items()},
        "Options of sampling that were searched": {
            key: allowed_text(each) for key, each in sweep["sampling_space"].items()
        },
        "Options that all trials share": sweep["options"],
        "Environment": sweep["environment"],
    }
    folds = f"<pre>{html.escape(sweep['command'])}</pre>" if sweep.get("command") else ""
    for title, values in blocks.items():
        if rows := [_th(name) + _cells([text]) for name, text in flat(values)]:
            folds += f"<details><summary>{title}</summary>{_table('options', [], rows)}</details>"
    return _section("Where it comes from", f"<dl>{items}</dl>" if items else "", folds)


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


def _pictures(again: Row) -> str:
    count = again.get("num_images")
    return f"Measured again on {count:,} images of {again.get('split') or 'the data'}." if count else ""


def _time(row: Row) -> str:
    return "" if row.get("seconds") is None else duration(row["seconds"])


def _cut(error: str) -> str:
    return error if len(error) <= 300 else f"{error[:300]} …"


def _td(value: Interval | None, digits: int | None = None, sign: str = "") -> str:
    """A mean with its interval, where it has one."""
    if value is None:
        return "<td>–</td>"
    mean, low, high = (
        number_text(each) if digits is None else f"{each:{sign}.{digits}f}".replace("-", "−")
        for each in (value.mean, value.low, value.high)
    )
    return f"<td>{mean}" + (f"<small>{low} … {high}</small>" if value.low < value.high else "") + "</td>"


def _th(text: str, marks: Mapping[str, Any] | None = None, href: str = "") -> str:
    """The head of a row; `marks`: words beside it, and whether they hold."""
    text = html.escape(text)
    text = f'<a href="{html.escape(href)}">{text}</a>' if href else text
    return f"<th>{text}{''.join(f' <small>{word}</small>' for word, holds in (marks or {}).items() if holds)}</th>"


def _cells(texts: Iterable[str]) -> str:
    return "".join(f"<td>{html.escape(text)}</td>" for text in texts)


def _table(kind: str, head: Sequence[str], rows: Sequence[str], ours: Sequence[str] = ()) -> str:
    """`rows`: the cells of each; `ours`: those that stand out."""
    columns = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(f'<tr class="ours">{row}</tr>' if row in ours else f"<tr>{row}</tr>" for row in rows)
    top = f"<thead><tr>{columns}</tr></thead>" if head else ""
    return f'<div class="scroll"><table class="{kind}">{top}<tbody>{body}</tbody></table></div>'


def _folded(title: str, head: Sequence[str], rows: Mapping[str, bool]) -> str:
    """A long table, folded; `rows`: the cells of each, and whether it stands out."""
    table = _table("rows", head, list(rows), [row for row, ours in rows.items() if ours])
    return f"<details><summary>{title}</summary>{table}</details>" if len(rows) > MAX_ROWS else table * bool(rows)


def _card(outcome: str, text: str, figures: str = "") -> str:
    kind, mark = OUTCOMES[outcome]
    return (
        f'<ul class="verdicts"><li class="{kind}"><span class="mark" aria-hidden="true">{mark}</span>'
        f"<div><b>{html.escape(text)}</b><br><span>{html.escape(figures)}</span></div></li></ul>"
    )


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def _section(title: str, *bodies: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{''.join(bodies)}</section>" if any(bodies) else ""


def _figure(draw: Callable[[Any], None], caption: str, *, height: float = 3.7, grid: Literal["x", "y"] = "y") -> str:
    picture = charts.chart(draw, caption, height=height, grid=grid)
    return f"<figure>{picture}<figcaption>{html.escape(caption)}</figcaption></figure>"


CSS = """
h3 { font-size: 16px; margin: 26px 0 10px; } h2 + h3 { margin-top: 0; }
section > .verdicts { margin: 16px 0 0; grid-template-columns: 1fr; }
section > figure picture img { display: block; margin: 0 auto; width: 760px; }
section > figure + figure { margin-top: 18px; }
th small { color: var(--soft); margin-left: 4px; } td small { font-weight: 400; }
.compared, .shares { margin-top: 20px; }
.compared td, .compared th, .rows td, .rows th { padding: 7px 8px; } .compared small { display: block; margin: 0; }
.compared thead th, .rows thead th, .shares thead th { white-space: normal; vertical-align: bottom; }
td.words, td.error, td.good, td.bad, td.even { white-space: normal; text-align: left; overflow-wrap: anywhere; }
.compared td.words { min-width: 130px; color: var(--soft); } .rows td.error { min-width: 200px; font-size: 13px; }
main { max-width: 1120px; } .compared td.good, .compared td.bad, .compared td.even { min-width: 110px; }
.rows tbody th { white-space: nowrap; } .shares td { width: 17%; }
.shares i { display: block; height: 5px; margin: 3px 0 0 auto; border-radius: 3px; background: var(--accent); }
.note + ul { margin: 6px 0 0; padding-left: 20px; font-size: 14px; overflow-wrap: anywhere; }
a { color: var(--accent); }
pre { font: 12px/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; margin: 0 0 14px;
  white-space: pre-wrap; overflow-wrap: anywhere; }
"""
