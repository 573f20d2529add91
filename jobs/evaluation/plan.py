"""What one evaluation is to measure: its command, checked, before the work starts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ddpm_core import checkpoint, storage
from ddpm_core import config as configs
from ddpm_core.config import SamplingConfig
from ddpm_core.errors import InputError
from ddpm_core.nets import Net
from jobs.common import kinds, numbers, resume
from jobs.datasets import cache
from jobs.datasets.format import DatasetCard, read_card
from jobs.evaluation import worker
from jobs.evaluation.options import EvaluateArgs
from jobs.evaluation.results import FORMAT, FORMAT_VERSION
from jobs.evaluation.worker import Judges
from jobs.translation import listing
from jobs.translation.opening import open_checkpoint
from jobs.translation.options import GuidanceNets

NUM_SHOWN = 10
"""Images in the grid, spread over the set."""
NUM_SAMPLES = 3
"""Results of different seeds of those whose diversity is measured, and shown."""
JUDGE_FLAGS = {"features": "--feature-net", "classifier": "--classifier", "identity": "--identity-net"}
FLAGS = {
    **{
        name: flag
        for options in (EvaluateArgs, SamplingConfig, GuidanceNets)
        for name, flag in resume.flags_of(options).items()
        if name not in ("checkpoint", "data", "classifier_guidance", "identity_guidance")
    },
    "domains": "--domain",
    **{f"{name}_net": flag for name, flag in JUDGE_FLAGS.items()},
}
"""Options of a record that are flags; of data and nets it has fingerprints, of `--domain` all domains."""


@dataclasses.dataclass(frozen=True)
class EvaluationJob:
    """Everything one command has made up its mind about before the work starts."""

    args: EvaluateArgs
    checkpoint_path: str
    config: configs.ModelConfig
    sampling: SamplingConfig
    guides: GuidanceNets
    judges: Judges
    nets: dict[str, dict[str, str] | None]
    """Name and fingerprint of each judge, None of those not given."""
    card: DatasetCard
    domains: tuple[str, ...]
    options: dict[str, Any]
    """What the results depend on."""
    plans: dict[str, dict[str, list[tuple[str, int, str]]]]
    """split → row id → (domain, seed, purpose) of each image to measure."""
    rows: dict[str, tuple[int, int]]
    """id → index of the domain, and whom it shows (NOBODY), of each row of the split."""
    ema: float | None = None
    """The length of the EMA that is measured, where it is not the checkpoint's own."""

    @property
    def has_train(self) -> bool:
        return bool(self.card.splits.get("train"))

    @property
    def num_samples(self) -> int:
        return num_samples(self.config, self.args)


def plan_evaluation(args: EvaluateArgs) -> EvaluationJob:
    """All checks that cost little.

    Raises:
        InputError: whatever is wrong with the command, in one line.
    """
    args = dataclasses.replace(
        args,
        checkpoint=storage.absolute(args.checkpoint, flag="--checkpoint"),
        data=storage.absolute(args.data, flag="--data"),
        output=storage.absolute(args.output, flag="--output"),
    )
    kinds.check_output(args.output, "evaluation", {"--data": args.data})
    numbers.check(args)
    opened = open_checkpoint(args.checkpoint, args.domain, args.sampling, ema=args.ema, guides=args.guides)
    config, domains = opened.loaded.config, opened.domains
    card = read_card(args.data)
    listing.check_dataset(args.data, card, config)
    rows = listing.split_rows(args.data, card, args.split)
    judges = Judges(
        features=place(args.feature_net, "--feature-net"),
        classifier=args.classifier and place(args.classifier, "--classifier"),
        identity=args.identity_net and place(args.identity_net, "--identity-net"),
    )
    judging = open_judges(judges, card.domains)
    check_independent(judges, judging, opened.guides, config)
    options = {
        "data": card.content_hash,
        "split": args.split,
        "domains": list(domains),
        "num_images": args.num_images,
        "num_diverse": args.num_diverse,
        "num_train": args.num_train,
        "seed": args.seed,
        **opened.options,
        **{f"{name}_net": net and net.fingerprint for name, net in judging.items()},
    }
    plans = make_plans(args, card, domains, rows, num_samples(config, args))
    return EvaluationJob(
        args=args,
        checkpoint_path=opened.loaded.path,
        config=config,
        sampling=opened.sampling,
        guides=opened.guides,
        judges=judges,
        nets={
            name: None if net is None else {"name": net.name, "fingerprint": net.fingerprint}
            for name, net in judging.items()
        },
        card=card,
        domains=domains,
        options=options,
        plans=plans,
        rows=labels(args, card),
        ema=opened.loaded.ema,
    )


def place(uri: str, flag: str) -> str:
    """A net's name, or its absolute place."""
    return uri if uri in worker.NAMED else storage.absolute(uri, flag=flag)


def open_judges(judges: Judges, domains: tuple[str, ...]) -> dict[str, Net | None]:
    """Each judge, None of those not given.

    Raises:
        InputError: it is no such net, by its flag.
    """
    found: dict[str, Net | None] = {}
    for name, flag in JUDGE_FLAGS.items():
        uri = getattr(judges, name)
        try:
            found[name] = None if uri is None else worker.load_judge(name, uri, domains)
        except InputError as error:
            raise InputError(f"{flag}: {error}") from None
    return found


