"""What a suite's measurements come to: its table's rows over seeds and images, and whether its claims hold.

    values     seeds n: a measurement of n images (of KID: n subsets of them), once for each training seed
    interval   95 %, over seeds and images; with one seed over images only, which every text that quotes it says

A claim holds where the whole interval is on its side, does not where the whole interval is on the other, and is not
clear in between, nor on fewer than ENOUGH images. Rows are compared image by image, on those that both have.
"""

import contextlib
import csv
import dataclasses
import functools
import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from ddpm_core import storage
from jobs.common.intervals import ENOUGH, Interval, bonferroni, two_level, two_level_difference
from jobs.evaluation.results import Evaluation
from jobs.reports import metric_table
from jobs.suite.plan import Claim, Command, Measured, Plan, Section, digests, needs, records

Outcome = Literal["holds", "does not hold", "not clear", "not measured"]


# -- what was measured --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Values:
    """One metric of one row; `array` is seeds n."""

    kind: Literal["images", "subsets", "summaries"]
    """Summaries: what metrics.json says, a mean a seed; nothing of the single images is known."""
    array: Float[np.ndarray, "seeds n"]
    ids: tuple[str, ...]
    """Of the images, or of the subsets."""
    summaries: tuple[Interval, ...]
    """What each seed's evaluation says by itself."""
    places: tuple[int, ...]
    """Which of the row's seeds these are."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One metric of one row, over all its seeds."""

    interval: Interval
    seeds: tuple[float, ...]
    """The mean of each."""
    num_pictures: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a row took, mean over its seeds; None where it is not known."""

    train_s: float | None
    images_seen: float | None
    nfe: float | None
    images_per_s: float | None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a claim."""

    section: str
    claim: Claim
    outcome: Outcome
    estimate: Interval | None
    """Of what the claim speaks of: the difference in the good direction, or what is above the threshold or the half."""
    figures: str
    """The interval, the values, seeds and images in words; or why it was not measured."""
    together: bool
    """Whether it holds also at the level at which all claims of the plan are right at once (Bonferroni)."""

    @property
    def line(self) -> str:
        return f"{self.outcome}: {self.claim.text} ({self.figures})"


