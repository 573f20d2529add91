"""What the measurements of one domain come to: every method in every metric with its interval, verdicts and notes."""

import dataclasses
import io
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from jaxtyping import Float

from jobs.common import intervals
from jobs.common.intervals import Interval
from jobs.evaluation import metrics as evaluation_metrics
from jobs.reports import metric_table
from jobs.reports.metric_table import METHODS

VERDICTS = [
    ("psnr", "copy"),
    ("ssim", "copy"),
    ("kid", "linear"),
    ("kid", "copy"),
    ("psnr", "linear"),
    ("ssim", "linear"),
    ("perceptual", "copy"),
    ("perceptual", "linear"),
    ("flip_rate", "copy"),
    ("flip_rate", "truth"),
    ("identity_rank_1", "truth"),
]
"""Ours against whom in what, the promised comparisons first."""
FEW_RIGHT = 0.9
"""A classifier that is right less often on real images judges flips too badly to rely on."""
PER_IMAGE = ("psnr", "ssim", "perceptual")


@dataclasses.dataclass(frozen=True)
class Measured:
    """One domain's measurements; rows of the arrays belong together."""

    ids: list[str]
    methods: dict[str, dict[str, np.ndarray]]
    """method → name → n or n d: metrics of each image, and the nets' features, chances and embedding."""
    samples: dict[str, Float[np.ndarray, "k d"]]
    """id → features of results that differ in their noise only."""
    real: Float[np.ndarray, "m d"]
    """Features of real held-out images of the domain."""
    real_chances: Float[np.ndarray, "m k"] | None
    """What the classifier makes of them."""
    people: np.ndarray
    """n, whom each source shows: other images of the same person are no rivals of the source."""
    train: Float[np.ndarray, "t d"]
    """Features of training images of the domain."""
    wanted: int
    """The domain."""
    source_domains: np.ndarray
    """n, the domain that each source is of."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a domain's measurements come to: every method in every metric."""

    values: dict[str, dict[str, Float[np.ndarray, " n"]]]
    """method → metric → each image's, NaN where it was not measured."""
    subsets: dict[str, Float[np.ndarray, " k"]]
    """method → KID of random subsets."""
    summaries: dict[str, dict[str, Interval]]
    """method → metric → its mean and interval."""
    instruments: dict[str, Interval]
    """How good the nets are that judge: on images of which the right answer is known."""


def summarise(measured: Measured, *, seed: int) -> Summary:
    """All of it."""
    values = {name: per_image(name, measured) for name in measured.methods}
    subsets = kid_subsets(measured, seed)
    summaries = {
        name: {metric: evaluation_metrics.estimate(metric, each, seed=seed) for metric, each in of.items()}
        for name, of in values.items()
    }
    for name, each in subsets.items():
        summaries.setdefault(name, {})["kid"] = evaluation_metrics.estimate("kid", each)
    for name, distance in frechet_distances(measured).items():
        summaries.setdefault(name, {})["fd"] = distance
    return Summary(values, subsets, summaries, instruments(measured, values, seed))


def per_image(method: str, measured: Measured) -> dict[str, np.ndarray]:
    """Every metric of each of a method's images."""
    found, sources = measured.methods[method], measured.methods["copy"]
    values = {name: each for name, each in found.items() if each.ndim == 1}
    if "chances" in found:
        values["flip_rate"] = evaluation_metrics.flipped(found["chances"], measured.wanted)
    if "embedding" in found:
        values["identity_cosine"] = evaluation_metrics.cosine(found["embedding"], sources["embedding"])
        values["identity_rank_1"] = evaluation_metrics.rank_1(
            found["embedding"], sources["embedding"], people=measured.people
        )
    if method == "model" and measured.samples:
        drawn = [name for name in measured.ids if name in measured.samples]
        values["diversity"] = np.full(len(measured.ids), np.nan)
        rows = [i for i, name in enumerate(measured.ids) if name in measured.samples]
        values["diversity"][rows] = evaluation_metrics.diversity(np.stack([measured.samples[name] for name in drawn]))
    if method in ("model", "truth") and len(measured.train) and len(measured.real):
        nearest = evaluation_metrics.nearest(found["features"], measured.train, measured.real)
        values["neighbor_distance"] = nearest.distances
        if len(measured.real) >= evaluation_metrics.MIN_COPIED_IMAGES:
            values["copied"] = nearest.copied
    return values


