"""Which trials are on the Pareto front, and which of them is chosen."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from jobs.reports.metric_table import lower_is_better


def pareto_front(points: Sequence[Mapping[str, float]]) -> list[int]:
    """Indices of those that no other beats: as good in everything, and better in something."""
    losses = np.stack([_losses(points, name) for name in points[0]], axis=1)
    beaten = [((losses <= mine).all(1) & (losses < mine).any(1)).any() for mine in losses]
    return np.flatnonzero(~np.array(beaten)).tolist()


def _losses(points: Sequence[Mapping[str, float]], name: str) -> Float[np.ndarray, " n"]:
    values = np.array([point[name] for point in points], dtype=np.float64)
    return values if lower_is_better(name) else -values


def nearest_to_ideal(front: Sequence[Mapping[str, float]], prefer: Mapping[str, float]) -> int:
    """Index of the trial that `jobs.tuning.plan.RULE` picks."""
    columns = []
    for name in front[0]:
        losses = _losses(front, name)
        losses = np.log(losses) if name == "nfe" else losses
        behind = losses - losses.min()
        unit = float(np.median(behind))
        unit = unit if unit > 0 else float(behind.max())
        columns.append(prefer.get(name, 1.0) * behind / (unit if unit > 0 else 1.0))
    return int(np.linalg.norm(np.stack(columns), axis=0).argmin())