class Results:
    """Everything below a suite's folder that its report speaks of, read when it is asked for."""

    def __init__(self, plan: Plan, output: str) -> None:
        self.plan, self.output = plan, output
        self.commands: dict[str, Command] = {command.key: command for command in plan.commands}
        self.records = records(plan, output)
        self._digests = digests(plan)
        self.stress: dict[Any, Any] = {}
        """What `jobs.suite.stress` has judged already."""
        self._evaluations: dict[str, Evaluation | None] = {}
        self._values: dict[tuple[Measured, str, str, str], Values | None] = {}
        self._cells: dict[tuple[Measured, str, str, str], Cell | None] = {}

    # -- reading

    def uri(self, word: str) -> str:
        """`{key}` is the folder of that command, anything else a URI."""
        return storage.join(self.output, word[1:-1]) if word.startswith("{") and word.endswith("}") else word

    def evaluation(self, key: str) -> Evaluation | None:
        """None: it is not there, and `missing` says why."""
        if key not in self._evaluations:
            self._evaluations[key] = None
            uri = storage.join(self.output, key)
            if key not in self.commands or self._is_done(key):
                with contextlib.suppress(FileNotFoundError, *storage.NOT_JSON):
                    self._evaluations[key] = Evaluation(uri, storage.read_json(storage.join(uri, "metrics.json")))
        return self._evaluations[key]

    def _is_done(self, key: str) -> bool:
        """Whether the command has been run as the plan says it now; what an earlier plan left is not of this one."""
        record = self.records.get(key, {})
        return record.get("state") == "done" and record.get("digest") == self._digests[key]

    def evaluations(self, row: Measured) -> list[Evaluation]:
        """Those that are there, in the order of their seeds."""
        return [found for key in row.evaluations if (found := self.evaluation(key)) is not None]

    def missing(self, key: str) -> str:
        """Why a command has not made what it should: its own failure, or that of the first one that it needs."""
        record = self.records.get(key, {})
        if record.get("state") == "failed":
            return f"{key} failed: {record.get('error') or 'exit code {}'.format(record.get('exit_code'))}"
        for needed in sorted(needs(self.commands[key])) if key in self.commands else ():
            if not self._is_done(needed):
                return self.missing(needed)
        if record.get("state") == "done":
            return f"{key} was " + ("lost after it was done" if self._is_done(key) else "done with other options")
        return f"{key} has not run yet"

    def training(self, evaluation_key: str) -> str:
        """The key of the run that an evaluation's --checkpoint is, or ""."""
        words = self.commands[evaluation_key].argv if evaluation_key in self.commands else ()
        for flag, word in itertools.pairwise(words):
            if flag == "--checkpoint" and word.startswith("{") and "}" in word:
                return word[1 : word.index("}")]
        return ""

    def curves(self, key: str) -> list[dict[str, Any]]:
        """The rows of a run's metrics.jsonl."""
        try:
            return storage.read_json_lines(storage.join(self.output, key, "metrics.jsonl"))
        except FileNotFoundError:
            return []

    def cost(self, row: Measured) -> Cost:
        runs = [run for key in row.evaluations if (run := self.training(key))]
        seen = [max((line.get("images_seen", 0) for line in self.curves(run)), default=0) for run in runs]
        computes = [found.metrics.get("compute") or {} for found in self.evaluations(row)]
        return Cost(
            _mean([self.records.get(run, {}).get("seconds") for run in runs]),
            _mean([value or None for value in seen]),
            _mean([compute.get("nfe") for compute in computes]),
            _mean([compute.get("images_per_s") for compute in computes]),
        )

    # -- measuring

    def values(self, row: Measured, domain: str, metric: str, method: str = "model") -> Values | None:
        key = (row, domain, metric, method)
        if key not in self._values:
            self._values[key] = self._read_values(row, domain, metric, method)
        return self._values[key]

    def _read_values(self, row: Measured, domain: str, metric: str, method: str) -> Values | None:
        """Of the evaluations that have it; images that all of them have."""
        there = ((place, self.evaluation(key)) for place, key in enumerate(row.evaluations))
        told = [
            (place, each, summary)
            for place, each in there
            if each is not None and (summary := each.summary(domain, method, metric)) is not None
        ]
        if not told:
            return None
        found, places = [each for _, each, _ in told], tuple(place for place, _, _ in told)
        summaries = tuple(summary for _, _, summary in told)
        if metric == "kid":
            subsets = [each.subsets(domain, method) for each in found]
            if all(len(values) == len(subsets[0]) > 0 for values in subsets):
                return Values("subsets", np.stack(subsets), tuple(map(str, range(len(subsets[0])))), summaries, places)
        pictures = [each.images(domain, method, metric) for each in found]
        if ids := sorted(set.intersection(*map(set, pictures))):
            array = np.array([[values[name] for name in ids] for values in pictures])
            return Values("images", array, tuple(ids), summaries, places)
        return Values("summaries", np.array([[each.mean] for each in summaries]), ("all",), summaries, places)

    def cell(self, row: Measured, domain: str, metric: str, method: str = "model") -> Cell | None:
        key = (row, domain, metric, method)
        if key not in self._cells:
            values = self.values(*key)
            if values is not None:
                means = tuple(float(mean) for mean in values.array.mean(axis=1))
                self._cells[key] = Cell(estimate(values), means, self.num_pictures(row, domain, metric, method))
            else:
                self._cells[key] = None
        return self._cells[key]

    def num_pictures(self, row: Measured, domain: str, metric: str, method: str = "model") -> int:
        values = self.values(row, domain, metric, method)
        if values is not None and values.kind == "images":
            return len(values.ids)
        counts = [each.metrics["domains"].get(domain, {}).get("num_images", 0) for each in self.evaluations(row)]
        return min(counts, default=0)

    def best(self, rows: Sequence[Measured], domain: str, metric: str) -> Measured | None:
        """The row that is clearly better than each of the others; None where there is none or nothing to compare."""
        cells = {row: cell for row in rows if (cell := self.cell(row, domain, metric)) is not None}
        if len(cells) < 2 or not metric_table.has_direction(metric):
            return None
        sign = -1 if metric_table.lower_is_better(metric) else 1
        first, *others = sorted(cells, key=lambda row: -sign * cells[row].interval.mean)
        for other in others:
            gap = self.gap(first, other, domain, metric)
            if isinstance(gap, str) or gap[1] < ENOUGH or not gap[0](0.95).low > 0:
                return None
        return first

    def gap(
        self, ours: Measured, theirs: Measured, domain: str, metric: str, *, share: float = 1.0, rest: float = 0.0
    ) -> tuple[Callable[[float], Interval], int] | str:
        """How much better ours is than `share` of theirs + `rest`: its interval at a level, and on how many images;
        or why they cannot be compared."""
        a, b = self.values(ours, domain, metric), self.values(theirs, domain, metric)
        if a is None or b is None:
            return self.why_not(ours if a is None else theirs, domain, metric)
        if (one := self.evaluations(ours)[0].source) != (other := self.evaluations(theirs)[0].source):
            return f"measured on different data: {' '.join(one)} and {' '.join(other)}"
        if a.kind != b.kind or (a.kind == "summaries" and min(len(a.array), len(b.array)) < 2):
            return f"nothing is known of the single images' {metric_table.name(metric)}"
        ids = sorted(set(a.ids) & set(b.ids), key=a.ids.index)
        if not ids:
            return "measured on different images"
        sign = -1 if metric_table.lower_is_better(metric) else 1
        x = a.array[:, [a.ids.index(name) for name in ids]]
        y = share * b.array[:, [b.ids.index(name) for name in ids]] + rest
        if same := ours.training == theirs.training:  # two samplings of one network: seed by seed
            common = [place for place in a.places if place in b.places]
            x, y = x[[a.places.index(place) for place in common]], y[[b.places.index(place) for place in common]]
            if not common:
                return "no training seed has both"
        subsets = a.kind == "subsets"

        def interval(level: float) -> Interval:
            return _moved(two_level_difference(x, y, paired_seeds=same, subsets=subsets, level=level), sign, 0.0)

        return interval, min(self.num_pictures(row, domain, metric) for row in (ours, theirs))

    def why_not(self, row: Measured, domain: str, metric: str) -> str:
        """Why a row has no value of a metric."""
        if not self.evaluations(row):
            return self.missing(row.evaluations[0])
        there = {name for each in self.evaluations(row) for name in each.metrics["domains"]}
        if domain not in there:
            return f"{row.name} was measured to {', '.join(sorted(there))}, not to {domain}"
        return f"{metric_table.name(metric)} of {row.name} was not measured"


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def estimate(values: Values, level: float = 0.95) -> Interval:
    """Over seeds and images."""
    if values.kind == "summaries":
        return _over_seeds(values.summaries)
    return two_level(values.array, subsets=values.kind == "subsets", level=level)


