"""Results at the photo's own size, on drawn scenes, whose true counterpart there is at any size.

faithful   a square as small as a network's carried to the photo, beside the same square enlarged bicubically and the
           photo with the enlarged difference: PSNR, SSIM and share of the truth's detail (mean step between
           neighbouring pixels). The square is the true one, as a perfect network would draw it, or a checkpoint's
untouched  where the square is the source's: the largest difference from the photo; and how far the photo moved
seams      a face's square turned and put back: steps across its border beside the steps around, faded and pasted
sheet.png  some scenes, what the checkpoint makes of them at their own size, and the truth
cost       a photo of 12 megapixels: seconds, and memory above that of the decoded photo
"""

import dataclasses
import json
import threading
import time
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from ddpm_core import checkpoint, faces, full_size, images, provenance, storage
from ddpm_core.errors import InputError
from ddpm_core.translator import Translator
from jobs.common import cli
from jobs.common.numbers import Within
from jobs.datasets.options import Scene
from jobs.datasets.sources import rendered
from jobs.evaluation import metrics

Pixels = UInt8[np.ndarray, "h w 3"]
SCENES: tuple[Scene, ...] = ("landscapes", "portraits")
FACTORS = (2, 4)
SIDE, DRAWN_SIDE = 64, rendered.MAX_SIZE
"""Of the square, and of the photo."""
NUM_SHOWN = 4
"""Scenes of the sheet."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Results at the photo's own size: how true they are, what stays untouched, seams, cost."""

    output: str = "runs/benchmark/full-size"
    """Folder or s3:// prefix for full-size.json."""
    checkpoint: str | None = None
    """A run or checkpoint of drawn landscapes or portraits, to be measured beside the perfect network."""
    num_scenes: Annotated[int, Within(1)] = 50
    """Scenes of each kind."""
    num_tiled: Annotated[int, Within(0)] = 0
    """Of the checkpoint's scenes, so many are drawn in tiles as well, beside the other ways."""
    seed: int = 1
    """Of the scenes; that of the checkpoint's data is 0 by default."""
    megapixels: float = 12.0
    """Of the photo whose cost is measured."""


def run(options: Options) -> int:
    """Measure; write full-size.json; print tables."""
    if not 1 <= options.megapixels <= images.MAX_PIXELS / 1e6:
        raise InputError(
            f"--megapixels is {options.megapixels:g}; it must lie between 1 and {images.MAX_PIXELS / 1e6:g}"
        )
    output = storage.absolute(options.output, flag="--output")
    storage.check_writable(output)
    result: dict[str, Any] = {"options": dataclasses.asdict(options), "environment": provenance.environment()}
    rows = [row for scene in SCENES for factor in FACTORS for row in faithful(scene, factor, options)]
    if options.checkpoint is not None:
        trained = opened(options.checkpoint)
        rows += of_checkpoint(trained, options)
        storage.write_bytes(storage.join(output, "sheet.png"), sheet(trained, options))
    result |= {"faithful": rows, "untouched": untouched(options), "seams": seams(options), "cost": cost(options)}
    print("| scenes | square | photo | way | PSNR, dB | SSIM | detail |\n|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['scenes']} | {row['square']} | {row['photo']} | {row['way']} | {row['psnr']:.2f} | "
            f"{row['ssim']:.3f} | {row['detail']:.2f} |"
        )
    for name in ("untouched", "seams", "cost"):
        print(f"{name}: {', '.join(f'{key} {value:.3g}' for key, value in result[name].items())}")
    storage.write_bytes(storage.join(output, "full-size.json"), json.dumps(result, indent=2).encode())
    print(f"written: {storage.join(output, 'full-size.json')}")
    return cli.DONE


# -- how true -----------------------------------------------------------------------------------------------------


def enlarged(photo: Image.Image, view: full_size.View, result: Pixels) -> Pixels:
    """The square as large as the photo."""
    return np.asarray(Image.fromarray(result).resize(photo.size, Image.Resampling.BICUBIC))


def difference(photo: Image.Image, view: full_size.View, result: Pixels) -> Pixels:
    """The photo and the enlarged difference."""
    change = torch.tensor(result.astype(np.float32) - view.pixels).permute(2, 0, 1)[None]
    large = torch.nn.functional.interpolate(change, photo.size[::-1], mode="bicubic", antialias=True)[0]
    return (np.asarray(photo) + large.permute(1, 2, 0).numpy()).round().clip(0, 255).astype(np.uint8)


WAYS: dict[str, Callable[[Image.Image, full_size.View, Pixels], Pixels]] = {
    "enlarged": enlarged,
    "difference": difference,
    "carried": full_size.carry,
}


