"""Evaluations as their folders keep them, and how two of them differ.

Images are compared by id, KID by the same random subsets of the images.
"""

import dataclasses
import functools
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow.parquet
from jaxtyping import Float

from ddpm_core import storage
from ddpm_core.errors import InputError
from jobs.common import intervals, resume
from jobs.common.intervals import Interval
from jobs.evaluation.metrics import difference
from jobs.reports import metric_table

FORMAT, FORMAT_VERSION = "ddpm-translate-evaluation", 2
IMAGES, SUBSETS = "pictures.parquet", "halves.parquet"
"""Values of each image; KID of each random subset."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One evaluation's folder; its tables are read when they are asked for.

    Raises InputError where a table is damaged.
    """

    uri: str
    metrics: Mapping[str, Any]
    """The content of metrics.json."""

    @property
    def source(self) -> tuple[str, str]:
        """Name and content hash of the data it was measured on."""
        return self.metrics["data"]["name"], self.metrics["data"]["content_hash"]

    def metrics_of_images(self, domain: str) -> list[str]:
        """What the model's images were measured by."""
        found = self._images.get((domain, "model"), {})
        return [name for name in found if name not in KEYS and self.images(domain, "model", name)]

    def images(self, domain: str, method: str, metric: str) -> dict[str, float]:
        """id → value, of those images that were measured."""
        found = self._images.get((domain, method), {})
        if metric not in found:
            return {}
        pairs = zip(found["id"], found[metric].astype(np.float64), strict=True)
        return {str(name): float(value) for name, value in pairs if not np.isnan(value)}

    def subsets(self, domain: str, method: str) -> Float[np.ndarray, "subsets"]:
        """KID of each random subset; (0,) where there is none."""
        found = self._subsets.get((domain, method))
        return np.zeros(0) if found is None else found["kid"][np.argsort(found["half"])]

    def summary(self, domain: str, method: str, metric: str) -> Interval | None:
        """What metrics.json says."""
        methods = self.metrics["domains"].get(domain, {}).get("methods", {})
        value = methods.get(method, {}).get("metrics", {}).get(metric)
        return None if value is None else Interval(value["mean"], value["low"], value["high"])

    @functools.cached_property
    def _images(self) -> dict[tuple[str, str], dict[str, np.ndarray]]:
        return _by_method(storage.join(self.uri, IMAGES))

    @functools.cached_property
    def _subsets(self) -> dict[tuple[str, str], dict[str, np.ndarray]]:
        return _by_method(storage.join(self.uri, SUBSETS))


KEYS = ("domain", "method", "id")


def _by_method(uri: str) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """The columns of a table by (domain, method); {} where there is no table."""
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(storage.read_bytes(uri)))
    except FileNotFoundError:
        return {}
    except pyarrow.ArrowException as error:
        raise InputError(f"{uri} is damaged ({str(error).splitlines()[0]}); evaluate again") from None
    columns = {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}
    keys = np.array([f"{d}\0{m}" for d, m in zip(columns["domain"], columns["method"], strict=True)])
    found = {}
    for key in dict.fromkeys(keys.tolist()):
        domain, method = key.split("\0")
        found[domain, method] = {name: column[keys == key] for name, column in columns.items()}
    return found


def read(uri: str) -> Evaluation:
    """A whole evaluation's folder.

    Raises:
        InputError: there is none, or one of another version, or a table is missing.
    """
    file, remedy = storage.join(uri, "metrics.json"), "give a folder that jobs.evaluate wrote, or evaluate again"
    found = resume.read_record(file, FORMAT, FORMAT_VERSION, what="an evaluation's", remedy=remedy)
    if found is None:
        raise InputError(f"{uri}: no evaluation here (no metrics.json); {remedy}")
    for name in (IMAGES, SUBSETS):
        if not storage.exists(storage.join(uri, name)):
            raise InputError(f"{uri}: {name} is missing; evaluate again")
    return Evaluation(uri, found)


# -- two of them --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Difference:
    """Two evaluations in one metric."""

    domain: str
    metric: str
    a: float
    b: float
    num: int
    """Images, or subsets."""
    difference: Interval
    """A minus B."""
    words: str


