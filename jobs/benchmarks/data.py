"""Images on their way into training, beside the usual loaders, in one interleaved run on this machine.

All deliver the same: batches of b 3 s s float32 in [-1, 1], shuffled, from the same JPEG files of 178 x 218 pixels (the
size of CelebA's; cut from the map of the Earth unless --source names a folder). Shown is the CPU time an image, that
of threads and children included, and how many times as much the usual way takes: PyTorch's DataLoader over the files
with Pillow. Wall times of single processes on a shared machine say little and are left out.

    once     shards to this node's disk: read, decode, write; local and, with --s3, from a bucket
    epoch    what every epoch costs: rows out of the page cache, without and with all that training draws beside
    peers    DataLoader with Pillow; the data set of denoising-diffusion-pytorch; webdataset
    prepare  a JPEG file to the stored square: ours, and Pillow's plain way
"""

import dataclasses
import functools
import importlib
import io
import itertools
import json
import os
import resource
import statistics
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils.data
from PIL import Image
from torch import Tensor

from ddpm_core import images, provenance, storage
from ddpm_core.config import ModelConfig
from ddpm_core.errors import InputError
from jobs.common import cli
from jobs.datasets import cache, writing
from jobs.datasets.format import DatasetCard, Row
from jobs.datasets.options import Encoding
from jobs.training import batches
from jobs.training.options import TrainOptions

WIDTH, HEIGHT, QUALITY = 178, 218, 90
"""Of the JPEG files that are made."""
CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Images on their way into training beside DataLoader with Pillow and other loaders: CPU time an image."""

    output: str = "runs/benchmark/data"
    """Folder or s3:// prefix for data.json."""
    source: str | None = None
    """Folder of JPEG files to take instead of pieces of the Earth."""
    num_images: int = 1000
    """Images in the set."""
    image_sizes: tuple[int, ...] = (64, 128)
    """Sides of the squares that training wants, in pixels."""
    batch_size: int = 64
    """Images in a batch."""
    rounds: int = 3
    """Times each way is measured; medians are shown."""
    s3: str | None = None
    """s3:// prefix to put the shards under as well."""


Way = Callable[[], Iterator[Tensor]]
"""One pass over all images, in batches."""


def run(options: Options) -> int:
    """Measure; write data.json; print a table for each size."""
    check(options)
    output = storage.absolute(options.output, flag="--output")
    storage.check_writable(output)
    torch.set_num_threads(1)
    result: dict[str, Any] = {"options": dataclasses.asdict(options), "environment": provenance.environment()}
    with tempfile.TemporaryDirectory(prefix="ddpm-benchmark-") as folder:
        os.environ[cache.ROOT] = f"{folder}/cache"
        files = jpeg_files(options, Path(folder) / "files")
        result["rows"] = [row for size in options.image_sizes for row in measure(files, size, options, Path(folder))]
    storage.write_bytes(storage.join(output, "data.json"), json.dumps(result, indent=2).encode())
    print(f"written: {storage.join(output, 'data.json')}")
    return cli.DONE


def check(options: Options) -> None:
    for flag, value in (
        ("--num-images", options.num_images),
        ("--batch-size", options.batch_size),
        ("--rounds", options.rounds),
        ("--image-sizes", min(options.image_sizes, default=0)),
    ):
        if value < 1:
            raise InputError(f"{flag} is {value}; it must be 1 or more")
    if options.batch_size > options.num_images:
        raise InputError(f"--batch-size {options.batch_size} is more than --num-images {options.num_images}")
    if options.s3 is not None:
        storage.check_writable(storage.absolute(options.s3, flag="--s3"), flag="--s3")


