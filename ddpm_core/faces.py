"""Faces in ordinary photographs, brought to where a data set of aligned portraits has them.

    points     5 2   left eye, right eye, nose, left and right corner of the mouth, as the image shows them
                     (CelebA's order); x y in pixels from the image's upper left corner
    template   10    where these points lie in the data set's images, x0 y0 x1 y1 ..., in shares of the side

Faces are found by MTCNN (Zhang et al. 2016, "Joint Face Detection and Alignment using Multi-task Cascaded
Convolutional Networks"): three small nets, each looking closer at what the one before it proposed. The weights come
with the optional package `mtcnn`; its own code is left alone, because it needs TensorFlow.
"""

import dataclasses
import functools
import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from ddpm_core import images
from ddpm_core.config import Align, Faces, Framing
from ddpm_core.errors import InputError

CELEBA = (0.3901, 0.5143, 0.6126, 0.5140, 0.4983, 0.6497, 0.3978, 0.7508, 0.6003, 0.7490)
"""Where CelebA's faces have the points: the mean of those found in 999 of its aligned images, cut to squares. The
landmarks that come with CelebA average within 0.7 % of the side of it."""
LOOKS = ((640, 1.0), (1600, 2.0))
"""Faces are looked for in the photo brought to this size (longer side, pixels) and enlarged at most so much; where
none is found, in the second way."""
MIN_FACE = 20
"""Smallest face looked for, in pixels of the reduced photo."""
PYRAMID_FACTOR = 0.709
"""From one size that is looked at to the next: half the area."""
THRESHOLDS = (0.6, 0.7, 0.7)
"""Least probability of a face after each net, the paper's."""
SURE = 0.8
"""Least probability of a face looked at again upright: what is none falls there, mostly below 0.5."""
ALIGNED = 0.15
"""A face whose crop differs from the plain one by no more than this (share of the side, at the worst corner) is
aligned already: 98 % of CelebA's are."""
SMALL = 2.0
"""A face enlarged by more than this is worth a note."""
MUCH_OUTSIDE = 0.15
"""A larger share of the crop outside of the photo is worth a note."""


class NoFaceError(InputError):
    """An image in which no face is found."""