def check_same(a: Evaluation, b: Evaluation) -> None:
    """The same rows of the same data.

    Raises:
        InputError: naming what differs.
    """
    facts = {
        "data": lambda side: "{} (hash {})".format(*side.source),
        "split": lambda side: side.metrics["split"],
    }
    for name, fact in facts.items():
        if fact(a) != fact(b):
            raise InputError(
                f"A was measured on {name} {fact(a)}, B on {fact(b)}; only evaluations of the same rows compare"
            )
    if not set(a.metrics["domains"]) & set(b.metrics["domains"]):
        ours, theirs = (", ".join(side.metrics["domains"]) for side in (a, b))
        raise InputError(f"A was measured to {ours}, B to {theirs}; only evaluations of the same domain compare")


def differences(a: Evaluation, b: Evaluation) -> tuple[list[Difference], list[str], float]:
    """Every metric that both have, why others are left out, and the level of each interval: so wide (Bonferroni) that
    all of them hold together with 95 %."""
    pairs: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
    left_out: dict[str, None] = {}
    for domain in [name for name in a.metrics["domains"] if name in b.metrics["domains"]]:
        for metric in dict.fromkeys([*a.metrics_of_images(domain), *b.metrics_of_images(domain), "kid"]):
            if reason := _why_not(a, b, domain, metric):
                left_out[f"{metric}: {reason}"] = None
            elif metric == "kid":
                pairs[domain, metric] = a.subsets(domain, "model"), b.subsets(domain, "model")
            else:
                ours, theirs = (side.images(domain, "model", metric) for side in (a, b))
                common = sorted(ours.keys() & theirs.keys())
                pairs[domain, metric] = (np.array([ours[i] for i in common]), np.array([theirs[i] for i in common]))
        if any(side.summary(domain, "model", "fd") for side in (a, b)):
            left_out["fd: no parts of it are kept whose difference could be taken; each report has its interval"] = None
    level = intervals.bonferroni(max(len(pairs), 1))
    return [_difference(*key, *pair, level) for key, pair in pairs.items()], list(left_out), level


def _why_not(a: Evaluation, b: Evaluation, domain: str, metric: str) -> str:
    """Why this metric cannot be compared, "" where it can."""
    ids = [set(side.images(domain, "model", metric)) for side in (a, b)]
    measured = [len(side.subsets(domain, "model")) for side in (a, b)] if metric == "kid" else [*map(len, ids)]
    if not all(measured):
        missing = [name for name, count in zip("AB", measured, strict=True) if not count]
        return f"not measured in {' and '.join(missing)}"
    if net := metric_table.of(metric).net:
        ours, theirs = ((side.metrics["nets"][net] or {}) for side in (a, b))
        if ours.get("fingerprint") != theirs.get("fingerprint"):
            return f"measured with different nets ({ours.get('name')}; {theirs.get('name')})"
    if metric == "kid":
        if a.metrics["seed"] != b.metrics["seed"]:
            return f"different seeds ({a.metrics['seed']}, {b.metrics['seed']}) give different subsets"
        ids = [set(side.images(domain, "model", side.metrics_of_images(domain)[0])) for side in (a, b)]
        real = [side.metrics["domains"][domain]["num_real_images"] for side in (a, b)]
        if ids[0] != ids[1] or real[0] != real[1]:
            return "measured on different images, so the subsets are not the same"
    elif not ids[0] & ids[1]:
        return "no image in common"
    return ""


def _difference(domain: str, metric: str, a: np.ndarray, b: np.ndarray, level: float) -> Difference:
    gap = difference(metric, a, b, level=level)
    words = "no clear difference" if len(a) >= intervals.ENOUGH else "too few to tell"
    if intervals.significant(gap, len(a)):
        directed = metric_table.has_direction(metric)
        ahead = "A" if (gap.mean > 0) != (directed and metric_table.lower_is_better(metric)) else "B"
        words = f"{ahead} is {'better' if directed else 'larger'}"
    return Difference(domain, metric, float(a.mean()), float(b.mean()), len(a), gap, words)