def jpeg_files(options: Options, folder: Path) -> list[Path]:
    """The files that every way starts from."""
    if options.source is not None:
        found = sorted(path for path in Path(options.source).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
        if len(found) < options.num_images:
            raise InputError(f"--source {options.source} holds {len(found)} JPEG files; --num-images wants more")
        return found[: options.num_images]
    from jobs.datasets.sources import earth

    world = images.decode((earth.maps_folder() / "day.avif").read_bytes())
    folder.mkdir()
    random = np.random.default_rng(0)
    files = []
    for number in range(options.num_images):
        left, top = int(random.integers(world.width - WIDTH)), int(random.integers(world.height - HEIGHT))
        files.append(folder / f"{number:06d}.jpg")
        world.crop((left, top, left + WIDTH, top + HEIGHT)).save(files[-1], quality=QUALITY)
    return files


def measure(files: list[Path], size: int, options: Options, folder: Path) -> list[dict[str, Any]]:
    """Every way at one size, taking turns; prints and returns the table."""
    ways = {
        **our_ways(files, size, options, folder / f"{size}"),
        **peers(files, size, options.batch_size, folder / f"{size}.tar"),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(options.rounds + 1):
        for name, way in ways.items():
            before = cpu_s()
            count = sum(len(batch) for batch in way())
            assert count >= len(files) - options.batch_size, (name, count)
            if turn:  # the first time warms up
                taken[name].append((cpu_s() - before) / count)
    usual = statistics.median(taken["DataLoader, Pillow"])
    rows = [
        {
            "image_size": size,
            "way": name,
            "cpu_us_an_image": statistics.median(seconds) * 1e6,
            "images_per_cpu_s": 1 / statistics.median(seconds),
            "times_less_than_usual": usual / statistics.median(seconds),
            "all_cpu_us": [1e6 * each for each in seconds],
        }
        for name, seconds in taken.items()
    ]
    print(f"\n{len(files):,} JPEG files to batches of {size} px, medians of {options.rounds}")
    print("| way | CPU-us an image | images per CPU-second | x DataLoader with Pillow |\n|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['way']} | {row['cpu_us_an_image']:.1f} | {row['images_per_cpu_s']:,.0f} "
            f"| {row['times_less_than_usual']:.1f} |"
        )
    return rows


def cpu_s() -> float:
    """Of this process with its threads, and of children that ended."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


# -- ours ---------------------------------------------------------------------------------------------------------


def our_ways(files: list[Path], size: int, options: Options, folder: Path) -> dict[str, Way]:
    contents = [file.read_bytes() for file in files]
    places = {"local": str(folder)} | ({"S3": f"{options.s3}/{size}"} if options.s3 else {})
    ways: dict[str, Way] = {}
    encodings: tuple[Encoding, ...] = ("raw", "jpeg")
    for (place, uri), encoding in itertools.product(places.items(), encodings):
        target = f"{uri}-{encoding}"
        make_set(target, contents, size, encoding)
        ways[f"ours, once: {encoding} shards, {place}"] = functools.partial(fill, target)
    loaded = cache.load(f"{folder}-raw", "train")
    ways["ours, epoch: rows from the cache"] = lambda: epoch_of(loaded, options.batch_size)
    ways["ours, epoch: with noise and all else drawn"] = lambda: training_epoch(loaded, size, options.batch_size)
    ways["ours, prepare: file to square"] = lambda: squares(contents, lambda data: images.read_square(data, size))
    ways["Pillow, prepare: file to square"] = lambda: squares(contents, lambda data: pillow_square(data, size))
    return ways


def make_set(uri: str, contents: list[bytes], size: int, encoding: Encoding) -> None:
    card = DatasetCard(
        name="benchmark",
        licence="",
        source="",
        image_size=size,
        encoding=encoding,
        domains=("a", "b"),
        pairing="unpaired",
    )
    rows = (
        Row(id=f"{number:06d}", domain=number % 2, image=images.read_square(content, size))
        for number, content in enumerate(contents)
    )
    writing.write_dataset(uri, {"train": rows}, card)


def fill(uri: str) -> Iterator[Tensor]:
    """The shards read into an empty cache."""
    with tempfile.TemporaryDirectory() as empty:
        before, os.environ[cache.ROOT] = os.environ[cache.ROOT], empty
        try:
            count = len(cache.load(uri, "train"))
        finally:
            os.environ[cache.ROOT] = before
    yield torch.empty(count)


def epoch_of(loaded: cache.SplitArrays, batch_size: int) -> Iterator[Tensor]:
    order = batches.epoch_order(0, 0, len(loaded))
    for first in range(0, len(order), batch_size):
        yield images.to_tensor(loaded.images(order[first : first + batch_size]))


def training_epoch(loaded: cache.SplitArrays, size: int, batch_size: int) -> Iterator[Tensor]:
    """Two images a sample, noise for it, flipped, on the device: all of a step but the network."""
    sampler = batches.Sampler(
        loaded, ModelConfig(image_size=size), TrainOptions(global_batch_size=batch_size, pairing="unpaired")
    )
    share = batches.Share(rank=0, world=1)
    feed = batches.Prefetcher(
        sampler, np.arange(len(loaded)), share, start=0, stop=len(loaded) // batch_size, pin=False
    )
    for draw in feed:
        yield draw.to(CPU).x_0


def squares(contents: list[bytes], decode: Callable[[bytes], np.ndarray]) -> Iterator[Tensor]:
    for content in contents:
        yield torch.from_numpy(decode(content)[None])


# -- the others ---------------------------------------------------------------------------------------------------


def pillow_square(content: bytes, size: int) -> np.ndarray:
    """The usual few lines: decode, the middle square, an antialiased resize."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return np.array(square.resize((size, size), Image.Resampling.BILINEAR))


class Files(torch.utils.data.Dataset):
    """The usual data set over files."""

    def __init__(self, files: list[Path], size: int) -> None:
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return as_tensor(pillow_square(self.files[index].read_bytes(), self.size))


def as_tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1


def peers(files: list[Path], size: int, batch_size: int, tar: Path) -> dict[str, Way]:
    """Those that are installed (the extra `bench`); DataLoader with Pillow always is."""
    loader = torch.utils.data.DataLoader
    dataset = Files(files, size)
    workers = min(2, os.cpu_count() or 1)
    ways: dict[str, Way] = {
        "DataLoader, Pillow": lambda: iter(loader(dataset, batch_size, shuffle=True)),
        f"DataLoader, Pillow, {workers} workers": lambda: iter(
            loader(dataset, batch_size, shuffle=True, num_workers=workers)
        ),
    }
    try:
        from jobs.benchmarks.contenders import import_peers

        import_peers()
        module = importlib.import_module("denoising_diffusion_pytorch.denoising_diffusion_pytorch")
        theirs = module.Dataset(str(files[0].parent), size, exts=["jpg"], augment_horizontal_flip=True)
        theirs.paths = files
        ways["denoising-diffusion-pytorch's"] = lambda: iter(loader(theirs, batch_size, shuffle=True))
        wds = importlib.import_module("webdataset")
        with tarfile.open(tar, "w") as archive:
            for file in files:
                archive.add(file, file.name)

        def shards() -> Iterator[Tensor]:
            stream = wds.WebDataset(str(tar), shardshuffle=False, empty_check=False).shuffle(1000)
            squares = stream.to_tuple("jpg").map(lambda item: as_tensor(pillow_square(item[0], size)))
            return iter(loader(squares, batch_size))

        ways["webdataset"] = shards
    except (ImportError, InputError) as error:
        print(f"without the peers of the extra bench: {error}")
    return ways
