"""Landscapes from parameters: a place, its season and weather, by day and by night.

A place is a number in [0, 1] for each of NAMES. The time of day enters through `Light` alone: colours of sky and
light, sun or moon and stars, windows and lamps on or off. Where things stand is the same by day and by night.
"""

import dataclasses
import functools
import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence

from jobs.datasets.sources.rendered_svg import (
    BLACK,
    SIDE,
    WHITE,
    Color,
    Point,
    Sheet,
    curve,
    hue,
    mix,
    polygon,
    ramp,
    times,
)

DOMAINS = ("day", "night")
NAMES = (
    # the camera
    "horizon", "nearness",
    # the land
    "terrain", "ridges", "peaks", "roughness", "snow_line", "rock_hue", "land_hue", "fields", "flowers",
    # the water
    "water", "water_level", "water_hue", "ripples", "boat",
    # season and plants
    "season", "trees", "tree_kind", "tree_places", "tree_size", "forest",
    # what people built
    "houses", "house_places", "house_size", "wall_color", "roof_color", "lit_windows", "tower", "road", "road_bend",
    "lamps", "fence",
    # the weather
    "clouds", "cloud_places", "cloud_height", "haze", "precipitation",
    # the sky
    "sun_place", "sun_height", "sky_warmth", "moon_place", "moon_height", "moon_phase", "stars", "star_places",
)  # fmt: skip
"""Names of the parameters, each in [0, 1]."""

SPRING, SUMMER, AUTUMN, WINTER = range(4)
GRASS = ((112, 160, 66), (92, 140, 58), (158, 142, 70), (226, 234, 242))
LEAVES = (((124, 176, 74), (236, 172, 190)), ((62, 120, 52), (88, 138, 58)), ((206, 120, 40), (190, 72, 44)),
          ((216, 224, 232), (200, 210, 222)))  # fmt: skip
WALLS = ((240, 232, 216), (226, 196, 150), (176, 92, 70), (150, 110, 78), (206, 214, 220), (218, 168, 92))
ROOFS = ((168, 72, 52), (96, 80, 76), (74, 84, 104), (124, 58, 46), (104, 96, 60))
GLOW: Color = (255, 206, 122)
"""Lit windows and lamps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Light:
    """All that the time of day decides."""

    night: bool
    tint: Color
    """Colour of the light, as a factor."""
    zenith: Color
    skyline: Color
    """The sky above and at the horizon; haze has the latter's colour."""
    cloud: Color
    cloud_shade: Color
    source: Point
    """Where sun or moon stands."""

    def on(self, color: Color) -> Color:
        """A surface of this colour in this light."""
        return times(color, self.tint)


