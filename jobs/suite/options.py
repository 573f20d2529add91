"""What the commands of the experiments and of the recipe say."""

import dataclasses
from typing import Annotated, Literal

from jobs.common.numbers import ImageSize, NumWorkers, Seed, Within


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Which experiments, how large, and where to."""

    output: str
    """Folder or s3:// prefix for data sets, runs, evaluations, the table and report.html."""
    suite: Literal["mission"] = "mission"
    """The plan: what is trained, measured and claimed."""
    size: Literal["smoke", "cpu", "gpu"] = "cpu"
    """smoke: minutes, shows that all parts work; cpu: under two hours on two cores; gpu: a GPU for each command."""
    seeds: Annotated[int, Within(1, 1000)] = 3
    """Trainings of each kind, from different random numbers: intervals count the spread between them."""
    sections: tuple[str, ...] = ()
    """Only these parts, such as injection day2night; by default all that there are data for. The report has them."""
    celeba: str | None = None
    """Your copy of CelebA, as jobs.prepare celeba takes it: adds real faces."""
    snapshots: str | None = None
    """A folder or s3:// prefix of your own photographs, for the stress test."""
    judges: str | None = None
    """Encoders that measure, trained before; by default the suite trains its own."""
    commands_per_gpu: Annotated[int, Within(1, 64)] = 1
    """Small trainings may share a GPU."""
    local_processes: NumWorkers = 0
    """Run so many commands at a time on this machine, without Ray; by default Ray spreads them, one on each CPU."""
    dry_run: bool = False
    """List the commands that are missing, as you could type them, and do nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeArgs:
    """Which folders, how large, and where to."""

    source: str
    """Folder or s3:// prefix with a sub-folder of images for each of the two sides."""
    output: str
    """Folder or s3:// prefix for everything: it is a --checkpoint of every command from the first network on."""
    preset: Literal["cpu", "gpu"] = "cpu"
    """cpu: 32 px, some 20 minutes on two cores. gpu: 64 px and a larger network; not run yet."""
    image_size: ImageSize | None = None
    """Side of the square images, in pixels; by default the preset's."""
    num_workers: NumWorkers | None = None
    """Processes (cpu) or GPUs (gpu) of each training, by default two and one; 0 trains in one process without Ray."""
    seed: Seed = 0
    """Of everything random."""
