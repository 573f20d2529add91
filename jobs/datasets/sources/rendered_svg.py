"""A sheet of 256 x 256 units to draw on, as SVG; resvg turns it into pixels of any size.

Point    (x, y), x to the right and y down, in units of the sheet
Colour   (r, g, b) in [0, 255]
"""

import contextlib
import io
import math
from collections.abc import Iterator, Sequence

import numpy as np
import resvg_py
from jaxtyping import UInt8
from PIL import Image

SIDE = 256
"""Side of the sheet, in units."""

Point = tuple[float, float]
Color = tuple[float, float, float]

WHITE: Color = (255, 255, 255)
BLACK: Color = (0, 0, 0)


def css(color: Color) -> str:
    r, g, b = (min(max(round(value), 0), 255) for value in color)
    return f"#{r:02x}{g:02x}{b:02x}"


def mix(one: Color, other: Color, share: float) -> Color:
    """`share` of `other` in `one`."""
    share = min(max(share, 0.0), 1.0)
    return (
        one[0] + (other[0] - one[0]) * share,
        one[1] + (other[1] - one[1]) * share,
        one[2] + (other[2] - one[2]) * share,
    )


def times(color: Color, tint: Color | float) -> Color:
    """Light of colour `tint` (1 = white) on a surface."""
    r, g, b = tint if isinstance(tint, tuple) else (tint, tint, tint)
    return color[0] * r, color[1] * g, color[2] * b


def hue(degrees: float, saturation: float, lightness: float) -> Color:
    """A colour by hue in degrees, saturation and lightness in [0, 1] (HSL)."""

    def channel(n: int) -> float:
        k = (n + degrees / 30) % 12
        return 255 * (lightness - saturation * min(lightness, 1 - lightness) * max(-1, min(k - 3, 9 - k, 1)))

    return channel(0), channel(8), channel(4)


def ramp(colors: Sequence[Color], share: float) -> Color:
    """The colour at `share` in [0, 1] of the way through `colors`."""
    place = min(max(share, 0.0), 1.0) * (len(colors) - 1)
    first = min(int(place), len(colors) - 2)
    return mix(colors[first], colors[first + 1], place - first)


def polygon(points: Sequence[Point]) -> str:
    """The closed path with straight sides through the points."""
    return "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in points) + "Z"


def curve(points: Sequence[Point], *, closed: bool = True) -> str:
    """The smooth path through the points (a Catmull-Rom spline as cubic Béziers)."""
    count = len(points)
    last = count if closed else count - 1
    parts = ["M{:.2f} {:.2f}".format(*points[0])]
    for i in range(last):
        (x0, y0), (x1, y1) = points[i - 1 if closed or i else 0], points[i]
        (x2, y2) = points[(i + 1) % count]
        (x3, y3) = points[(i + 2) % count if closed else min(i + 2, count - 1)]
        ax, ay, bx, by = x1 + (x2 - x0) / 6, y1 + (y2 - y0) / 6, x2 - (x3 - x1) / 6, y2 - (y3 - y1) / 6
        parts.append(f"C{ax:.2f} {ay:.2f} {bx:.2f} {by:.2f} {x2:.2f} {y2:.2f}")
    return "".join(parts) + ("Z" if closed else "")


