"""Pages by Jinja2 templates: everything in them is escaped, and they fetch nothing.

`templates/base.html.j2` is what every page has, `parts.html.j2` are its figures, tables and cards, `style.css` is the
style of all.
"""

import base64
import dataclasses
import functools
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    import jinja2

REFRESH_S = 30
"""How often a browser loads the page of something that still runs again."""
CREDITS = {"licence": "Licence of the images", "credit": "Credit", "source": "Source"}
"""Of a data set: key in its card → what a page says."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """Of a table."""

    text: str = "–"
    small: str = ""
    """Beside or below it: an interval, a unit."""
    kind: str = ""
    """Its class in the style sheet."""
    share: float | None = None
    """Of 1, drawn as a bar."""


@dataclasses.dataclass(frozen=True)
class Line:
    """Of a table; its first cell is its head."""

    head: str
    cells: Sequence[Cell | str]
    kind: str = ""
    """`ours` stands out, `reference` stands back."""
    marks: Sequence[str] = ()
    """Small words beside the head."""
    href: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """`kind`: its class in the style sheet."""

    head: Sequence[str]
    lines: Sequence[Line]
    kind: str = ""
    caption: str = ""


def render(template: str, **values: Any) -> str:
    """What this template makes of the values, a page if it names no other kind; a name that is missing is an error."""
    name = template if "." in template else f"{template}.html"
    return _environment().get_template(f"{name}.j2").render(**values)


@functools.cache
def _environment() -> "jinja2.Environment":
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jobs.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["flat"] = flat
    return environment


def image(caption: str, png: bytes, kind: str = "") -> dict[str, Any]:
    """What a page shows of a PNG. `kind`: how it is laid out, `latest` (not higher than a screen), `film` (not
    narrower than it can be read) or as any other."""
    with Image.open(io.BytesIO(png)) as opened:
        width, height = opened.size
    return {"caption": caption, "uri": data_uri(png), "width": width, "height": height, "kind": kind}


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested options as (dotted name, text)."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{key}", " ".join(map(str, value)) or "–"
        else:
            yield f"{prefix}{key}", "–" if value in (None, "") else str(value)


def data_uri(image: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64," + base64.b64encode(image).decode()
