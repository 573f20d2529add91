"""What a sweep is to do: its command, checked, and the content of its folder's sweep.json."""

import dataclasses
import math
import re
import shlex
import sys
from collections.abc import Mapping
from typing import Any

from ddpm_core import checkpoint, provenance, storage
from ddpm_core import config as configs
from ddpm_core.config import ModelConfig, SamplingConfig
from ddpm_core.errors import InputError
from ddpm_core.translator import check_sampling
from jobs.common import kinds, numbers, resume
from jobs.datasets.format import DatasetCard, read_card
from jobs.evaluation import plan
from jobs.evaluation.worker import Judges
from jobs.reports.metric_table import OBJECTIVES
from jobs.training import checks, fitting, run_folder
from jobs.training.options import TrainArgs, TrainOptions, stored_options
from jobs.translation import listing
from jobs.translation.options import GuidanceNets
from jobs.tuning import search_space as spaces
from jobs.tuning.options import SweepArgs
from jobs.tuning.search_space import Space

FORMAT, FORMAT_VERSION = "ddpm-translate-sweep", 1
NUM_TRIALS = 16
WEIGHTS = (1.0, 1.5, 2.0, 3.0, 4.0)
"""Guidance weights of the grid of images, beside the chosen one."""
RULE = (
    "Left out is what beats the source itself in nothing that tells the two apart: KID, PSNR to the truth, flips. Of "
    "the others' Pareto front the point nearest to the ideal one, which has the best of every objective. Distances are "
    "counted in units of what lies between the best and the median of the front, of network evaluations in their "
    "logarithms, and each objective's is multiplied by its --prefer."
)


def default_grace_epochs(epochs: int) -> int:
    return max(math.ceil(epochs / 4), 1)


@dataclasses.dataclass(frozen=True)
class SweepJob:
    """Everything one command has made up its mind about before the work starts."""

    args: SweepArgs
    card: DatasetCard
    options: TrainOptions
    """The base's, with what trials are compared by."""
    training: Space
    sampling: Space | None
    """None: to be made up for the network once it is there."""
    given_sampling: Space
    epochs: int
    grace_epochs: int
    prefer: dict[str, float]

    @property
    def num_trials(self) -> int:
        return 0 if self.args.checkpoint else self.args.num_trials or NUM_TRIALS

    @property
    def num_points(self) -> int:
        return self.args.num_points if self.options.method == "diffusion" else 0

    @property
    def worker(self) -> dict[str, float]:
        """What a worker, or a sampling trial, takes."""
        return {"CPU": self.args.cpus_per_worker, **({"GPU": 1} if self.args.use_gpu else {})}

    def run_of(self, number: int) -> str:
        return storage.join(self.args.output, "trials", f"{number:04d}")


# -- checks -------------------------------------------------------------------------------------------------------


def plan_sweep(args: SweepArgs) -> SweepJob:
    """All checks that cost little.

    Raises:
        InputError: whatever is wrong with the command, in one line.
    """
    args = dataclasses.replace(
        args,
        data=storage.absolute(args.data, flag="--data"),
        output=storage.absolute(args.output, flag="--output"),
        checkpoint=None if args.checkpoint is None else storage.absolute(args.checkpoint, flag="--checkpoint"),
    )
    kinds.check_output(args.output, "sweep", {"--data": args.data})
    numbers.check(args)
    options = checks.with_absolute_uris(args.options)
    card = read_card(args.data)
    training, given_sampling = spaces.parse(args.space)
    sampling: Space | None = None
    if args.checkpoint is not None:
        if args.num_trials is not None or training:
            flag = "--num-trials" if args.num_trials is not None else f"--space {next(iter(training))}"
            raise InputError(f"{flag} with --checkpoint: nothing is trained then; leave one of them out")
        loaded = checkpoint.load(args.checkpoint)
        if loaded.config.method != "diffusion":
            raise InputError(f"--checkpoint {args.checkpoint}: {loaded.config.method} does not sample; nothing to tune")
        if not args.num_points:
            raise InputError("--num-points 0 with --checkpoint: there is nothing left to do; give 1 or more")
        config, sampling = loaded.config, sampling_space(loaded.config, given_sampling)
    else:
        options = fitting.fitted(options, card, args.data, args.output, preset=args.preset, given=args.given)
        training = {**spaces.default_training(options), **training}
        if any(name in spaces.OF_LOSS for name in training):
            options = dataclasses.replace(options, validation_loss_config=options.diffusion)
        config = check_space(card, dataclasses.replace(args, options=options), training)
        sampling = None if config.method != "diffusion" else sampling_space(config, given_sampling)
    check_effect(args, card, config, given_sampling)
    check_sampling_trials(args, card, config)
    grace = args.grace_epochs or default_grace_epochs(options.epochs)
    if grace > options.epochs:
        raise InputError(f"--grace-epochs {grace} is more than the {options.epochs} epochs of a trial; give fewer")
    return SweepJob(
        args=args,
        card=card,
        options=options,
        training=training,
        sampling=sampling,
        given_sampling=given_sampling,
        epochs=options.epochs,
        grace_epochs=grace,
        prefer=preferences(args.prefer),
    )