@dataclasses.dataclass(frozen=True)
class Face:
    """One face of a photo."""

    box: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels."""
    score: float
    """Probability that it is one."""
    points: Float[np.ndarray, "5 2"]

    @property
    def area(self) -> float:
        left, top, right, bottom = self.box
        return (right - left) * (bottom - top)


# -- finding ------------------------------------------------------------------------------------------------------


def check_installed() -> None:
    """Raises InputError, with the remedy, where the weights are not installed."""
    if missing := [name for name in ("mtcnn", "joblib", "lz4") if importlib.util.find_spec(name) is None]:
        raise InputError(
            f"faces are found with the package mtcnn, and {missing[0]} is not installed: "
            "pip install 'mtcnn==1.0.0', or take align none"
        )


def template_for(landmarks: Sequence[float], align: Align) -> tuple[float, ...]:
    """What to align photos to for a model whose data set has these landmarks; () where they stay as they are.

    Raises:
        InputError: faces are asked for and the model has no landmarks of faces, or the weights are not installed.
    """
    if align == "none" or (align == "auto" and len(landmarks) != 10):
        return ()
    if len(landmarks) != 10:
        raise InputError(
            "align is faces, and the checkpoint was not trained on aligned portraits with the landmarks of eyes, nose "
            "and mouth; leave align out"
        )
    check_installed()
    return tuple(landmarks)


def template_of(landmarks: Sequence[float], framing: Framing) -> tuple[float, ...]:
    """As `template_for`, of all that is asked of a photo.

    Raises:
        InputError: as `template_for`, or all faces are asked for where none is looked for or one result is to come.
    """
    template = template_for(landmarks, framing.align)
    if framing.faces == "all" and not template:
        raise InputError("faces is all, and photos are taken as they are, no faces are looked for; leave faces out")
    if framing.faces == "all" and framing.output_size == "model":
        raise InputError("faces is all, and a result of the model's size holds one; leave faces or output size out")
    return template


def find(photo: Image.Image) -> list[Face]:
    """The faces of an RGB photo, the largest first. The same photo gives the same faces.

    Raises:
        InputError: the weights are not installed.
        ValueError: `photo` is not as `images.decode` returns them.
    """
    images.check_photo(photo)
    nets = _nets()
    faces: list[Face] = []
    for side, most in LOOKS:
        scale = min(side / max(photo.size), most)
        reduced = photo.resize(_size(photo, scale), Image.Resampling.BILINEAR, reducing_gap=2.0)
        with torch.inference_mode():
            found = _cascade(reduced, nets, photo.width / reduced.width)
            faces = [face for one in found if (face := _refined(photo, nets.o, one)).score >= SURE]
        if faces:
            break
    return sorted(faces, key=lambda face: (-face.area, face.box))


class _Net(nn.Module):
    """Convolutions, one hidden layer where the input is of one size, and several outputs."""

    def __init__(self, convolutions: Sequence[nn.Module], hidden: tuple[int, int] | None, *outputs: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(*convolutions)
        self.hidden = nn.Sequential(nn.Linear(*hidden), nn.PReLU(hidden[1])) if hidden else None
        last = hidden[1] if hidden else 32
        self.outputs = nn.ModuleList(nn.Linear(last, n) if hidden else nn.Conv2d(last, n, 1) for n in outputs)

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> list[Tensor]:
        """Offsets of the box's sides, (landmarks,) and the logits of no face and face."""
        x = self.convolutions(x.contiguous(memory_format=torch.channels_last))
        if self.hidden is not None:
            x = self.hidden(x.permute(0, 3, 2, 1).flatten(1))  # column by column, as in the authors' MATLAB
        return [output(x) for output in self.outputs]


def _conv(inp: int, out: int, kernel: int, pool: int = 0) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Conv2d(inp, out, kernel), nn.PReLU(out)]
    return [*layers, nn.MaxPool2d(pool, 2, ceil_mode=True)] if pool else layers


@dataclasses.dataclass(frozen=True)
class _Nets:
    p: _Net
    """Proposes: slides over the whole image, 12 pixels wide, 2 pixels a step."""
    r: _Net
    """Refines 24-pixel crops."""
    o: _Net
    """Outputs box and landmarks from 48-pixel crops."""


@functools.lru_cache(maxsize=1)
def _nets() -> _Nets:
    check_installed()
    nets = _Nets(
        p=_Net([*_conv(3, 10, 3, 2), *_conv(10, 16, 3), *_conv(16, 32, 3)], None, 4, 2),
        r=_Net([*_conv(3, 28, 3, 3), *_conv(28, 48, 3, 3), *_conv(48, 64, 2)], (576, 128), 4, 2),
        o=_Net(
            [*_conv(3, 32, 3, 3), *_conv(32, 64, 3, 3), *_conv(64, 64, 3, 2), *_conv(64, 128, 2)],
            (1152, 256),
            4,
            10,
            2,
        ),
    )
    for name in ("p", "r", "o"):
        _load(getattr(nets, name), f"{name}net.lz4")
    return nets


def _load(net: _Net, file: str) -> None:
    """The package's arrays, in Keras's order and layout, as the net's weights."""
    spec = importlib.util.find_spec("mtcnn")
    assert spec is not None
    assert spec.origin is not None
    arrays = importlib.import_module("joblib").load(Path(spec.origin).parent / "assets" / "weights" / file)
    turned = {4: (3, 2, 0, 1), 2: (1, 0)}
    for weight, array in zip(net.parameters(), arrays, strict=True):
        array = array.transpose(turned[array.ndim]) if array.ndim in turned else array.ravel()
        with torch.no_grad():
            weight.copy_(torch.tensor(array))
    net.eval().requires_grad_(False)


