"""Translating many images with Ray Data: what `jobs.translate` and `jobs.evaluate` share, and what travels.

A row on its way: `id`, `output` (path below the output, "" to keep the image in the row), `to` (domain),
`seed`, `image` (uint8 s s 3, the source), `error` ("" while all is well), `note` (what was done to the source that
its owner should know, mostly "").
"""

import concurrent.futures
import functools
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import ray
import ray.data
import torch

from ddpm_core import checkpoint, faces, images, storage
from ddpm_core import config as configs
from ddpm_core.config import SamplingConfig
from ddpm_core.errors import InputError
from jobs.datasets import reading
from jobs.datasets.format import DatasetCard
from jobs.translation import options
from jobs.translation.options import GuidanceNets

Batch = dict[str, np.ndarray]
Plan = Mapping[str, list[tuple[str, int, str]]]
"""What to make of the row with this id: (domain, seed, output) for each result."""

READ_THREADS = 8
"""Images read at once by one task: hides a bucket's latency."""
MAX_BLOCKS = 4096
"""Ray Data's bookkeeping grows with blocks; beyond this many they get larger instead."""
CPUS_PER_ACTOR = 0.5
"""Logical CPUs of one actor on a cluster without GPUs; what is left lets Ray Data's reading tasks be placed."""


class Translate:
    """Ray Data actor: rows with a source image become rows with the result, or with the result written."""

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
        self.translator = options.translator(loaded, GuidanceNets(**guides))
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
    guides: GuidanceNets,
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
    """Rows of the images `items` (id = path below `root`, output), read and prepared on the workers.

    `template`: landmarks that faces are aligned to, () to take images as they are.
    """
    blocks = min(max(math.ceil(len(items) / batch_size), 1), MAX_BLOCKS)
    read = functools.partial(read_images, root=root, image_size=image_size, template=template, to=to, seed=seed)
    return ray.data.from_items(items, override_num_blocks=blocks).map_batches(read, batch_size=batch_size)


def read_images(
    batch: Batch, *, root: str, image_size: int, to: str, seed: int, template: tuple[float, ...] = ()
) -> Batch:
    """Each file read and prepared as training did it; what cannot be read gets its reason in `error`."""
    with concurrent.futures.ThreadPoolExecutor(READ_THREADS) as threads:
        one = functools.partial(read_image, root=root, image_size=image_size, template=template)
        read = list(threads.map(one, batch["id"]))
    return {
        **batch,
        "to": np.array([to] * len(read)),
        "seed": np.full(len(read), seed, np.int64),
        "image": np.stack([picture for picture, _, _ in read]),
        "error": np.array([error for _, error, _ in read], dtype=object),
        "note": np.array([note for _, _, note in read], dtype=object),
    }


def read_image(name: str, *, root: str, image_size: int, template: tuple[float, ...]) -> tuple[np.ndarray, str, str]:
    """(image, "", note) or (black, why not, "").

    Raises:
        InputError: the storage itself is gone, which no single image is to blame for.
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
    uri: str, card: DatasetCard, split: str, plan: Plan, *, batch_size: int, keep_truth: bool = False
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
    rows = reading.read_split(uri, split).map_batches(expand)
    # A block is one actor's task: as read they would be far too large to share out.
    return rows.repartition(target_num_rows_per_block=batch_size)


def expand_rows(
    batch: Batch, *, plan: Plan, domains: list[str], paired: bool, image_size: int, keep_truth: bool
) -> Batch:
    """See `dataset_rows`. In a paired set the image of the other side is the source, whichever column it is in."""
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
