"""Pairs where there are none: the other side of each image of a data set, made by a checkpoint.

A row keeps its own, real image, which training makes; the made one, `target`, is what training shows. Every row is
edited with the weights of --weights in turn until the classifier takes the result for the other side: no more is
changed than it takes. With an identity encoder all weights are tried, and of those that the classifier passes the one
is taken that is most like the source. Rows that no weight turns are set aside and counted.

What is made is kept beside --output until the data set is whole, so that the same command goes on after a kill.
"""

import collections
import contextlib
import functools
import io
import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow
import torch
from jaxtyping import UInt8
from torch import Tensor

from ddpm_core import checkpoint, nets, storage
from ddpm_core import config as configs
from ddpm_core.config import FROM_SIDE, ModelConfig, SamplingConfig
from ddpm_core.errors import InputError
from ddpm_core.translator import Translator, check_sampling
from jobs.common import cli, workers
from jobs.common.progress import Progress
from jobs.datasets import decode, reading, source
from jobs.datasets.format import DatasetCard, Row, read_card
from jobs.datasets.options import MadePairs

SPLITS = ("train", "val")
"""Those that training looks at: of the others only real images are of use."""
COLUMNS = ("id", "domain", "image", "identity", "attributes", "landmarks")
BATCH = 64
"""Images that are edited at once."""
NOT_TURNED, NOT_FINITE = -1, -2
"""What takes the place of the weight's index where nothing came of a row."""

Batch = dict[str, Any]


def draft(options: MadePairs) -> source.Draft:
    """Raises InputError where data, checkpoint and nets do not go together."""
    if options.num_workers is not None and options.num_workers < 0:
        raise InputError(f"--num-workers is {options.num_workers}; it must be 0 or more")
    weights = [*options.weights]
    if not weights or not all(0 < weight < math.inf for weight in weights) or weights != sorted({*weights}):
        raise InputError(f"--weights is {weights}; give one or more positive numbers, the least first")
    if options.identity_encoder and not options.classifier:
        raise InputError("--identity-encoder chooses among weights that turn an image; give --classifier, too")
    data = storage.absolute(options.data, flag="--data")
    card = read_card(data)
    loaded = checkpoint.load(options.checkpoint)
    sampling = checked(card, loaded.config, data)
    classifier, encoder = (
        storage.absolute(uri, flag=flag) if uri else None
        for uri, flag in (
            (options.classifier, "--classifier"),
            (options.identity_encoder, "--identity-encoder"),
        )
    )
    # loaded here to be refused here
    judges = [
        nets.classifier(classifier, card.domains).fingerprint if classifier else "",
        nets.identity_net(encoder).fingerprint if encoder else "",
    ]
    licence = loaded.config.data.licence
    made = DatasetCard(
        name=card.name,
        licence=card.licence if licence in (card.licence, "unknown") else f"{card.licence} + {licence}",
        source=f"{card.source}; the other side of each image made by a model, {loaded.fingerprint}",
        image_size=card.image_size,
        encoding=options.encoding,
        domains=card.domains,
        pairing="synthetic",
        attribute_names=card.attribute_names,
        prepared_by={"command": "pairs", "weights": [*options.weights], "seed": options.seed},
        source_hash=source.fingerprint(card.content_hash, loaded.fingerprint, sampling, *judges),
    )
    output = storage.absolute(options.output, flag="--output")
    parts = storage.join(f"{output.rstrip('/')}.parts", source.fingerprint(made.source_hash, made.prepared_by))
    make: dict[str, Any] = {"checkpoint_uri": loaded.path, "ema": loaded.ema, "sampling": configs.to_dict(sampling)}
    make |= {"weights": options.weights, "seed": options.seed, "classifier": classifier, "identity_encoder": encoder}
    return source.Draft(card=made, make=lambda: _make(data, card, make, parts, num_workers=options.num_workers))


def checked(card: DatasetCard, config: ModelConfig, data: str) -> SamplingConfig:
    """How the checkpoint edits.

    Raises:
        InputError: it does not edit, or not these images.
    """
    if card.has_targets:
        raise InputError(f"--data {data} has pairs already ({card.pairing}): train on them")
    if len(card.domains) != 2:
        raise InputError(f"--data {data} has {len(card.domains)} sides, {', '.join(card.domains)}; pairs need two")
    if config.method != "diffusion" or config.sampling.start not in FROM_SIDE:
        raise InputError(
            f"--checkpoint: its images are not edited ({config.method}, --start {config.sampling.start}); give "
            "a run of jobs.train --preset prior"
        )
    if (config.image_size, set(config.domains)) != (card.image_size, set(card.domains)):
        raise InputError(
            f"--checkpoint makes {', '.join(config.domains)} of {config.image_size} px, --data {data} has "
            f"{', '.join(card.domains)} of {card.image_size} px; train a prior on these data"
        )
    for name in card.domains:
        check_sampling(config, config.sampling, name)
    return config.sampling


