"""What a preset's options become on a data set: what the command does not name itself gives way to the data.

The same command on the same data comes to the same options, so that a run resumes.
"""

import dataclasses
import shlex
from collections.abc import Collection, Iterator

from ddpm_core import config as configs
from ddpm_core.errors import InputError
from jobs.datasets import cache
from jobs.datasets.format import DatasetCard
from jobs.training import checks, origin
from jobs.training.batches import training_rows
from jobs.training.options import TrainOptions


def fitted(
    options: TrainOptions, card: DatasetCard, dataset: str, run: str, *, preset: str, given: Collection[str]
) -> TrainOptions:
    """`run`: the folder of the run. `given`: the flags that the command names.

    Raises:
        InputError: the preset makes a side that the data do not have, and which one is meant is not plain; or what
            `--init-from` names does not do.
    """
    options = origin.adopted(_directed(options, card, preset, given), card.image_size, run, given)
    rows = _num_rows(options, card, dataset)
    if 0 < rows < options.global_batch_size and "--global-batch-size" not in given:
        options = dataclasses.replace(options, global_batch_size=rows)
    return options


def notes(asked: TrainOptions, options: TrainOptions, card: DatasetCard) -> Iterator[str]:
    """What to say of the difference, and of a run too short for its options."""
    batch, warmup = options.global_batch_size, options.optim.warmup_steps
    if options.target_domain not in (asked.target_domain, None):
        yield f"the preset makes {asked.target_domain}, here that is --target-domain {options.target_domain}"
    if batch < asked.global_batch_size:
        yield f"too few training rows for the preset's batch of {asked.global_batch_size}: --global-batch-size {batch}"
    if (steps := checks.num_rows(card, options) // batch * options.epochs) < warmup:
        yield (
            f"with --epochs {options.epochs} training ends after {steps} of the {warmup} steps over which the "
            "learning rate rises (--optim.warmup-steps); give more"
        )


def _directed(options: TrainOptions, card: DatasetCard, preset: str, given: Collection[str]) -> TrainOptions:
    wanted = options.target_domain
    if wanted is None or wanted in card.domains or "--target-domain" in given:
        return options
    if options.method in configs.ENCODERS or len(card.domains) < 2:  # nothing to aim at
        return dataclasses.replace(options, target_domain=None)
    alike = [name for name in card.domains if name.casefold() == wanted.casefold()]
    if len(alike) != 1:
        ways = " or ".join(f"--target-domain {shlex.quote(name)}" for name in card.domains)
        raise InputError(
            f"--preset {preset} makes {wanted!r}, which {card.name} does not have; say what to make, with {ways}"
        )
    return dataclasses.replace(options, target_domain=alike[0])


def _num_rows(options: TrainOptions, card: DatasetCard, dataset: str) -> int:
    rows = checks.num_rows(card, options)
    if options.method == "identity" and rows:  # only people of whom there are several images serve it
        labels = cache.read_labels(dataset, card, "train")
        return len(training_rows(labels, checks.model_config(card, options), options)) or rows
    return rows
