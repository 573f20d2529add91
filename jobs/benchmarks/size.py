"""CelebA-like sources of growing size, prepared, matched and read once: what a row costs, and what is held in memory.

    source   img_align_celeba.zip of JPEGs (two pieces of the map of the Earth laid over each other: no two alike),
             attributes and landmarks that hang together as real ones do, identities, the official split's proportions
    prepare  `jobs.prepare celeba --pairing matched` as a process of its own
    read     all training rows once, images and targets, as a process of its own

Memory is PSS, what is shared (Ray's object store) counted once, of the driver alone and of it with all of its Ray.
"""

import dataclasses
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ddpm_core import images, provenance, storage
from ddpm_core.errors import InputError
from jobs.common import cli
from jobs.datasets import cache
from jobs.datasets.format import read_card
from jobs.datasets.sources import earth
from jobs.datasets.sources.celeba import CENTRE, HEIGHT, WIDTH

if TYPE_CHECKING:
    import psutil

QUALITY = 90
NUM_ATTRIBUTES = 40
IMAGES_PER_PERSON = 20
STEPS = ("decode", "match", "write")
"""What `jobs.prepare` reports progress of."""
READ = """
import sys
from jobs.datasets import cache
rows = cache.load(sys.argv[1], "train")
for start in range(0, len(rows), 256):
    some = range(start, min(start + 256, len(rows)))
    assert rows.images(some).shape == rows.targets(some).shape
"""
MIB = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Data sets of the size of CelebA prepared, matched and read: cost a row, memory and disk."""

    output: str = "runs/benchmark/size"
    """Folder or s3:// prefix for size.json."""
    num_images: tuple[int, ...] = (2_000, 20_000, 200_000)
    """Sizes; what a row costs is compared with the first."""
    image_size: int = 64
    """Side of the stored squares, in pixels."""
    scratch: str | None = None
    """Local folder for sources, scratch files and data sets (at 200,000: 12 GB); default: the system's."""


def run(options: Options) -> int:
    """Measure; write size.json; print a table."""
    if not options.num_images or min(options.num_images) < 100:
        raise InputError(f"--num-images is {list(options.num_images)}; each must be 100 or more")
    if importlib.util.find_spec("psutil") is None:
        raise InputError("psutil is not installed; install the extra of the benchmarks: pip install -e '.[bench]'")
    output = storage.absolute(options.output, flag="--output")
    storage.check_writable(output)
    result: dict[str, Any] = {"options": dataclasses.asdict(options), "environment": provenance.environment()}
    result["rows"] = []
    print(f"| images | {' | '.join(f'{step} us' for step in (*STEPS, 'rest', 'read', 'all'))} | x first | us more |")
    print("|---" * (len(STEPS) + 6) + "|")
    for num_images in options.num_images:
        with tempfile.TemporaryDirectory(prefix="ddpm-size-", dir=options.scratch) as folder:
            row = measure(num_images, options.image_size, Path(folder))
        result["rows"].append(row)
        print(table_row(row, result["rows"][-2:][0], result["rows"][0]), flush=True)
        storage.write_bytes(storage.join(output, "size.json"), json.dumps(result, indent=2).encode())
    for row in result["rows"]:
        print(memory_line(row))
    print(f"written: {storage.join(output, 'size.json')}")
    return cli.DONE


def table_row(row: dict[str, Any], before: dict[str, Any], first: dict[str, Any]) -> str:
    """Microseconds a row of each step; of all beside the first size; of each row more than in the size before.

    The last leaves out what every run costs once, such as the start of Ray.
    """
    costs = [*(row["us_a_row"][step] for step in (*STEPS, "rest", "read")), row["us_a_row_in_all"]]
    cells = [f"{row['num_images']:,}", *(f"{cost:,.0f}" for cost in costs)]
    more_s, more = (row[name] - before[name] for name in ("in_all_s", "num_rows"))
    cells.append(f"{row['us_a_row_in_all'] / first['us_a_row_in_all']:.2f}")
    return f"| {' | '.join(cells)} | {f'{1e6 * more_s / more:,.0f}' if more else ''} |"


def memory_line(row: dict[str, Any]) -> str:
    peaks = {name: f"{row[name] / MIB:,.0f} MiB" for name in row if name.endswith("_bytes")}
    return (
        f"{row['num_images']:,}: driver {peaks['driver_bytes']}, with Ray {peaks['all_bytes']}, reader "
        f"{peaks['reader_bytes']}; source {peaks['source_bytes']}, scratch {peaks['scratch_bytes']}, "
        f"data set {peaks['dataset_bytes']}; {row['prepare_s']:.0f} s + {row['read_s']:.0f} s"
    )


def measure(num_images: int, image_size: int, folder: Path) -> dict[str, Any]:
    """One size: seconds, microseconds a row and bytes."""
    source, out = folder / "source", folder / "set"
    make_source(source, num_images)
    command = [sys.executable, "-m", "jobs.prepare", "celeba", "--source", str(source), "--output", str(out)]
    prepared = Watched([*command, "--image-size", str(image_size)], folder)
    steps = {step: seconds_of(step, prepared.stderr) for step in STEPS}
    read = Watched([sys.executable, "-c", READ, str(out)], folder)
    card = read_card(str(out))
    num_rows = sum(card.splits.values())
    steps |= {
        "rest": prepared.wall_s - sum(steps.values()),
        "read": read.wall_s * num_rows / card.splits["train"],
    }
    return {
        "num_images": num_images,
        "num_rows": num_rows,
        "notes": card.notes,
        "prepare_s": prepared.wall_s,
        "read_s": read.wall_s,
        "cpu_s": prepared.cpu_s,
        "us_a_row": {step: 1e6 * seconds / num_rows for step, seconds in steps.items()},
        "in_all_s": sum(steps.values()),
        "us_a_row_in_all": 1e6 * sum(steps.values()) / num_rows,
        "driver_bytes": prepared.driver_bytes,
        "all_bytes": prepared.all_bytes,
        "reader_bytes": read.all_bytes,
        "scratch_bytes": prepared.scratch_bytes,
        "source_bytes": folder_bytes(source),
        "dataset_bytes": folder_bytes(out),
    }