def _over_seeds(summaries: Sequence[Interval]) -> Interval:
    """Of one seed its own interval; of several the wider of what they say by themselves and how far they are apart."""
    low, mean, high = (float(np.mean([getattr(each, name) for each in summaries])) for name in ("low", "mean", "high"))
    apart = [each.mean for each in summaries]
    return Interval(mean, min(low, *apart), max(high, *apart)) if len(apart) > 1 else Interval(mean, low, high)


# -- claims -------------------------------------------------------------------------------------------------------


def verdicts(results: Results) -> list[Verdict]:
    """Of every claim of the plan, in its order."""
    claims = [(section, claim) for section in results.plan.sections for claim in section.claims]
    level = bonferroni(max(len(claims), 1))
    return [judge(results, section, claim, together=level) for section, claim in claims]


def judge(results: Results, section: Section, claim: Claim, *, together: float) -> Verdict:
    """`together`: the level of each interval at which all claims are right at once in 95 % of cases."""
    rows = {row.name: row for row in section.rows}
    unknown = [name for name in (claim.ours, claim.theirs) if name is not None and name not in rows]
    if unknown:
        raise ValueError(f"claim {claim.text!r} speaks of {unknown[0]!r}, which is no row of section {section.key}")
    found = _subject(results, rows[claim.ours], rows.get(claim.theirs or ""), claim)
    if isinstance(found, str):
        return Verdict(section.key, claim, "not measured", None, found, together=False)
    interval, num_pictures = found
    gap = interval(0.95)
    outcome: Outcome = "holds" if _on_our_side(gap, claim) else "does not hold" if gap.high < 0 else "not clear"
    if num_pictures < ENOUGH:
        outcome = "not clear"
    strict = outcome == "holds" and _on_our_side(interval(together), claim)
    figures = _figures(results, rows[claim.ours], rows.get(claim.theirs or ""), claim, gap, num_pictures)
    return Verdict(section.key, claim, outcome, gap, figures, together=strict)


def _on_our_side(gap: Interval, claim: Claim) -> bool:
    """More than nothing is better; a threshold may be met exactly."""
    return gap.low > 0 if claim.kind == "better" else gap.low >= 0