def _size(photo: Image.Image, scale: float) -> tuple[int, int]:
    return max(round(photo.width * scale), 1), max(round(photo.height * scale), 1)


def _input(pictures: Sequence[Image.Image]) -> Float[Tensor, "b 3 h w"]:
    return images.to_tensor(np.stack([np.asarray(picture) for picture in pictures])) * (127.5 / 128)


def _cascade(photo: Image.Image, nets: _Nets, scale: float) -> list[Face]:
    """The faces of a reduced photo, in pixels of the original, `scale` times as large."""
    boxes, scores = _propose(photo, nets.p)
    if len(boxes):
        offsets, logits = nets.r(_crops(photo, boxes, 24))
        boxes, scores, _ = _chosen(boxes, offsets, logits, THRESHOLDS[1])
    if not len(boxes):
        return []
    squares = _squares(boxes)
    offsets, places, logits = nets.o(_crops(photo, boxes, 48))
    points = squares[:, None, :2] + _xy(places) * (squares[:, None, 2:] - squares[:, None, :2])
    boxes, scores, kept = _chosen(boxes, offsets, logits, THRESHOLDS[2], inside=True)
    return [
        Face((*(box * scale).tolist(),), float(score), point * scale)
        for box, score, point in zip(boxes, scores, points[kept], strict=True)
    ]


def _propose(photo: Image.Image, net: _Net) -> tuple[np.ndarray, np.ndarray]:
    """(n, 4) boxes that may hold a face, and their probabilities."""
    found: list[np.ndarray] = []
    scale = 12 / MIN_FACE
    while min(photo.size) * scale >= 12:
        small = photo.resize(_size(photo, scale), Image.Resampling.BILINEAR)
        offsets, logits = net(_input([small]))
        probability = logits[0].softmax(0)[1].numpy()
        rows, columns = np.nonzero(probability > THRESHOLDS[0])
        corner = np.stack([columns, rows], axis=1) * 2.0
        cells = np.concatenate([corner, corner + 12], axis=1) + 12 * offsets[0].numpy()[:, rows, columns].T
        scores = probability[rows, columns]
        ratio = np.array([photo.width / small.width, photo.height / small.height] * 2)
        kept = _suppressed(cells, scores, 0.5)
        found.append(np.concatenate([cells[kept] * ratio, scores[kept, None]], axis=1))
        scale *= PYRAMID_FACTOR
    proposals = np.concatenate(found) if found else np.zeros((0, 5))
    kept = _suppressed(proposals[:, :4], proposals[:, 4], 0.7)
    return proposals[kept, :4], proposals[kept, 4]


def _squares(boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 4"]:
    """Each box widened to a square with the same centre, whole pixels."""
    centre, side = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).max(axis=1, keepdims=True)
    corner = np.round(centre - side / 2)
    return np.concatenate([corner, corner + np.maximum(np.round(side), 1)], axis=1)


def _crops(photo: Image.Image, boxes: np.ndarray, size: int) -> Float[Tensor, "n 3 size size"]:
    """The squares around boxes; black where they leave the photo, as in the nets' training."""
    squares = _squares(boxes).astype(int).tolist()
    return _input([photo.crop(box).resize((size, size), Image.Resampling.BILINEAR) for box in squares])


