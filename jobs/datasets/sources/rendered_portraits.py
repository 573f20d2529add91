"""Portraits from parameters: who somebody is, apart from the sex, and how the image was taken.

A person is a number in [0, 1] for each of NAMES. `sex_linked` is the one place where the sex enters: whatever is not
in its result is the same in both images of a person. Lengths are in units of the sheet (256 x 256); the head has its
own coordinates, whose origin lies between the eyes: x to the right, y down, z towards the viewer.
"""

import dataclasses
import math
import random
from collections.abc import Mapping, Sequence

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
    ramp,
    times,
    turned,
)

DOMAINS = ("female", "male")
NAMES = (
    # the head
    "face_width", "face_length", "jaw_width", "chin_shape", "cheeks", "skin_tone", "skin_warmth", "ear_size",
    "freckles", "mole", "age",
    # eyes and brows
    "eye_size", "eye_spacing", "eye_tilt", "eye_openness", "eye_color", "brow_thickness", "brow_arch", "brow_height",
    # nose and mouth
    "nose_length", "nose_width", "nose_bridge", "mouth_width", "lip_fullness", "lip_bow",
    # hair
    "hair_style", "hair_lightness", "hair_redness", "hair_volume", "hair_parting", "hair_length", "hairline",
    # what shows, or shows more, in one sex
    "beard_growth", "beard_style", "balding", "makeup",
    # the moment
    "turn", "nod", "tilt", "smile", "mouth_open", "gaze", "distance", "shift",
    # the light and the place
    "light_side", "light_warmth", "background_kind", "background_hue", "background_lightness", "background_detail",
    # what is worn
    "glasses", "glasses_color", "earrings", "hat", "hat_hue", "clothes", "clothes_hue", "clothes_lightness",
)  # fmt: skip
"""Names of the parameters, each in [0, 1]."""
OF_THE_MOMENT = NAMES[NAMES.index("turn") :]
"""Those that say nothing of the person."""

CENTER: Point = (SIDE / 2, 120.0)
"""Where the point between the eyes comes to lie, but for `shift`."""
NECK: Point = (SIDE / 2, 206.0)
"""What the head tilts about."""
EYE_Y, EAR_Y = 0.0, 12.0
GOLDEN = 0.618034

SKIN = ((253, 229, 212), (246, 207, 176), (226, 172, 131), (186, 125, 84), (138, 86, 55), (88, 52, 34))
HAIR = ((22, 17, 17), (52, 33, 26), (96, 62, 38), (142, 98, 58), (196, 152, 92), (228, 196, 138))
IRIS = ((62, 36, 22), (92, 56, 28), (128, 96, 44), (88, 116, 72), (72, 116, 156), (128, 146, 158))
STYLES = ("side", "middle", "fringe", "back", "wavy", "curly", "afro", "bun")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SexLinked:
    """Every trait that depends on the sex."""

    jaw: float
    """Half the width of the jaw, as a share of the face's."""
    chin: float
    """Half the width of the chin, as a share of the face's."""
    chin_drop: float
    brow_thickness: float
    brow_drop: float
    brow_arch: float
    eye_scale: float
    lashes: float
    lip_fullness: float
    lip_paint: float
    eye_paint: float
    blush: float
    nose_width: float
    neck: float
    shoulders: float
    slope: float
    """How far the shoulders fall."""
    throat: float
    """How far the Adam's apple shows."""
    stubble: float
    beard: float
    """How dense the beard is, 0: shaved."""
    hair_length: float
    """0: cropped; 0.3: over the ears; 0.6: to the chin; 1: over the shoulders."""
    balding: float