def pair(scene: Scene, options: Options, index: int, size: int, domain: int = 0) -> tuple[Image.Image, Image.Image]:
    """A drawn photo and its counterpart."""
    parameters = rendered.parameters_of(scene, options.seed, index)
    drawn = (rendered.draw(scene, parameters, each, size) for each in (domain, 1 - domain))
    one, other = map(Image.fromarray, drawn)
    return one, other


def faithful(scene: Scene, factor: int, options: Options) -> list[dict[str, Any]]:
    """Each way with a perfect network."""
    side = DRAWN_SIDE // factor
    pairs = [pair(scene, options, index, DRAWN_SIDE) for index in range(options.num_scenes)]
    results = [images.squeezed(truth, side) for _, truth in pairs]
    return judged(scene, side, pairs, results)


Trained = tuple[Translator, Scene, str, int]


def opened(uri: str) -> Trained:
    """A trained network, the scenes that it knows, the side to make of them and the index of that they are on.

    Raises:
        InputError: it was trained on other images.
    """
    translate = Translator(checkpoint.load(uri))
    config = translate.config
    scene = next((scene for scene in SCENES if config.domains == rendered.DOMAINS[scene]), None)
    if scene is None:
        raise InputError(
            f"--checkpoint {uri} has the domains {', '.join(config.domains)}; give one of drawn scenes "
            f"({'; '.join(', '.join(rendered.DOMAINS[each]) for each in SCENES)})"
        )
    wanted = (config.target_domains or config.domains)[-1]
    return translate, scene, wanted, 1 - config.domains.index(wanted)


def sheet(trained: Trained, options: Options) -> bytes:
    """The first scenes, what a trained network makes of them at their own size, and the truth below each other."""
    translate, scene, wanted, domain = trained
    pairs = [pair(scene, options, index, DRAWN_SIDE, domain) for index in range(NUM_SHOWN)]
    made = translate.at_own_size([photo for photo, _ in pairs], wanted)
    rows = [[np.asarray(photo) for photo, _ in pairs], made, [np.asarray(truth) for _, truth in pairs]]
    return images.encode_png(images.grid(rows, gap=4))


def of_checkpoint(trained: Trained, options: Options) -> list[dict[str, Any]]:
    """Each way with a trained network."""
    translate, scene, wanted, domain = trained
    config = translate.config
    rows = []
    for factor in FACTORS:
        pairs = [pair(scene, options, index, factor * config.image_size, domain) for index in range(options.num_scenes)]
        sources = np.stack([images.squeezed(photo, config.image_size) for photo, _ in pairs])
        made, side = translate(sources, wanted), config.image_size
        rows += judged(f"{scene}, checkpoint, {wanted}", side, pairs, made)
        if some := pairs[: options.num_tiled]:
            name = f"the first {len(some)} of them"
            rows += judged(name, side, some, made[: len(some)])
            tiled = np.stack([translate.in_tiles(photo, wanted) for photo, _ in some])
            rows.append(row_of(name, side, "tiles", tiled, truths_of(some)))
    return rows


Pairs = list[tuple[Image.Image, Image.Image]]


def truths_of(pairs: Pairs) -> UInt8[np.ndarray, "n h w 3"]:
    return np.stack([np.asarray(truth) for _, truth in pairs])


def judged(scenes: str, side: int, pairs: Pairs, results: Any) -> list[dict[str, Any]]:
    rows = []
    for way, function in WAYS.items():
        made = np.stack(
            [
                function(photo, full_size.whole(photo, side), result)
                for (photo, _), result in zip(pairs, results, strict=True)
            ]
        )
        rows.append(row_of(scenes, side, way, made, truths_of(pairs)))
    return rows


def row_of(
    scenes: str, side: int, way: str, made: UInt8[np.ndarray, "n h w 3"], truths: UInt8[np.ndarray, "n h w 3"]
) -> dict[str, Any]:
    return {
        "scenes": scenes,
        "square": side,
        "photo": truths.shape[1],
        "way": way,
        "psnr": float(metrics.psnr(made, truths).mean()),
        "ssim": float(metrics.ssim(made, truths).mean()),
        "detail": steps(made) / steps(truths),
    }


def steps(pictures: np.ndarray) -> float:
    """The mean step between neighbouring pixels."""
    values = pictures.astype(np.float32)
    return float(np.abs(np.diff(values, axis=1)).mean() + np.abs(np.diff(values, axis=2)).mean())


# -- what stays ---------------------------------------------------------------------------------------------------