def light_of(p: Mapping[str, float], domain: int) -> Light:
    """The light by day (0) or by night (1)."""
    grey = max(p["clouds"] - 0.5, 0) * 1.3
    wet = p["precipitation"] > 0.72
    grey = max(grey, 0.75) if wet else grey
    if domain == 0:
        warm = p["sky_warmth"] * (1 - 0.75 * p["sun_height"])
        zenith = mix(mix((58, 124, 206), (86, 120, 190), warm), (150, 160, 172), grey)
        skyline = mix(mix((196, 224, 244), (255, 206, 150), warm), (206, 210, 214), grey)
        tint = mix(mix((255, 250, 240), (255, 226, 190), warm), (222, 228, 236), grey)
        return Light(
            night=False,
            tint=times(tint, 1 / 255),
            zenith=zenith,
            skyline=skyline,
            cloud=mix((255, 255, 255), (214, 216, 222), grey),
            cloud_shade=mix((196, 208, 226), (140, 146, 158), grey),
            source=(24 + 208 * p["sun_place"], 16 + 64 * (1 - p["sun_height"])),
        )
    moon = (0.35 + 0.65 * p["moon_phase"]) * (1 - 0.5 * grey)
    return Light(
        night=True,
        tint=mix((0.15, 0.19, 0.32), (0.27, 0.34, 0.53), moon),
        zenith=mix((6, 10, 30), (14, 24, 58), moon),
        skyline=mix((24, 34, 70), (50, 70, 118), moon),
        cloud=mix((34, 42, 70), (74, 88, 126), moon),
        cloud_shade=mix((18, 24, 46), (36, 46, 78), moon),
        source=(24 + 208 * p["moon_place"], 16 + 50 * (1 - p["moon_height"])),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """The geometry and the colours that several parts of the drawing share."""

    p: Mapping[str, float]
    light: Light
    season: int
    horizon: float
    shore: float
    """Where the near ground begins: the horizon, or the near side of the lake."""
    water: str
    haze: float

    def far(self, color: Color, distance: float) -> Color:
        """A colour in this light, seen through the air over a distance in [0, 1]."""
        return mix(self.light.on(color), self.light.skyline, (0.25 + 0.65 * self.haze) * distance)

    def scale(self, y: float) -> float:
        """Size of things that stand at height `y` of the image, 1 for those in front."""
        return (0.16 + 0.84 * (y - self.horizon) / (SIDE - self.horizon)) * (0.85 + 0.4 * self.p["nearness"])

    def ground(self, x: float) -> float:
        """The upper edge of the near ground."""
        return self.shore + (2.5 if self.water == "lake" else 4) * math.sin(x / 37 + 6 * self.p["terrain"])

    def seeded(self, name: str) -> random.Random:
        """Random numbers that a parameter alone decides."""
        return random.Random(round(100 * self.p[name]) + 1000 * NAMES.index(name))


def place_of(p: Mapping[str, float], domain: int) -> Place:
    horizon = 96.0 + 44.0 * p["horizon"]
    water = "none" if p["water"] < 0.3 else "lake" if p["water"] < 0.72 else "river"
    return Place(
        p=p,
        light=light_of(p, domain),
        season=min(int(4 * p["season"]), WINTER),
        horizon=horizon,
        shore=horizon + (24.0 + 46.0 * p["water_level"] if water == "lake" else 3.0),
        water=water,
        haze=p["haze"] ** 1.5,
    )


def landscape(p: Mapping[str, float], domain: int) -> Sheet:
    """The image of a place at DOMAINS[domain]."""
    place, sheet = place_of(p, domain), Sheet()
    sky(sheet, place)
    ridges = ridge_lines(place)
    mountains(sheet, place, ridges)
    if place.water == "lake":
        lake(sheet, place, ridges)
    ground(sheet, place)
    if place.water == "river":
        river(sheet, place)
    road(sheet, place)
    for _, draw in sorted(standing(sheet, place), key=lambda item: item[0]):
        draw()
    weather(sheet, place)
    return sheet


# ---------------------------------------------------------------------------------------------- the sky


def sky(sheet: Sheet, place: Place) -> None:
    light, p, y = place.light, place.p, place.horizon
    middle = mix(light.zenith, light.skyline, 0.42)
    paint = sheet.linear((0, 0), (0, y + 8), ((0, light.zenith, 1), (0.55, middle, 1), (1, light.skyline, 1)))
    sheet.path(f"M0 0H{SIDE}V{y + 60:.1f}H0Z", paint)
    cover = max(p["clouds"] - 0.5, 0) * 2 if p["precipitation"] <= 0.72 else 0.9
    x, top = light.source
    if light.night:
        stars(sheet, place, 1 - 0.85 * cover)
        sheet.soft(x, top, 60, 60, (150, 176, 236), 0.45 * (1 - 0.5 * cover))
        moon(sheet, x, top, p["moon_phase"], mix((246, 244, 226), middle, 0.45 * cover), middle)
    else:
        sheet.soft(x, top, 110, 90, mix((255, 240, 200), (255, 190, 110), p["sky_warmth"]), 0.75 * (1 - 0.6 * cover))
        sheet.ellipse(x, top, 10.5, 10.5, mix((255, 252, 236), middle, 0.5 * cover))
    clouds(sheet, place)


def stars(sheet: Sheet, place: Place, share: float) -> None:
    seeds = place.seeded("star_places")
    for _ in range(round((14 + 46 * place.p["stars"]) * share)):
        x, y, size = SIDE * seeds.random(), (place.horizon - 12) * seeds.random() ** 1.2, seeds.random()
        sheet.ellipse(x, y, 0.55 + 0.75 * size**3, 0.55 + 0.75 * size**3, (236, 240, 255), 0.45 + 0.5 * size)


def moon(sheet: Sheet, x: float, y: float, phase: float, color: Color, behind: Color) -> None:
    """Crescent to full moon."""
    r = 10.0
    sheet.ellipse(x, y, r, r, mix(color, behind, 0.86))
    bulge = r * (2 * (0.25 + 0.75 * phase) - 1)
    sweep = 1 if bulge > 0 else 0
    sheet.path(f"M{x:.2f} {y - r:.2f}a{r} {r} 0 0 1 0 {2 * r}a{abs(bulge):.2f} {r} 0 0 {sweep} 0 {-2 * r}Z", color)
    for dx, dy, size in ((3.4, -3, 2.2), (4.6, 3.2, 1.7), (1.6, 1.2, 1.2)):
        sheet.ellipse(x + dx, y + dy, size, size, mix(color, (120, 120, 130), 0.35), 0.5)


def clouds(sheet: Sheet, place: Place) -> None:
    p, light, seeds = place.p, place.light, place.seeded("cloud_places")
    count = round(9 * p["clouds"])
    for i in range(count):
        x = SIDE * ((i + 0.8 * seeds.random()) / count)
        y = 14 + (0.25 + 0.6 * p["cloud_height"]) * (place.horizon - 50) * (0.3 + seeds.random())
        size = 9 + 13 * seeds.random()
        sheet.soft(x, y + size * 0.45, size * 2.6, size * 0.8, light.cloud_shade, 0.9)
        for _ in range(4):
            px, py = x + size * 2.6 * (seeds.random() - 0.5), y - size * 0.5 * seeds.random()
            r = size * (0.55 + 0.45 * seeds.random())
            sheet.soft(px, py, r * 1.5, r * 1.05, light.cloud, 0.95)


# ---------------------------------------------------------------------------------------------- the land


def ridge_lines(place: Place) -> list[list[Point]]:
    """The skylines of the hills, from the farthest to the nearest."""
    p, seeds = place.p, place.seeded("terrain")
    count = 2 + round(2 * p["ridges"])
    lines = []
    for k in range(count):
        near = k / (count - 1)
        height = (1 - 0.72 * near) * (16 + 52 * p["peaks"])
        waves = [
            (
                (0.010 + 0.009 * i * i) * (1 + 0.5 * near),
                (0.62**i) * (0.45 + 0.75 * p["roughness"] * (i > 1)),
                6.3 * seeds.random(),
            )
            for i in range(5)
        ]
        line = []
        for x in range(0, SIDE + 1, 8):
            lift = sum(size * math.sin(6.3 * speed * x + phase) for speed, size, phase in waves)
            sharp = 1 - abs(math.sin(x * 0.028 * (1 + 0.3 * k) + waves[0][2]))
            value = 0.55 + 0.30 * lift + (0.75 * sharp * p["roughness"] if near < 0.6 else 0)
            line.append((float(x), place.horizon - max(height * value, 1.5 * (1 - near)) + 5 * near))
        lines.append(line)
    return lines


def _rock(place: Place, near: float) -> Color:
    """Rock far away, forest or meadow near by."""
    rock = mix((104, 112, 130), hue(18 + 30 * place.p["rock_hue"], 0.24, 0.44), 0.7)
    green = mix(hue(82 + 60 * place.p["land_hue"], 0.30, 0.32), GRASS[place.season], 0.45)
    return mix(rock, green, near**0.8)


def mountains(sheet: Sheet, place: Place, lines: Sequence[Sequence[Point]]) -> None:
    count, p = len(lines), place.p
    for k, line in enumerate(lines):
        near = k / (count - 1)
        color = place.far(_rock(place, near), 0.95 - 0.75 * near)
        top, foot = min(y for _, y in line), place.horizon + 6
        hazy = mix(color, place.light.skyline, (0.30 + 0.45 * place.haze) * (1 - 0.6 * near))
        d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in line) + f"V{foot + 40:.0f}H0Z"
        sheet.path(d, sheet.linear((0, top), (0, foot), ((0, color, 1), (1, hazy, 1))))
        if near < 0.55:
            _faces(sheet, place, line, color, foot)
            limit = place.horizon - 10 - 50 * p["snow_line"] if place.season != WINTER else place.horizon
            if top < limit:
                snow = place.far((248, 250, 255), 0.75 - 0.6 * near)
                sheet.path(d, sheet.linear((0, top), (0, limit), ((0, snow, 0.95), (0.55, snow, 0.75), (1, snow, 0))))
        elif p["forest"] > 0.35 and near < 1:
            _tree_line(sheet, place, line, color)


