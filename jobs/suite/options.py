"""What the command of the experiments says."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Which experiments, how large, and where to."""

    output: str
    """Folder or s3:// prefix for data sets, runs, evaluations, the table and report.html."""
    suite: Literal["mission"] = "mission"
    """The plan: what is trained, measured and claimed."""
    size: Literal["smoke", "cpu", "gpu"] = "cpu"
    """smoke: minutes, shows that all parts work; cpu: under two hours on two cores; gpu: a GPU for each command."""
    seeds: int = 3
    """Trainings of each kind, from different random numbers: intervals count the spread between them."""
    sections: tuple[str, ...] = ()
    """Only these parts, such as injection day2night; by default all that there are data for. The report has them."""
    celeba: str | None = None
    """Your copy of CelebA, as jobs.prepare celeba takes it: adds real faces."""
    snapshots: str | None = None
    """A folder or s3:// prefix of your own photographs, for the stress test."""
    judges: str | None = None
    """Encoders that measure, trained before; by default the suite trains its own."""
    commands_per_gpu: int = 1
    """Small trainings may share a GPU."""
    local_processes: int = 0
    """Run so many commands at a time on this machine, without Ray; by default Ray spreads them, one on each CPU."""
    dry_run: bool = False
    """List the commands that are missing, as you could type them, and do nothing."""
