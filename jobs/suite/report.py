"""What a suite comes to: table.json, table.csv, plots and report.html.

table.json   the rows with every metric's interval and each seed's mean; the claims and what became of them
table.csv    the same rows, a line a value
table.md     tables of both, to be kept in a document
plots/       every figure of the report by itself
report.html  written last: where it is, everything is
"""

import dataclasses
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ddpm_core import provenance, storage
from ddpm_core.errors import InputError
from jobs.common.intervals import Interval
from jobs.common.progress import duration
from jobs.evaluation.summary import FEW_RIGHT
from jobs.reports import metric_table
from jobs.reports.html import document, flat
from jobs.suite import charts, stress
from jobs.suite import plan as suite_plan
from jobs.suite import results as tables
from jobs.suite.charts import REFERENCES, Drawn
from jobs.suite.plan import Measured, Plan, Section
from jobs.suite.results import Cell, Results, Verdict

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
    parts = [
        _headline(results, environment),
        _summary(plan, verdicts),
        *(
            _section(results, section, [each for each in verdicts if each.section == section.key], figures[section.key])
            for section in plan.sections
        ),
        _origin(results, environment),
    ]
    return document(f"{plan.name}: {plan.size}", parts, css=CSS)


def _headline(results: Results, environment: Mapping[str, Any]) -> str:
    plan, records = results.plan, results.records
    done = {key for key, record in records.items() if record.get("state") == "done"}
    spent_s = sum(records[key].get("seconds") or 0.0 for key in done)
    facts = [suite_plan.counted(plan.commands, done), f"{duration(spent_s)} of computing in all"]
    facts.append(str(environment["date"])[:10])
    if commit := environment.get("git_commit"):
        facts.append(f"commit {commit[:10]}")
    told = " · ".join(html.escape(fact) for fact in facts if fact)
    return (
        f"<header><h1>{html.escape(plan.name)}: what holds and what does not</h1>"
        f'<p class="facts">size {html.escape(plan.size)} · {told}</p>'
        f'<p class="where">{html.escape(results.output)}</p></header>'
    )


def _summary(plan: Plan, verdicts: Sequence[Verdict]) -> str:
    """One line a claim."""
    links = "".join(
        f'<a href="#{html.escape(section.key)}">{html.escape(section.title)}</a>' for section in plan.sections
    )
    contents = f'<nav aria-label="Sections">{links}</nav>'
    if not verdicts:
        return f"<section>{contents}</section>"
    lines = ""
    for verdict in verdicts:
        kind, mark = MARKS[verdict.outcome]
        lines += (
            f'<li class="{kind}"><span class="mark" aria-hidden="true">{mark}</span>'
            f'<a href="#{html.escape(verdict.section)}">'
            f"{html.escape(verdict.claim.text)}</a><span>{html.escape(verdict.outcome)}</span></li>"
        )
    return f'<section><h2>{counted(verdicts)}</h2><ul class="claims">{lines}</ul>{contents}</section>'


def counted(verdicts: Sequence[Verdict]) -> str:
    """8 claims: 6 hold, 1 does not hold, 1 is not clear."""
    one = {"not clear": "is not clear", "not measured": "was not measured"}
    many = {"holds": "hold", "does not hold": "do not hold", "not clear": "are not clear"}
    many["not measured"] = "were not measured"
    counts = {outcome: sum(each.outcome == outcome for each in verdicts) for outcome in MARKS}
    parts = [f"{n} {one.get(word, word) if n == 1 else many[word]}" for word, n in counts.items() if n]
    return f"{len(verdicts)} claim{'s' * (len(verdicts) != 1)}: {', '.join(parts)}"


def _section(results: Results, section: Section, verdicts: Sequence[Verdict], figures: Sequence[Drawn | str]) -> str:
    drawn = "".join(
        each.html
        if isinstance(each, Drawn)
        else f'<p class="note">{html.escape(figure.title)}: {html.escape(each)}.</p>'
        for figure, each in zip(section.figures, figures, strict=True)
    )
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in section.notes)
    missing = "".join(
        f"<li><code>{html.escape(key)}</code>: {html.escape(why)}</li>"
        for key, why in tables.missing(results, section).items()
    )
    missing = f'<div class="missing bad"><b>Not measured</b><ul>{missing}</ul></div>' if missing else ""
    answers = "".join(map(_answer, verdicts))
    return (
        f'<section id="{html.escape(section.key)}"><h2>{html.escape(section.title)}</h2>'
        f'<p class="headline">{html.escape(section.question)}</p>'
        + (f'<ul class="verdicts answers">{answers}</ul>' if answers else "")
        + f"{missing}{_tables(results, section)}{drawn}{notes}{_commands(results, section)}</section>"
    )


