"""Measure this project on this machine, beside its peers; each run interleaves what it compares.

python -m jobs.benchmark network      (make bench)
python -m jobs.benchmark data --help

network     our network beside those of denoising-diffusion-pytorch and diffusers: steps, memory, denoising loss
data        images on their way into training, beside DataLoader with Pillow and other loaders
size        data sets of the size of CelebA prepared, matched and read: cost a row, memory and disk
train       jobs.train beside a plain loop: images a second, and seconds to the first step
validation  why a validation curve bounces: raw or averaged weights, fresh or fixed draws
sweep       jobs.sweep beside random search within a budget of training steps
gpu         the presets' networks on a GPU within minutes, on a machine that has little but PyTorch
full-size   results at the photo's own size: how true, what stays untouched, seams, cost
marks       the invisible mark: PSNR, detection after changes by size, false positives
serve       the endpoint's engine beside request-level batching, under load
people      the identity encoder among few people and among thousands, in equally many steps
translate   jobs.translate's steady state beside the network alone; its memory from few images to many
"""

import importlib
import sys
from collections.abc import Sequence
from typing import Literal, get_args

from jobs.common import cli

MODULES = {"train": "training", "full-size": "full_size"}
"""Of `jobs.benchmarks`, where they are not called as their subject is: it would be `jobs.train`'s name, or none
of Python's."""

Subject = Literal[
    "network",
    "data",
    "size",
    "train",
    "validation",
    "sweep",
    "gpu",
    "full-size",
    "marks",
    "serve",
    "people",
    "translate",
]


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] and argv[0] in get_args(Subject):
        subject = argv[0]
    else:
        subject = cli.parse(Subject, argv[:1], prog="jobs.benchmark", description=__doc__)
    module = importlib.import_module(f"jobs.benchmarks.{MODULES.get(subject, subject)}")  # of all of them: ten seconds
    return module.run(cli.parse(module.Options, argv[1:], prog=f"jobs.benchmark {subject}", description=module.__doc__))


if __name__ == "__main__":
    cli.run(main)
