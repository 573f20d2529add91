"""jobs.translate in its steady state, and what it holds in memory.

raw       the pool's networks alone, each fed with the same batch
job       the whole way: files read and prepared, drawn, encoded and written
script    the obvious one: open an image, translate it, save it, the next

The three take turns in this process, round by round. Rates are of the time after the first result; what comes before it
(networks loaded, first images read) is told as the start. Busy is the share of the workers' time that the network had.

keys      a listing of so many objects, which is made up, brought into shards, and once more as a second run finds
          them: the memory that this process gains, and seconds
images    so many small images translated by a process of its own: its largest memory, and images a second
"""

import concurrent.futures
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ddpm_core import checkpoint, images, provenance, storage
from ddpm_core.config import ModelConfig, SamplingConfig, UNetConfig
from ddpm_core.translator import Translator
from jobs.benchmarks.full_size import Memory
from jobs.common import cli, workers
from jobs.translation import batch as batches
from jobs.translation.batch import Source, Translate
from jobs.translation.shards import Known, Listed, Result, Shards


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The steady state of jobs.translate beside the network alone; memory from few images to many."""

    output: str = "runs/benchmark/translate"
    """Folder or s3:// prefix for translate.json."""
    checkpoint: str | None = None
    """A run or checkpoint; by default a network of 0.3 million parameters at 32 px with random weights."""
    num_images: int = 256
    """Of a round."""
    image_size: int = 64
    """Side of the images, in pixels."""
    batch_size: int = 16
    """Images the network sees at once."""
    rounds: int = 5
    """Each has the three take turns."""
    keys: tuple[int, ...] = (1_000, 100_000, 1_000_000)
    """Objects of the listings that are made up."""
    images: tuple[int, ...] = (1_000, 10_000)
    """Images that are translated for their memory."""
    bucket: str | None = None
    """An s3:// prefix where these and their results lie, instead of this machine's disk."""


def run(options: Options) -> int:
    """Measure; write translate.json; print tables."""
    output = storage.absolute(options.output, flag="--output")
    storage.check_writable(output)
    with tempfile.TemporaryDirectory() as folder:
        uri = options.checkpoint or network(f"{folder}/network", 32)
        rates = [one_round(uri, options, Path(folder, "in"), Path(folder, f"out-{i}")) for i in range(options.rounds)]
        speed = {name: statistics.median(row[name] for row in rates) for name in rates[0]}
        speed["job / raw"] = statistics.median(row["job"] / row["raw"] for row in rates)
        speed["job / script"] = statistics.median(row["job"] / row["script"] for row in rates)
        listed = [keys(num, f"{folder}/keys-{num}") for num in options.keys]
        small = network(f"{folder}/small", 8)
        done = [memory_of(small, num, f"{options.bucket or folder}/images-{num}") for num in options.images]
    result: dict[str, Any] = {"options": dataclasses.asdict(options), "environment": provenance.environment()}
    result |= {"speed": speed, "rounds": rates, "keys": listed, "images": done}
    print(", ".join(f"{name} {value:.3g}" for name, value in speed.items()))
    for row in (*listed, *done):
        print(", ".join(f"{name} {value:,.4g}" for name, value in row.items()))
    storage.write_bytes(storage.join(output, "translate.json"), json.dumps(result, indent=2).encode())
    print(f"written: {storage.join(output, 'translate.json')}")
    return cli.DONE


