"""Which trial of a Pareto front is chosen."""

from collections.abc import Mapping, Sequence

import numpy as np

from jobs.reports.metric_table import lower_is_better


def nearest_to_ideal(front: Sequence[Mapping[str, float]], prefer: Mapping[str, float]) -> int:
    """Index of the trial that `jobs.tuning.plan.RULE` picks."""
    columns = []
    for name in front[0]:
        values = np.array([point[name] for point in front], dtype=np.float64)
        losses = np.log(values) if name == "nfe" else values if lower_is_better(name) else -values
        behind = losses - losses.min()
        unit = float(np.median(behind))
        unit = unit if unit > 0 else float(behind.max())
        columns.append(prefer.get(name, 1.0) * behind / (unit if unit > 0 else 1.0))
    return int(np.linalg.norm(np.stack(columns), axis=0).argmin())