def kid_subsets(measured: Measured, seed: int) -> dict[str, np.ndarray]:
    """KID of each method on the same subsets, where there are images enough."""
    made = {name: found["features"] for name, found in measured.methods.items() if name != "truth"}
    if len(measured.train) >= evaluation_metrics.MIN_KID_IMAGES:
        made["real"] = measured.train
    if min(len(measured.real), len(measured.ids)) < evaluation_metrics.MIN_KID_IMAGES:
        return {}
    real = torch.from_numpy(measured.real)
    return {
        name: evaluation_metrics.kid(real, torch.from_numpy(features), seed=seed) for name, features in made.items()
    }


def frechet_distances(measured: Measured) -> dict[str, Interval]:
    """Fréchet distance of each method, where there are images enough."""
    made = {name: found["features"] for name, found in measured.methods.items() if name != "truth"}
    if len(measured.train):
        made["real"] = measured.train
    least = evaluation_metrics.MIN_FRECHET_IMAGES
    found: dict[str, Interval] = {}
    for name, features in made.items():
        if min(len(measured.real), len(features)) >= least:
            found[name] = evaluation_metrics.frechet(torch.from_numpy(measured.real), torch.from_numpy(features))
    return found


def instruments(measured: Measured, values: dict[str, dict[str, np.ndarray]], seed: int) -> dict[str, Interval]:
    """How often the classifier is right on real images of either side, and the identity net on true counterparts."""
    found = {}
    if measured.real_chances is not None and len(measured.real_chances):
        of_wanted = measured.real_chances.argmax(1) == measured.wanted
        of_sources = measured.methods["copy"]["chances"].argmax(1) == measured.source_domains
        right = np.concatenate([of_wanted, of_sources]).astype(np.float64)
        found["classifier_accuracy"] = intervals.bootstrap(right, seed=seed)
    if "identity_rank_1" in values.get("truth", {}):
        found["identity_rank_1"] = intervals.bootstrap(values["truth"]["identity_rank_1"], seed=seed)
    return found


# -- in words -----------------------------------------------------------------------------------------------------


def verdicts(found: Summary, *, seed: int) -> list[evaluation_metrics.Verdict]:
    """Ours against the baselines and against a perfect answer."""
    told = []
    for metric, other in VERDICTS:
        values = found.subsets if metric == "kid" else {name: of.get(metric) for name, of in found.values.items()}
        ours, theirs = values.get("model"), values.get(other)
        if ours is not None and theirs is not None:
            told.append(evaluation_metrics.verdict(metric, METHODS[other], ours, theirs, seed=seed))
    return told


def headline(found: Iterable[evaluation_metrics.Verdict], *, num_images: int) -> str:
    """The promised comparisons in one sentence: what it beats, and what it does not; or why there is nothing to say."""
    told = list(found)
    if num_images < intervals.ENOUGH:
        return intervals.rests_on(num_images)
    if not told:
        return "There is nothing to compare with here: how good the translations are is not known."
    promised = [v for v in told if METHODS.get(metric_table.of(v.metric).promised) == v.against] or told
    groups: dict[tuple[bool | None, str], list[str]] = {}
    for v in promised:
        groups.setdefault((v.better, v.against), []).append(v.text.partition(":")[0])
    parts = []
    for better, (words, joint) in OUTCOMES.items():
        those = [f"{against} in {' and '.join(names)}" for (each, against), names in groups.items() if each == better]
        if those:
            parts.append(f"{words} {joint.join(those)}.")
    return " ".join(parts)