def network(folder: str, side: int) -> str:
    """A small checkpoint with random weights."""
    unet = UNetConfig(
        model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attn_resolutions=(side // 2,), condition_channels=32
    )
    sampling = SamplingConfig(num_steps=20 if side > 8 else 1)
    config = ModelConfig(image_size=side, domains=("day", "night"), unet=unet, sampling=sampling)
    torch.manual_seed(0)
    for name, content in checkpoint.files(checkpoint.build(config).state_dict(), config).items():
        storage.write_bytes(f"{folder}/{name}", content)
    return folder


def fill(folder: Path, num: int, side: int) -> list[dict[str, Any]]:
    """Images of noise, a few contents in turn, as rows of a shard."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0)
    contents = [images.encode_png(noise.integers(0, 256, (side, side, 3), np.uint8)) for _ in range(min(num, 64))]
    rows = []
    for i in range(num):
        path = folder / f"{i // 1000:04d}" / f"{i:07d}.png"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(contents[i % len(contents)])
        name = str(path.relative_to(folder))
        rows.append({"id": name, "input": str(path), "path": None, "output": name, "size": path.stat().st_size})
    return rows


def put(uri: str, num: int) -> None:
    """As `fill`, as objects of a bucket."""
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(16) as threads:
        rows = fill(Path(folder), min(num, 64), 8)
        contents = [Path(row["input"]).read_bytes() for row in rows]

        def write(i: int) -> None:
            storage.write_bytes(f"{uri}/{i // 1000:04d}/{i:07d}.png", contents[i % len(contents)])

        for _ in threads.map(write, range(num)):
            pass


# -- speed --------------------------------------------------------------------------------------------------------


def one_round(uri: str, options: Options, source: Path, output: Path) -> dict[str, float]:
    """Images a second of each way, in turn."""
    rows = fill(source, options.num_images, options.image_size)
    loaded = checkpoint.load(uri)
    domain = (loaded.config.target_domains or loaded.config.domains)[-1]
    found = job(uri, domain, rows, options, output)
    found["raw"] = raw(uri, domain, options)
    found["script"] = script(loaded, domain, rows[: max(options.num_images // 4, 1)], output / "script")
    return found


def job(uri: str, domain: str, rows: list[dict[str, Any]], options: Options, output: Path) -> dict[str, float]:
    """The pool of `jobs.translate --num-workers 0`."""
    side = checkpoint.load(uri).config.image_size
    pool = workers.pool(len(rows), 0)

    def read(task: batches.Batch) -> list[batches.Batch]:
        return batches.read_images(task, root="", image_size=side, to=domain, seed=0, output_size="own")

    spent: list[float] = []

    class Timed(Translate):
        def _translated(self, *args: Any) -> Iterator[Any]:
            began = time.perf_counter()
            made = list(super()._translated(*args))
            spent.append(time.perf_counter() - began)
            return iter(made)

    tasks = list(batches.file_tasks(rows, "", shard=0, batch_size=options.batch_size))
    began = time.perf_counter()
    make: dict[str, Any] = {"checkpoint_uri": uri, "ema": None, "sampling": {}, "output": str(output)}
    results = Source(tasks, read).through(Timed, pool, **make)
    ends = [(time.perf_counter(), len(done["id"])) for done in results]
    passed = ends[-1][0] - ends[0][0] if len(ends) > 1 else ends[-1][0] - began
    num = sum(count for _, count in ends[1:]) or ends[0][1]
    busy = sum(spent[pool.size :]) / (passed * pool.size) if len(ends) > 1 else 0.0
    return {"job": num / passed, "start_s": ends[0][0] - began, "busy": busy}


def raw(uri: str, domain: str, options: Options) -> float:
    """As many networks as the pool has, each with batches that are there already."""
    pool = workers.pool(options.num_images, 0)
    translators = [Translator(checkpoint.load(uri)) for _ in range(pool.size)]
    side = translators[0].config.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (options.batch_size, side, side, 3), np.uint8)
    torch.set_num_threads(pool.num_threads)
    num = max(options.num_images // options.batch_size // pool.size, 1)
    ready = threading.Barrier(pool.size + 1)

    def work(translator: Translator) -> None:
        translator(pixels, domain)
        ready.wait()
        for _ in range(num):
            translator(pixels, domain)

    threads = [threading.Thread(target=work, args=(each,)) for each in translators]
    for thread in threads:
        thread.start()
    ready.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    return num * pool.size * options.batch_size / (time.perf_counter() - began)


def script(loaded: checkpoint.Checkpoint, domain: str, rows: list[dict[str, Any]], output: Path) -> float:
    """One image after another, with all the threads there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(workers.pool(1, 0).num_threads)
    translate = Translator(loaded)
    output.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    for number, row in enumerate(rows):
        with Image.open(row["input"]) as photo:
            made = translate.at_own_size([photo.convert("RGB")], domain)[0]
        Image.fromarray(made).save(output / f"{number}.png")
    passed = time.perf_counter() - began
    torch.set_num_threads(threads)
    return len(rows) / passed


# -- memory -------------------------------------------------------------------------------------------------------


def keys(num: int, folder: str) -> dict[str, float]:
    """A first run that lists and has all done, and a second."""

    def listing() -> Iterator[Listed]:
        for i in range(num):
            name = f"{i // 10_000:05d}/photo-{i:09d}.jpg"
            yield Listed(name, f"s3://bucket/{name}", 100_000, 0, f"{i:032x}")

    facts = {"seed": 0, "options": "x", "checkpoint": "y"}
    found: dict[str, float] = {"keys": num}
    for run in ("first", "again"):
        began = time.perf_counter()
        with Memory() as memory:
            shards = Shards(folder)
            known = Known(shards.files, folder)
            known.present[:] = True  # the results are made up, too
            shards.list_images(listing(), known, facts, suffix=".png", stop=threading.Event())
            found[f"{run}_s"] = time.perf_counter() - began
            shards.listed.put(None)
            for number, rows in shards.todo():
                shards.note(number, {row["id"]: Result(row["output"], "ok", "", "", 8, 8, 0.0, None) for row in rows})
            shards.finish({})
            shards.remove()
            found[f"{run}_todo"] = shards.counts.todo
        found[f"{run}_mib"] = memory.most_bytes / 2**20
    return found


def memory_of(uri: str, num: int, folder: str) -> dict[str, float]:
    """A command of its own, with all that it does in one process."""
    if storage.is_remote(folder):
        put(f"{folder}/in", num)
    else:
        fill(Path(folder, "in"), num, 8)
    argv = [sys.executable, "-m", "jobs.translate", "--checkpoint", uri, "--domain", "night", "--num-workers", "0"]
    argv += ["--input", f"{folder}/in", "--output", f"{folder}/out", "--batch-size", "64"]
    began = time.perf_counter()
    child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    most = 0
    while child.poll() is None:
        most = max(most, resident_of(child.pid))
        time.sleep(0.2)
    if child.returncode:
        raise RuntimeError(f"jobs.translate ended with {child.returncode}")
    return {"images": num, "most_mib": most / 2**20, "images_per_s": num / (time.perf_counter() - began)}


def resident_of(pid: int) -> int:
    """Bytes of memory that a process holds; 0 once it has ended."""
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0
