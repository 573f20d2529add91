"""The invisible mark: how well it hides, after which changes it is found, and how often where there is none.

Drawn portraits and landscapes, at 512 pixels enlarged from 256 and given grain, are marked, changed and looked at.
Images that were not marked, every second one changed likewise, show how often the detector is wrong: its threshold is
set by a bound, the rate here is counted.
"""

import dataclasses
import functools
import io
import json
import math
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ddpm_core import keyed_mark, provenance, storage
from jobs.common import cli, intervals, workers
from jobs.common.numbers import NumWorkers, Seed, Within
from jobs.common.progress import Progress
from jobs.datasets.options import Scene
from jobs.datasets.sources import rendered

Pixels = UInt8[np.ndarray, "h w 3"]
SCENES: tuple[Scene, ...] = ("landscapes", "portraits")
SIZES = (64, 128, 256, 512)
IMAGES_PER_TASK = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The invisible mark: how well it hides, after which changes it is found, and how often where there is none."""

    output: str = "runs/benchmark/marks"
    """Folder or s3:// prefix for marks.json."""
    num_images: Annotated[int, Within(1)] = 200
    """Marked images of each size."""
    num_unmarked: Annotated[int, Within(1)] = 10_000
    """Images without a mark, of 64 pixels."""
    seed: Seed = 1
    """Of the scenes and the crops."""
    num_workers: NumWorkers = 0
    """Processes on Ray; 0: this one."""


# -- what happens to images -----------------------------------------------------------------------------------------


def jpeg(pixels: Pixels, draw: np.random.Generator, quality: int) -> Pixels:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def resized(pixels: Pixels, draw: np.random.Generator, factor: float) -> Pixels:
    size = (round(pixels.shape[1] * factor), round(pixels.shape[0] * factor))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def cropped(pixels: Pixels, draw: np.random.Generator, share: float) -> Pixels:
    """Without this share of width and height, from either side as it comes."""
    height, width = pixels.shape[:2]
    rows, columns = math.floor(height * share), math.floor(width * share)
    top, left = draw.integers(rows + 1), draw.integers(columns + 1)
    return pixels[top : top + height - rows, left : left + width - columns]


def turned(pixels: Pixels, draw: np.random.Generator, degrees: float) -> Pixels:
    return np.asarray(Image.fromarray(pixels).rotate(degrees, Image.Resampling.BICUBIC))


def contrast(pixels: Pixels, draw: np.random.Generator, factor: float) -> Pixels:
    return ((pixels - 127.5) * factor + 127.5).round().clip(0, 255).astype(np.uint8)


def one_after_another(*changes: Callable[..., Pixels]) -> Callable[..., Pixels]:
    def change(pixels: Pixels, draw: np.random.Generator) -> Pixels:
        for each in changes:
            pixels = each(pixels, draw)
        return pixels

    return change


JPEG_75, HALF = functools.partial(jpeg, quality=75), functools.partial(resized, factor=0.5)
CROP_5, CROP_10 = (functools.partial(cropped, share=share) for share in (0.05, 0.1))
CHANGES: dict[str, Callable[..., Pixels]] = {
    "none": lambda pixels, draw: pixels,
    "JPEG 75": JPEG_75,
    "JPEG 50": functools.partial(jpeg, quality=50),
    "half the size": HALF,
    "a third": functools.partial(resized, factor=1 / 3),
    "crop 5 %": CROP_5,
    "crop 10 %": CROP_10,
    "crop 5 %, JPEG 75": one_after_another(CROP_5, JPEG_75),
    "half, JPEG 75": one_after_another(HALF, JPEG_75),
    "crop 5 %, half, JPEG 75": one_after_another(CROP_5, HALF, JPEG_75),
    "contrast + 10 %": functools.partial(contrast, factor=1.1),
    "crop 15 %": functools.partial(cropped, share=0.15),
    "turned by 1 degree": functools.partial(turned, degrees=1),
    "mirrored": lambda pixels, draw: pixels[:, ::-1],
}


def drawn(seed: int, index: int, size: int) -> Pixels:
    """A portrait or a landscape, by turns, in either domain."""
    scene = SCENES[index % 2]
    parameters = rendered.parameters_of(scene, seed, index // 4)
    pixels = rendered.draw(scene, parameters, index // 2 % 2, min(size, rendered.MAX_SIZE))
    if size <= rendered.MAX_SIZE:
        return pixels
    large = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))
    grain = np.random.default_rng((seed, index)).normal(0, 2, (size, size, 1))
    return (large + grain).round().clip(0, 255).astype(np.uint8)