def untouched(options: Options) -> dict[str, float]:
    """Squares changed in their middle only: the largest difference elsewhere, in levels, and shifts in pixels."""
    largest, shifts = 0.0, []
    quarter = SIDE // 4
    reach = 2 * full_size.RADIUS + 2
    for index in range(options.num_scenes):
        photo, truth = pair("landscapes", options, index, DRAWN_SIDE)
        view, result = full_size.whole(photo, SIDE), images.squeezed(truth, SIDE)
        part = view.pixels.copy()
        part[quarter:-quarter, quarter:-quarter] = result[quarter:-quarter, quarter:-quarter]
        off = np.abs(full_size.carry(photo, view, part).astype(int) - np.asarray(photo))
        edge = (quarter - reach) * DRAWN_SIDE // SIDE
        off[edge:-edge, edge:-edge] = 0
        largest = max(largest, float(off.max()))
        shifts.append(shift(np.asarray(photo), full_size.carry(photo, view, view.pixels // 2)))
    return {"largest_difference": largest, "largest_shift_px": float(np.max(shifts))}


def shift(before: Pixels, after: Pixels) -> float:
    """How far an image moved, in pixels, by phase correlation: the mean of the peak's surroundings."""
    spectra = [np.fft.fft2(each.mean(-1) - each.mean()) for each in (before.astype(float), after.astype(float))]
    cross = spectra[0] * spectra[1].conj()
    peak = np.fft.fftshift(np.fft.ifft2(cross / np.maximum(np.abs(cross), 1e-9)).real)
    row, column = np.unravel_index(peak.argmax(), peak.shape)
    near = peak[row - 1 : row + 2, column - 1 : column + 2].clip(min=0)
    offsets = np.array([-1, 0, 1])
    y = row - peak.shape[0] // 2 + (near.sum(1) * offsets).sum() / near.sum()
    x = column - peak.shape[1] // 2 + (near.sum(0) * offsets).sum() / near.sum()
    return float(np.hypot(x, y))


def seams(options: Options) -> dict[str, float]:
    """Squares of a part of the photo, turned by 20 degrees and brightened by 40 levels: the mean step between pixels
    across their border beside that of the 12 pixels on either side of it, where the change fades out and where it is
    pasted in. 1: no border to be seen."""
    found: dict[str, list[float]] = {"faded": [], "pasted": []}
    angle, scale = np.radians(20), SIDE / 140
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    transform = np.concatenate([turn, (SIDE / 2 - turn.sum(1) * DRAWN_SIDE / 2)[:, None]], axis=1)
    rows, columns = np.mgrid[:DRAWN_SIDE, :DRAWN_SIDE] + 0.5
    places = faces.apply(transform, np.stack([columns, rows], -1).reshape(-1, 2)).reshape(DRAWN_SIDE, DRAWN_SIDE, 2)
    inside = np.minimum(places, SIDE - places).min(-1) / scale  # pixels of the photo from the border, outside negative
    across = (inside[:, 1:] > 0) != (inside[:, :-1] > 0)
    around = (np.abs(inside[:, 1:]) < 12) & ~across
    for index in range(options.num_scenes):
        photo, _ = pair("landscapes", options, index, DRAWN_SIDE)
        view = full_size.View(pixels=faces.resample(photo, transform, SIDE), transform=transform, size=photo.size)
        result = np.minimum(view.pixels, 215) + 40
        pasted = np.asarray(photo) + np.where(inside[..., None] > 0, 40.0, 0.0)
        for name, made in {"faded": full_size.carry(photo, view, result), "pasted": pasted}.items():
            step = np.abs(np.diff(made.mean(-1), axis=1))
            found[name].append(float(step[across].mean() / step[around].mean()))
    return {name: float(np.mean(values)) for name, values in found.items()}


# -- cost ---------------------------------------------------------------------------------------------------------


def cost(options: Options) -> dict[str, float]:
    """Of one photo, on one thread: seconds to look at it, to carry the change over and to write the PNG; the most
    memory that this took, the decoded photo apart."""
    width = round((options.megapixels * 1e6 * 4 / 3) ** 0.5)
    small, _ = pair("landscapes", options, 0, DRAWN_SIDE)
    data = images.encode_png(np.asarray(small.resize((width, round(width * 3 / 4)), Image.Resampling.BICUBIC)))
    torch.set_num_threads(1)
    began = time.perf_counter()
    [view] = full_size.look(data, SIDE, output_size="own")
    looked = time.perf_counter()
    photo = images.decode(data)
    with Memory() as memory:
        decoded = time.perf_counter()
        result = full_size.carry(photo, view, 255 - view.pixels)
        carried = time.perf_counter()
        images.encode_png(result)
        written = time.perf_counter()
    return {
        "megapixels": photo.width * photo.height / 1e6,
        "look_s": looked - began,
        "carry_s": carried - decoded,
        "png_s": written - carried,
        "more_mib": memory.most_bytes / 2**20,
    }


class Memory:
    """The most memory that this process held beyond what it held at the beginning, looked at every few milliseconds."""

    def __enter__(self) -> "Memory":
        self.ended = threading.Event()
        self.before, self.most_bytes = resident(), 0
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.ended.wait(0.005):
            self.most_bytes = max(self.most_bytes, resident() - self.before)


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096
