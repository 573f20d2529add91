"""Translating many pictures with Ray Data: what `jobs.translate` and `jobs.evaluate` share, and what travels.

A row on its way: `id`, `output` (path below the output, "" to keep the picture in the row), `to` (domain),
`seed`, `image` (uint8 s s 3, the source), `error` ("" while all is well), `note` (what was done to the source that
its owner should know, mostly "").
"""

import concurrent.futures
import functools
import io
import math
import time
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet
import ray
import ray.data
import torch

from ddpm_core import checkpoint, faces, images
from ddpm_core import config as configs
from ddpm_core.config import ModelConfig, SamplingConfig
from ddpm_core.errors import InputError
from jobs import data, inference, storage
from jobs.inference import Guides

Batch = dict[str, np.ndarray]
Plan = Mapping[str, list[tuple[str, int, str]]]
"""What to make of the row with this id: (domain, seed, output) for each result."""

READ_THREADS = 8
"""Pictures read at once by one task: hides a bucket's latency."""
MAX_BLOCKS = 4096
"""Ray Data's bookkeeping grows with blocks; beyond this many they get larger instead."""
CPUS_PER_ACTOR = 0.5
"""Logical CPUs of one actor on a cluster without GPUs; what is left lets Ray Data's reading tasks be placed."""