# -- one image ------------------------------------------------------------------------------------------------------


def look_at_marked(task: list[tuple[int, int]], seed: int) -> list[dict[str, Any]]:
    """Rows of (size, index): PSNR, and the score after each change."""
    rows = []
    for size, index in task:
        image = drawn(seed, index, size)
        marked = keyed_mark.embed(image, keyed_mark.PUBLIC)
        error = np.square(marked.astype(np.float64) - image).mean()
        draw = np.random.default_rng((seed, size, index))
        scores = {name: keyed_mark.score(change(marked, draw), keyed_mark.PUBLIC) for name, change in CHANGES.items()}
        rows.append({"size": size, "psnr": 10 * math.log10(255**2 / error), "scores": scores})
    return rows


def look_at_unmarked(task: list[int], seed: int) -> list[float]:
    """The scores of images as they are drawn, and of every second one changed."""
    scores, changes = [], list(CHANGES.values())
    for index in task:
        image, draw = drawn(seed, index, SIZES[0]), np.random.default_rng((seed, index))
        changed = changes[index // 2 % len(changes)](image, draw) if index % 2 else image
        scores.append(keyed_mark.score(changed, keyed_mark.PUBLIC))
    return scores


def through(work: Callable[..., list[Any]], items: list[Any], what: str, options: Options) -> Iterator[Any]:
    tasks = [items[first : first + IMAGES_PER_TASK] for first in range(0, len(items), IMAGES_PER_TASK)]
    done = workers.mapped(
        functools.partial(work, seed=options.seed), tasks, len(tasks), num_workers=options.num_workers
    )
    with Progress(total=len(items), unit="image", description=what) as progress:
        for rows in done:
            yield from rows
            progress.update(len(rows))


# -- all of them ----------------------------------------------------------------------------------------------------


def run(options: Options) -> int:
    """Measure; write marks.json; print tables."""
    output = storage.absolute(options.output, flag="--output")
    storage.check_writable(output)
    result: dict[str, Any] = {"options": dataclasses.asdict(options), "environment": provenance.environment()}
    items = [(size, index) for index in range(options.num_images) for size in SIZES]
    rows = list(through(look_at_marked, items, "marked", options))
    scores = np.array(list(through(look_at_unmarked, list(range(options.num_unmarked)), "unmarked", options)))
    result |= {"found": found(rows), "hidden": hidden(rows), "false": false(scores)}
    storage.write_bytes(storage.join(output, "marks.json"), json.dumps(result, indent=2).encode())
    print(f"| found after | {' | '.join(f'{size} px' for size in SIZES)} |\n|{'---|' * (len(SIZES) + 1)}")
    for name in CHANGES:
        print(f"| {name} | {' | '.join(told(result['found'][str(size)][name]) for size in SIZES)} |")
    psnr = [f"{each['mean']:.1f}, {each['least']:.1f}" for each in result["hidden"].values()]
    print(f"| PSNR, dB: mean, least | {' | '.join(psnr)} |")
    wrong = result["false"]
    print(
        f"unmarked: {wrong['images']:,} images, {wrong['taken']} taken for marked ({wrong['low']:.4%} to "
        f"{wrong['high']:.4%}); highest score {wrong['highest']:.2f}, {wrong['needed']:.2f} needed"
    )
    print(f"written: {storage.join(output, 'marks.json')}")
    return cli.DONE


def found(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """By size and change: the share that was found with its interval, and the median score."""
    told: dict[str, dict[str, dict[str, float]]] = {}
    for size in SIZES:
        for name in CHANGES:
            scores = np.array([row["scores"][name] for row in rows if row["size"] == size])
            share = intervals.bootstrap((scores >= keyed_mark.NEEDED).astype(float))
            told.setdefault(str(size), {})[name] = {**dataclasses.asdict(share), "score": float(np.median(scores))}
    return told


def hidden(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    values = {str(size): [row["psnr"] for row in rows if row["size"] == size] for size in SIZES}
    return {size: {"mean": float(np.mean(each)), "least": min(each)} for size, each in values.items()}


def false(scores: np.ndarray) -> dict[str, float]:
    taken = scores >= keyed_mark.NEEDED
    share = intervals.bootstrap(taken.astype(float))
    return {
        "images": len(scores),
        "taken": int(taken.sum()),
        "low": share.low,
        "high": share.high,
        "highest": float(scores.max()),
        "needed": keyed_mark.NEEDED,
        "bound": keyed_mark.FALSE_RATE,
    }


def told(share: dict[str, float]) -> str:
    return f"{share['mean']:.1%} ({share['low']:.1%} to {share['high']:.1%})"