def sex_linked(p: Mapping[str, float], domain: int) -> SexLinked:
    """What the sex (0: female, 1: male) makes of a person's own traits."""
    male = float(domain)
    female = 1 - male
    grown = max(p["beard_growth"] - 0.35, 0) / 0.65
    return SexLinked(
        jaw=0.70 + 0.11 * p["jaw_width"] + 0.085 * male,
        chin=0.26 + 0.12 * p["chin_shape"] + 0.10 * male,
        chin_drop=3.5 * male,
        brow_thickness=1.9 + 1.9 * p["brow_thickness"] + male * (1.3 + 0.8 * p["brow_thickness"]),
        brow_drop=2.6 * male,
        brow_arch=(1.5 + 5.0 * p["brow_arch"]) * (1 - 0.55 * male),
        eye_scale=1 - 0.10 * male,
        lashes=0.25 + female * (0.45 + 0.3 * p["makeup"]),
        lip_fullness=(3.4 + 3.2 * p["lip_fullness"]) * (1 - 0.27 * male),
        lip_paint=female * (0.15 + 0.75 * max(p["makeup"] - 0.25, 0)),
        eye_paint=female * max(p["makeup"] - 0.4, 0) * 0.8,
        blush=female * (0.12 + 0.2 * p["makeup"]),
        nose_width=1 + 0.10 * male,
        neck=24.0 + 9.0 * male,
        shoulders=86.0 + 16.0 * male,
        slope=8.0 * female,
        throat=male,
        stubble=male * (0.10 + 0.32 * p["beard_growth"]),
        beard=male * grown,
        hair_length=0.42 + 0.58 * p["hair_length"] if not domain else 0.02 + 0.26 * p["hair_length"],
        balding=male * max(p["balding"] - 0.55, 0) / 0.45 * (0.35 + 0.65 * p["age"]),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """The geometry and the colours that several parts of the drawing share."""

    p: Mapping[str, float]
    sex: SexLinked
    half_width: float
    chin_y: float
    brow_y: float
    eye_x: float
    nose_y: float
    mouth_y: float
    mouth_x: float
    hairline_y: float
    sin: float
    nod: float
    scale: float
    origin: Point
    tilt: float
    light: float
    """-1: from the left, 1: from the right."""
    skin: Color
    shade: Color
    glow: Color
    hair: Color
    style: str

    def at(self, x: float, y: float, z: float = 0.0) -> Point:
        """Where a point of the head comes to lie on the sheet, before the tilt."""
        turned_x = x * math.sqrt(1 - self.sin**2) + z * self.sin
        return self.origin[0] + self.scale * turned_x, self.origin[1] + self.scale * (y + z * self.nod)

    def on(self, x: float, y: float, bump: float = 0.0) -> Point:
        """The same for a point on the front of the face, `bump` above the ellipsoid that the face is."""
        return self.at(x, y, 0.85 * self.half_width * math.sqrt(max(1 - (x / self.half_width) ** 2, 0.0)) + bump)

    def through(self, points: Sequence[Point], *, closed: bool = True, bump: float = 0.0) -> str:
        """The smooth path through points on the front of the face."""
        return curve([self.on(x, y, bump) for x, y in points], closed=closed)


def head_of(p: Mapping[str, float], domain: int) -> Head:
    sex = sex_linked(p, domain)
    skin = ramp(SKIN, p["skin_tone"])
    skin = mix(skin, times(skin, (1.04, 0.98, 0.88)) if p["skin_warmth"] > 0.5 else times(skin, (1.02, 0.95, 0.96)),
               abs(p["skin_warmth"] - 0.5) * 2)  # fmt: skip
    hair = ramp(HAIR, p["hair_lightness"] * (1 - 0.45 * p["skin_tone"]))
    redness = max(p["hair_redness"] - 0.6, 0) / 0.4 * (1 - 0.6 * p["skin_tone"])
    hair = mix(hair, times((176, 74, 34), 0.55 + 0.6 * p["hair_lightness"]), 0.75 * redness)
    hair = mix(hair, (186, 183, 180), max(p["age"] - 0.55, 0) / 0.45 * 0.9)
    chin_y = 80.0 + 12.0 * p["face_length"] + sex.chin_drop
    own_chin_y = chin_y - sex.chin_drop
    warmth = p["light_warmth"]
    return Head(
        p=p,
        sex=sex,
        half_width=49.0 + 9.0 * p["face_width"],
        chin_y=chin_y,
        brow_y=-17.0 - 5.0 * p["brow_height"] + sex.brow_drop,
        eye_x=22.0 + 5.0 * p["eye_spacing"],
        nose_y=28.0 + 9.0 * p["nose_length"],
        mouth_y=own_chin_y * 0.42 + (28.0 + 9.0 * p["nose_length"]) * 0.58 - 1.0,
        mouth_x=(15.0 + 6.0 * p["mouth_width"]) * (1 + 0.18 * p["smile"]),
        hairline_y=-44.0 - 11.0 * p["hairline"],
        sin=0.26 * (2 * p["turn"] - 1),
        nod=0.10 * (2 * p["nod"] - 1),
        scale=1.22 - 0.17 * p["distance"],
        origin=(CENTER[0] + 10 * (p["shift"] - 0.5), CENTER[1] - 6 * (p["distance"] - 0.5)),
        tilt=14 * (p["tilt"] - 0.5),
        light=2 * p["light_side"] - 1,
        skin=skin,
        shade=times(mix(skin, (146, 60, 48), 0.22), 0.66),
        glow=mix(mix(skin, WHITE, 0.55), (255, 214, 160) if warmth > 0.5 else (214, 228, 255), 0.25),
        hair=hair,
        style=STYLES[min(int(p["hair_style"] * len(STYLES)), len(STYLES) - 1)],
    )


def landmarks(p: Mapping[str, float], domain: int) -> list[float]:
    """x0 y0 x1 y1 ... of left eye, right eye, nose tip, left and right corner of the mouth, as shares of the side.

    Left is the viewer's left, as in CelebA.
    """
    h = head_of(p, domain)
    corner_y = _corner_y(h)
    points = [
        h.on(-h.eye_x, EYE_Y),
        h.on(h.eye_x, EYE_Y),
        h.on(0, h.nose_y - 5, 9),
        h.on(-h.mouth_x, corner_y),
        h.on(h.mouth_x, corner_y),
    ]
    return [value / SIDE for point in points for value in turned(point, h.tilt, NECK)]


def portrait(p: Mapping[str, float], domain: int) -> Sheet:
    """The image of a person as DOMAINS[domain]."""
    h, sheet = head_of(p, domain), Sheet()
    background(sheet, p)
    with sheet.rotated(h.tilt, *NECK):
        back_hair(sheet, h)
    body(sheet, h)
    with sheet.rotated(h.tilt, *NECK):
        ears(sheet, h)
        face(sheet, h)
        nose(sheet, h)
        mouth(sheet, h)
        eyes(sheet, h)
        wrinkles(sheet, h)
        earrings(sheet, h)
        front_hair(sheet, h)
        brows(sheet, h)
        glasses(sheet, h)
        hat(sheet, h)
    light(sheet, h)
    return sheet


# ---------------------------------------------------------------------------------------------- surroundings


def background(sheet: Sheet, p: Mapping[str, float]) -> None:
    """One of five places, out of focus."""
    base = hue(360 * p["background_hue"], 0.16 + 0.2 * p["background_detail"], 0.22 + 0.56 * p["background_lightness"])
    dark, pale = times(base, 0.55), mix(base, WHITE, 0.35)
    left = p["light_side"] < 0.5
    focus = (70.0 if left else 186.0, 80.0)
    sheet.path(f"M0 0H{SIDE}V{SIDE}H0Z", sheet.radial(focus, 230, ((0, pale, 1), (0.45, base, 1), (1, dark, 1))))
    seeds = random.Random(round(100 * p["background_detail"]) + 101 * round(100 * p["background_hue"]))
    kind = min(int(p["background_kind"] * 5), 4)
    if kind == 1:
        for _ in range(14):
            x, y, r = SIDE * seeds.random(), 190 * seeds.random(), 9 + 20 * seeds.random()
            tone = mix(pale, hue(360 * seeds.random(), 0.6, 0.7), 0.45)
            sheet.ellipse(x, y, r, r, sheet.radial((x, y), r, ((0, tone, 0.16), (0.86, tone, 0.3), (1, tone, 0))))
    elif kind == 2:
        horizon = 120 + 40 * seeds.random()
        sky = mix((196, 220, 240), pale, 0.35)
        sheet.path(
            f"M0 0H{SIDE}V{horizon + 30:.0f}H0Z", sheet.linear((0, 0), (0, horizon + 30), ((0, sky, 1), (1, sky, 0)))
        )
        for _ in range(11):
            x, r = SIDE * seeds.random(), 26 + 34 * seeds.random()
            green = hue(70 + 70 * seeds.random(), 0.32, 0.2 + 0.3 * p["background_lightness"] * seeds.random())
            sheet.soft(x, horizon + 10 + 24 * seeds.random(), r * 1.3, r, green, 0.85)
    elif kind == 3:
        for i in range(9):
            sheet.path(f"M{i * 32 - 8} 0h15v{SIDE}h-15Z", dark, 0.10)
        x = 4 + 16 * seeds.random() if not left else 172 + 16 * seeds.random()
        inner = hue(360 * seeds.random(), 0.3, 0.6)
        sheet.path(f"M{x:.1f} 26h66v82h-66Z", times(base, 0.35))
        sheet.path(
            f"M{x + 5:.1f} 31h56v72h-56Z",
            sheet.linear((x, 31), (x, 103), ((0, mix(inner, WHITE, 0.5), 1), (1, inner, 1))),
        )
        sheet.path(f"M{x + 5:.1f} 84l18 -22l14 13l12 -8l12 15v21h-56Z", times(inner, 0.6), 0.8)
    elif kind == 4:
        x = 16.0 if left else 164.0
        glass = mix((228, 240, 252), (255, 226, 178), p["light_warmth"])
        sheet.path(f"M{x} 14h76v142h-76Z", mix(dark, BLACK, 0.2))
        for i in range(2):
            for j in range(3):
                sheet.path(f"M{x + 5 + 35 * i} {19 + 45 * j}h31v41h-31Z", glass, 0.92 - 0.1 * j)
        sheet.soft(x + 38, 85, 120, 130, glass, 0.45)


def light(sheet: Sheet, h: Head) -> None:
    """The colour of the light over everything."""
    warmth = 2 * h.p["light_warmth"] - 1
    tone = (255, 168, 84) if warmth > 0 else (92, 140, 255)
    near, far = (SIDE, 0) if h.light > 0 else (0, SIDE)
    strength = 0.17 * abs(warmth)
    paint = sheet.linear((near, 20), (far, 200), ((0, tone, strength), (1, times(tone, 0.3), strength * 0.8)))
    sheet.path(f"M0 0H{SIDE}V{SIDE}H0Z", paint)


def body(sheet: Sheet, h: Head) -> None:
    """Neck, shoulders and clothes; they stay upright when the head tilts."""
    _p, s = h.p, h.scale
    x, y = h.origin[0], h.origin[1] + h.scale * (h.chin_y - h.sex.chin_drop)
    neck, shoulders = h.sex.neck * s, h.sex.shoulders * s
    slope = h.sex.slope
    top, base = y - 30 * s, y + 22 * s
    skin_path = curve(
        [
            (x - neck, top), (x - neck * 1.02, base - 18), (x - neck * 1.35, base), (x - shoulders, base + 40),
            (x - shoulders, 300), (x + shoulders, 300), (x + shoulders, base + 40), (x + neck * 1.35, base),
            (x + neck * 1.02, base - 18), (x + neck, top),
        ]
    )  # fmt: skip
    sheet.path(
        skin_path,
        sheet.linear(
            (0, y - 10),
            (0, base + 12),
            ((0, h.shade, 1), (0.5, mix(h.skin, h.shade, 0.45), 1), (1, mix(h.skin, h.shade, 0.15), 1)),
        ),
    )
    sheet.soft(x - h.light * neck * 0.8, base - 14, neck * 0.9, 34, h.shade, 0.55)
    if h.sex.throat:
        sheet.soft(x + 2 * h.light, y + 13 * s, 5, 6, h.skin, 0.45 * h.sex.throat)
        sheet.soft(x - 2 * h.light, y + 19 * s, 8, 5, times(h.shade, 0.8), 0.5 * h.sex.throat)
    for side in (-1, 1):  # collar bones
        sheet.line(f"M{x + side * 7:.1f} {base + 9:.1f}q{side * 16} {-5} {side * 36} {-3}", h.shade, 1.6, 0.35)
    clothes(sheet, h, x, base, neck, shoulders, slope)


def clothes(sheet: Sheet, h: Head, x: float, base: float, neck: float, shoulders: float, slope: float) -> None:
    """Crew neck, V-neck, shirt, turtleneck or blouse with a wide neckline."""
    p = h.p
    kind = min(int(p["clothes"] * 5), 4)
    cloth = hue(360 * p["clothes_hue"], 0.42, 0.16 + 0.58 * p["clothes_lightness"])
    dark, pale = times(cloth, 0.6), mix(cloth, WHITE, 0.22)
    wide, deep = ((1.30, 7), (1.15, 30), (1.12, 4), (1.05, -16), (1.9, 14))[kind]
    rim = base + deep
    edge = neck * wide
    rise = base - 7 if kind != 4 else base + 3
    if kind == 3:
        rise = base - 22
    middle = [
        (x - edge * 0.55, rim - (4 if kind != 1 else 14)),
        (x, rim),
        (x + edge * 0.55, rim - (4 if kind != 1 else 14)),
    ]
    outline = [
        (x - edge, rise), (x - shoulders * 0.72, base + 7 + slope), (x - shoulders, base + 26 + slope),
        (x - shoulders - 14, 300), (x + shoulders + 14, 300), (x + shoulders, base + 26 + slope),
        (x + shoulders * 0.72, base + 7 + slope), (x + edge, rise), *reversed(middle),
    ]  # fmt: skip
    lit, unlit = (x + h.light * shoulders, base), (x - h.light * shoulders, base + 40)
    paint = sheet.linear(lit, unlit, ((0, pale, 1), (0.45, cloth, 1), (1, dark, 1)))
    sheet.path(curve(outline), paint)
    collar = curve([(x - edge, rise), *middle, (x + edge, rise)], closed=False)
    sheet.line(collar, dark if kind != 0 else times(cloth, 0.75), 3.2 if kind in (0, 4) else 2.0, 0.8)
    for side in (-1, 1):  # folds
        sheet.line(f"M{x + side * shoulders * 0.62:.1f} {base + 14:.1f}q{side * 3} 16 {side * -2} 40", dark, 2.4, 0.35)
    if kind == 2:
        shirt = mix(cloth, WHITE, 0.5)
        for side in (-1, 1):
            flap = [
                (x, rim + 4),
                (x + side * edge * 1.12, rise - 6),
                (x + side * edge * 1.35, rise + 6),
                (x + side * edge * 0.62, rim + 17),
            ]
            sheet.path(
                "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in flap) + "Z",
                shirt if side * h.light > 0 else times(shirt, 0.88),
            )
        sheet.line(f"M{x:.1f} {rim + 6:.1f}V256", dark, 1.4, 0.6)
    elif kind == 3:
        for i in range(3):
            sheet.line(f"M{x - edge:.1f} {rise + 6 + 7 * i:.1f}q{edge:.1f} 7 {2 * edge:.1f} 0", dark, 1.5, 0.4)


# ---------------------------------------------------------------------------------------------- the face


def outline(h: Head) -> list[Point]:
    """The face's contour, clockwise from the crown."""
    a = h.half_width
    cheek = 0.93 + 0.06 * h.p["cheeks"]
    half = [
        (0.60 * a, -66.0, 0.0), (0.93 * a, -38.0, 0.0), (1.0 * a, -4.0, 0.0), (cheek * a, 26.0, 0.05 * a),
        (h.sex.jaw * a, 0.68 * h.chin_y, 0.2 * a), (h.sex.chin * a, h.chin_y - 5.5, 0.45 * a),
    ]  # fmt: skip
    right = [h.at(*point) for point in half]
    left = [h.at(-x, y, z) for x, y, z in half]
    return [h.at(0, -78), *right, h.at(0, h.chin_y, 0.5 * a), *reversed(left)]


def ears(sheet: Sheet, h: Head) -> None:
    size = h.scale * (12.5 + 5.5 * h.p["ear_size"])
    for side in (-1, 1):
        x, y = h.at(side * (h.half_width + 1.5), EAR_Y, -10)
        lit = 0.5 + 0.5 * side * h.light
        sheet.ellipse(x, y, size * 0.52, size, mix(h.skin, h.shade, 0.45 - 0.3 * lit), angle=side * 9)
        sheet.ellipse(x + side * 0.8, y - 1, size * 0.28, size * 0.66, h.shade, 0.45, angle=side * 9)


def face(sheet: Sheet, h: Head) -> None:
    """The face with light and shadow on it, blush, stubble and beard, freckles and mole."""
    a, side = h.half_width, 1 if h.light >= 0 else -1
    contour = curve(outline(h))
    strong = 0.3 + 0.7 * abs(h.light)
    lit, unlit = h.at(side * a, -30), h.at(-side * a, 30)
    sheet.path(
        contour,
        sheet.linear(
            lit,
            unlit,
            ((0, mix(h.skin, h.glow, 0.35 * strong), 1), (0.45, h.skin, 1), (1, mix(h.skin, h.shade, 0.8 * strong), 1)),
        ),
    )
    with sheet.clipped(contour):
        x, y = h.on(0, h.chin_y)
        sheet.soft(x, y + 4, a * 1.1, 22, h.shade, 0.45)
        sheet.soft(*h.on(side * a * 0.12, -44), 36, 22, h.glow, 0.42)
        for s in (-1, 1):
            sheet.soft(*h.on(s * h.eye_x, EYE_Y - 3), 19, 15, h.shade, 0.40)
            sheet.soft(*h.on(s * a * 0.60, 24), 18, 13, h.glow, 0.34 if s == side else 0.10)
            sheet.soft(*h.on(s * a * 0.66, 46), 12, 22, h.shade, 0.30 * (1 - h.p["cheeks"]))
            sheet.soft(*h.on(s * a * 0.58, 25), 19, 15, (214, 70, 74), h.sex.blush)
        sheet.soft(*h.on(0, h.chin_y - 12), 13, 9, h.glow, 0.25)
        beard(sheet, h)
        freckles(sheet, h)


def beard(sheet: Sheet, h: Head) -> None:
    """Stubble, and what is let grow: nothing, a moustache, a goatee or a full beard."""
    if not h.sex.stubble:
        return
    a, y, chin = h.half_width, h.mouth_y, h.chin_y
    tone = mix(times(h.hair, 0.75), (60, 56, 60), 0.35)
    start, end = h.on(0, 16), h.on(0, y - 2)
    paint = sheet.linear(start, end, ((0, tone, 0), (0.6, tone, 0.5 * h.sex.stubble), (1, tone, 0.85 * h.sex.stubble)))
    sheet.path(f"M0 {start[1]:.1f}H{SIDE}V{SIDE}H0Z", paint)
    style = min(int(h.p["beard_style"] * 4), 3)
    if not h.sex.beard or style == 0:
        return
    dense = 0.45 + 0.5 * h.sex.beard
    dark, m = times(h.hair, 0.88), h.mouth_x
    moustache = [
        (-m - 3, y + 3),
        (-m * 0.6, y - 8),
        (0, y - 9),
        (m * 0.6, y - 8),
        (m + 3, y + 3),
        (m * 0.5, y - 3),
        (0, y - 4),
        (-m * 0.5, y - 3),
    ]
    if style == 3:
        half = [(8, y + 12), (m + 2, y + 8), (m + 6, y - 3), (0.66 * a, y - 6), (0.93 * a, 30), (0.99 * a, 6)]
        half += [(1.2 * a, 60), (0.6 * a, chin + 12)]
        full = [*half, *((-x, down) for x, down in reversed(half))]
        sheet.path(h.through(full), dark, dense)
    elif style == 2:
        sheet.path(
            h.through(
                [
                    (-m - 2, y),
                    (-m - 3, y + 14),
                    (-9, chin + 4),
                    (9, chin + 4),
                    (m + 3, y + 14),
                    (m + 2, y),
                    (m - 3, y + 9),
                    (0, y + 11),
                    (-m + 3, y + 9),
                ]
            ),
            dark,
            dense,
        )
    sheet.path(h.through(moustache), dark, dense)
    for i in range(9 if style == 3 else 0):
        x = (i - 4) / 4 * 0.72 * a
        start, end = h.on(x, chin - 17 - 0.2 * abs(x)), h.on(x * 0.9, chin - 3 - 0.35 * abs(x))
        sheet.line(curve([start, end], closed=False), mix(h.hair, WHITE, 0.25), 1.2, 0.35 * dense)


def freckles(sheet: Sheet, h: Head) -> None:
    count = round(34 * max(h.p["freckles"] - 0.45, 0) / 0.55)
    tone = times(mix(h.skin, (150, 74, 32), 0.55), 0.85)
    places = random.Random(round(100 * h.p["mole"]))
    for _ in range(count):
        across, down = places.random() + places.random() - 1, places.random() + places.random()
        sheet.ellipse(*h.on(across * 0.75 * h.half_width, 10 + 13 * down), 0.95, 0.9, tone, 0.6)
    if h.p["mole"] > 0.5:
        place = (h.p["mole"] - 0.5) * 2
        x = (-1 if place < 0.5 else 1) * (20 + 12 * ((place * 2) % 1))
        sheet.ellipse(*h.on(x, 30 + 22 * ((place * 7.3) % 1)), 1.7, 1.6, times(h.shade, 0.5), 0.9)


def nose(sheet: Sheet, h: Head) -> None:
    w = (7.5 + 5.0 * h.p["nose_width"]) * h.sex.nose_width
    y, side = h.nose_y, 1 if h.light >= 0 else -1
    bridge = 3.4 + 3.0 * h.p["nose_bridge"]
    for s in (-1, 1):
        deep = (0.5 if s != side else 0.2) * (0.5 + 0.5 * abs(h.light))
        x, top = h.on(s * (bridge + 2), y * 0.35, 3)
        sheet.soft(x, top, 5.5, 26, h.shade, deep, angle=-s * 5)
    sheet.soft(*h.on(side * 0.8, y * 0.4, 8), bridge * 1.1, 24, h.glow, 0.40)
    sheet.soft(*h.on(0, y + 3.5, 4), w * 1.5, 7.5, h.shade, 0.62)
    sheet.ellipse(
        *h.on(0, y - 5, 8),
        w * 0.74,
        w * 0.62,
        sheet.radial(
            h.on(side * 1.5, y - 7, 9),
            w * 0.9,
            ((0, mix(h.skin, h.glow, 0.5), 0.9), (0.6, h.skin, 0.6), (1, h.skin, 0)),
        ),
    )
    for s in (-1, 1):
        wing = h.through(
            [(s * w * 0.72, y - 9), (s * w * 1.02, y - 4), (s * w * 0.94, y + 1), (s * w * 0.6, y + 1.5)],
            closed=False,
            bump=4,
        )
        sheet.line(wing, times(h.shade, 0.85), 1.5, 0.75)
        sheet.ellipse(*h.on(s * w * 0.46, y + 1, 6), w * 0.24, 1.6, times(h.shade, 0.42), 0.85, angle=-s * 14)
    sheet.soft(*h.on(side * 1.5, y - 7, 9), 3.6, 3.0, WHITE, 0.45)


def _corner_y(h: Head) -> float:
    """Height of the mouth's corners: they rise when it smiles."""
    return h.mouth_y + 1.5 - 5.0 * h.p["smile"]


def mouth(sheet: Sheet, h: Head) -> None:
    p, y, m, corner = h.p, h.mouth_y, h.mouth_x, _corner_y(h)
    full, bow = h.sex.lip_fullness, 0.8 + 1.6 * p["lip_bow"]
    natural = mix(mix(h.skin, (176, 66, 66), 0.42), h.shade, 0.20)
    paint = hue(340 + 30 * p["makeup"], 0.62, 0.42 - 0.12 * p["skin_tone"])
    lip = mix(natural, paint, h.sex.lip_paint)
    opened = max(p["mouth_open"] - 0.35, 0) * 11 * (0.35 + 0.65 * p["smile"])
    upper_line = [(-m, corner), (-m * 0.45, y + 0.4), (0, y + 0.9), (m * 0.45, y + 0.4), (m, corner)]
    lower_line = [
        (m, corner),
        (m * 0.5, y + 0.6 + opened),
        (0, y + 1.1 + opened * 1.15),
        (-m * 0.5, y + 0.6 + opened),
        (-m, corner),
    ]
    if opened > 0.6:
        inside = h.through([*upper_line[:-1], *lower_line[:-1]])
        sheet.path(inside, (74, 22, 24))
        with sheet.clipped(inside):
            teeth = [
                (-m * 0.86, y - 4),
                (m * 0.86, y - 4),
                (m * 0.7, y + 0.74 * opened),
                (0, y + 0.86 * opened),
                (-m * 0.7, y + 0.74 * opened),
            ]
            sheet.path(h.through(teeth), (240, 234, 226))
    top = [
        (m * 0.5, y - full * 0.55),
        (bow * 1.6, y - full * 0.86),
        (0, y - full * 0.86 + bow),
        (-bow * 1.6, y - full * 0.86),
        (-m * 0.5, y - full * 0.55),
    ]
    sheet.path(h.through([*upper_line, *top]), times(lip, 0.86))
    low = y + 1.1 + opened
    bottom = [(-m * 0.55, low + full * 0.72), (0, low + full * 1.08), (m * 0.55, low + full * 0.72)]
    sheet.path(h.through([*lower_line, *bottom]), lip)
    sheet.soft(*h.on(h.light * 3, low + full * 0.48), m * 0.5, full * 0.42, mix(lip, WHITE, 0.7), 0.5)
    sheet.soft(*h.on(0, low + full + 4.5), m * 0.75, 4.5, h.shade, 0.55)
    sheet.line(h.through(upper_line, closed=False), times(lip, 0.42), 1.3, 0.85)
    for s in (-1, 1):
        sheet.soft(*h.on(s * (m + 1.5), corner), 4, 4.5, h.shade, 0.5)
        if p["smile"] > 0.3:
            fold = h.through(
                [(s * (m + 5), corner - 9), (s * (m + 8), corner - 1), (s * (m + 5.5), corner + 6)], closed=False
            )
            sheet.line(fold, h.shade, 1.6, 0.5 * p["smile"])


def eyes(sheet: Sheet, h: Head) -> None:
    p = h.p
    half = (10.2 + 2.6 * p["eye_size"]) * h.sex.eye_scale
    open_ = (4.3 + 2.6 * p["eye_openness"]) * h.sex.eye_scale * (1 - 0.22 * p["smile"])
    slant = 3.6 * (p["eye_tilt"] - 0.35)
    iris = IRIS[min(int(p["eye_color"] * len(IRIS)), len(IRIS) - 1)]
    upper, lower = {}, {}
    for s in (-1, 1):
        x = s * h.eye_x
        upper[s] = [
            (x - s * half, EYE_Y + 1.6),
            (x - s * half * 0.45, EYE_Y - open_ * 0.82),
            (x + s * half * 0.2, EYE_Y - open_),
            (x + s * half * 0.7, EYE_Y - open_ * 0.6 - slant * 0.5),
            (x + s * half, EYE_Y + 0.4 - slant),
        ]
        lower[s] = [
            (x + s * half * 0.5, EYE_Y + open_ * 0.66 - slant * 0.3),
            (x - s * half * 0.1, EYE_Y + open_ * 0.82),
            (x - s * half * 0.6, EYE_Y + open_ * 0.62),
        ]
    shapes = {s: h.through([*upper[s], *lower[s]]) for s in (-1, 1)}
    r = h.scale * 6.0 * h.sex.eye_scale
    with sheet.clipped(shapes[-1], shapes[1]):
        for s in (-1, 1):
            sheet.path(shapes[s], (238, 234, 230))
            x, y = h.on(s * h.eye_x + 5 * (p["gaze"] - 0.5), EYE_Y - open_ * 0.12)
            sheet.ellipse(
                x,
                y,
                r,
                r,
                sheet.radial(
                    (x, y + 1.5),
                    r,
                    (
                        (0, mix(iris, WHITE, 0.28), 1),
                        (0.55, iris, 1),
                        (0.85, times(iris, 0.7), 1),
                        (1, times(iris, 0.35), 1),
                    ),
                ),
            )
            sheet.ellipse(x, y, r * 0.44, r * 0.44, (10, 8, 8))
            sheet.soft(*h.on(s * h.eye_x, EYE_Y - open_ - 0.5), half * 1.1, 5, times(h.shade, 0.35), 0.62)
            sheet.ellipse(x + 2.1 * (1 if h.light >= 0 else -1), y - 2.2, 1.7, 1.7, WHITE, 0.95)
            sheet.ellipse(x - 1.8 * (1 if h.light >= 0 else -1), y + 2.4, 0.9, 0.9, WHITE, 0.5)
    lash = mix(times(h.hair, 0.35), (18, 12, 12), 0.6)
    for s in (-1, 1):
        crease = [(x, y - 3.4 - 0.8 * p["eye_openness"]) for x, y in upper[s]]
        if h.sex.eye_paint:
            sheet.path(
                h.through([*upper[s], *reversed(crease)]),
                hue(200 + 160 * p["makeup"], 0.35, 0.35),
                0.8 * h.sex.eye_paint,
            )
        sheet.line(h.through(crease[1:], closed=False), times(h.shade, 0.8), 1.2, 0.6)
        sheet.line(h.through(upper[s], closed=False), lash, 1.2 + 1.9 * h.sex.lashes, 0.95)
        sheet.line(h.through([upper[s][-1], *lower[s]], closed=False), times(h.shade, 0.6), 0.9, 0.55)
        if h.sex.lashes > 0.5:
            x, y = upper[s][-1]
            wing = [upper[s][-2], (x, y), (x + s * 4.2 * h.sex.lashes, y - 3.6 * h.sex.lashes)]
            sheet.line(h.through(wing, closed=False), lash, 1.1 + 1.2 * h.sex.lashes, 0.95)
        inner = upper[s][0]
        sheet.ellipse(*h.on(inner[0] + s * 0.9, inner[1]), 1.1, 0.9, mix(h.skin, (190, 80, 80), 0.5), 0.8)


def brows(sheet: Sheet, h: Head) -> None:
    thick, arch, y = h.sex.brow_thickness, h.sex.brow_arch, h.brow_y
    tone = mix(times(h.hair, 0.72), (44, 32, 28), 0.35)
    for s in (-1, 1):
        x = s * h.eye_x
        top = [
            (x - s * 13, y + 0.6 - thick * 0.4),
            (x - s * 3, y - arch * 0.5 - thick * 0.6),
            (x + s * 6, y - arch * 0.85 - thick * 0.4),
            (x + s * 16, y + 1.8),
        ]
        under = [
            (x + s * 7, y - arch * 0.85 + thick * 0.55),
            (x - s * 3, y - arch * 0.45 + thick * 0.6),
            (x - s * 12.5, y + 0.8 + thick * 0.55),
        ]
        sheet.path(h.through([*top, *under]), tone, 0.86)


def wrinkles(sheet: Sheet, h: Head) -> None:
    """Lines that come with age, and the bags below the eyes."""
    old = max(h.p["age"] - 0.4, 0) / 0.6
    if not old:
        return
    a, tone = h.half_width, times(h.shade, 0.85)
    for s in (-1, 1):
        x = s * h.eye_x
        bag = [(x - s * 9, EYE_Y + 7), (x, EYE_Y + 10.5), (x + s * 9, EYE_Y + 7.5)]
        sheet.line(h.through(bag, closed=False), tone, 1.4, 0.4 * old)
        fold = [(s * 12, h.nose_y - 2), (s * (h.mouth_x - 1), h.mouth_y - 11), (s * (h.mouth_x + 5), h.mouth_y + 1)]
        sheet.line(h.through(fold, closed=False), tone, 1.5, 0.42 * old)
        for i in (-1, 0, 1):
            start, end = h.on(x + s * 15.5, EYE_Y + 2 * i), h.on(x + s * 21, EYE_Y + 1 + 4.2 * i)
            sheet.line(curve([start, end], closed=False), tone, 0.9, 0.35 * old)
    for i in range(3):
        y = -32.0 - 6.5 * i
        lines = [(-0.5 * a + 4 * i, y + 1), (-0.2 * a, y - 1), (0.2 * a, y - 0.5), (0.5 * a - 4 * i, y + 1)]
        sheet.line(h.through(lines, closed=False), tone, 1.1, 0.26 * old)


# ---------------------------------------------------------------------------------------------- hair


def hair_end(h: Head) -> float:
    """How far down the hair reaches, in the head's coordinates."""
    if h.style in ("back", "bun"):
        return 8.0
    return 8.0 + 145.0 * max(h.sex.hair_length - 0.16, 0) ** 1.15


def volume(h: Head) -> float:
    """How far the hair stands off the skull."""
    own = 4.0 + 9.0 * h.p["hair_volume"]
    extra = {"curly": 5.0, "afro": 15.0, "wavy": 2.0, "bun": -2.0, "back": -1.0}.get(h.style, 0.0)
    return max(own + extra * (0.35 + 0.65 * min(h.sex.hair_length * 1.6, 1)), 2.5) * (1 - 0.75 * h.sex.balding)


def back_hair(sheet: Sheet, h: Head) -> None:
    """What hangs behind the neck, and a bun."""
    a, v, end = h.half_width, volume(h), hair_end(h)
    dark = times(h.hair, 0.62)
    if h.style == "bun" and h.sex.balding < 0.3:
        r = h.scale * (12 + 16 * h.sex.hair_length)
        x, y = h.at(0, -80 - v - r * 0.35 / h.scale, -10)
        sheet.ellipse(
            x,
            y,
            r,
            r * 0.92,
            sheet.radial(
                (x + h.light * r * 0.4, y - r * 0.3),
                r * 1.3,
                ((0, mix(h.hair, WHITE, 0.18), 1), (0.6, h.hair, 1), (1, dark, 1)),
            ),
        )
        for i in (-1, 0, 1):
            sheet.line(
                f"M{x - r * 0.7:.1f} {y + i * r * 0.3:.1f}q{r * 0.7:.1f} {-r * 0.5:.1f} {r * 1.4:.1f} 0", dark, 1.3, 0.4
            )
    if end < 24:
        return
    right = [
        (0.66 * a, -70 - 0.9 * v), (a + 0.7 * v, -20.0), (a + v + _wave(h, 0.3), end * 0.45),
        (a + 0.8 * v + _wave(h, 0.7), end * 0.8), (0.7 * a, end + 5),
    ]  # fmt: skip
    points = [h.at(x, y, -8) for x, y in right]
    left = [h.at(-x, y, -8) for x, y in right]
    path = curve([*points, h.at(0, end + 8, -8), *reversed(left)])
    sheet.path(
        path, sheet.linear(h.at(0, -60), h.at(0, end), ((0, times(h.hair, 0.66), 1), (1, times(h.hair, 0.55), 1)))
    )


def _wave(h: Head, share: float) -> float:
    """How far the hair swings out at a share of its length."""
    swing = {"wavy": 5.0, "curly": 4.0}.get(h.style, 0.8)
    return swing * math.sin(9 * share + 2)


def locks(h: Head, side: int) -> tuple[list[Point], list[Point]]:
    """Outer and inner edge of the hair on one side, from the parting to the tip: as many points each."""
    a, v, end, length = h.half_width, volume(h), hair_end(h), h.sex.hair_length
    part = {"side": 26.0, "wavy": 20.0, "middle": 0.0}.get(h.style, 6.0) * (1 if h.p["hair_parting"] > 0.5 else -1)
    part *= 0.5 + abs(h.p["hair_parting"] - 0.5)
    line = h.hairline_y - 12 * h.sex.balding
    swoop = 14.0 if side * part < 0 and h.style in ("side", "wavy") else 3.0
    back = h.style in ("back", "bun", "afro")
    tight = 2.0 + (v - 2.0) * min(0.25 + 2.2 * length, 1.0)
    receding = 16 * h.sex.balding
    outer = [
        (part * 0.6, -78.0 - v),
        (side * 0.62 * a + part * 0.2, -70.0 - 0.9 * v),
        (side * (0.97 * a + 0.6 * tight), -42.0),
    ]
    inner = [
        (part, line),
        (side * 0.42 * a + part * 0.3, line + (0 if back else swoop) - receding),
        (side * 0.84 * a, line + 12 + (4 if not back else 0) - 0.4 * receding),
    ]
    outer += [(side * (a + 0.8 * tight), -12.0), (side * (a + tight * 0.9 + _wave(h, 0.35)), 0.5 * end - 4)]
    inner += [(side * 0.955 * a, -12.0), (side * (0.985 * a), 0.5 * end - 4)]
    tip = a * (1.0 if end < 60 else 0.93) + (_wave(h, 0.9) if end > 30 else 0)
    outer.append((side * (tip + (2.0 if end < 24 else 0.5 * v)), end))
    inner.append((side * (a * 0.99 if end < 24 else tip - 9), end + (0 if end < 24 else 2)))
    return outer, inner


def front_hair(sheet: Sheet, h: Head) -> None:
    """The hair over crown, temples and forehead, side by side from the parting."""
    bald = h.sex.balding
    pale, dark = mix(h.hair, (255, 244, 224), 0.22), times(h.hair, 0.62)
    sides = [(side, *locks(h, side)) for side in ((-1, 1) if h.light > 0 else (1, -1))]
    bright, dim = h.at(h.light * 55, -95), h.at(-h.light * 45, max(hair_end(h), 20))
    paint = sheet.linear(bright, dim, ((0, pale, 1), (0.5, h.hair, 1), (1, dark, 1)))
    for side, outer, inner in sides:
        edge = [h.at(x, y, 8) for x, y in outer]
        brim = [h.on(x, y) if abs(x) < h.half_width else h.at(x, y, 4) for x, y in inner]
        if h.style in ("curly", "afro"):
            edge = bumpy(edge, 2.4 * h.scale)
        lit = side * h.light > 0
        sheet.path(curve([*edge, *reversed(brim)]), paint, 1 - 0.35 * bald)
        strands(sheet, h, edge, brim, lit)
    if h.style == "fringe" and bald < 0.4:
        fringe(sheet, h)
    if h.style in ("curly", "afro"):
        curls(sheet, h)


def bumpy(points: Sequence[Point], height: float) -> list[Point]:
    """The same way, in and out as curls do."""
    result = []
    for i in range(len(points) - 1):
        (x0, y0), (x1, y1) = points[i], points[i + 1]
        length = max(math.hypot(x1 - x0, y1 - y0), 1e-6)
        nx, ny = (y1 - y0) / length, -(x1 - x0) / length
        steps = max(round(length / 13), 1) * 2
        for j in range(steps):
            t, off = j / steps, height * (0.5 if j % 2 else -0.5)
            result.append((x0 + (x1 - x0) * t + nx * off, y0 + (y1 - y0) * t + ny * off))
    return [*result, points[-1]]


def strands(sheet: Sheet, h: Head, outer: Sequence[Point], inner: Sequence[Point], lit: bool) -> None:
    """Lines that follow the hair: along it, or over the head where it is combed back."""
    pale, dark = mix(h.hair, (255, 240, 215), 0.38), times(h.hair, 0.5)
    if h.style in ("curly", "afro"):
        return
    if h.style in ("back", "bun"):
        for i in range(5):
            (x0, y0), (x1, y1) = inner[min(i, 3)], outer[min(i, 3)]
            t = 0.25 * i % 1
            (x2, y2), (x3, y3) = inner[min(i + 1, 4)], outer[min(i + 1, 4)]
            start = (x0 + (x2 - x0) * t, y0 + (y2 - y0) * t)
            end = (x1 + (x3 - x1) * t, y1 + (y3 - y1) * t)
            sheet.line(
                curve([start, ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 - 1.5), end], closed=False),
                pale if i % 2 else dark,
                1.6,
                0.4,
            )
        return
    for i, share in enumerate((0.14, 0.3, 0.46, 0.62, 0.78, 0.92)):
        way = [
            (x0 + (x1 - x0) * share, y0 + (y1 - y0) * share) for (x0, y0), (x1, y1) in zip(outer, inner, strict=True)
        ]
        light_one = i % 2 == 0
        opacity = (0.5 if lit else 0.28) if light_one else 0.38
        sheet.line(
            curve(way[: 4 + i % 3], closed=False), pale if light_one else dark, 1.3 + 0.8 * (i % 3 == 0), opacity
        )