def _faces(sheet: Sheet, place: Place, line: Sequence[Point], color: Color, foot: float) -> None:
    """The sides of the peaks that the light does not reach."""
    right = place.p["sun_place"] < 0.5
    for i in range(1, len(line) - 1):
        (x, y), before, after = line[i], line[i - 1], line[i + 1]
        if y < before[1] and y <= after[1] and foot - y > 14:
            run = (foot - y) * 0.55
            way = 1 if right else -1
            edge = [
                (x, y),
                (x + way * run * 0.42, y + (foot - y) * 0.34),
                (x + way * run * 1.1, foot),
                (x + way * run * 0.12, foot),
                (x - way * run * 0.06, y + (foot - y) * 0.5),
            ]
            sheet.path(
                polygon(edge),
                sheet.linear((0, y), (0, foot), ((0, times(color, 0.62), 0.55), (1, times(color, 0.8), 0))),
            )


def _tree_line(sheet: Sheet, place: Place, line: Sequence[Point], color: Color) -> None:
    """A forest on a far hill, as one dark edge."""
    points: list[Point] = []
    for (x0, y0), (x1, y1) in itertools.pairwise(line):
        points += [
            (x0, y0),
            ((x0 * 3 + x1) / 4, y0 - 3.2),
            ((x0 + x1) / 2, (y0 + y1) / 2),
            ((x0 + 3 * x1) / 4, y1 - 2.4),
        ]
    lower = [(x, y + 7) for x, y in reversed(line)]
    sheet.path(polygon([*points, *lower]), times(color, 0.72), 0.85)


def ground(sheet: Sheet, place: Place) -> None:
    p, light = place.p, place.light
    grass = mix(GRASS[place.season], hue(60 + 50 * p["land_hue"], 0.35, 0.42), 0.25 if place.season != WINTER else 0.04)
    edge = [(float(x), place.ground(x)) for x in range(-8, SIDE + 9, 24)]
    far, near = place.far(mix(grass, WHITE, 0.10), 0.45), light.on(times(grass, 0.72))
    d = curve(edge, closed=False) + f"V{SIDE}H-8Z"
    sheet.path(d, sheet.linear((0, place.shore), (0, SIDE), ((0, far, 1), (0.35, light.on(grass), 1), (1, near, 1))))
    seeds = place.seeded("fields")
    if p["fields"] > 0.45 and place.water != "lake":
        for i in range(4):
            y = place.shore + 6 + (i + seeds.random()) * (SIDE - place.shore) * 0.13
            x, wide = SIDE * seeds.random(), 50 + 70 * seeds.random()
            crop = mix(hue(40 + 60 * seeds.random(), 0.5, 0.5), grass, 0.35 if place.season != WINTER else 0.9)
            field = [
                (x - wide, y + 2),
                (x - wide * 0.5, y - 3),
                (x + wide * 0.6, y - 2),
                (x + wide, y + 3),
                (x + wide * 0.5, y + 9),
                (x - wide * 0.8, y + 8),
            ]
            sheet.path(curve(field), place.far(crop, 0.25), 0.75)
    for i in range(3):  # swells of the ground
        y = place.shore + (i + 0.7) ** 1.35 * (SIDE - place.shore) * 0.2
        x = SIDE * seeds.random()
        sheet.soft(x, y, 90, 9 + 3 * i, light.on(mix(grass, WHITE, 0.4)), 0.28)
        sheet.soft(SIDE - x, y + 8, 90, 8 + 3 * i, light.on(times(grass, 0.45)), 0.30)
    if p["flowers"] > 0.4 and place.season in (SPRING, SUMMER):
        spots = place.seeded("flowers")
        for _ in range(round(44 * p["flowers"])):
            y = SIDE - (SIDE - place.shore - 12) * spots.random() ** 1.4
            r = 1.5 * place.scale(y)
            petal = light.on(ramp(((250, 226, 80), (246, 246, 240), (226, 92, 120), (150, 110, 210)), spots.random()))
            sheet.ellipse(SIDE * spots.random(), y, r, r * 0.8, petal, 0.9)


