"""The page of a translation: what came of how many images, a contact sheet, how far people are kept, and with what."""

from collections.abc import Mapping, Sequence
from typing import Any

from jobs.reports import charts, html
from jobs.reports.html import Line, Table

MOST_REASONS = 30
BINS = 50
"""Of the cosines, from -1 to 1."""


def build(
    note: Mapping[str, Any],
    *,
    seconds: float,
    reasons: Mapping[str, Mapping[str, int]],
    cosines: Sequence[int],
    least: Sequence[tuple[float, str]],
    sheet: bytes | None,
) -> str:
    """The page of the `note` in run.json.

    `seconds`: of work, all workers together. `reasons`: under each heading how often each kind of reason. `cosines`:
    how many images have one in each of BINS, all zero where nothing measured them. `least`: the least of them with the
    images' ids. `sheet`: the contact sheet as PNG.
    """
    counts, data = note["counts"], note["model"].get("data", {})
    ok, bad = counts["ok"], counts["rejected"]
    facts = [
        f"{ok:,} translated",
        f"{bad:,} set aside" if bad else "",
        f"{counts['ignored']:,} passed over" if counts["ignored"] else "",
    ]
    facts += [f"{seconds / ok:.3g} s of a worker an image" if ok else "", f"finished {note['finished']}"]
    domain = note["options"]["domain"]
    return html.render(
        "translation",
        title=f"To {domain}: {ok:,} images",
        heading=f"{data.get('name') or 'Translated'}: to {domain}",
        refresh_s=None,
        facts=[fact for fact in facts if fact],
        where=[f"of {note['command']['input']}", f"by {note['checkpoint']}"],
        sheet=sheet and html.image(f"{len(note['preview'])} images, spread evenly over all.", sheet),
        tables=[_reasons(heading, of_kind) for heading, of_kind in reasons.items() if of_kind],
        identity=charts.chart(lambda axes: _draw(axes, cosines), "Cosine of source and result.")
        if any(cosines)
        else None,
        least=Table(["least alike", "cosine"], [Line(name, [f"{cosine:.2f}"]) for cosine, name in least]),
        credits=[(label, data[key]) for key, label in html.CREDITS.items() if data.get(key)],
        blocks={
            "Options that the results depend on": note["options"],
            "The command": note["command"],
            "Model": note["model"],
            "Environment": note["environment"],
        },
    )


def _reasons(heading: str, counts: Mapping[str, int]) -> Table:
    most = sorted(counts.items(), key=lambda each: -each[1])
    lines = [Line(kind, [f"{num:,}"]) for kind, num in most[:MOST_REASONS]]
    if rest := most[MOST_REASONS:]:
        lines.append(Line(f"{len(rest)} other reasons", [f"{sum(num for _, num in rest):,}"]))
    return Table([heading, "images"], lines)


def _draw(axes: Any, cosines: Sequence[int]) -> None:
    width = 2 / BINS
    first = next(i for i, num in enumerate(cosines) if num)
    axes.bar([-1 + width * (i + 0.5) for i in range(first, BINS)], cosines[first:], 0.9 * width, color=charts.VAL)
    axes.set_xlabel("cosine between the identity net's embeddings")
    axes.set_ylabel("images")