def _make(
    data: str,
    card: DatasetCard,
    make: dict[str, Any],
    parts: str,
    *,
    num_workers: int | None,
) -> source.Made:
    splits = {name: reading.open_split(data, name, columns=COLUMNS) for name in SPLITS if card.splits.get(name)}
    tasks: list[tuple[str, int, reading.Piece]] = []
    total = 0
    for name, split in splits.items():
        for piece in split.pieces:
            tasks.append((name, total, piece))
            total += piece.rows
    pixels = decode.Pixels((total, 1, card.image_size, card.image_size, 3))
    taken = np.full(total, NOT_TURNED, np.int8)
    there = {int(name.removesuffix(".npz")) for name in storage.file_sizes(parts) if name.endswith(".npz")}
    with Progress(total=total, unit="row", description="edit") as progress:

        def put(first: int, made: Batch) -> None:
            for row, image in enumerate(made["image"], first):
                pixels[row] = image.tobytes()
            taken[first : first + len(made["taken"])] = made["taken"]
            progress.update(len(made["taken"]))

        kept = {first: part for first in sorted(there) if (part := _part(parts, first, card.image_size)) is not None}
        for first, part in kept.items():
            put(first, part)
        wanted = {first for _, start, piece in tasks for first in range(start, start + piece.rows, BATCH)} - {*kept}
        todo = [(name, start, piece) for name, start, piece in tasks if wanted & {*range(start, start + piece.rows)}]
        read = functools.partial(_read, splits=splits, wanted=frozenset(wanted))
        with contextlib.nullcontext() if num_workers == 0 or not todo else cli.ray_session():
            if todo:
                pool = workers.pool(len(wanted), num_workers)
                for made in workers.piped(read, todo, Editor, make, pool):
                    file = io.BytesIO()
                    np.savez(file, image=made["image"], taken=made["taken"])
                    storage.write_bytes(storage.join(parts, _file(made["first"])), file.getvalue())
                    put(made["first"], made)
    if not (taken[: card.splits["train"]] >= 0).any():
        raise InputError(
            f"none of the {card.splits['train']:,} training images is taken for the other side when it is edited; "
            "train the prior for longer, or give larger --weights"
        )
    rejected: list[tuple[str, str]] = []
    counted = collections.Counter(taken.tolist())
    weights = make["weights"] if make["classifier"] else make["weights"][:1]
    used = ", ".join(f"{counted[i]:,} at weight {weight:g}" for i, weight in enumerate(weights) if counted[i])
    notes = [f"the other side of each image is made by a model: {used or 'of none'}"]
    if not make["classifier"]:
        notes.append("no classifier has looked whether they are turned")
    starts = {name: next(first for split, first, _ in tasks if split == name) for name in splits}
    rows = {name: _rows(data, name, starts[name], pixels, taken, card.domains, rejected) for name in splits}
    return source.Made(
        rows=rows,
        num_rows=int((taken >= 0).sum()),
        rejected=rejected,
        notes=notes,
        clean=lambda: storage.delete_folder(parts.rpartition("/")[0]),
    )


def _file(first: int) -> str:
    return f"{first:09d}.npz"


def _part(parts: str, first: int, size: int) -> Batch | None:
    """What an earlier run made of the rows from `first` on; None where it is no such thing."""
    try:
        with np.load(io.BytesIO(storage.read_bytes(storage.join(parts, _file(first))))) as found:
            part = {name: found[name] for name in ("image", "taken")}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    return part if part["image"].shape == (len(part["taken"]), size, size, 3) else None


def _read(
    task: tuple[str, int, reading.Piece], splits: dict[str, reading.Split], wanted: frozenset[int]
) -> list[Batch]:
    """The batches of a piece that are still to be made; `first` is the number of a batch's first row."""
    split, start, piece = task
    table = splits[split].read(piece)
    pixels, domain = reading.pixels_of(table, "image"), table["domain"].to_numpy()
    return [
        {
            "first": start + at,
            "sides": splits[split].card.domains,
            "image": pixels[at : at + BATCH],
            "domain": domain[at : at + BATCH],
        }
        for at in range(0, len(table), BATCH)
        if start + at in wanted
    ]