def check_space(card: DatasetCard, args: SweepArgs, space: Space) -> ModelConfig:
    """Try each end of each range and each choice as a training would, so that none fails for its options alone.

    Returns the model of the options as they are.

    Raises:
        InputError: naming the option and what would be right.
    """
    trial = train_args(args, args.output, args.options)
    config = checks.model_config(card, args.options)
    checks.check_fit(card, config, trial)
    if config.method == "cyclegan":
        raise InputError(
            "--method cyclegan: its validation loss says nothing of a network's worth; nothing to search by"
        )
    for name, each in space.items():
        for corner in each.corners:
            try:
                options = spaces.applied(args.options, {name: corner})
                checks.check_fit(card, checks.model_config(card, options), dataclasses.replace(trial, options=options))
            except InputError as error:
                raise InputError(f"--space {name} = {corner}: {error}") from None
    return config


def train_args(args: SweepArgs, run: str, options: TrainOptions) -> TrainArgs:
    """What jobs.train is asked for by a trial."""
    return TrainArgs(
        data=args.data,
        output=run,
        preset=args.preset,
        num_workers=str(args.num_workers),
        use_gpu=args.use_gpu,
        cpus_per_worker=args.cpus_per_worker,
        wait_for_nodes_s=args.wait_for_nodes_s,
        max_failures=args.max_failures,
        options=options,
    )


def sampling_space(config: ModelConfig, given: Space) -> Space:
    """What is searched on a checkpoint of this model.

    Raises:
        InputError: values that the model cannot be sampled with.
    """
    kept = [float(length) for length in config.training.get("optim", {}).get("ema_sigma_rels", [])]
    space = {**spaces.default_sampling(config.sampling, kept, config.diffusion.num_timesteps), **given}
    base = spaces.sampling_values(config.sampling, None)
    for name, each in space.items():
        for corner in each.corners:
            if name == "ema" and corner not in kept:
                raise InputError(f"--space sampling.ema = {corner}: the checkpoint keeps {', '.join(map(str, kept))}")
            try:
                fields, _ = spaces.sampling_options({**base, name: corner})
                sampling = configs.from_dict(SamplingConfig, fields, where="sampling")
                for domain in config.target_domains or config.domains:
                    check_sampling(config, sampling, domain)
            except InputError as error:
                raise InputError(f"--space sampling.{name} = {corner}: {error}") from None
    low, high = (max(map(float, space["guidance_low"].corners)), min(map(float, space["guidance_high"].corners)))
    if low >= high:
        raise InputError(
            f"--space sampling.guidance_low goes up to {low}, sampling.guidance_high begins at {high}; "
            "they must not meet"
        )
    return space


def check_effect(args: SweepArgs, card: DatasetCard, config: ModelConfig, given_sampling: Space) -> None:
    """Refuse flags without effect.

    Raises:
        InputError: naming the flag.
    """
    if args.early_stopping == "none" and args.grace_epochs is not None:
        raise InputError("--grace-epochs has no effect with --early-stopping none; leave it out")
    sampling = {
        "--domain": args.domain,
        "--classifier": args.classifier,
        "--identity-net": args.identity_net,
        "--prefer": args.prefer,
        "--space sampling.": given_sampling,
    }
    if config.method != "diffusion" or not args.num_points:
        why = "--num-points 0" if config.method == "diffusion" else f"{config.method}, which does not sample"
        for flag, value in sampling.items():
            if value:
                raise InputError(f"{flag} has no effect with {why}; leave it out")
    there = objectives(args, card, kid=True)
    if unknown := [name for name in preferences(args.prefer) if name not in there]:
        raise InputError(f"--prefer {unknown[0]}: sampling trials are judged by {', '.join(there)} only; leave it out")


def objectives(args: SweepArgs, card: DatasetCard, *, kid: bool) -> list[str]:
    """What sampling trials are judged by, in order; `kid`: whether there are images enough for it."""
    found = ["kid"] if kid else []
    found.append("psnr" if card.pairing == "paired" else "psnr_to_source")
    found += ["identity_cosine"] if args.identity_net else []
    found += ["flip_rate"] if args.classifier else []
    return [*found, "nfe"]


