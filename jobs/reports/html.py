"""What every page has: head, style, figures, tables."""

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from PIL import Image


def document(title: str, parts: Sequence[str], *, head: str = "", css: str = "") -> str:
    """A page of these parts of HTML; `head` and `css`: what it has beside what all have."""
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n{head}'
        f"<title>{html.escape(title)}</title>\n<style>{CSS}{css}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def figure(caption: str, png: bytes, kind: str = "") -> str:
    """`kind`: how the page lays it out, `latest` (not higher than a screen), `film` (not narrower than it can be read)
    or as any other."""
    with Image.open(io.BytesIO(png)) as image:
        width, height = image.size
    caption = html.escape(caption)
    return (
        f'<figure><div class="scroll"><img class="grid {kind}" src="{data_uri(png)}" width="{width}" '
        f'height="{height}" alt="{caption}"></div><figcaption>{caption}</figcaption></figure>'
    )


def table(values: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in flat(values))
    return f'<table class="options">{rows}</table>'


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{key}", " ".join(map(str, value)) or "–"
        else:
            yield f"{prefix}{key}", "–" if value in (None, "") else str(value)


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


CSS = """
:root { --ink: #1d222b; --soft: #5b6270; --line: #e2e5ea; --page: #f6f7f9; --card: #fff; --accent: #2f6fde;
  --good: #1c7f4a; --bad: #b3372f; --even: #8a6d1d; --good-bg: #e9f6ef; --bad-bg: #fbeceb; --even-bg: #faf4e3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #a7afbd; --line: #303642; --page: #14171c;
  --card: #1c2027; --accent: #7aa9f7; --good: #6fd39b; --bad: #f0918a; --even: #e0c46c; --good-bg: #17291f;
  --bad-bg: #2f1d1c; --even-bg: #2a2515; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 40px 20px 80px; }
header { margin-bottom: 28px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 14px; }
.facts, .where, .note, figcaption { color: var(--soft); margin: 0; }
.where { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.note { font-size: 14px; margin-top: 12px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 22px; margin: 0 0 18px; }
.headline { font-size: 18px; margin: 0 0 16px; }
.verdicts { list-style: none; margin: 0; padding: 0; display: grid; gap: 10px;
  grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); }
.verdicts li { display: flex; gap: 12px; padding: 12px 14px; border-radius: 8px; font-size: 14px; }
.verdicts span { color: var(--soft); }
.verdicts .mark { font-size: 20px; line-height: 1.1; font-weight: 700; }
.good { background: var(--good-bg); } .good b, .good .mark { color: var(--good); }
.bad { background: var(--bad-bg); } .bad b, .bad .mark { color: var(--bad); }
.even { background: var(--even-bg); } .even b, .even .mark { color: var(--even); }
.status h2 { display: inline-block; padding: 4px 12px; border-radius: 999px; margin: 0 0 14px; font-size: 16px; }
h2.good { color: var(--good); } h2.bad { color: var(--bad); } h2.even { color: var(--even); }
progress { display: block; width: 100%; height: 8px; margin: 0 0 18px; appearance: none; border: 0;
  border-radius: 4px; background: var(--line); overflow: hidden; accent-color: var(--accent); }
progress::-webkit-progress-bar { background: var(--line); }
progress::-webkit-progress-value { background: var(--accent); }
progress::-moz-progress-bar { background: var(--accent); }
dl.tiles { grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); gap: 16px; margin: 0; }
.tiles dd { font-size: 16px; font-variant-numeric: tabular-nums; }
figure { margin: 0; }
figcaption { font-size: 14px; margin-top: 8px; }
img { max-width: 100%; height: auto; }
img.grid { display: block; margin: 0 auto; background: #fff; padding: 6px; border-radius: 6px; }
img.latest { max-height: 760px; width: auto; }
@media (max-width: 700px) { img.film { max-width: none; width: 640px; } }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); gap: 22px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
table + table, .scroll + .scroll { margin-top: 20px; }
caption { text-align: left; color: var(--soft); padding-bottom: 6px; }
th, td { text-align: right; padding: 7px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { font-weight: 600; color: var(--soft); }
tbody th, tr > th:first-child { text-align: left; font-weight: 400; white-space: normal; }
td small { color: var(--soft); margin-left: 6px; }
tbody .ours th, .ours td { font-weight: 600; }
.best { color: var(--accent); }
details { border-top: 1px solid var(--line); padding: 10px 0; }
summary { cursor: pointer; }
.options { margin-top: 8px; }
.options th { color: var(--soft); width: 34%; }
.options td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
dl { margin: 0 0 14px; display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px; font-size: 14px; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
"""