def road(sheet: Sheet, place: Place) -> None:
    if place.p["road"] < 0.35:
        return
    way = _road_middle(place)
    half = [place.scale(y) * 17 + 0.4 for _, y in way]
    left = [(x - w, y) for (x, y), w in zip(way, half, strict=True)]
    right = [(x + w, y) for (x, y), w in zip(way, half, strict=True)]
    earth = mix((196, 178, 146), (150, 150, 152), 1 if place.p["road"] > 0.7 else 0)
    earth = mix(earth, (226, 230, 238), 0.45 if place.season == WINTER else 0)
    far, near = place.far(earth, 0.4), place.light.on(times(earth, 0.82))
    paint = sheet.linear((0, place.shore), (0, SIDE), ((0, far, 1), (1, near, 1)))
    sheet.path(curve([*left, *reversed(right)]), paint)
    edge = place.light.on(times(earth, 0.6))
    for side in (left, right):
        sheet.line(curve(side, closed=False), edge, 1.1, 0.35)
    if place.p["road"] > 0.7:
        for (x0, y0), (x1, y1) in zip(way[::2], way[1::2], strict=False):
            sheet.line(
                f"M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}", place.light.on((240, 236, 220)), 1.6 * place.scale(y0), 0.8
            )


def _road_middle(place: Place) -> list[Point]:
    """From far to near."""
    start, bend = 60 + 136 * place.p["road_bend"], 2 * place.p["road"] % 1
    points = []
    for i in range(9):
        t = i / 8
        y = place.shore + 5 + (SIDE + 12 - place.shore) * t**1.35
        points.append(
            (
                start
                + (70 * bend - 35 + 56 * (0.5 - place.p["road_bend"])) * t
                + 26 * math.sin(5.2 * t + 6 * bend) * (0.2 + 0.8 * t),
                y,
            )
        )
    return points


# ---------------------------------------------------------------------------------------------- the water


