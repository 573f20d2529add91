"""The identity encoder among few people and among thousands: equally many steps, then rank-1 among others.

Drawn people at several moments each (`jobs.prepare rendered --moments`): pose, light, place and clothes differ between
two images of a person, so that pixels do not tell who it is. Of each number of people the preset `identity-encoder` is
trained; a query is an image of a person it has not seen, which is found when the nearest of --others images, one of
each person, shows the same one.
"""

import dataclasses
import json
import time
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_core import encoders, provenance, storage
from ddpm_core.errors import InputError
from ddpm_core.images import to_float
from jobs import prepare, train
from jobs.common import cli, intervals, numbers
from jobs.common.numbers import Within
from jobs.datasets import cache
from jobs.datasets.format import read_card

SIDE = 32
ALONE = ("--num-workers", "0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The identity encoder among few people and among thousands."""

    output: str = "runs/benchmark/people"
    """Folder or s3:// prefix for the drawn people, the encoders and people.json."""
    people: tuple[Annotated[int, Within(2, 1_000_000)], ...] = (512, 8000)
    """How many people to learn from, one encoder each."""
    moments: Annotated[int, Within(2, 1000)] = 4
    """Images of each."""
    others: Annotated[int, Within(2, 100_000)] = 400
    """Unseen people among whom one is looked for."""
    steps: Annotated[int, Within(1, 1_000_000)] = 1500
    """Of each training."""
    batch_size: Annotated[int, Within(2, 16_384)] = 64
    """Of each training, in rows."""
    seed: numbers.Seed = 0
    """Of the trainings."""


def run(options: Options) -> int:
    """Draw, train, write people.json, print the table."""
    numbers.check(options)
    output = storage.absolute(options.output, flag="--output")
    storage.check_writable(output)
    torch.set_num_threads(1)
    sets = {number: drawn(output, number, options) for number in sorted(options.people, reverse=True)}
    queries, partners = both(sets[max(sets)], options)
    rows = [{"people": 0, "name": "pixels", **found(pixels(queries), pixels(partners), options.seed)}]
    for number in options.people:
        learned = trained(sets[number], output, number, queries, partners, options)
        rows.append({"people": number, "name": f"{number:,}", **learned})
        show(rows)
    result = {"options": dataclasses.asdict(options), "environment": provenance.environment(), "rows": rows}
    storage.write_bytes(storage.join(output, "people.json"), json.dumps(result, indent=2).encode())
    return cli.DONE


def drawn(output: str, number: int, options: Options) -> str:
    """A data set of so many people to learn from, and an eighth as many to test. The smaller is a part of the larger:
    nobody whom one holds out is learned from in the other."""
    uri = storage.join(output, f"people-{number}")
    flags = ("--count", str(round(number / 0.8)), "--moments", str(options.moments), "--image-size", str(SIDE))
    code = prepare.main(["rendered", *flags, "--pairing", "unpaired", "--output", uri, *ALONE])
    assert code == cli.DONE, code
    return uri


def both(data: str, options: Options) -> tuple[Tensor, Tensor]:
    """Two images, n 3 s s, of each of the first people of the test split."""
    rows = cache.load(data, "test")
    first = np.arange(options.others) * options.moments
    if len(rows) < options.others * options.moments:
        raise InputError(
            f"--others is {options.others}; with --people {max(options.people)} there are "
            f"{len(rows) // options.moments} to test: give at most as many, or more --people"
        )
    queries, partners = (to_float(torch.from_numpy(rows.images(first + moment))) for moment in (0, 1))
    return queries, partners


def pixels(images: Tensor) -> Tensor:
    """Of each image its pixels as a vector of length 1."""
    return F.normalize(images.flatten(1) - images.mean((1, 2, 3))[:, None], dim=1)


def trained(data: str, output: str, number: int, queries: Tensor, partners: Tensor, options: Options) -> dict[str, Any]:
    """What an encoder that learned from these people makes of others."""
    uri = storage.join(output, f"encoder-{number}-{options.seed}")
    epochs = max(round(options.steps * options.batch_size / read_card(data).splits["train"]), 1)
    argv = ["--preset", "identity-encoder", "--data", data, "--output", uri, *ALONE, "--seed", str(options.seed)]
    argv += ["--epochs", str(epochs), "--global-batch-size", str(options.batch_size)]
    argv += ["--validate-every-epochs", str(max(epochs // 4, 1)), "--encoder.image-size", str(SIDE)]
    began = time.process_time()
    code = train.main(argv)
    assert code == cli.DONE, code
    encoder = encoders.load_identity_encoder(uri)
    of_each = found(encoder(queries), encoder(partners), options.seed)
    return {**of_each, "cpu_s": time.process_time() - began, "epochs": epochs}


def found(queries: Tensor, partners: Tensor, seed: int) -> dict[str, float]:
    """How many queries find their partner first, with its 95 % interval."""
    _, first = encoders.retrieval(queries, partners, torch.arange(len(queries)), scale=1.0)
    share = intervals.bootstrap(first.double().numpy(), seed=seed)
    return {"rank_1": share.mean, "low": share.low, "high": share.high}


def show(rows: list[dict[str, Any]]) -> None:
    print("\n| people to learn from | rank-1 among others | epochs | CPU-s |\n|---|---|---|---|")
    for row in rows:
        share = f"{row['rank_1']:.1%} ({row['low']:.1%} to {row['high']:.1%})"
        print(f"| {row['name']} | {share} | {row.get('epochs', '–')} | {row.get('cpu_s', 0):.0f} |", flush=True)
