"""Grids of images under headings, and film strips of how they came to be."""

import io
import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

CELL = 128
"""Images in a grid are enlarged by whole factors to about this side."""
HEADER, LINE, GAP = 26, 16, 4
"""Height of a grid's row of headings and of each further line in it, and what is left between its images, in
pixels."""
FILM_STEPS, FILM_ROWS, FILM_CELL = 6, 4, 96
"""How many steps and images a film strip has, and about the side of an image."""


# -- images -----------------------------------------------------------------------------------------------------


def labelled_grid(
    columns: Sequence[str], rows: Sequence[Sequence[UInt8[np.ndarray, "s s 3"]]], *, cell: int = CELL
) -> bytes:
    """Rows of equally sized images under headings, enlarged by a whole factor to about `cell` without smoothing, as
    PNG; `ungrid` takes them out again. Headings too long for a column are broken into lines."""
    from ddpm_core import images

    scale = max(round(cell / rows[0][0].shape[0]), 1)
    grid = images.grid([list(row) for row in rows], gap=GAP, scale=scale)
    side, font = rows[0][0].shape[1] * scale, ImageFont.load_default(14)
    lines_of = [broken(text, side, font.getlength) for text in columns]
    header = HEADER + LINE * (max(len(lines) for lines in lines_of) - 1)
    canvas = Image.new("RGB", (grid.shape[1], grid.shape[0] + header), "white")
    canvas.paste(Image.fromarray(grid), (0, header))
    draw = ImageDraw.Draw(canvas)
    for i, lines in enumerate(lines_of):
        for j, text in enumerate(lines):
            at = (i * (side + GAP) + side / 2, header / 2 + LINE * (j - (len(lines) - 1) / 2))
            draw.text(at, text, fill=(70, 76, 88), font=font, anchor="mm")
    layout = PngInfo()
    facts = {"columns": list(columns), "side": side, "scale": scale, "header": header}
    layout.add_text("grid", json.dumps(facts))
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG", pnginfo=layout)
    return buffer.getvalue()


def broken(text: str, width: float, length: Callable[[str], float]) -> list[str]:
    """The text in lines no longer than `width` where its words allow that."""
    lines: list[str] = []
    for word in text.split():
        if lines and length(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines or [""]


def ungrid(png: bytes) -> tuple[list[str], list[list[UInt8[np.ndarray, "s s 3"]]]]:
    """The headings and the rows of images of a `labelled_grid`."""
    with Image.open(io.BytesIO(png)) as image:
        layout = json.loads(image.text["grid"])  # type: ignore[attr-defined]
        pixels = np.asarray(image)[layout.get("header", HEADER) :]
    side, scale = layout["side"], layout["scale"]
    lefts = [i * (side + GAP) for i in range(len(layout["columns"]))]
    tops = range(0, len(pixels), side + GAP)
    cut = [[pixels[top : top + side : scale, left : left + side : scale] for left in lefts] for top in tops]
    return layout["columns"], cut


def film_strip(grids: Mapping[int, bytes]) -> bytes:
    """From the grids of some steps, each source | translated | …, one grid: the source, what was made of it after each
    step, and what else the last grid shows."""
    last_columns, last = ungrid(grids[max(grids)])
    films = [[row[1] for row in ungrid(grids[step])[1][:FILM_ROWS]] for step in sorted(grids)]
    rows = [[row[0], *(film[i] for film in films), *row[2:]] for i, row in enumerate(last[:FILM_ROWS])]
    rows = [[_reduced(image) for image in row] for row in rows]
    columns = [last_columns[0], *(f"{step:,}" for step in sorted(grids)), *last_columns[2:]]
    return labelled_grid(columns, rows, cell=FILM_CELL)


def _reduced(image: UInt8[np.ndarray, "s s 3"]) -> UInt8[np.ndarray, "r r 3"]:
    """By a whole factor to about FILM_CELL: the page of a run at 256 px is written and loaded often."""
    return np.asarray(Image.fromarray(image).reduce(max(image.shape[0] // FILM_CELL, 1)))