class Sheet:
    """What has been drawn so far, bottom first."""

    def __init__(self) -> None:
        self.body: list[str] = []
        self.definitions: dict[str, str] = {}

    def path(self, d: str, fill: Color | str, opacity: float = 1.0) -> None:
        """Fill a path with a colour or a gradient."""
        paint = fill if isinstance(fill, str) else css(fill)
        shade = "" if opacity >= 1 else f' fill-opacity="{opacity:.2f}"'
        self.body.append(f'<path d="{d}" fill="{paint}"{shade}/>')

    def line(self, d: str, color: Color, width: float, opacity: float = 1.0) -> None:
        """Stroke a path with round ends."""
        shade = "" if opacity >= 1 else f' stroke-opacity="{opacity:.2f}"'
        self.body.append(
            f'<path d="{d}" fill="none" stroke="{css(color)}" stroke-width="{width:.2f}" '
            f'stroke-linecap="round" stroke-linejoin="round"{shade}/>'
        )

    def ellipse(
        self, x: float, y: float, rx: float, ry: float, fill: Color | str, opacity: float = 1.0, *, angle: float = 0.0
    ) -> None:
        """Fill an ellipse, turned clockwise by `angle` degrees."""
        paint = fill if isinstance(fill, str) else css(fill)
        shade = "" if opacity >= 1 else f' fill-opacity="{opacity:.2f}"'
        turned = f' transform="rotate({angle:.1f} {x:.2f} {y:.2f})"' if angle else ""
        self.body.append(
            f'<ellipse cx="{x:.2f}" cy="{y:.2f}" rx="{rx:.2f}" ry="{ry:.2f}" fill="{paint}"{shade}{turned}/>'
        )

    def soft(
        self, x: float, y: float, rx: float, ry: float, color: Color, opacity: float, *, angle: float = 0.0
    ) -> None:
        """An ellipse that fades out towards its edge."""
        if opacity > 0.01:
            paint = self._gradient(
                "radialGradient", "", ((0, color, opacity), (0.5, color, opacity * 0.55), (1, color, 0))
            )
            self.ellipse(x, y, rx, ry, paint, angle=angle)

    def linear(self, start: Point, end: Point, stops: Sequence[tuple[float, Color, float]]) -> str:
        """A gradient from point to point; stops are (place in [0, 1], colour, opacity)."""
        where = f'x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"'
        return self._gradient("linearGradient", f'gradientUnits="userSpaceOnUse" {where}', stops)

    def radial(self, center: Point, radius: float, stops: Sequence[tuple[float, Color, float]]) -> str:
        """A gradient outwards from `center`."""
        where = f'cx="{center[0]:.1f}" cy="{center[1]:.1f}" r="{radius:.1f}"'
        return self._gradient("radialGradient", f'gradientUnits="userSpaceOnUse" {where}', stops)

    def _gradient(self, kind: str, where: str, stops: Sequence[tuple[float, Color, float]]) -> str:
        inner = "".join(
            f'<stop offset="{place:.2f}" stop-color="{css(color)}" stop-opacity="{opacity:.2f}"/>'
            for place, color, opacity in stops
        )
        return f"url(#{self._define(kind, where, inner)})"

    def _define(self, kind: str, where: str, inner: str) -> str:
        return self.definitions.setdefault(f"<{kind} %s {where}>{inner}</{kind}>", f"d{len(self.definitions)}")

    @contextlib.contextmanager
    def group(self, attributes: str) -> Iterator[None]:
        self.body.append(f"<g {attributes}>")
        yield
        self.body.append("</g>")

    @contextlib.contextmanager
    def clipped(self, *paths: str) -> Iterator[None]:
        """Nothing drawn in here shows outside of the paths."""
        name = self._define("clipPath", "", "".join(f'<path d="{d}"/>' for d in paths))
        with self.group(f'clip-path="url(#{name})"'):
            yield

    @contextlib.contextmanager
    def rotated(self, degrees: float, x: float, y: float) -> Iterator[None]:
        """Turned clockwise about (x, y)."""
        with self.group(f'transform="rotate({degrees:.2f} {x:.2f} {y:.2f})"'):
            yield

    @contextlib.contextmanager
    def blurred(self, radius: float) -> Iterator[None]:
        """Out of focus."""
        inner = f'<feGaussianBlur stdDeviation="{radius:.1f}"/>'
        name = self._define("filter", 'x="-10%" y="-10%" width="120%" height="120%"', inner)
        with self.group(f'filter="url(#{name})"'):
            yield

    def text(self) -> str:
        """The whole sheet as SVG."""
        definitions = "".join(text.replace("%s", f'id="{name}"', 1) for text, name in self.definitions.items())
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SIDE} {SIDE}">'
            f"<defs>{definitions}</defs>{''.join(self.body)}</svg>"
        )

    def pixels(self, size: int) -> UInt8[np.ndarray, "size size 3"]:
        """The sheet at `size` x `size` pixels; nothing may shine through it."""
        png = resvg_py.svg_to_bytes(svg_string=self.text(), width=size, height=size, skip_system_fonts=True)
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def turned(point: Point, degrees: float, about: Point) -> Point:
    """`point` turned clockwise (as seen, y down) about another one."""
    sin, cos = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    x, y = point[0] - about[0], point[1] - about[1]
    return about[0] + x * cos - y * sin, about[1] + x * sin + y * cos
