"""The model card of a checkpoint, as Hugging Face has them: Markdown with YAML in front.

Training writes it as README.md into the best checkpoint's folder, with validation's figures; an evaluation writes one
with its own figures beside its report, to be put in that place. The checkpoint itself is never touched.
"""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.common.intervals import rests_on
from jobs.reports import metric_table
from jobs.reports.html import render

KINDS = {
    "diffusion": "conditional diffusion model (DDPM)",
    "pix2pix": "pix2pix generator",
    "cyclegan": "CycleGAN generator",
    "identity": "encoder that tells people or places apart",
    "attributes": "classifier of attributes",
}
PAIRS = {
    "paired": "true pairs: each image with its own counterpart",
    "matched": "matched pairs: each image with a similar one of somebody or somewhere else",
    "unpaired": "no pairs",
    "self": "no pairs: each image with its own structure",
    "none": "no pairs: a prior of both sides, with which images are edited",
    "synthetic": "synthetic pairs: each image with its other side as a model made it",
}


def build(
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    *,
    validation: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    samples: Sequence[str] = (),
) -> str:
    """The card's text.

    `config`, `environment`: the content of the run's files. `validation`: the row of metrics.jsonl that the checkpoint
    was chosen by; `evaluation`: the content of a metrics.json. `samples`: names of images beside the card.
    """
    made = config["target_domains"] or config["domains"]
    return render(
        "model_card.md",
        config=config,
        data=config["data"],
        kind=KINDS[config["method"]],
        translates=config["method"] in ("diffusion", "pix2pix", "cyclegan"),
        made=made,
        pairs=PAIRS.get(config["data"]["pairing"], config["data"]["pairing"]),
        command=_command(environment.get("command") or []),
        packages={name: version for name, version in (environment.get("packages") or {}).items() if version},
        environment=environment,
        validation=validation and {"images_seen": 0, "num_images": 0, "loss_ci": 0.0, **validation},
        few=rests_on(validation.get("num_images", 0), "validation image") if validation else "",
        evaluation=evaluation,
        figures={name: _figures(domain) for name, domain in evaluation["domains"].items()} if evaluation else {},
        samples=samples,
    )


def _command(words: Sequence[str]) -> str:
    """The command line without the places of its author's files."""
    shown, hidden = [], ("--data", "--output")
    for word, before in zip(words[1:], words, strict=False):
        if word.partition("=")[0] not in hidden and before not in hidden:
            shown.append(word)
    return f"python -m jobs.{words[0]} {shlex.join(shown)}" if words else ""


def _figures(domain: Mapping[str, Any]) -> dict[str, Any]:
    """An evaluation's table of one domain: head and rows of text."""
    methods = domain["methods"]
    metrics = list(methods["model"]["metrics"])
    shown = {name: method for name, method in methods.items() if any(metric in method["metrics"] for metric in metrics)}
    rows = [
        [metric_table.column(metric), *(_text(method["metrics"].get(metric), metric) for method in shown.values())]
        for metric in metrics
    ]
    return {"head": ["", *(method["name"] for method in shown.values())], "rows": rows, **domain}


def _text(value: Mapping[str, float] | None, metric: str) -> str:
    if value is None:
        return "–"
    mean, low, high = (f"{value[key]:.{metric_table.of(metric).digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})" if value["low"] < value["high"] else mean