def fringe(sheet: Sheet, h: Head) -> None:
    """Hair combed over the forehead, down to the brows."""
    a, v = h.half_width, volume(h)
    low = h.brow_y - 3 - h.sex.brow_drop + 5 * (h.p["hair_length"] - 0.5)
    top = -66.0 - 0.9 * v
    left = [(-0.9 * a, -20.0), (-0.8 * a, -48.0), (-0.5 * a, top)]
    shape = [*left, (0.0, top - 5), *[(-x, y) for x, y in reversed(left)]]
    cut = [
        (x * a, low + (2.5 if i % 2 else 0) + 5 * x * x)
        for i, x in enumerate((0.66, 0.44, 0.2, 0.0, -0.2, -0.44, -0.66))
    ]
    pale, dark = mix(h.hair, (255, 244, 224), 0.20), times(h.hair, 0.6)
    paint = sheet.linear(h.on(0, top), h.on(0, low), ((0, h.hair, 1), (0.5, pale, 1), (1, mix(h.hair, dark, 0.5), 1)))
    sheet.path(h.through([*shape, *cut]), paint)
    for i in range(8):
        x = (i - 3.5) / 3.5 * 0.62
        way = [(x * 0.5 * a, top + 6), (x * 0.9 * a, (top + low) / 2), (x * a, low - 1)]
        sheet.line(h.through(way, closed=False), dark if i % 2 else mix(pale, WHITE, 0.2), 1.5, 0.4)