def _subject(
    results: Results, ours: Measured, theirs: Measured | None, claim: Claim
) -> tuple[Callable[[float], Interval], int] | str:
    """What must be above zero for the claim to hold, at a level, and on how many images; or why it is not known."""
    metric, domain, threshold = claim.metric, claim.domain, claim.threshold or 0.0
    if claim.kind == "at_least":
        values = results.values(ours, domain, metric)
        if values is None:
            return results.why_not(ours, domain, metric)
        sign = -1 if metric_table.lower_is_better(metric) else 1
        return (
            lambda level: _moved(estimate(values, level), sign, -sign * threshold),
            results.num_pictures(ours, domain, metric),
        )
    if theirs is None:
        raise ValueError(f"claim {claim.text!r} compares, and names nothing to compare with")
    if claim.kind == "half_of_missing":  # ours - theirs >= (1 - theirs) / 2
        return results.gap(ours, theirs, domain, metric, share=0.5, rest=0.5)
    found = results.gap(ours, theirs, domain, metric)
    if isinstance(found, str) or claim.kind == "better":
        return found
    interval, count = found
    return (lambda level: _moved(interval(level), 1, threshold)), count


def _moved(interval: Interval, sign: int, by: float) -> Interval:
    """sign · interval + by, in order."""
    low, high = sorted((sign * interval.low + by, sign * interval.high + by))
    return Interval(sign * interval.mean + by, low, high)


def _figures(
    results: Results, ours: Measured, theirs: Measured | None, claim: Claim, gap: Interval, num_pictures: int
) -> str:
    metric, domain = claim.metric, claim.domain
    cells = [results.cell(row, domain, metric) for row in (ours, theirs) if row is not None]
    values = " against ".join(number(cell.interval.mean, metric, cell.interval) for cell in cells if cell is not None)
    threshold = claim.threshold or 0.0
    sign, most = (-1, "at most") if metric_table.lower_is_better(metric) else (1, "at least")
    what = {
        "better": apart(gap, metric),
        "at_least": f"{span(_moved(gap, sign, threshold), metric, finer=1)}, "
        f"wanted {most} {number(threshold, metric, gap)}",
        "half_of_missing": f"closes half of what is missing to 100 %, and {apart(gap, metric, 'more', 'less')}",
        "not_worse_by": f"{apart(_moved(gap, 1, -threshold), metric)}, allowed to be worse by "
        f"{number(threshold, metric, gap, points=True)}",
    }[claim.kind]
    if claim.kind == "half_of_missing" and gap.mean < 0:
        what = f"short of half of what is missing by {span(_moved(gap, -1, 0.0), metric, points=True)}"
    parts = [what] if claim.kind == "at_least" else [what, values]
    few = ", too few to tell" * (num_pictures < ENOUGH)
    stands = f"{seeds(results, ours, theirs)}, {num_pictures:,} image{'s' * (num_pictures != 1)}{few}"
    return f"{metric_table.name(metric)}: {'; '.join(parts)}; {stands}"


def apart(gap: Interval, metric: str, more: str = "better", less: str = "worse") -> str:
    """better by 0.3, worse by 0.3; where the interval holds zero its bounds say so."""
    if gap.mean < 0:
        gap, more = _moved(gap, -1, 0.0), less
    return f"{more} by {span(gap, metric, points=True)}"


def seeds(results: Results, *rows: Measured | None) -> str:
    """How many training seeds stand behind a figure; what one seed does not say."""
    counts = {row.name: len(results.evaluations(row)) for row in rows if row is not None}
    fewest = min(counts.values())
    if fewest > 1:
        return f"{fewest} training seeds"
    if max(counts.values()) > 1:
        return (
            f"{' and '.join(row for row, count in counts.items() if count == 1)} of one training seed, taken as fixed"
        )
    return "one training seed, so the interval is over images only"


# -- numbers ------------------------------------------------------------------------------------------------------


def number(
    value: float,
    metric: str,
    interval: Interval | None = None,
    *,
    unit: bool = True,
    points: bool = False,
    finer: int = 0,
) -> str:
    """As many digits as the interval's half-width gives a meaning to and `finer` more; rates in percent, their
    differences in points."""
    factor = 100 if metric_table.of(metric).rate else 1
    half = factor * (interval.high - interval.low) / 2 if interval else 0.0
    digits = _digits(half) + finer if half > 0 and math.isfinite(half) else 1 if metric_table.of(metric).rate else 3
    told = f"{factor * value:.{digits}f}"
    told = told.removeprefix("-") if float(told) == 0 else told
    return told + (" points" if unit and points and metric_table.of(metric).rate else _unit(metric) if unit else "")


def _digits(half: float) -> int:
    """Two where the half-width begins with 1 or 2, else one: 0.24, 0.3."""
    place = math.floor(math.log10(half))
    return min(max(-place + (half / 10**place < 2.95), 0), 6)


def _unit(metric: str) -> str:
    return " %" if metric_table.of(metric).rate else metric_table.of(metric).unit


