"""Which images share a pass through the network: those whose options are equal, and no others."""

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import UInt8

from .schemas import Options

Translate = Callable[..., np.ndarray]
"""`ddpm_core.translator.Translator`, or anything called like it."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One request as the model gets it."""

    image: UInt8[np.ndarray, "h w 3"]
    options: Options


@dataclasses.dataclass(frozen=True)
class Done:
    """One request as the model answers it."""

    image: UInt8[np.ndarray, "h w 3"]
    model_ms: float
    """Time of the pass it was part of."""
    batch_size: int
    """Images in that pass."""


def run(translate: Translate, jobs: Sequence[Job]) -> list[Done]:
    """The jobs' results in their order; one pass for each set of equal options."""
    groups: dict[Options, list[int]] = {}
    for index, job in enumerate(jobs):
        groups.setdefault(job.options, []).append(index)
    done: dict[int, Done] = {}
    for options, members in groups.items():
        start = time.perf_counter()
        images = np.stack([jobs[index].image for index in members])
        results = translate(images, **options.arguments())
        model_ms = (time.perf_counter() - start) * 1000
        for index, image in zip(members, results, strict=True):
            done[index] = Done(image, model_ms, len(members))
    return [done[index] for index in range(len(jobs))]