def curls(sheet: Sheet, h: Head) -> None:
    """Small arcs all over the hair."""
    a, v, end = h.half_width, volume(h), hair_end(h)
    pale, dark = mix(h.hair, (255, 240, 215), 0.33), times(h.hair, 0.5)
    for i in range(34):
        t, depth = (i * GOLDEN) % 1, (i * 0.754878) % 1
        angle = math.pi * (1.12 * t - 0.06)
        x, y = -math.cos(angle) * (a + v * depth), -12 - math.sin(angle) * (52 + (16 + v) * depth)
        if end > 30 and i % 3 == 0:
            x, y = math.copysign(a + v * (0.2 + 0.6 * depth), x), -20 + (end + 14) * t
        px, py = h.at(x, y, 8)
        r = 3.2 * h.scale
        sheet.line(
            f"M{px - r:.1f} {py:.1f}q{r:.1f} {-1.5 * r:.1f} {2 * r:.1f} 0",
            pale if i % 2 else dark,
            1.5,
            0.42 * (1 - h.sex.balding),
        )


# ---------------------------------------------------------------------------------------------- things worn


def earrings(sheet: Sheet, h: Head) -> None:
    if h.p["earrings"] <= 0.7:
        return
    kind = min(int((h.p["earrings"] - 0.7) * 10), 2)
    gold = (224, 178, 84)
    for side in (-1, 1):
        x, y = h.at(side * (h.half_width + 1), EAR_Y + 11 + 5 * h.p["ear_size"], -8)
        if kind == 0:
            sheet.ellipse(x, y, 2.4, 2.4, sheet.radial((x - 0.8, y - 0.8), 3, ((0, WHITE, 1), (1, (190, 190, 205), 1))))
        elif kind == 1:
            sheet.line(f"M{x - 4:.1f} {y + 4:.1f}a4 5 0 1 0 8 0a4 5 0 1 0 -8 0", gold, 1.6)
        else:
            sheet.line(f"M{x:.1f} {y:.1f}v7", gold, 1.2)
            sheet.ellipse(x, y + 10, 3, 4.2, hue(360 * h.p["clothes_hue"], 0.6, 0.42))