def seconds_of(step: str, stderr: str) -> float:
    """From the last line that the step's progress wrote."""
    lines = re.findall(rf"^{step}: ([\d,]+) of .* ([\d.e+]+) a second, took", stderr, re.MULTILINE)
    count, rate = lines[-1]
    return int(count.replace(",", "")) / float(rate)


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


class Watched:
    """A process that ran to its end: time, and the largest memory of it and of all that it started."""

    def __init__(self, command: list[str], folder: Path) -> None:
        environment = {**os.environ, "TMPDIR": str(folder), cache.ROOT: str(folder / "cache")}
        self.driver_bytes = self.all_bytes = self.scratch_bytes = 0
        self.cpu_s = 0.0
        import psutil

        started = time.monotonic()
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        ended = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(psutil.Process(process.pid), ended))
        watcher.start()
        self.stderr = process.communicate()[1].decode()
        self.wall_s = time.monotonic() - started
        ended.set()
        watcher.join()
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {self.stderr[-2000:]}")

    def _watch(self, driver: "psutil.Process", ended: threading.Event) -> None:
        import psutil

        cpu: dict[int, float] = {}
        while not ended.wait(0.5):
            total = 0
            try:
                processes = [driver, *driver.children(recursive=True)]
            except psutil.Error:
                return
            for process in processes:
                try:
                    pss = process.memory_full_info().pss
                    cpu[process.pid] = sum(process.cpu_times()[:2])
                except psutil.Error:
                    continue
                total += pss
                if process is driver:
                    self.driver_bytes = max(self.driver_bytes, pss)
            self.all_bytes = max(self.all_bytes, total)
            self.scratch_bytes = max(self.scratch_bytes, nameless_bytes(driver.pid))
            self.cpu_s = sum(cpu.values())


def nameless_bytes(pid: int) -> int:
    """Size of the files that the process holds open and that have no name any more."""
    total = 0
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            status = link.stat()
        except OSError:
            continue
        if status.st_nlink == 0:
            total += status.st_blocks * 512
    return total


# ------------------------------------------------------------------------------------------------ source


def make_source(folder: Path, num_images: int) -> None:
    """A source in CelebA's layout, the same each time."""
    random = np.random.default_rng(num_images)
    folder.mkdir()
    names = [f"{number:06d}.jpg" for number in range(1, num_images + 1)]
    people = np.arange(num_images) // IMAGES_PER_PERSON
    share = np.arange(num_images) / num_images
    split = np.select([share < 0.8, share < 0.9], [0, 1], 2)
    split = split[people * IMAGES_PER_PERSON]  # of a person's first image
    # Traits of the person and of the image decide the attributes, the pose the landmarks.
    traits = random.normal(size=(people[-1] + 1, 6))[people] + 0.5 * random.normal(size=(num_images, 6))
    logits = traits @ random.normal(size=(6, NUM_ATTRIBUTES)) + random.normal(size=NUM_ATTRIBUTES) - 0.5
    attributes = np.where(logits + random.logistic(size=logits.shape) > 0, 1, -1)
    pose = random.normal(size=(num_images, 3)) @ random.normal(size=(3, 10))
    points = np.round(CENTRE + random.uniform(-25, 25, 10) + 2 * pose + random.normal(size=pose.shape)).astype(int)
    columns = ["Male", *(f"Attribute_{number}" for number in range(1, NUM_ATTRIBUTES))]
    write_table(folder / "list_attr_celeba.txt", names, attributes, columns)
    write_table(folder / "list_landmarks_align_celeba.txt", names, points, [f"point_{number}" for number in range(10)])
    write_table(folder / "list_eval_partition.txt", names, split[:, None])
    write_table(folder / "identity_CelebA.txt", names, people[:, None])
    world = np.asarray(images.decode((earth.maps_folder() / "day.avif").read_bytes()))
    with zipfile.ZipFile(folder / "img_align_celeba.zip", "w", zipfile.ZIP_STORED) as archive:
        for name in names:
            archive.writestr(f"img_align_celeba/{name}", photo(world, random))


def write_table(path: Path, names: list[str], values: np.ndarray, columns: list[str] | None = None) -> None:
    text = io.StringIO()
    if columns is not None:
        text.write(f"{len(names)}\n{' '.join(columns)}\n")
    text.writelines(f"{name} {' '.join(map(str, row))}\n" for name, row in zip(names, values.tolist(), strict=True))
    path.write_text(text.getvalue())


def photo(world: np.ndarray, random: np.random.Generator) -> bytes:
    """Two pieces of the map at once, as a JPEG of 178 x 218."""
    tops = random.integers(0, world.shape[0] - HEIGHT, 2)
    lefts = random.integers(0, world.shape[1] - WIDTH, 2)
    one, two = (world[top : top + HEIGHT, left : left + WIDTH] for top, left in zip(tops, lefts, strict=True))
    buffer = io.BytesIO()
    Image.fromarray((one >> 1) + (two >> 1)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