def _chosen(
    boxes: np.ndarray, offsets: Tensor, logits: Tensor, threshold: float, *, inside: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Corrected boxes that are likely enough and not twice the same, their probabilities, and which they were."""
    scores = logits.softmax(1)[:, 1].numpy()
    squares = _squares(boxes)
    corrected = squares + offsets.numpy() * (squares[:, 2:3] - squares[:, :1])
    likely = np.flatnonzero(scores > threshold)
    kept = likely[_suppressed(corrected[likely], scores[likely], 0.7, inside=inside)]
    return corrected[kept], scores[kept], kept


def _suppressed(boxes: np.ndarray, scores: np.ndarray, overlap: float, *, inside: bool = False) -> np.ndarray:
    """Indices of the boxes, the likeliest first, without those that overlap a likelier one by more than `overlap`.

    Overlap is intersection over union, or with `inside` over the smaller box, so that of nested boxes one is left.
    """
    order = np.argsort(-scores, kind="stable")
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    kept: list[int] = []
    while len(order):
        first, order = int(order[0]), order[1:]
        kept.append(first)
        sides = np.minimum(boxes[first, 2:], boxes[order, 2:]) - np.maximum(boxes[first, :2], boxes[order, :2])
        common = sides.clip(min=0).prod(axis=1)
        whole = np.minimum(area[first], area[order]) if inside else area[first] + area[order] - common
        order = order[common <= overlap * whole]
    return np.array(kept, dtype=np.int64)


def _xy(places: Tensor) -> Float[np.ndarray, "b 5 2"]:
    """The third net's x0 ... x4 y0 ... y4 as points."""
    return places.reshape(-1, 2, 5).transpose(1, 2).double().numpy()


# -- aligning -----------------------------------------------------------------------------------------------------

UPRIGHT = np.array([[0.33, 0.38], [0.67, 0.38], [0.50, 0.56], [0.36, 0.74], [0.64, 0.74]])
"""Where the third net sees the points of an upright face, in shares of its crop."""
JITTERS = np.array([[x, y, side] for side in (0.9, 1.0, 1.1) for x in (-0.04, 0.04) for y in (-0.04, 0.04)])
"""Crops whose landmarks are averaged: shift of the centre and side, in shares of the upright crop."""

MOST_MOVED = 0.15
"""Points that move further when found again, in shares of the upright crop, are not trusted."""


def _refined(photo: Image.Image, net: _Net, face: Face) -> Face:
    """The face with its points and its probability found again where it stands upright, in several crops.

    The net was trained on upright faces: on CelebA turned by 25 degrees its points are off by 4 % of the distance of
    the eyes, found again by 0.2 %.
    """
    frame, margin = 120, 12
    points, score = face.points, face.score
    for jitters in (np.array([[0.0, 0.0, 1.0]]), JITTERS):
        inner = frame - 2 * margin
        upright = similarity(points, UPRIGHT * inner + margin)
        picture = Image.fromarray(resample(photo, upright, frame))
        centre, side = frame / 2 + inner * jitters[:, None, :2], inner * jitters[:, None, 2:]
        corners = centre - side / 2
        boxes = np.concatenate([corners, corners + side], axis=2)[:, 0].tolist()
        crops = [picture.resize((48, 48), Image.Resampling.BILINEAR, box=tuple(box)) for box in boxes]
        _, places, logits = net(_input(crops))
        score = float(logits.softmax(1)[:, 1].mean())
        moved = (corners + side * _xy(places)).mean(axis=0)
        if np.abs(moved - apply(upright, points)).max() > MOST_MOVED * inner:
            return dataclasses.replace(face, score=score)  # a profile, which the net knows little of
        points = apply(inverse(upright), moved)
    return dataclasses.replace(face, points=points, score=score)


def similarity(source: Float[np.ndarray, "n 2"], target: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "2 3"]:
    """The rotation, scaling and shift that brings `source` closest to `target` in the least squares (Umeyama 1991).

    Never a reflection.

    Raises:
        ValueError: all points of `source` are one.
    """
    from_mean, to_mean = source.mean(axis=0), target.mean(axis=0)
    centred = source - from_mean
    if not (variance := (centred**2).sum()) > 0:
        raise ValueError("a similarity needs two different points")
    # In two dimensions eqs. 40 to 43 come down to one complex number: scale times rotation.
    x, y = centred.T
    u, v = (target - to_mean).T
    a, b = (x * u + y * v).sum() / variance, (x * v - y * u).sum() / variance
    turn = np.array([[a, -b], [b, a]])
    return np.concatenate([turn, (to_mean - turn @ from_mean)[:, None]], axis=1)


def apply(transform: Float[np.ndarray, "2 3"], points: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
    """The points, moved."""
    return points @ transform[:, :2].T + transform[:, 2]


def inverse(transform: Float[np.ndarray, "2 3"]) -> Float[np.ndarray, "2 3"]:
    """The transform back."""
    back = np.linalg.inv(transform[:, :2])
    return np.concatenate([back, -(back @ transform[:, 2])[:, None]], axis=1)


def resample(photo: Image.Image, transform: Float[np.ndarray, "2 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The square that `transform`, from the photo's pixels to the square's, cuts out; antialiased.

    Beyond the photo its outermost pixels go on: a mirror would show a second face beside one that the edge cuts.
    """
    fine = 2 * size  # turned at twice the resolution, so that the last step can average
    back = inverse(transform * (fine / size))
    steps = np.arange(fine) + 0.5
    places = apply(back, np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2))
    # Only the part that is needed is read, and reduced before it is turned: a large photo costs no more than a small.
    step = max(math.sqrt(abs(np.linalg.det(back[:, :2]))), 1.0)  # pixels of the photo for one of the fine square
    low = np.clip(np.floor(places.min(axis=0) - 4 * step), 0, np.array(photo.size) - 1).astype(int)
    high = np.clip(np.ceil(places.max(axis=0) + 4 * step), low + 1, photo.size).astype(int)
    reduced = np.maximum(np.round((high - low) / step).astype(int), 1)
    box = (*low.tolist(), *high.tolist())
    part = photo.resize(tuple(reduced.tolist()), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    grid = torch.tensor((places - low) / (high - low) * 2 - 1, dtype=torch.float32).reshape(1, fine, fine, 2)
    pixels = torch.tensor(np.asarray(part), dtype=torch.float32).permute(2, 0, 1)[None]
    turned = F.grid_sample(pixels, grid, mode="bicubic", padding_mode="border", align_corners=False)[0]
    square = Image.fromarray(turned.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy())
    return np.array(square.resize((size, size), Image.Resampling.LANCZOS), dtype=np.uint8)


def deviation(photo: Image.Image, points: Float[np.ndarray, "5 2"], template: Sequence[float]) -> float:
    """How far the aligned crop is from the plain centred square: the worst corner's distance, in shares of the side."""
    corner, side = _square(photo)
    wanted = similarity((points - corner) / side, _places(template))
    corners = np.array([[0, 0], [1, 0], [0, 1], [1, 1]], dtype=np.float64)
    return float(np.linalg.norm(apply(inverse(wanted), corners) - corners, axis=1).max())


def _places(template: Sequence[float]) -> Float[np.ndarray, "5 2"]:
    if len(template) != 10:
        raise ValueError(f"a template has five points, ten numbers; this one has {len(template)}")
    places = np.array(template, dtype=np.float64).reshape(5, 2)
    if not np.isfinite(places).all() or (places == places[0]).all():
        raise ValueError(f"a template has different points, as shares of the side; this one is {places.tolist()}")
    return places


@dataclasses.dataclass(frozen=True, kw_only=True)
class Portrait:
    """A photo made ready for a model of aligned portraits."""

    pixels: UInt8[np.ndarray, "size size 3"]
    landmarks: tuple[float, ...]
    """The points in it, x0 y0 x1 y1 ..., in shares of the side."""
    transform: Float[np.ndarray, "2 3"]
    """From the photo's pixels to the square's."""
    photo_size: tuple[int, int]
    """Width and height of the photo."""
    num_faces: int
    """Faces of the photo."""
    zoom: float
    """Pixels of it for one of the photo, along a side."""
    outside: float = 0.0
    """Share of it that lies outside of the photo."""
    which: Faces = "largest"
    """Of several faces, those that are taken."""
    decoded: tuple[str, ...] = ()
    """Notes of `images.decode`."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the photo's owner should know; mostly nothing."""
        several = {"largest": "the largest of several faces was taken", "all": "all of its faces were taken"}
        notes = {
            f"{several[self.which]} ({self.num_faces})": self.num_faces > 1,
            f"much of the crop lies outside of the photo ({self.outside:.0%})": self.outside > MUCH_OUTSIDE,
            f"the face is small and was enlarged ({self.zoom:.1f} times)": self.zoom > SMALL,
        }
        return (*self.decoded, *(note for note, holds in notes.items() if holds))

    @property
    def note(self) -> str:
        """The notes in one line."""
        return "; ".join(self.notes)


def read_portrait(data: bytes, size: int, template: Sequence[float], *, name: str = "image") -> Portrait:
    """An image file with its largest face brought to the template.

    An image that is aligned already comes out as `images.read_square` has it, to the bit: so did training read it.

    Raises:
        InputError: as `images.decode`, or the weights are not installed.
        NoFaceError: there is no face.
    """
    photo = images.decode(data, name=name)
    return portraits(photo, size, template, square=lambda: images.read_square(data, size, name=name), name=name)[0]


def portraits(
    photo: Image.Image,
    size: int,
    template: Sequence[float],
    *,
    square: Callable[[], UInt8[np.ndarray, "size size 3"]],
    which: Faces = "largest",
    name: str = "image",
) -> list[Portrait]:
    """The faces of a photo, as `images.decode` returns it, each brought to the template; the largest first.

    `square`: gives the photo's largest centred square as training read it, for a face that is aligned already.

    Raises:
        InputError: the weights are not installed.
        NoFaceError: there is no face.
    """
    found = find(photo)
    if not found:
        raise NoFaceError(
            f"{name}: no face was found; turn the photo upright, crop it closer to one face, or take align none"
        )
    taken = found[:1] if which == "largest" else found
    common: Any = {
        "photo_size": photo.size,
        "num_faces": len(found),
        "which": which,
        "decoded": photo.info.get("notes", ()),
    }
    return [_portrait(photo, face.points, size, template, square, common) for face in taken]


def _portrait(
    photo: Image.Image,
    points: Float[np.ndarray, "5 2"],
    size: int,
    template: Sequence[float],
    square: Callable[[], UInt8[np.ndarray, "size size 3"]],
    common: Mapping[str, Any],
) -> Portrait:
    if deviation(photo, points, template) <= ALIGNED:
        corner, side = _square(photo)
        return Portrait(
            pixels=square(),
            landmarks=_flat((points - corner) / side),
            transform=np.concatenate([np.eye(2), -corner[:, None]], axis=1) * (size / side),
            zoom=size / side,
            **common,
        )
    to_square = similarity(points, _places(template) * size)
    return Portrait(
        pixels=resample(photo, to_square, size),
        landmarks=_flat(apply(to_square, points) / size),
        transform=to_square,
        zoom=math.sqrt(abs(np.linalg.det(to_square[:, :2]))),
        outside=_outside(photo, inverse(to_square), size),
        **common,
    )


def _outside(photo: Image.Image, back: Float[np.ndarray, "2 3"], size: int) -> float:
    """The share of the square that lies outside of the photo, on a grid of places."""
    steps = (np.arange(16) + 0.5) / 16 * size
    places = apply(back, np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2))
    return float(1 - ((places >= 0) & (places <= np.array(photo.size))).all(axis=1).mean())


def _square(photo: Image.Image) -> tuple[np.ndarray, int]:
    """Upper left corner and side of what `images.to_square` cuts out."""
    side = min(photo.size)
    return np.array([(photo.width - side) // 2, (photo.height - side) // 2]), side


def _flat(points: np.ndarray) -> tuple[float, ...]:
    return tuple(round(float(value), 6) for value in points.ravel())