def _rows(
    data: str,
    split: str,
    first: int,
    pixels: decode.Pixels,
    taken: np.ndarray,
    sides: Sequence[str],
    rejected: list[tuple[str, str]],
) -> Iterator[Row]:
    """The rows of a split that were turned; the others are added to `rejected`."""
    number = first
    for table in reading.read_tables(data, split, columns=COLUMNS):
        images = reading.pixels_of(table, "image")
        others: dict[str, list[Any]] = pyarrow.table(table.drop_columns(["image"])).to_pydict()
        for row, name in enumerate(others["id"]):
            domain = others["domain"][row]
            if taken[number] >= 0:
                yield Row(
                    id=name,
                    domain=domain,
                    image=images[row],
                    target=pixels[number, 0],
                    target_id=f"{name} as {sides[1 - domain]}",
                    **{column: others[column][row] for column in ("identity", "attributes", "landmarks")},
                )
            else:
                rejected.append((name, _reason(int(taken[number]), sides[domain], sides[1 - domain])))
            number += 1


def _reason(taken: int, own: str, other: str) -> str:
    if taken == NOT_FINITE:
        return "the network gave values that are not finite numbers"
    return f"made {other} by every one of --weights, it is still taken for {own}"


class Editor:
    """A worker of a pool: batches of real images become batches of their other side."""

    def __init__(
        self,
        *,
        checkpoint_uri: str,
        ema: float | None,
        sampling: Mapping[str, Any],
        weights: Sequence[float],
        seed: int,
        classifier: str | None,
        identity_encoder: str | None,
        num_threads: int,
    ) -> None:
        torch.set_num_threads(num_threads)
        self.translator = Translator(checkpoint.load(checkpoint_uri, ema=ema))
        self.sampling, self.seed, self.weights = sampling, seed, weights if classifier else weights[:1]
        self.domains = self.translator.config.domains
        device = self.translator.device
        self.side = nets.classifier(classifier, self.domains).module.to(device) if classifier else None
        self.who = nets.identity_net(identity_encoder).module.to(device) if identity_encoder else None

    def __call__(self, batch: Batch) -> Batch:
        made = np.zeros_like(batch["image"])
        taken = np.full(len(made), NOT_TURNED, np.int8)
        for own, domain in enumerate(batch["sides"]):
            rows = np.flatnonzero(batch["domain"] == own)
            if len(rows):
                made[rows], taken[rows] = self.turned(batch["image"][rows], domain, batch["sides"][1 - own])
        return {"first": batch["first"], "image": made, "taken": taken}

    def turned(
        self, sources: UInt8[np.ndarray, "b s s 3"], own: str, other: str
    ) -> tuple[UInt8[np.ndarray, "b s s 3"], np.ndarray]:
        """Images of the side `own` as the side `other`, and the index of the weight that was taken, or what is in its
        place where none was."""
        best, taken = np.zeros_like(sources), np.full(len(sources), NOT_FINITE, np.int8)
        likeness = np.full(len(sources), -np.inf)
        left = np.arange(len(sources))
        for index, weight in enumerate(self.weights):
            options = {**self.sampling, "guidance_scale": float(weight)}
            made = self.translator.attempt(sources[left], other, seed=self.seed, source_domain=own, **options)
            passed = made.finite & self._passes(made.images, other)
            taken[left[made.finite & (taken[left] == NOT_FINITE)]] = NOT_TURNED
            alike = self._alike(sources[left], made.images)
            better = passed & (alike > likeness[left])
            rows = left[better]
            best[rows], taken[rows], likeness[rows] = made.images[better], index, alike[better]
            if self.who is None:
                left = left[~passed]
            if not len(left):
                break
        return best, taken

    def _passes(self, images: UInt8[np.ndarray, "b s s 3"], domain: str) -> np.ndarray:
        """(b,) bool: taken for that side."""
        if self.side is None:
            return np.ones(len(images), bool)
        found: np.ndarray = self._seen(self.side, images)[:, self.domains.index(domain)].cpu().numpy() > 0.5
        return found

    def _alike(self, sources: UInt8[np.ndarray, "b s s 3"], images: UInt8[np.ndarray, "b s s 3"]) -> np.ndarray:
        """(b,) cosine of the embeddings; 1 without an encoder."""
        if self.who is None:
            return np.ones(len(images))
        found: np.ndarray = (self._seen(self.who, sources) * self._seen(self.who, images)).sum(1).cpu().numpy()
        return found

    @torch.no_grad()
    def _seen(self, net: torch.nn.Module, images: UInt8[np.ndarray, "b s s 3"]) -> Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
        found: Tensor = net(pixels.to(self.translator.device)).float()
        return found