OUTCOMES: dict[bool | None, tuple[str, str]] = {
    True: ("It beats", ", and "),
    False: ("It does not beat", ", nor "),
    None: ("There is no clear difference to", ", nor to "),
}
"""Of a verdict: how a headline begins, and goes on."""


def notes(found: Summary, *, pairing: str, domain: str, num_train: tuple[int, int], elsewhere: bool) -> list[str]:
    """What a reader must know not to misread the figures. `num_train`: training images measured, and all of them.
    `elsewhere`: the model was trained on other data."""
    told = []
    if pairing == "matched":
        told.append(
            "These data have no true pairs: the counterparts are the nearest neighbours among other people, proxies. "
            "Closeness to a proxy is not correctness; the figures to the source say how much of the image was kept."
        )
    elif pairing != "paired":
        told.append(
            "These data have no pairs: PSNR and SSIM are to the source and say how much of the image was kept, "
            "not whether the translation is right."
        )
    if "model" not in found.subsets:
        told.append(
            f"No KID: it needs {evaluation_metrics.MIN_KID_IMAGES} results and as many real images of {domain}."
        )
    model = found.summaries["model"]
    if (accuracy := found.instruments.get("classifier_accuracy")) is not None:
        told.append(
            f"The classifier is right on {accuracy.mean:.1%} ({accuracy.low:.1%} to {accuracy.high:.1%}) of the real "
            "images here, which bounds what its flip rate can say."
            + (" That is too few to rely on it." if accuracy.mean < FEW_RIGHT else "")
        )
    if (right := found.instruments.get("identity_rank_1")) is not None:
        told.append(
            f"Of the true counterparts the identity net finds {right.mean:.1%} ({right.low:.1%} to {right.high:.1%}) "
            "at their sources: no model can be expected to reach more."
            + (" That is too few to rely on it." if right.mean < FEW_RIGHT else "")
        )
    if "neighbor_distance" in model:
        measured, there = num_train
        told.append(
            f"Nearest training images: by the feature net, among {measured:,} of {there:,} images of {domain}"
            + " (copied: nearer to one of them than 99 % of the real held-out images are)" * ("copied" in model)
            + (", which are not those that this model was trained on." if elsewhere else ".")
        )
    return told


# -- files --------------------------------------------------------------------------------------------------------


def images_table(found: Mapping[str, tuple[list[str], Summary]]) -> bytes:
    """pictures.parquet: a row for each domain, method and id, with the value of each metric."""
    rows = [
        {"domain": domain, "method": method, "id": name, **{m: _number(each[i]) for m, each in of.items()}}
        for domain, (ids, of_domain) in found.items()
        for method, of in of_domain.values.items()
        for i, name in enumerate(ids)
    ]
    columns = dict.fromkeys(name for row in rows for name in row)
    text = dict.fromkeys(("domain", "method", "id"), pyarrow.string())
    return _parquet({name: ([row.get(name) for row in rows], text.get(name, pyarrow.float64())) for name in columns})


def subsets_table(found: Mapping[str, tuple[list[str], Summary]]) -> bytes:
    """halves.parquet: KID of each domain, method and random subset."""
    rows = [
        (domain, method, subset, float(kid))
        for domain, (_, of_domain) in found.items()
        for method, subsets in of_domain.subsets.items()
        for subset, kid in enumerate(subsets)
    ]
    types = {"domain": pyarrow.string(), "method": pyarrow.string(), "half": pyarrow.int32(), "kid": pyarrow.float64()}
    return _parquet({name: ([row[i] for row in rows], kind) for i, (name, kind) in enumerate(types.items())})


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _parquet(columns: dict[str, tuple[list[Any], pyarrow.DataType]]) -> bytes:
    table = pyarrow.table({name: pyarrow.array(values, kind) for name, (values, kind) in columns.items()})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()