def labels(args: EvaluateArgs, card: DatasetCard) -> dict[str, tuple[int, int]]:
    """See `Job.rows`."""
    found = cache.read_labels(args.data, card, args.split)
    return dict(zip(found.ids, zip(found.domain.tolist(), found.identity.tolist(), strict=True), strict=True))


def check_independent(
    judges: Judges, judging: Mapping[str, Net | None], guides: GuidanceNets, config: configs.ModelConfig
) -> None:
    """A net that taught the model, or leads its sampling, would judge its own work.

    Raises:
        InputError: naming it.
    """
    teacher = config.training.get("identity_encoder")
    used = [
        ("identity", teacher, "the encoder of the model's own losses"),
        ("identity", guides.identity_guidance, "the encoder of --identity-guidance"),
        ("classifier", guides.classifier_guidance, "the classifier of --classifier-guidance"),
    ]
    for kind, uri, what in used:
        for name in {"identity": ("identity", "features"), "classifier": ("classifier",)}[kind]:
            judge, there = judging[name], getattr(judges, name)
            if uri is None or judge is None or there in worker.NAMED:
                continue
            if same_net(kind, uri, there, judge, config.domains):
                raise InputError(
                    f"{JUDGE_FLAGS[name]} {there} is {what} and would judge its own work; give another net, such as "
                    "one trained with another --seed or on other images"
                )


def same_net(kind: str, uri: str, there: str, judge: Net, domains: tuple[str, ...]) -> bool:
    """Whether the encoder at `uri` is the judge: the same place, or as far as it can still be read the same weights."""
    places = set()
    for each in (uri, there):
        try:
            places.add(checkpoint.resolve(each)[0])
        except InputError:
            places.add(each.rstrip("/"))
    if len(places) == 1:
        return True
    try:
        return worker.load_judge(kind, uri, domains).fingerprint == judge.fingerprint
    except InputError:  # the training's encoder may be gone
        return False


def finished(job: EvaluationJob) -> bool:
    """Whether the output holds this very evaluation.

    Raises:
        InputError: it holds another one.
    """
    uri = storage.join(job.args.output, "metrics.json")
    if (there := resume.read_record(uri, FORMAT, FORMAT_VERSION)) is None:
        return False
    resume.check_same(job.args.output, "an evaluation", there.get("options", {}), job.options, flags=FLAGS)
    return True


# -- what to measure -----------------------------------------------------------------------------------------------


def spread(total: int, wanted: int) -> list[int]:
    """At most `wanted` indices, evenly over `total`; 0 wanted means all."""
    if not wanted or wanted >= total:
        return list(range(total))
    return [int((i + 0.5) * total / wanted) for i in range(wanted)]


def num_samples(config: configs.ModelConfig, args: EvaluateArgs) -> int:
    """How many results of an image are drawn at most: a GAN has but one."""
    return NUM_SAMPLES if config.method == "diffusion" and args.num_diverse else 1


def make_plans(
    args: EvaluateArgs, card: DatasetCard, domains: tuple[str, ...], rows: list[tuple[str, int]], most_samples: int
) -> dict[str, dict[str, list[tuple[str, int, str]]]]:
    """Which rows of which split to measure, translated to what with which seeds.

    Raises:
        InputError: no row can be turned into the wanted domain.
    """
    plans: dict[str, dict[str, list[tuple[str, int, str]]]] = {args.split: {}}
    has_train = args.num_train and card.splits.get("train")
    train = listing.split_rows(args.data, card, "train") if has_train else []
    for domain in domains:
        # A pair can be read from either side; other sets give the images of the other sides.
        paired = card.pairing == "paired"
        usable = [name for name, side in rows if paired or card.domains[side] != domain]
        chosen = [usable[i] for i in spread(len(usable), args.num_images)]
        if not chosen:
            raise InputError(f"{args.data}: no row of split {args.split!r} can be turned into {domain!r}")
        drawn = [chosen[i] for i in spread(len(chosen), args.num_diverse)]
        shown = {drawn[i] for i in spread(len(drawn), NUM_SHOWN)}
        wishes = plans[args.split]
        for name in chosen:
            purpose = worker.SHOW if name in shown else worker.MEASURE
            wishes.setdefault(name, []).append((domain, args.seed, purpose))
        for name in drawn:
            purpose = worker.SHOW_SAMPLE if name in shown else worker.SAMPLE
            wishes[name] += [(domain, args.seed + more, purpose) for more in range(1, most_samples)]
        if not paired:
            there = [name for name, side in rows if card.domains[side] == domain]
            for i in spread(len(there), args.num_images):
                wishes.setdefault(there[i], []).append((domain, args.seed, worker.REAL))
        known = [name for name, side in train if paired or card.domains[side] == domain]
        for i in spread(len(known), args.num_train):
            plans.setdefault("train", {}).setdefault(known[i], []).append((domain, args.seed, worker.TRAIN))
    return plans