def glasses(sheet: Sheet, h: Head) -> None:
    """None for two people in three; else round, square or large ones."""
    if h.p["glasses"] < 0.66:
        return
    kind = int((h.p["glasses"] - 0.66) / 0.341 * 3)
    tone = ((28, 24, 24), (92, 52, 28), (150, 124, 74), (120, 26, 34), (34, 48, 84))[
        min(int(h.p["glasses_color"] * 5), 4)
    ]
    w, up, low, corner = ((14.5, 12, 14, 1.0), (16.5, 9, 12, 0.35), (17.0, 11, 17, 0.7))[kind]
    thick = (1.7, 3.0, 2.1)[kind]
    for s in (-1, 1):
        x = s * (h.eye_x + 1)
        k = 0.72 + 0.22 * (1 - corner)
        lens = [
            (x - s * w, EYE_Y + 1),
            (x - s * w * k, EYE_Y - up * k),
            (x, EYE_Y - up),
            (x + s * w * k, EYE_Y - up * k),
            (x + s * w, EYE_Y + 1),
            (x + s * w * k, EYE_Y + low * k),
            (x, EYE_Y + low),
            (x - s * w * k, EYE_Y + low * k),
        ]
        path = h.through(lens, bump=5)
        sheet.path(path, (220, 235, 250), 0.10)
        (gx, gy), r = h.on(x + h.light * 4, EYE_Y - up * 0.35, 5), 5
        sheet.line(f"M{gx - r:.1f} {gy + 3:.1f}l{r * 1.4:.1f} -7", WHITE, 2.2, 0.35)
        sheet.line(path, tone, thick)
        arm = [h.on(s * (h.eye_x + 1 + w), EYE_Y - 3, 4), h.at(s * (h.half_width + 1), EYE_Y - 1, -4)]
        sheet.line(curve(arm, closed=False), tone, thick)
    bridge = [(-(h.eye_x + 1 - w), EYE_Y - 1), (0, EYE_Y - 4), (h.eye_x + 1 - w, EYE_Y - 1)]
    sheet.line(h.through(bridge, closed=False, bump=6), tone, thick)


