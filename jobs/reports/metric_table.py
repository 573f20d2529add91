"""The metrics, one row each: what it is called, its unit and digits, which way is better, what it is measured with.

A key of metrics.json is a metric by itself (`kid`, or `psnr` to the truth) or says what it is measured to
(`psnr_to_source`). Whatever tells of a metric in a table, on an axis or in a sentence reads it here.
"""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """One row."""

    name: str
    """In a sentence."""
    group: str = ""
    """The table of an evaluation that it stands in."""
    better: Literal["higher", "lower", ""] = "higher"
    """Empty where neither is."""
    unit: str = ""
    digits: int = 3
    """Worth showing after the point."""
    rate: bool = False
    """A share of images; a suite shows it in percent."""
    net: str = ""
    """The net of an evaluation that it is measured with: features, classifier or identity."""
    promised: str = ""
    """The method (`METHODS`) that a model must beat in it to be worth anything."""
    to_truth: bool = False
    """Each image is measured to its true counterpart where the key says nothing else."""


FAITHFUL, REAL, DOMAIN = "How faithful", "How real", "Domain and identity"
VARIETY, OTHERS = "Variety and memory", "Others"
METRICS = {
    "psnr": Metric(name="PSNR", group=FAITHFUL, unit=" dB", digits=2, promised="copy", to_truth=True),
    "ssim": Metric(name="SSIM", group=FAITHFUL, promised="copy", to_truth=True),
    "perceptual": Metric(
        name="perceptual distance", group=FAITHFUL, better="lower", digits=4, net="features", to_truth=True
    ),
    "kid": Metric(name="KID", group=REAL, better="lower", digits=4, net="features", promised="linear"),
    "fd": Metric(name="Fréchet distance", group=REAL, better="lower", digits=2, net="features"),
    "flip_rate": Metric(name="flip rate", group=DOMAIN, rate=True, net="classifier"),
    "identity_cosine": Metric(name="identity cosine", group=DOMAIN, net="identity"),
    "identity_rank_1": Metric(name="identity rank-1", group=DOMAIN, rate=True, net="identity"),
    "diversity": Metric(name="diversity", group=VARIETY, better="", net="features"),
    "neighbor_distance": Metric(name="distance to training images", group=VARIETY, better="", net="features"),
    "copied": Metric(name="copied from training", group=VARIETY, better="", rate=True, net="features"),
    "nfe": Metric(name="network evaluations an image", better="lower", digits=0),
    "images_per_s": Metric(name="images a second"),
    "train_s": Metric(name="seconds of training", better="lower"),
    "images_seen": Metric(name="images seen", better=""),
}
OBJECTIVES = ("kid", "psnr", "psnr_to_source", "identity_cosine", "flip_rate", "nfe")
"""What sampling can be tuned by."""
SUFFIXES = {"_to_source": " to the source", "_to_proxy": " to the proxy"}
METHODS = {
    "model": "this model",
    "copy": "a copy of the source",
    "linear": "the best linear colour map",
    "truth": "the true counterparts",
    "real": "real images of the training split",
}
"""What an evaluation measures beside each other: name in metrics.json → in words."""


def base(metric: str) -> str:
    """The metric without what it is measured to."""
    return metric.partition("_to_")[0]


def of(metric: str) -> Metric:
    """The row of a key; an unknown metric is called by its own name."""
    return METRICS.get(base(metric)) or Metric(name=base(metric).replace("_", " "), group=OTHERS)


def name(metric: str) -> str:
    """In a sentence, where the value brings its unit."""
    return of(metric).name + SUFFIXES.get(metric.removeprefix(base(metric)), "")


def heading(metric: str) -> str:
    """Of a column or an axis: with what it is measured to, and the unit."""
    to = " to the truth" if metric == base(metric) and of(metric).to_truth else ""
    return name(metric) + to + of(metric).unit.replace(" ", ", ")


def lower_is_better(metric: str) -> bool:
    return of(metric).better == "lower"


def has_direction(metric: str) -> bool:
    """Whether more or less of it is better; how much of the source was kept is not."""
    return of(metric).better != "" and not metric.endswith("_to_source")


def column(metric: str) -> str:
    """The head of a column, with an arrow to where it is better."""
    if not has_direction(metric):
        return heading(metric)
    return f"{heading(metric)} {'↓' if lower_is_better(metric) else '↑'}"