def check_sampling_trials(args: SweepArgs, card: DatasetCard, config: ModelConfig) -> None:
    """Refuse judges and images that sampling trials cannot be measured with.

    Raises:
        InputError: naming the flag.
    """
    if config.method != "diffusion" or not args.num_points:
        return
    if args.checkpoint is not None:
        listing.check_dataset(args.data, card, config)
    judging = plan.open_judges(judges_of(args), card.domains)
    plan.check_independent(judges_of(args), judging, GuidanceNets(), config)
    if args.domain is not None:
        configs.domain_index(config, args.domain)
        if config.target_domains and args.domain not in config.target_domains:
            raise InputError(
                f"--domain {args.domain}: the network learns to produce {', '.join(config.target_domains)}"
            )
    rows = listing.split_rows(args.data, card, "val")
    asked = plan.EvaluateArgs(
        checkpoint="", data=args.data, output="", num_images=args.num_images, num_train=0, split="val"
    )
    domains = (args.domain,) if args.domain else config.target_domains or config.domains
    plan.make_plans(asked, card, domains, rows, 1)


def judges_of(args: SweepArgs) -> Judges:
    return Judges(
        features=plan.place(args.feature_net, "--feature-net"),
        classifier=args.classifier and plan.place(args.classifier, "--classifier"),
        identity=args.identity_net and plan.place(args.identity_net, "--identity-net"),
    )


def preferences(texts: tuple[str, ...]) -> dict[str, float]:
    """--prefer as numbers.

    Raises:
        InputError: no such objective, or no weight.
    """
    found = {}
    for text in texts:
        name, _, weight = text.partition("=")
        if name not in OBJECTIVES:
            raise InputError(f"--prefer {text}{configs.did_you_mean(name, OBJECTIVES)}: {', '.join(OBJECTIVES)}")
        if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", weight):
            raise InputError(f"--prefer {text}: write {name}=WEIGHT, a number such as 2 or 0.5")
        found[name] = float(weight)
    return found


# -- the folder ---------------------------------------------------------------------------------------------------


def described(job: SweepJob) -> dict[str, Any]:
    """The content of sweep.json."""
    args = job.args
    asha = {"grace_epochs": job.grace_epochs, "reduction_factor": args.reduction_factor}
    trains = not args.checkpoint
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "uri": args.output,
        "command": shlex.join(["python", "-m", "jobs.sweep", *sys.argv[1:]]),
        "preset": args.preset if trains else None,
        "data": {
            "uri": args.data,
            "name": job.card.name,
            "licence": job.card.licence,
            "pairing": job.card.pairing,
            "content_hash": job.card.content_hash,
        },
        "checkpoint": args.checkpoint,
        "seed": args.search_seed,
        "search": args.search,
        "space": spaces.to_json(job.training) if job.num_trials else {},
        "sampling_space": spaces.to_json(job.sampling) if job.sampling and job.num_points else {},
        "num_trials": job.num_trials,
        "num_points": job.num_points,
        "num_images": args.num_images,
        "domain": args.domain,
        "judges": configs.to_dict(judges_of(args)),
        "prefer": job.prefer,
        "epochs": job.epochs,
        "early_stopping": asha if trains and args.early_stopping == "asha" else None,
        "rule": RULE,
        "options": configs.to_dict(job.options) if trains else {},
        "environment": provenance.environment(),
    }


MAY_CHANGE = ("uri", "command", "environment", "num_trials", "num_points", "prefer", "rule", "data.uri", "preset")
"""What a later command of the same sweep may say differently."""
FLAGS = {
    "seed": "--search-seed",
    **{name: f"--{name.replace('_', '-')}" for name in ("preset", "checkpoint", "search", "num_images", "domain")},
    "early_stopping.grace_epochs": "--grace-epochs",
    "early_stopping.reduction_factor": "--reduction-factor",
    **resume.flags_of(TrainOptions, "options."),
}
"""Options of a record that are flags."""


def same_as_before(job: SweepJob, told: Mapping[str, Any]) -> bool:
    """Whether the folder holds this sweep, as far as it is.

    Raises:
        InputError: it holds another one.
    """
    there = resume.read_record(storage.join(job.args.output, "sweep.json"), FORMAT, FORMAT_VERSION)
    if there is None:
        return False
    there["options"] = stored_options(there.get("options", {}))
    resume.check_same(job.args.output, "a sweep", there, told, may_change=MAY_CHANGE, flags=FLAGS)
    return bool(there["prefer"] == told["prefer"])


def finished(job: SweepJob) -> bool:
    """Whether all that is asked for was done."""
    best = run_folder.read_best(job.args.output)
    done = best.get("sweep", {})
    enough = done.get("num_trials", -1) >= job.num_trials and done.get("num_points", -1) >= job.num_points
    return enough and storage.exists(storage.join(job.args.output, "report.html"))