def hat(sheet: Sheet, h: Head) -> None:
    """None for four people in five; else a beanie, a hat with a brim or a cap."""
    if h.p["hat"] < 0.8:
        return
    kind = int((h.p["hat"] - 0.8) / 0.201 * 3)
    a = h.half_width + 7.0  # not the hair's volume: the hat is the same whoever wears it
    cloth = hue(360 * h.p["hat_hue"], 0.45, 0.36)
    pale, dark = mix(cloth, WHITE, 0.25), times(cloth, 0.55)
    lit, unlit = h.at(h.light * a, -90), h.at(-h.light * a, -40)
    paint = sheet.linear(lit, unlit, ((0, pale, 1), (0.5, cloth, 1), (1, dark, 1)))
    height = (-112.0, -124.0, -108.0)[kind]
    dome = [
        (-a, -36.0),
        (-0.94 * a, -72.0),
        (-0.55 * a, height + 8),
        (0.0, height),
        (0.55 * a, height + 8),
        (0.94 * a, -72.0),
        (a, -36.0),
        (0.5 * a, -44.0),
        (0.0, -47.0),
        (-0.5 * a, -44.0),
    ]
    sheet.path(curve([h.at(x, y, 6) for x, y in dome]), paint)
    if kind == 0:
        cuff = [
            (-a - 2, -32.0),
            (-a - 1, -50.0),
            (-0.5 * a, -59.0),
            (0.0, -62.0),
            (0.5 * a, -59.0),
            (a + 1, -50.0),
            (a + 2, -32.0),
            (0.5 * a, -40.0),
            (0.0, -43.0),
            (-0.5 * a, -40.0),
        ]
        sheet.path(curve([h.at(x, y, 8) for x, y in cuff]), mix(cloth, WHITE, 0.12))
        for i in range(9):
            x = (i - 4) / 4 * 0.92 * a
            y = -41.0 + 8 * (x / a) ** 2
            sheet.line(curve([h.at(x, y, 8), h.at(x, y - 16, 8)], closed=False), dark, 1.3, 0.4)
    else:
        reach = 1.55 if kind == 1 else 1.05
        drop = -40.0 if kind == 1 else -38.0
        brim = [
            (-a * reach, drop + 2),
            (-a * 0.6, drop - 12),
            (0.0, drop - 15),
            (a * 0.6, drop - 12),
            (a * reach, drop + 2),
            (a * 0.6, drop + 3),
            (0.0, drop + 4 + 5 * (kind == 2)),
            (-a * 0.6, drop + 3),
        ]
        band = [
            (-0.99 * a, -47.0),
            (0.0, -58.0),
            (0.99 * a, -47.0),
            (0.97 * a, -58.0),
            (0.0, -70.0),
            (-0.97 * a, -58.0),
        ]
        if kind == 1:
            sheet.path(curve([h.at(x, y, 7) for x, y in band]), dark, 0.8)
        sheet.path(curve([h.at(x, y, 24) for x, y in brim]), mix(cloth, dark, 0.35))
    sheet.soft(*h.on(0, -34), 44, 10, h.shade, 0.45)
