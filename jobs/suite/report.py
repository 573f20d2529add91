"""What a suite comes to: table.json, table.csv, plots and report.html.

table.json   the rows with every metric's interval and each seed's mean; the claims and what became of them
table.csv    the same rows, a line a value
table.md     tables of both, to be kept in a document
plots/       every figure of the report by itself
report.html  written last: where it is, everything is
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ddpm_core import provenance, storage
from ddpm_core.errors import InputError
from jobs.common.intervals import Interval
from jobs.common.progress import duration
from jobs.evaluation.summary import FEW_RIGHT
from jobs.reports import metric_table
from jobs.reports.html import Cell, Line, Table, render
from jobs.suite import charts, stress
from jobs.suite import plan as suite_plan
from jobs.suite import results as tables
from jobs.suite.charts import REFERENCES, Drawn
from jobs.suite.plan import Measured, Plan, Section
from jobs.suite.results import Cell as Measurement
from jobs.suite.results import Results, Verdict

FORMAT, FORMAT_VERSION = "ddpm-translate-table", 1
MAX_ROWS = 14
"""A longer table is folded."""
MARKS = {
    "holds": ("good", "✓"),
    "does not hold": ("bad", "✗"),
    "not clear": ("even", "≈"),
    "not measured": ("even", "–"),
}


def write(plan: Plan, output: str) -> list[Verdict]:
    """Read what the plan's commands have left below `output` and write what it comes to; the claims' verdicts.

    What is not there is named in the report with the reason.
    """
    results = Results(plan, output)
    verdicts = tables.verdicts(results)
    table = tables.rows(results)
    figures = {
        section.key: [_drawn(results, section, i) for i in range(len(section.figures))] for section in plan.sections
    }
    content: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "suite": plan.name,
        "size": plan.size,
        "rows": table,
        "claims": [as_json(verdict) for verdict in verdicts],
        "stress": [stress.as_json(folder) for folder in results.stress.values()],
        "missing": {key: why for section in plan.sections for key, why in tables.missing(results, section).items()},
        "environment": provenance.environment(),
    }
    _put(output, "table.json", json.dumps(content, indent=1, allow_nan=False))
    _put(output, "table.csv", tables.as_csv(table))
    _put(output, "table.md", tables.as_markdown(results, verdicts))
    for section in plan.sections:
        for i, drawn in enumerate(figures[section.key]):
            if isinstance(drawn, Drawn):
                name = f"{section.key}-{i + 1}-{section.figures[i].kind}.png"
                storage.write_bytes(storage.join(output, "plots", name), drawn.png)
    _put(output, "report.html", page(results, verdicts, figures, content["environment"]))
    return verdicts


def _put(output: str, name: str, text: str) -> None:
    storage.write_bytes(storage.join(output, name), text.encode())


def _drawn(results: Results, section: Section, place: int) -> Drawn | str:
    try:
        return charts.draw(results, section, section.figures[place])
    except (InputError, FileNotFoundError) as error:  # a net or an image that is gone costs its figure only
        return f"not drawn: {error}"


def as_json(verdict: Verdict) -> dict[str, Any]:
    interval = verdict.estimate
    return {
        "section": verdict.section,
        **dataclasses.asdict(verdict.claim),
        "outcome": verdict.outcome,
        "estimate": None if interval is None else dataclasses.asdict(interval),
        "holds_with_all_claims_together": verdict.together,
        "figures": verdict.figures,
    }


# -- the page -----------------------------------------------------------------------------------------------------


def page(
    results: Results,
    verdicts: Sequence[Verdict],
    figures: Mapping[str, Sequence[Drawn | str]],
    environment: Mapping[str, Any],
) -> str:
    plan = results.plan
    cards = [_card(verdict) for verdict in verdicts]
    return render(
        "suite",
        title=f"{plan.name}: {plan.size}",
        heading=f"{plan.name}: what holds and what does not",
        refresh_s=None,
        facts=_facts(results, environment),
        where=[results.output],
        counted=counted(verdicts),
        verdicts=cards,
        sections=[
            _section(results, each, [card for card in cards if card["section"] == each.key], figures[each.key])
            for each in plan.sections
        ],
        origin=_origin(results),
        note=NOTE,
        environment=environment,
    )


def _facts(results: Results, environment: Mapping[str, Any]) -> list[str]:
    """What stands below the title."""
    plan, records = results.plan, results.records
    done = {key for key, record in records.items() if record.get("state") == "done"}
    spent_s = sum(records[key].get("seconds") or 0.0 for key in done)
    facts = [f"size {plan.size}", suite_plan.counted(plan.commands, done), f"{duration(spent_s)} of computing in all"]
    facts.append(str(environment["date"])[:10])
    if commit := environment.get("git_commit"):
        facts.append(f"commit {commit[:10]}")
    return [fact for fact in facts if fact]


def _card(verdict: Verdict) -> dict[str, Any]:
    kind, sign = MARKS[verdict.outcome]
    lines = [verdict.figures]
    if verdict.outcome == "holds" and not verdict.together:
        lines.append("At 95 % by itself; not at the level of all claims together.")
    if verdict.claim.reason and verdict.outcome in ("does not hold", "not clear"):
        lines.append(f"Likely reason: {verdict.claim.reason}")
    facts = {"section": verdict.section, "claim": verdict.claim.text, "outcome": verdict.outcome}
    return {**facts, "kind": kind, "sign": sign, "lines": lines}


def counted(verdicts: Sequence[Verdict]) -> str:
    """8 claims: 6 hold, 1 does not hold, 1 is not clear."""
    one = {"not clear": "is not clear", "not measured": "was not measured"}
    many = {"holds": "hold", "does not hold": "do not hold", "not clear": "are not clear"}
    many["not measured"] = "were not measured"
    counts = {outcome: sum(each.outcome == outcome for each in verdicts) for outcome in MARKS}
    parts = [f"{n} {one.get(word, word) if n == 1 else many[word]}" for word, n in counts.items() if n]
    return f"{len(verdicts)} claim{'s' * (len(verdicts) != 1)}: {', '.join(parts)}"


def _section(
    results: Results, section: Section, cards: Sequence[Mapping[str, Any]], figures: Sequence[Drawn | str]
) -> dict[str, Any]:
    shown = [each.shown if isinstance(each, Drawn) else each for each in figures]
    return {
        "key": section.key,
        "title": section.title,
        "question": section.question,
        "verdicts": cards,
        "missing": tables.missing(results, section),
        "folded": len(section.rows) if len(section.rows) > MAX_ROWS else 0,
        "tables": [
            (_table(results, section, name, domain, rows), _judges(results, rows[0], domain))
            for name, _, domain, rows in tables.groups(results, section)
        ],
        "figures": [(figure.title, each) for figure, each in zip(section.figures, shown, strict=True)],
        "notes": section.notes,
        "commands": _commands(results, section),
    }


# -- tables -------------------------------------------------------------------------------------------------------


def _table(results: Results, section: Section, data: str, domain: str, rows: Sequence[Measured]) -> Table:
    metrics = [key for key in section.metrics if any(results.cell(row, domain, key) is not None for row in rows)]
    best = {metric: results.best(rows, domain, metric) for metric in metrics}
    lines = []
    for row in rows:
        cells = [_cell(results.cell(row, domain, key), key, best=best[key] == row) for key in metrics]
        lines.append(Line(row.name, [*cells, *_costs(results, row)], marks=[_seeds(results, row)]))
    for method, words in REFERENCES.items():
        references = [results.cell(rows[0], domain, metric, method) for metric in metrics]
        if any(references):
            cells = [_cell(cell, metric) for metric, cell in zip(metrics, references, strict=True)]
            lines.append(Line(words, [*cells, "", ""], kind="reference"))
    head = ["", *map(metric_table.column, metrics), "training", "sampling"]
    return Table(head, lines, kind="dense suite", caption=f"{data}, to {domain}: {_sizes(results, rows, domain)}")


def _judges(results: Results, row: Measured, domain: str) -> str:
    """How far the judging nets can be trusted; all rows of a table have the same images and judges."""
    found = results.evaluations(row)[0].metrics["domains"][domain].get("instruments") or {}
    words = {
        "classifier_accuracy": "the classifier is right on",
        "identity_rank_1": "the identity net finds the source of",
    }
    told = [f"{words[key]} {tables.span(Interval(**found[key]), 'flip_rate')}" for key in words if key in found]
    if not told:
        return ""
    doubt = found.get("classifier_accuracy", {}).get("mean", 1.0) < FEW_RIGHT
    return f"On images of which the answer is known {', '.join(told)}{': flips are judged badly' if doubt else ''}."


def _cell(cell: Measurement | None, metric: str, *, best: bool = False) -> Cell:
    if cell is None:
        return Cell()
    mean = tables.number(cell.interval.mean, metric, cell.interval, unit=metric_table.of(metric).rate)
    return Cell(mean, tables.spread_text(cell.interval, metric), kind="best" if best else "")


def _seeds(results: Results, row: Measured) -> str:
    there, wanted = len(results.evaluations(row)), len(row.evaluations)
    if there < wanted:
        return f"{there} of {wanted} training seeds"
    return f"{there} training seeds" if there > 1 else "1 training seed"


def _costs(results: Results, row: Measured) -> list[Cell]:
    cost = results.cost(row)
    seen = "" if cost.images_seen is None else f"{_thousands(cost.images_seen)} images"
    speed = "" if cost.images_per_s is None else f"{cost.images_per_s:.3g} a second"
    return [
        Cell("–" if cost.train_s is None else duration(cost.train_s), seen),
        Cell("–" if cost.nfe is None else f"{cost.nfe:g} NFE", speed),
    ]


def _thousands(count: float) -> str:
    return f"{count / 1000:,.0f}k" if count >= 10_000 else f"{count:,.0f}"


def _sizes(results: Results, rows: Sequence[Measured], domain: str) -> str:
    counts = sorted(
        {
            each.metrics["domains"][domain]["num_images"]
            for row in rows
            for each in results.evaluations(row)
            if domain in each.metrics["domains"]
        }
    )
    words = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    return f"{words} held-out images; each value with its 95 % interval"


# -- where it comes from ------------------------------------------------------------------------------------------


def _commands(results: Results, section: Section) -> dict[str, list[str]]:
    """What gives each row and figure again, as a user would type it; each command stands once."""
    shown: set[str] = set()
    found = {}
    behind = [(row.name, row.evaluations) for row in section.rows]
    behind += [(figure.title, (*figure.translations, *figure.runs)) for figure in section.figures]
    for name, keys in behind:
        commands = [results.commands[key] for key in _needed(results, keys) if key not in shown]
        shown |= {command.key for command in commands}
        if commands:
            found[name] = [
                suite_plan.command_line(each.module, suite_plan.argv(each, results.output)) for each in commands
            ]
    return found


def _needed(results: Results, keys: Iterable[str]) -> list[str]:
    """The commands behind these, what is needed first."""
    found: dict[str, None] = {}
    for key in keys:
        if key in results.commands:
            found |= dict.fromkeys([*_needed(results, sorted(suite_plan.needs(results.commands[key]))), key])
    return list(found)


def _origin(results: Results) -> list[tuple[str, str]]:
    """Data with licences, nets and seeds."""
    there = {
        key: found
        for section in results.plan.sections
        for row in section.rows
        for key in row.evaluations
        if (found := results.evaluation(key)) is not None
    }
    data = {each.source: each.metrics["data"] for each in there.values()}
    nets = {
        (f"{role} net", f"{net['name']} ({net['fingerprint']})"): None
        for each in there.values()
        for role, net in (each.metrics.get("nets") or {}).items()
        if net
    }
    seeds = sorted({each.metrics["seed"] for each in there.values()})
    sampling = [("seed of sampling", ", ".join(map(str, seeds)))] if seeds else []
    return [*((str(card["name"]), _credit(card)) for card in data.values()), *nets, *sampling]


def _credit(card: Mapping[str, Any]) -> str:
    parts = [card.get("licence"), card.get("source"), card.get("pairing") and f"{card['pairing']} images"]
    return "; ".join(str(part) for part in [*parts, f"content hash {card['content_hash']}"] if part)


NOTE = (
    "Intervals are 95 %, over training seeds and images; KID's spread is that of random subsets of the images. A "
    "claim holds where its whole interval is on its side, does not hold where the whole interval is on the other, and "
    "is not clear in between. The level of all claims together is the one at which all of them are right at once in "
    "95 % of cases (Bonferroni); where nothing is said a claim that holds does so at that level too. Two samplings of "
    "the same networks are compared seed by seed."
)