def _answer(verdict: Verdict) -> str:
    kind, mark = MARKS[verdict.outcome]
    lines = [f"<span>{html.escape(verdict.figures)}</span>"]
    if verdict.outcome == "holds" and not verdict.together:
        lines.append("<span>At 95 % by itself; not at the level of all claims together.</span>")
    if verdict.claim.reason and verdict.outcome in ("does not hold", "not clear"):
        lines.append(f"<span>Likely reason: {html.escape(verdict.claim.reason)}</span>")
    return (
        f'<li class="{kind}"><span class="mark" aria-hidden="true">{mark}</span>'
        f"<div><b>{html.escape(verdict.claim.text)}: {verdict.outcome}</b><br>{'<br>'.join(lines)}</div></li>"
    )


# -- tables -------------------------------------------------------------------------------------------------------


def _tables(results: Results, section: Section) -> str:
    found = "".join(
        _table(results, section, name, domain, rows)
        for (name, _), domains in tables.groups(results, section).items()
        for domain, rows in domains
    )
    if not found:
        return ""
    found += '<p class="note">Coloured: clearly better than every other row (95 %).</p>'
    if len(section.rows) > MAX_ROWS:
        return f"<details><summary>Table of {len(section.rows)} rows</summary>{found}</details>"
    return found


def _table(results: Results, section: Section, data: str, domain: str, rows: Sequence[Measured]) -> str:
    metrics = [key for key in section.metrics if any(results.cell(row, domain, key) is not None for row in rows)]
    best = {metric: results.best(rows, domain, metric) for metric in metrics}
    body = ""
    for row in rows:
        cells = "".join(_td(results.cell(row, domain, key), key, best=best[key] == row) for key in metrics)
        body += f"<tr><th>{html.escape(row.name)}{_seeds(results, row)}</th>{cells}{_costs(results, row)}</tr>"
    for method, name in REFERENCES.items():
        references = [results.cell(rows[0], domain, metric, method) for metric in metrics]
        if any(references):
            cells = "".join(_td(cell, metric) for metric, cell in zip(metrics, references, strict=True))
            body += f'<tr class="reference"><th>{name}</th>{cells}<td></td><td></td></tr>'
    head = "".join(f"<th>{html.escape(metric_table.column(metric))}</th>" for metric in metrics)
    head += "<th>training</th><th>sampling</th>"
    return (
        f'<div class="scroll"><table class="suite"><caption>{html.escape(data)}, to {html.escape(domain)}: '
        f"{_sizes(results, rows, domain)}</caption><thead><tr><th></th>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>{_judges(results, rows[0], domain)}"
    )


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
    text = f"On images of which the answer is known {', '.join(told)}{': flips are judged badly' if doubt else ''}."
    return f'<p class="note">{html.escape(text)}</p>'


def _td(cell: Cell | None, metric: str, *, best: bool = False) -> str:
    if cell is None:
        return "<td>–</td>"
    mean = tables.number(cell.interval.mean, metric, cell.interval, unit=metric_table.of(metric).rate)
    spread = tables.spread_text(cell.interval, metric)
    mark = ' class="best"' if best else ""
    return f"<td{mark}>{mean}<small>{spread}</small></td>"


def _seeds(results: Results, row: Measured) -> str:
    there, wanted = len(results.evaluations(row)), len(row.evaluations)
    if there == wanted > 1:
        return f"<small>{there} training seeds</small>"
    return f"<small>{there} of {wanted} training seeds</small>" if there < wanted else "<small>1 training seed</small>"


def _costs(results: Results, row: Measured) -> str:
    cost = results.cost(row)
    train = "–" if cost.train_s is None else duration(cost.train_s)
    seen = "" if cost.images_seen is None else f"<small>{_thousands(cost.images_seen)} images</small>"
    steps = "–" if cost.nfe is None else f"{cost.nfe:g} NFE"
    speed = "" if cost.images_per_s is None else f"<small>{cost.images_per_s:.3g} a second</small>"
    return f"<td>{train}{seen}</td><td>{steps}{speed}</td>"


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


def _commands(results: Results, section: Section) -> str:
    """What gives each row and figure again, as a user would type it; what an earlier one has is not told twice."""
    told: set[str] = set()
    blocks = ""
    behind = [(row.name, row.evaluations) for row in section.rows]
    behind += [(figure.title, (*figure.translations, *figure.runs)) for figure in section.figures]
    for name, keys in behind:
        lines = []
        for key in _needed(results, keys):
            if key not in told:
                command = results.commands[key]
                lines.append(suite_plan.command_line(command.module, suite_plan.argv(command, results.output)))
                told.add(key)
        if lines:
            blocks += f"<h4>{html.escape(name)}</h4><pre>{html.escape(chr(10).join(lines))}</pre>"
    return f"<details><summary>Commands that give each row again</summary>{blocks}</details>" if blocks else ""


def _needed(results: Results, keys: Iterable[str]) -> list[str]:
    """The commands behind these, what is needed first."""
    found: dict[str, None] = {}
    for key in keys:
        if key in results.commands:
            found |= dict.fromkeys([*_needed(results, sorted(suite_plan.needs(results.commands[key]))), key])
    return list(found)