class Translate:
    """Ray Data actor: rows with a source picture become rows with the result, or with the result written."""

    def __init__(
        self,
        *,
        checkpoint_uri: str,
        ema: float | None,
        sampling: dict[str, Any],
        output: str | None,
        num_threads: int,
        guides: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """`sampling`, `guides`: fields of SamplingConfig and of Guides. `output`: where results go, None to keep them
        in `result`."""
        torch.set_num_threads(num_threads)
        loaded = checkpoint.load(checkpoint_uri, ema=ema, read=storage.read_bytes)
        self.translator = inference.translator(loaded, Guides(**guides))
        self.sampling, self.output = sampling, output

    def __call__(self, batch: Batch) -> Batch:
        results = np.zeros_like(batch["image"])
        wanted: dict[tuple[str, int], list[int]] = {}
        for row, (to, seed, error) in enumerate(zip(batch["to"], batch["seed"], batch["error"], strict=True)):
            if not error:
                wanted.setdefault((str(to), int(seed)), []).append(row)
        for (to, seed), rows in wanted.items():
            results[rows] = self.translator(batch["image"][rows], to, seed=seed, **self.sampling)
        if self.output is None:
            return {**batch, "result": results}
        for rows in wanted.values():
            for row in rows:
                storage.write_bytes(storage.join(self.output, batch["output"][row]), images.encode_png(results[row]))
        return {name: column for name, column in batch.items() if name != "image"}


def actor_pool(num_rows: int, batch_size: int, num_workers: int | None) -> dict[str, Any]:
    """`map_batches` arguments for a pool of `Translate` on the cluster at hand: a GPU each where there are any.

    Raises:
        InputError: more workers than GPUs.
    """
    there = ray.cluster_resources()
    gpus, cpus = int(there.get("GPU", 0)), max(int(there.get("CPU", 1)), 1)
    batches = max(math.ceil(num_rows / batch_size), 1)
    if gpus:
        if num_workers is not None and num_workers > gpus:
            raise InputError(f"--num-workers {num_workers}: the cluster has {gpus} GPUs, one for each; give fewer")
        size, threads = min(num_workers or gpus, batches), 2
        resources = {"num_gpus": 1.0, "num_cpus": 1.0}
    else:
        # One thread an actor: convolutions this small gain less from a second thread than a second actor gives.
        size, threads = min(num_workers or cpus, batches), 1
        resources = {"num_cpus": min(CPUS_PER_ACTOR, cpus / 2 / size)}
    return {
        "batch_size": batch_size,
        "compute": ray.data.ActorPoolStrategy(size=size),
        "fn_constructor_kwargs": {"num_threads": threads},
        **resources,
    }


def translate_rows(
    rows: ray.data.Dataset,
    *,
    num_rows: int,
    checkpoint_uri: str,
    ema: float | None,
    sampling: SamplingConfig,
    guides: Guides,
    output: str | None,
    batch_size: int,
    num_workers: int | None,
) -> ray.data.Dataset:
    """`rows` through a pool of `Translate`."""
    pool = actor_pool(num_rows, batch_size, num_workers)
    pool["fn_constructor_kwargs"] |= {
        "checkpoint_uri": checkpoint_uri,
        "ema": ema,
        "sampling": configs.to_dict(sampling),
        "guides": configs.to_dict(guides),
        "output": output,
    }
    return rows.map_batches(Translate, **pool)


# -- sources: files -----------------------------------------------------------------------------------------------


def file_rows(
    items: list[dict[str, Any]],
    root: str,
    *,
    image_size: int,
    template: tuple[float, ...],
    to: str,
    seed: int,
    batch_size: int,
) -> ray.data.Dataset:
    """Rows of the pictures `items` (id = path below `root`, output), read and prepared on the workers.

    `template`: landmarks that faces are aligned to, () to take pictures as they are.
    """
    blocks = min(max(math.ceil(len(items) / batch_size), 1), MAX_BLOCKS)
    read = functools.partial(read_pictures, root=root, image_size=image_size, template=template, to=to, seed=seed)
    return ray.data.from_items(items, override_num_blocks=blocks).map_batches(read, batch_size=batch_size)


def read_pictures(
    batch: Batch, *, root: str, image_size: int, to: str, seed: int, template: tuple[float, ...] = ()
) -> Batch:
    """Each file read and prepared as training did it; what cannot be read gets its reason in `error`."""
    with concurrent.futures.ThreadPoolExecutor(READ_THREADS) as threads:
        one = functools.partial(read_picture, root=root, image_size=image_size, template=template)
        read = list(threads.map(one, batch["id"]))
    return {
        **batch,
        "to": np.array([to] * len(read)),
        "seed": np.full(len(read), seed, np.int64),
        "image": np.stack([picture for picture, _, _ in read]),
        "error": np.array([error for _, error, _ in read], dtype=object),
        "note": np.array([note for _, _, note in read], dtype=object),
    }


def read_picture(name: str, *, root: str, image_size: int, template: tuple[float, ...]) -> tuple[np.ndarray, str, str]:
    """(picture, "", note) or (black, why not, "").

    Raises:
        InputError: the storage itself is gone, which no single picture is to blame for.
    """
    try:
        data = storage.read_bytes(storage.join(root, name))
    except FileNotFoundError:
        return _black(image_size), f"{name}: gone since the folder was listed", ""
    except InputError as error:
        storage.exists(root)  # raises where the server is unreachable or refuses everything
        return _black(image_size), str(error), ""
    try:
        if template:
            portrait = faces.read_portrait(data, image_size, template, name=name)
            return portrait.pixels, "", portrait.note
        return images.read_square(data, image_size, name=name), "", ""
    except InputError as error:
        return _black(image_size), str(error), ""


def _black(image_size: int) -> np.ndarray:
    return np.zeros((image_size, image_size, 3), np.uint8)


# -- sources: rows of a data set ----------------------------------------------------------------------------------


def dataset_rows(
    uri: str, card: data.DatasetCard, split: str, plan: Plan, *, batch_size: int, keep_truth: bool = False
) -> ray.data.Dataset:
    """The rows of a data set that `plan` names, once for each result wanted of them, with the side to start from."""
    expand = functools.partial(
        expand_rows,
        plan=dict(plan),
        domains=list(card.domains),
        paired=card.pairing == "paired",
        image_size=card.image_size,
        keep_truth=keep_truth,
    )
    rows = data.read_split(uri, split).map_batches(expand)
    # A block is one actor's task: as read they would be far too large to share out.
    return rows.repartition(target_num_rows_per_block=batch_size)


def expand_rows(
    batch: Batch, *, plan: Plan, domains: list[str], paired: bool, image_size: int, keep_truth: bool
) -> Batch:
    """See `dataset_rows`. In a paired set the picture of the other side is the source, whichever column it is in."""
    chosen = [
        (row, to, seed, output) for row, name in enumerate(batch["id"]) for to, seed, output in plan.get(str(name), ())
    ]
    swapped = [paired and domains[int(batch["domain"][row])] == to for row, to, _, _ in chosen]
    empty = np.zeros((0, image_size, image_size, 3), np.uint8)

    def pictures(from_target: Iterable[bool]) -> np.ndarray:
        picked = [batch["target" if t else "image"][c[0]] for c, t in zip(chosen, from_target, strict=True)]
        return np.stack(picked).astype(np.uint8) if picked else empty

    rows = {
        "id": np.array([str(batch["id"][c[0]]) for c in chosen], dtype=object),
        "output": np.array([c[3] for c in chosen], dtype=object),
        "to": np.array([c[1] for c in chosen], dtype=object),
        "seed": np.array([c[2] for c in chosen], dtype=np.int64),
        "image": pictures(swapped),
        "error": np.array([""] * len(chosen), dtype=object),
        "note": np.array([""] * len(chosen), dtype=object),
    }
    if keep_truth:
        rows["truth"] = pictures([not s for s in swapped])
    return rows


# -- the listing and the manifest ---------------------------------------------------------------------------------


def list_pictures(uri: str) -> tuple[list[dict[str, Any]], int]:
    """The pictures below `uri` as {id: path below it, size, mtime_ns}, sorted, and how many other files there are.

    What is hidden by a dot is left out (`._x.jpg` is what macOS leaves on foreign disks).

    Raises:
        InputError: `uri` does not exist or is a file.
    """
    fs, path = storage.filesystem(uri)
    with storage.explained(uri):
        kind = fs.get_file_info(path).type
        if kind == pyarrow.fs.FileType.NotFound:
            raise InputError(f"--input {uri}: no such folder")
        if kind == pyarrow.fs.FileType.File:
            raise InputError(f"--input {uri} is a file; give the folder that holds the pictures")
        infos = fs.get_file_info(pyarrow.fs.FileSelector(path, recursive=True))
    files = [info for info in infos if info.type == pyarrow.fs.FileType.File]
    named = [(info.path[len(path) :].lstrip("/"), info) for info in files]
    pictures = [
        {"id": name, "size": info.size, "mtime_ns": info.mtime_ns or 0}
        for name, info in named
        if "." + info.extension.lower() in images.SUFFIXES and not any(p.startswith(".") for p in name.split("/"))
    ]
    return sorted(pictures, key=lambda picture: picture["id"]), len(files) - len(pictures)


def output_names(ids: Iterable[str], taken: Mapping[str, str]) -> dict[str, str]:
    """id → output path, suffix .png; ids whose outputs would meet keep their own suffix (a.jpg.png).

    `taken`: names given by an earlier run, which stay. Case does not tell names apart on every disk, so it does
    not here.
    """
    names = {name: taken.get(name) or _stem(name) + ".png" for name in ids}
    while True:
        users: dict[str, list[str]] = {}
        for name in {**taken, **names}:
            users.setdefault((names.get(name) or taken[name]).casefold(), []).append(name)
        clashing = [
            name
            for group in users.values()
            if len(group) > 1
            for name in group
            if name not in taken and names[name] != _inside(name) + ".png"
        ]
        if not clashing:
            break
        names.update({name: _inside(name) + ".png" for name in clashing})
    outputs: dict[str, str] = {}
    for name in {**taken, **names}:
        output = names.get(name) or taken[name]
        if outputs.setdefault(output, name) != name:
            raise InputError(f"{name} and {outputs[output]} would both become {output}; rename one")
    return names


def _inside(name: str) -> str:
    """`name` without parts that lead out of a folder or hide in it: a data set's ids are any strings."""
    return "/".join("_" + part if not part or part.startswith(".") else part for part in name.split("/"))


def _stem(name: str) -> str:
    folder, slash, base = _inside(name).rpartition("/")
    stem, dot, suffix = base.rpartition(".")
    return folder + slash + (stem if dot and stem and "." + suffix.lower() in images.SUFFIXES else base)


def check_dataset(uri: str, card: data.DatasetCard, config: ModelConfig) -> None:
    """A data set must be of the checkpoint's kind.

    Raises:
        InputError: other domains, or pictures of another size.
    """
    if tuple(card.domains) != tuple(config.domains):
        raise InputError(
            f"{uri} has the domains {', '.join(card.domains)}, the checkpoint {', '.join(config.domains)}; "
            "give the checkpoint data like what it was trained on"
        )
    if card.image_size != config.image_size:
        raise InputError(
            f"{uri} has pictures of {card.image_size} px, the checkpoint takes {config.image_size} px; "
            f"prepare it again with --image-size {config.image_size}"
        )


def split_rows(uri: str, card: data.DatasetCard, split: str) -> list[tuple[str, int]]:
    """(id, domain) of every row of a data set's split, without its pictures, sorted by id; needs no Ray.

    Raises:
        InputError: no such split.
    """
    if not card.splits.get(split):
        there = ", ".join(name for name, count in card.splits.items() if count)
        raise InputError(f"{uri} has no rows in split {split!r}; it has {there}")
    shards = [shard for shard in card.shards if shard.file.startswith(f"{split}/")]
    data.check_shards(uri, shards, ("id", "domain"))
    rows: list[tuple[str, int]] = []
    for shard in shards:
        fs, path = storage.filesystem(storage.join(uri, shard.file))
        with storage.explained(uri), fs.open_input_file(path) as file:
            table = pyarrow.parquet.read_table(file, columns=["id", "domain"])
        rows += zip(table["id"].to_pylist(), table["domain"].to_pylist(), strict=True)
    return sorted(rows)


class Manifest:
    """What has been done, a row a picture: small parts while the work goes on, one `manifest.parquet` at the end.

    Each part is written whole or not at all, so a killed run loses at most the rows since the last one.
    """

    SCHEMA = pa.schema(
        [
            ("id", pa.string()),
            ("output", pa.string()),
            ("status", pa.string()),
            ("error", pa.string()),
            ("note", pa.string()),
            ("size", pa.int64()),
            ("mtime_ns", pa.int64()),
        ]
    )
    FLUSH_EVERY_S = 2.0
    MAX_PARTS = 200

    def __init__(self, output: str) -> None:
        """Take up what earlier runs noted under `output`."""
        self.whole = storage.join(output, "manifest.parquet")
        self.folder = storage.join(output, ".manifest")  # no picture is ever put below a hidden folder
        self.rows: dict[str, dict[str, Any]] = {}
        self.pending: list[dict[str, Any]] = []
        self.num_parts = 0
        self.flushed = time.monotonic()
        if storage.exists(self.whole):
            self._take(self.whole)
        for name in storage.list_files(self.folder):
            if name.endswith(".parquet"):
                self._take(storage.join(self.folder, name))
                self.num_parts += 1

    def _take(self, uri: str) -> None:
        try:
            table = pyarrow.parquet.read_table(io.BytesIO(storage.read_bytes(uri)), schema=self.SCHEMA)
        except (pa.ArrowInvalid, KeyError) as error:
            raise InputError(f"{uri} is damaged ({error}); give a new --output folder") from None
        self.rows.update({row["id"]: row for row in table.to_pylist()})

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Note rows; they are on disk at the latest after FLUSH_EVERY_S and a further call."""
        for row in rows:
            self.rows[row["id"]] = row
            self.pending.append(row)
        if time.monotonic() - self.flushed >= self.FLUSH_EVERY_S:
            self.flush()

    def flush(self) -> None:
        if self.pending:
            # Later parts sort behind earlier ones, whichever run wrote them.
            self._write(storage.join(self.folder, f"part-{time.time_ns():020d}.parquet"), self.pending)
            self.pending, self.num_parts = [], self.num_parts + 1
        self.flushed = time.monotonic()
        if self.num_parts >= self.MAX_PARTS:
            self.finish()

    def finish(self) -> None:
        """One file instead of many parts."""
        self._write(self.whole, [self.rows[name] for name in sorted(self.rows)])
        storage.delete_folder(self.folder)
        self.pending, self.num_parts = [], 0

    def _write(self, uri: str, rows: list[dict[str, Any]]) -> None:
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema=self.SCHEMA), buffer, compression="zstd")
        storage.write_bytes(uri, buffer.getvalue())