def lake(sheet: Sheet, place: Place, lines: Sequence[Sequence[Point]]) -> None:
    """From the hills' foot to the near shore, with what it mirrors."""
    light, p, top, low = place.light, place.p, place.horizon + 4, place.shore + 8
    blue = light.on(hue(186 + 30 * p["water_hue"], 0.42, 0.46))
    mirror = mix(light.skyline, blue, 0.35)
    deep = mix(mix(light.zenith, blue, 0.5), BLACK, 0.10)
    d = f"M0 {top:.1f}H{SIDE}V{low:.1f}H0Z"
    sheet.path(d, sheet.linear((0, top), (0, low), ((0, mirror, 1), (1, deep, 1))))
    with sheet.clipped(d):
        count = len(lines)
        for k, line in enumerate(lines):
            color = mix(place.far(_rock(place, k / (count - 1)), 0.95 - 0.75 * k / (count - 1)), deep, 0.4)
            flipped = [(x, top + 0.75 * (top - y)) for x, y in line]
            sheet.path("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in flipped) + f"V{top:.1f}H0Z", color, 0.5)
        x = light.source[0]
        shine = (255, 244, 214) if not light.night else (206, 220, 250)
        seeds = place.seeded("ripples")
        for i in range(9):
            y = top + 2 + (low - top) * (i / 9) ** 1.1
            wide = (3 + 9 * seeds.random()) * (0.6 + 0.9 * i / 9)
            sheet.ellipse(x + 5 * (seeds.random() - 0.5), y, wide, 0.7 + 0.07 * i, shine, 0.5)
        for _ in range(round(8 + 12 * p["ripples"])):
            y = top + (low - top) * seeds.random()
            wide = 6 + 24 * seeds.random() * (y - top) / (low - top)
            sheet.ellipse(SIDE * seeds.random(), y, wide, 0.55, mix(mirror, WHITE, 0.3), 0.28)
    bank = place.light.on(times(GRASS[place.season], 0.5))
    sheet.path(f"M0 {top - 1:.1f}H{SIDE}v1.8H0Z", bank, 0.55)
    if p["boat"] > 0.55:
        boat(sheet, place, top, low)


def boat(sheet: Sheet, place: Place, top: float, low: float) -> None:
    x, t = 30 + 196 * ((place.p["boat"] - 0.55) / 0.45), 0.35 + 0.3 * place.p["ripples"]
    y = top + (low - top) * t
    s = 0.5 + 0.9 * place.scale(y)
    sail, hull = place.light.on((250, 246, 236)), place.light.on((128, 64, 44))
    sheet.path(f"M{x - 9 * s:.1f} {y:.1f}h{18 * s:.1f}l{-3 * s:.1f} {4 * s:.1f}h{-12 * s:.1f}Z", hull)
    sheet.path(f"M{x:.1f} {y - s:.1f}v{-19 * s:.1f}q{10 * s:.1f} {10 * s:.1f} {9 * s:.1f} {18 * s:.1f}Z", sail)
    sheet.path(f"M{x - s:.1f} {y - s:.1f}v{-15 * s:.1f}l{-7 * s:.1f} {14 * s:.1f}Z", times(sail, 0.86))
    sheet.ellipse(x, y + 6 * s, 9 * s, 2.4 * s, mix(sail, hull, 0.5), 0.25)
    if place.light.night:
        sheet.soft(x - 6 * s, y - 2 * s, 9 * s, 9 * s, GLOW, 0.6)
        sheet.ellipse(x - 6 * s, y - 2 * s, 1.1 * s, 1.1 * s, (255, 236, 190))


def _river_edges(place: Place) -> tuple[list[Point], list[Point]]:
    """Left and right bank, from far to near."""
    p = place.p
    side = -1 if p["road_bend"] > 0.5 else 1
    start = 128 + side * (20 + 50 * p["water_level"])
    left, right = [], []
    for i in range(9):
        t = i / 8
        y = place.shore + 3 + (SIDE + 16 - place.shore) * t**1.5
        middle = start + side * 46 * t + (8 + 26 * t) * math.sin(4.6 * t + 6 * p["water_hue"])
        wide = 2 + 34 * t * (0.6 + 0.5 * p["ripples"])
        left.append((middle - wide, y))
        right.append((middle + wide, y))
    return left, right


def river(sheet: Sheet, place: Place) -> None:
    """A stream that winds towards the viewer."""
    light, p = place.light, place.p
    left, right = _river_edges(place)
    blue = light.on(hue(190 + 24 * p["water_hue"], 0.40, 0.48))
    d = curve([*left, *reversed(right)])
    sheet.line(d, light.on(mix((150, 132, 96), GRASS[place.season], 0.45)), 3.0, 0.7)
    sheet.path(
        d,
        sheet.linear(
            (0, place.shore), (0, SIDE), ((0, mix(light.skyline, blue, 0.25), 1), (1, mix(light.zenith, blue, 0.5), 1))
        ),
    )
    with sheet.clipped(d):
        seeds = place.seeded("ripples")
        for i in range(12):
            t = (i + 0.5) / 12
            k = min(int(t * 8), 7)
            x = left[k][0] + (right[k][0] - left[k][0]) * seeds.random()
            sheet.ellipse(
                x,
                place.shore + 4 + (SIDE - place.shore) * t**1.4,
                3 + 12 * t,
                0.5 + 0.5 * t,
                mix(light.skyline, WHITE, 0.3),
                0.4,
            )


# ---------------------------------------------------------------------------------------------- what stands on the land


def _strips(place: Place) -> list[list[tuple[float, float, float]]]:
    """River and road, where nothing is built and nothing grows: (y, left, right) from far to near."""
    strips = []
    if place.water == "river":
        left, right = _river_edges(place)
        strips.append([(y, x0, x1) for (x0, y), (x1, _) in zip(left, right, strict=True)])
    if place.p["road"] >= 0.35:
        strips.append([(y, x - 17 * place.scale(y), x + 17 * place.scale(y)) for x, y in _road_middle(place)])
    return strips


def _is_free(strips: Sequence[Sequence[tuple[float, float, float]]], x: float, y: float, half_width: float) -> bool:
    """Whether a thing at (x, y) leaves river and road alone."""
    for strip in strips:
        _, left, right = min(strip, key=lambda cut: abs(cut[0] - y))
        if left - half_width < x < right + half_width:
            return False
    return True


def standing(sheet: Sheet, place: Place) -> list[tuple[float, Callable[[], None]]]:
    """(height in the image, how to draw it) of everything that stands on the near ground."""
    p = place.p
    things: list[tuple[float, Callable[[], None]]] = []
    taken: list[tuple[float, float, float]] = []
    strips = _strips(place)
    seeds = place.seeded("house_places")
    for i in range(round(4.4 * max(p["houses"] - 0.12, 0))):
        x, y = 26 + 204 * seeds.random(), place.shore + 9 + (6 + 44 * seeds.random()) * (SIDE - place.shore) / 120
        size, color, trim = place.scale(y) * (1.05 + 0.5 * p["house_size"]), seeds.random(), seeds.random()
        lit = [seeds.random() < 0.25 + 0.75 * p["lit_windows"] for _ in range(6)]
        apart = all(abs(x - other) > 34 * (size + s) for other, _, s in taken)
        if apart and _is_free(strips, x, y, 27 * size):
            taken.append((x, y, size))
            things.append((y, functools.partial(house, sheet, place, x, y, size, (color, trim), lit, i)))  # fmt: skip
    if p["tower"] > 0.72:
        kind = (p["tower"] - 0.72) / 0.28
        x, y = 36 + 184 * ((7.7 * kind) % 1), place.shore + 7
        taken.append((x, y, place.scale(y)))
        things.append((y, functools.partial(tower, sheet, place, x, y, kind > 0.5)))
    seeds = place.seeded("tree_places")
    for _ in range(round(17 * p["trees"])):
        x, y = -4 + 264 * seeds.random(), place.shore + 5 + (SIDE - place.shore) * 0.66 * seeds.random() ** 1.5
        size, shape, tone = (
            place.scale(y) * (0.6 + 0.5 * p["tree_size"] + 0.4 * seeds.random()),
            seeds.random(),
            seeds.random(),
        )
        kind = shape + 2 * p["tree_kind"] - 1.5 > 0
        hides = any(abs(x - hx) < 24 * hs + 12 * size and -2 < y - hy < 46 * size for hx, hy, hs in taken)
        if not hides and _is_free(strips, x, y, 5 * size):
            things.append((y, functools.partial(conifer if kind else broadleaf, sheet, place, x, y, size, tone)))
    if p["lamps"] > 0.4 and p["road"] >= 0.35:
        for i, (x, y) in enumerate(_road_middle(place)[2:8]):
            s = place.scale(y)
            lamp_x = x + (20 * s + 2) * (1 if i % 2 else -1)
            if place.water != "river" or _is_free(strips[:1], lamp_x, y, 2 * s):
                things.append((y, functools.partial(lamp, sheet, place, lamp_x, y, s)))
    if p["fence"] > 0.6:
        things.append(
            (SIDE - 30 * p["fence"], functools.partial(fence, sheet, place, SIDE - 4 - 26 * (p["fence"] - 0.6)))
        )
    return things


def shadow(sheet: Sheet, place: Place, x: float, y: float, wide: float) -> None:
    """What a thing that stands at (x, y) casts, away from the sun or moon."""
    lean = (x - place.light.source[0]) / SIDE
    sheet.soft(x + wide * 0.7 * lean, y + wide * 0.06, wide * (1 + 0.5 * abs(lean)), wide * 0.22, (8, 14, 24), 0.5)


def house(
    sheet: Sheet,
    place: Place,
    x: float,
    y: float,
    s: float,
    looks: tuple[float, float],
    lit: Sequence[bool],
    number: int,
) -> None:
    p, light = place.p, place.light
    wall = light.on(WALLS[int((p["wall_color"] + 0.35 * looks[0]) * 5.99) % 6])
    roof = light.on(
        mix(
            ROOFS[int((p["roof_color"] + 0.25 * looks[1]) * 4.99) % 5],
            (244, 248, 255),
            0.8 if place.season == WINTER else 0,
        )
    )
    w, h, gable = 25 * s, 21 * s, 15 * s
    side = 1 if place.p["sun_place"] > 0.5 else -1
    shadow(sheet, place, x, y, w * 1.7)
    left, right, top = x - w, x + w, y - h
    bright, dim = (wall, times(wall, 0.72)) if side < 0 else (times(wall, 0.80), wall)
    front = x - w * 0.25  # where the gable wall ends and the long wall begins
    tip = (left + front) / 2
    sheet.path(polygon([(left, y), (left, top), (tip, top - gable), (front, top), (front, y)]), bright)
    sheet.path(polygon([(front, y), (front, top), (right, top), (right, y)]), dim)
    sheet.path(
        polygon(
            [
                (tip - s, top - gable - s),
                (right - (front - tip) * 0.6, top - gable - s),
                (right + 2 * s, top + s),
                (front + s, top + s),
            ]
        ),
        sheet.linear((0, top - gable), (0, top), ((0, mix(roof, WHITE, 0.08), 1), (1, times(roof, 0.8), 1))),
    )
    sheet.line(
        f"M{left - 2 * s:.2f} {top + 2 * s:.2f}L{tip:.2f} {top - gable - s * 0.5:.2f}L{front + s:.2f} {top + s:.2f}",
        times(roof, 0.7),
        1.8 * s,
    )
    chimney = right - w * 0.55
    sheet.path(
        polygon(
            [
                (chimney, top - gable * 0.55),
                (chimney, top - gable * 1.45),
                (chimney + 4 * s, top - gable * 1.45),
                (chimney + 4 * s, top - gable * 0.55),
            ]
        ),
        light.on((140, 84, 70)),
    )
    if number % 2 == 0:
        for i in range(3):
            sheet.soft(
                chimney + 2 * s + 3 * s * i,
                top - gable * 1.5 - 5 * s * i,
                (3 + 2 * i) * s,
                (3 + 1.6 * i) * s,
                light.cloud,
                0.5,
            )
    spots = [
        (tip - 3 * s, top + 4 * s),
        (front + 5 * s, top + 6 * s),
        (front + 16 * s, top + 6 * s),
        (front + 27 * s, top + 6 * s),
        (tip - 2 * s, top - 7 * s),
    ]
    for i, (wx, wy) in enumerate(spots):
        if wx + 5 * s < right:
            window(sheet, place, wx, wy, (4 if i == 4 else 6) * s, (4.5 if i == 4 else 7) * s, lit[i])
    sheet.path(
        polygon([(tip - 2.6 * s, y), (tip - 2.6 * s, y - 8.5 * s), (tip + 2.6 * s, y - 8.5 * s), (tip + 2.6 * s, y)]),
        light.on((96, 60, 42)),
    )


def window(sheet: Sheet, place: Place, x: float, y: float, w: float, h: float, lit: bool) -> None:
    frame = place.light.on((244, 240, 232))
    sheet.path(f"M{x - 0.12 * w:.2f} {y - 0.12 * w:.2f}h{1.24 * w:.2f}v{h + 0.24 * w:.2f}h{-1.24 * w:.2f}Z", frame)
    glass = place.light.on((96, 122, 148))
    if place.light.night and lit:
        sheet.path(f"M{x:.2f} {y:.2f}h{w:.2f}v{h:.2f}h{-w:.2f}Z", mix(GLOW, (255, 240, 190), 0.35))
        sheet.soft(x + w / 2, y + h / 2, w * 2.1, h * 1.9, GLOW, 0.55)
    else:
        sheet.path(f"M{x:.2f} {y:.2f}h{w:.2f}v{h:.2f}h{-w:.2f}Z", glass)
    sheet.line(f"M{x + w / 2:.2f} {y:.2f}v{h:.2f}", frame, 0.11 * w)


def tower(sheet: Sheet, place: Place, x: float, y: float, church: bool) -> None:
    """A church or a windmill on the skyline."""
    light, s = place.light, 0.55 + 0.9 * place.scale(y)
    wall = place.far((232, 224, 208), 0.2)
    roof = place.far((92, 76, 84) if church else (150, 84, 60), 0.2)
    shadow(sheet, place, x, y, 12 * s)
    if church:
        sheet.path(polygon([(x, y), (x, y - 13 * s), (x + 20 * s, y - 13 * s), (x + 20 * s, y)]), times(wall, 0.85))
        sheet.path(
            polygon([(x, y - 13 * s), (x + 4 * s, y - 20 * s), (x + 18 * s, y - 20 * s), (x + 22 * s, y - 13 * s)]),
            times(roof, 0.9),
        )
        sheet.path(polygon([(x - 5 * s, y), (x - 5 * s, y - 26 * s), (x + 5 * s, y - 26 * s), (x + 5 * s, y)]), wall)
        sheet.path(polygon([(x - 6 * s, y - 26 * s), (x, y - 46 * s), (x + 6 * s, y - 26 * s)]), roof)
        for wx, wy in ((-1.5, -22), (8, -9), (14, -9)):
            window(sheet, place, x + wx * s, y + wy * s, 2.6 * s, 4.6 * s, True)
        return
    sheet.path(
        polygon([(x - 7 * s, y), (x - 4.5 * s, y - 26 * s), (x + 4.5 * s, y - 26 * s), (x + 7 * s, y)]),
        sheet.linear((x - 7 * s, 0), (x + 7 * s, 0), ((0, wall, 1), (1, times(wall, 0.7), 1))),
    )
    sheet.path(curve([(x - 5.4 * s, y - 26 * s), (x, y - 33 * s), (x + 5.4 * s, y - 26 * s)]), roof)
    turn = 90 * place.p["terrain"]
    for i in range(4):
        angle = math.radians(turn + 90 * i)
        dx, dy = math.cos(angle), math.sin(angle)
        hub = (x, y - 27 * s)
        sheet.line(
            f"M{hub[0]:.1f} {hub[1]:.1f}l{20 * s * dx:.1f} {20 * s * dy:.1f}", place.far((84, 62, 48), 0.1), 1.0 * s
        )
        blade = [
            (hub[0] + s * (5 * dx), hub[1] + s * (5 * dy)),
            (hub[0] + s * 20 * dx, hub[1] + s * 20 * dy),
            (hub[0] + s * (20 * dx - 4 * dy), hub[1] + s * (20 * dy + 4 * dx)),
            (hub[0] + s * (5 * dx - 4 * dy), hub[1] + s * (5 * dy + 4 * dx)),
        ]
        sheet.path(polygon(blade), light.on((240, 232, 214)), 0.85)
    window(sheet, place, x - 1.3 * s, y - 17 * s, 2.6 * s, 4 * s, True)


def conifer(sheet: Sheet, place: Place, x: float, y: float, s: float, tone: float) -> None:
    far = max(0.0, 0.55 - s)
    green = mix((34, 84, 58), (60, 104, 56), tone)
    color = place.far(mix(green, (236, 242, 250), 0.45 if place.season == WINTER else 0), far)
    shadow(sheet, place, x, y, 13 * s)
    sheet.path(f"M{x - 1.6 * s:.2f} {y:.2f}v{-9 * s:.2f}h{3.2 * s:.2f}v{9 * s:.2f}Z", place.far((84, 58, 42), far))
    lit = -1 if place.light.source[0] < x else 1
    for i in range(4):
        wide, low = (13 - 2.6 * i) * s, y - (5 + 10.5 * i) * s
        tier = [
            (x - wide, low),
            (x - wide * 0.42, low - 8 * s),
            (x, low - 17 * s),
            (x + wide * 0.42, low - 8 * s),
            (x + wide, low),
            (x, low + 2.2 * s),
        ]
        shade = times(color, 0.78 + 0.07 * i)
        a, b = (x + lit * wide, low), (x - lit * wide, low)
        sheet.path(
            polygon(tier),
            sheet.linear(
                a, b, ((0, mix(shade, place.light.on(WHITE), 0.16), 1), (0.55, shade, 1), (1, times(shade, 0.66), 1))
            ),
        )


def broadleaf(sheet: Sheet, place: Place, x: float, y: float, s: float, tone: float) -> None:
    far = max(0.0, 0.55 - s)
    leaf = ramp(LEAVES[place.season], tone)
    color, bark = place.far(leaf, far), place.far((92, 66, 48), far)
    shadow(sheet, place, x, y, 18 * s)
    sheet.path(
        polygon([(x - 2.6 * s, y), (x - 1.5 * s, y - 26 * s), (x + 1.5 * s, y - 26 * s), (x + 2.6 * s, y)]), bark
    )
    if place.season == WINTER:
        for dx, dy, wide in ((-13, -22, 1.5), (12, -24, 1.5), (-6, -31, 1.3), (7, -32, 1.3), (0.5, -34, 1.4)):
            sheet.line(
                f"M{x:.1f} {y - 17 * s:.1f}q{dx * 0.3 * s:.1f} {dy * 0.45 * s:.1f} {dx * s:.1f} {dy * s:.1f}",
                bark,
                wide * s,
            )
        sheet.soft(x, y - 38 * s, 20 * s, 18 * s, color, 0.40)
        return
    lit = -1 if place.light.source[0] < x else 1
    crown = [(-9, -28, 10.5), (9, -29, 10.5), (0, -38, 12), (-5, -45, 8.5), (6, -44, 8), (0, -28, 10)]
    for dx, dy, r in crown:
        sheet.ellipse(x + (dx - 0.8 * lit) * s, y + (dy + 1.6) * s, r * s, r * 0.92 * s, times(color, 0.66))
    for dx, dy, r in crown[:5]:
        sheet.ellipse(x + (dx + 1.2 * lit) * s, y + (dy - 1.0) * s, r * 0.86 * s, r * 0.78 * s, color)
    sheet.soft(x + 6 * lit * s, y - 41 * s, 12 * s, 11 * s, mix(color, place.light.on(WHITE), 0.55), 0.7)


def lamp(sheet: Sheet, place: Place, x: float, y: float, s: float) -> None:
    pole = place.light.on((58, 60, 66))
    if place.light.night:
        sheet.soft(x, y, 24 * s, 8 * s, GLOW, 0.62)
    sheet.line(f"M{x:.2f} {y:.2f}v{-35 * s:.2f}", pole, 1.5 * s)
    sheet.path(
        polygon(
            [(x - 2.6 * s, y - 40 * s), (x + 2.6 * s, y - 40 * s), (x + 1.6 * s, y - 34 * s), (x - 1.6 * s, y - 34 * s)]
        ),
        (255, 240, 196) if place.light.night else place.light.on((214, 224, 226)),
    )
    sheet.path(polygon([(x - 3.6 * s, y - 40 * s), (x, y - 43.5 * s), (x + 3.6 * s, y - 40 * s)]), pole)
    if place.light.night:
        sheet.soft(x, y - 37 * s, 17 * s, 17 * s, GLOW, 0.85)


def fence(sheet: Sheet, place: Place, y: float) -> None:
    """Along the lower edge, in front of everything."""
    wood = place.light.on(mix((168, 132, 96), (236, 236, 232), 1 if place.p["fence"] > 0.8 else 0))
    for rail in (-15, -8):
        sheet.line(f"M-4 {y + rail + 2:.1f}Q128 {y + rail - 3:.1f} 260 {y + rail + 2:.1f}", times(wood, 0.8), 2.6)
    for i in range(9):
        x = i * 32 - 2 + 6 * place.p["terrain"]
        sheet.path(
            polygon([(x - 2.4, y + 3), (x - 2.4, y - 19), (x, y - 22), (x + 2.4, y - 19), (x + 2.4, y + 3)]), wood
        )
        sheet.path(
            polygon([(x + 0.8, y + 3), (x + 0.8, y - 20), (x + 2.4, y - 19), (x + 2.4, y + 3)]), times(wood, 0.7)
        )


# ---------------------------------------------------------------------------------------------- the weather


def weather(sheet: Sheet, place: Place) -> None:
    """Mist over everything, rain or snow in front of it."""
    p, light = place.p, place.light
    if place.haze > 0.2:
        low = place.horizon + 40
        paint = sheet.linear(
            (0, place.horizon - 50),
            (0, low),
            ((0, light.skyline, 0), (0.55, light.skyline, 0.55 * place.haze), (1, light.skyline, 0)),
        )
        sheet.path(f"M0 {place.horizon - 50:.0f}H{SIDE}V{low:.0f}H0Z", paint)
    if p["precipitation"] <= 0.72:
        return
    heavy = (p["precipitation"] - 0.72) / 0.28
    seeds = place.seeded("precipitation")
    drops = round(40 + 60 * heavy)
    if place.season == WINTER:
        flake = mix(WHITE, light.skyline, 0.3 if light.night else 0.0)
        for _ in range(drops):
            r = 0.7 + 1.3 * seeds.random()
            sheet.ellipse(SIDE * seeds.random(), SIDE * seeds.random(), r, r, flake, 0.85)
    else:
        streaks = "".join(
            f"M{(SIDE + 20) * seeds.random():.0f} {SIDE * seeds.random():.0f}l-4 {9 + 8 * seeds.random():.0f}"
            for _ in range(drops)
        )
        sheet.line(streaks, mix((226, 234, 244), light.skyline, 0.4 if light.night else 0.0), 0.8, 0.5)