def _origin(results: Results, environment: Mapping[str, Any]) -> str:
    """Data with licences, nets, seeds, environment, and how the intervals are made."""
    there = {
        key: found
        for section in results.plan.sections
        for row in section.rows
        for key in row.evaluations
        if (found := results.evaluation(key)) is not None
    }
    data = {each.source: each.metrics["data"] for each in there.values()}
    nets = {
        (role, net["name"], net["fingerprint"]): None
        for each in there.values()
        for role, net in (each.metrics.get("nets") or {}).items()
        if net
    }
    seeds = sorted({each.metrics["seed"] for each in there.values()})
    items = "".join(
        f"<dt>{html.escape(str(card['name']))}</dt><dd>{html.escape(_credit(card))}</dd>" for card in data.values()
    )
    items += "".join(f"<dt>{role} net</dt><dd>{html.escape(name)} ({mark})</dd>" for role, name, mark in nets)
    items += f"<dt>seed of sampling</dt><dd>{', '.join(map(str, seeds))}</dd>" if seeds else ""
    return (
        f'<section><h2>Where it comes from</h2><dl>{items}</dl><p class="note">{NOTE}</p>'
        f"<details><summary>Environment of this report</summary>{_options(environment)}</details></section>"
    )


def _credit(card: Mapping[str, Any]) -> str:
    parts = [card.get("licence"), card.get("source"), card.get("pairing") and f"{card['pairing']} images"]
    return "; ".join(str(part) for part in [*parts, f"content hash {card['content_hash']}"] if part)


def _options(values: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in flat(values))
    return f'<div class="scroll"><table class="options">{rows}</table></div>'


NOTE = (
    "Intervals are 95 %, over training seeds and images; KID's spread is that of random subsets of the images. A "
    "claim holds where its whole interval is on its side, does not hold where the whole interval is on the other, and "
    "is not clear in between. The level of all claims together is the one at which all of them are right at once in "
    "95 % of cases (Bonferroni); where nothing is said a claim that holds does so at that level too. Two samplings of "
    "the same networks are compared seed by seed."
)

CSS = """
.claims { list-style: none; margin: 0 0 16px; padding: 0; display: grid; gap: 6px; }
.claims li { display: grid; grid-template-columns: 20px 1fr max-content; gap: 10px; align-items: baseline;
  padding: 7px 12px; border-radius: 8px; font-size: 15px; }
.claims a { color: inherit; text-decoration: none; } .claims a:hover { text-decoration: underline; }
.claims span { color: var(--soft); font-size: 13px; } .claims .mark { font-size: 16px; font-weight: 700; }
.claims .good .mark { color: var(--good); } .claims .bad .mark { color: var(--bad); }
.claims .even .mark { color: var(--even); }
nav { display: flex; flex-wrap: wrap; gap: 6px 16px; font-size: 14px; } nav a { color: var(--accent); }
.answers { margin-bottom: 20px; grid-template-columns: repeat(auto-fill, minmax(min(400px, 100%), 1fr)); }
main { max-width: 1120px; } table.suite { margin-bottom: 6px; }
table.suite th, table.suite td { padding: 7px 8px; } table.suite th { vertical-align: bottom; }
table.suite thead th { white-space: normal; min-width: 84px; }
table.suite tbody th { min-width: 130px; max-width: 220px; position: sticky; left: 0; background: var(--card); }
table.suite small { display: block; margin: 0; color: var(--soft); font-weight: 400; }
table.suite td.best { font-weight: 600; }
.reference th, .reference td { color: var(--soft); }
section > figure { margin: 22px 0 0; } section > figure picture img { display: block; margin: 0 auto; width: 760px; }
@media (max-width: 700px) { main { padding: 24px 10px 60px; } section { padding: 16px 12px; }
  section > figure picture img { max-width: none; width: 560px; } }
.missing { border-radius: 8px; padding: 12px 14px; font-size: 14px; margin: 0 0 18px; }
.missing ul, details ul { margin: 6px 0 0; padding-left: 20px; overflow-wrap: anywhere; }
h3 { font-size: 16px; margin: 22px 0 8px; overflow-wrap: anywhere; } h4 { font-size: 14px; margin: 12px 0 4px; }
h4.good, h4.bad, h4.even { background: none; } h4.good { color: var(--good); } h4.bad { color: var(--bad); }
pre { font: 12px/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; margin: 0; white-space: pre-wrap;
  overflow-wrap: anywhere; }
section details { margin-top: 14px; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(380px, 100%), 1fr)); gap: 22px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 14px; }
.cards figcaption { font-size: 13px; margin-top: 4px; overflow-wrap: anywhere; }
.cards img { width: calc(50% - 3px); margin-right: 3px; border-radius: 4px; image-rendering: pixelated; }
"""