def span(interval: Interval, metric: str, *, points: bool = False, finer: int = 0) -> str:
    """23.71 dB ± 0.25, or with its bounds where they are not equally far: 98.4 % (96.1 to 99.4)."""
    mean = number(interval.mean, metric, interval, points=points, finer=finer)
    spread = spread_text(interval, metric, finer=finer)
    return f"{mean} ({spread})" if " to " in spread else f"{mean} {spread}"


def spread_text(interval: Interval, metric: str, *, finer: int = 0) -> str:
    """± half-width, or the bounds where they are not equally far."""
    told = functools.partial(number, metric=metric, interval=interval, unit=False, finer=finer)
    up, down = interval.high - interval.mean, interval.mean - interval.low
    if up + down == 0:
        return "± 0"
    if abs(up - down) < 0.2 * (up + down) / 2:
        return f"± {told((up + down) / 2)}"
    return f"{told(interval.low)} to {told(interval.high)}"


# -- files --------------------------------------------------------------------------------------------------------


def groups(results: Results, section: Section) -> list[tuple[str, str, str, list[Measured]]]:
    """(data set, its hash, domain, the section's rows that were measured there)."""
    found: dict[tuple[str, str], dict[str, list[Measured]]] = {}
    for row in section.rows:
        for domain, source in dict.fromkeys(
            (domain, each.source) for each in results.evaluations(row) for domain in each.metrics["domains"]
        ):
            found.setdefault(source, {}).setdefault(domain, []).append(row)
    return [(*source, domain, rows) for source, domains in found.items() for domain, rows in domains.items()]


def rows(results: Results) -> list[dict[str, Any]]:
    """The table: a row of each section, data set and domain, with all the section's metrics."""
    return [
        {
            "section": section.key,
            "row": row.name,
            "data": name,
            "content_hash": content_hash,
            "domain": domain,
            "evaluations": list(row.evaluations),
            "metrics": {
                metric: _cell(cell)
                for metric in section.metrics
                if (cell := results.cell(row, domain, metric)) is not None
            },
            "cost": dataclasses.asdict(results.cost(row)),
        }
        for section in results.plan.sections
        for name, content_hash, domain, measured in groups(results, section)
        for row in measured
    ]


def _cell(cell: Cell) -> dict[str, Any]:
    return {
        **dataclasses.asdict(cell.interval),
        "seeds": list(cell.seeds),
        "num_seeds": len(cell.seeds),
        "num_pictures": cell.num_pictures,
    }


def missing(results: Results, section: Section) -> dict[str, str]:
    """Evaluations of a section that are not there, and why."""
    keys = dict.fromkeys(key for row in section.rows for key in row.evaluations)
    return {key: results.missing(key) for key in keys if results.evaluation(key) is None}


def as_csv(table: Sequence[Mapping[str, Any]]) -> str:
    """A line for every value of the table."""
    buffer = io.StringIO()
    facts, numbers = ["section", "row", "data", "domain"], ["mean", "low", "high", "num_seeds", "num_pictures"]
    costs = ["train_s", "images_seen", "nfe", "images_per_s"]
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*facts, "metric", *numbers, *costs])
    for row in table:
        for metric, cell in row["metrics"].items():
            cost = [row["cost"][name] for name in costs]
            writer.writerow([*(row[name] for name in facts), metric, *(cell[name] for name in numbers), *cost])
    return buffer.getvalue()


def as_markdown(results: Results, verdicts: Sequence[Verdict]) -> str:
    """Tables of what was measured and of what became of the claims, to be kept in a document."""
    lines = []
    for section in results.plan.sections:
        for name, _, domain, measured in groups(results, section):
            lines += [f"### {section.title} ({name} → {domain})", "", *_table(results, section, domain, measured), ""]
    claims = [(verdict.section, verdict.claim.text, f"**{verdict.outcome}**", verdict.figures) for verdict in verdicts]
    return "\n".join([*lines, "### Claims", "", *_lines(("section", "claim", "", "95 %"), claims), ""])


def _table(results: Results, section: Section, domain: str, measured: Sequence[Measured]) -> list[str]:
    cells = {row.name: {metric: results.cell(row, domain, metric) for metric in section.metrics} for row in measured}
    metrics = [metric for metric in section.metrics if any(found[metric] for found in cells.values())]
    body = []
    for row in measured:
        found = [cells[row.name][metric] for metric in metrics]
        told = ["–" if cell is None else span(cell.interval, at) for at, cell in zip(metrics, found, strict=True)]
        train_s = results.cost(row).train_s
        body.append((row.name, *told, str(len(row.evaluations)), "–" if train_s is None else f"{train_s:.0f}"))
    return _lines(("", *map(metric_table.heading, metrics), "trainings", "s each"), body)


def _lines(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *body)]
