"""Measure a checkpoint on held-out pictures, beside baselines that need no network.

    python -m jobs.evaluate --checkpoint RUN --data DATASET --output FOLDER
    python -m jobs.evaluate compare FOLDER FOLDER

Writes metrics.json (every figure with its interval, the sizes, seeds and nets), pictures.parquet and halves.parquet
(the figures of each picture, and of each random half for KID), grid.png and report.html. Baselines: a copy of the
source, and for true pairs the best per-pixel linear colour map fitted on train.
"""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import numpy as np
import torch
import tyro

from ddpm_core import checkpoint, metrics, provenance
from ddpm_core import config as configs
from ddpm_core.config import SamplingConfig
from ddpm_core.errors import InputError
from ddpm_core.nets import Net
from jobs import arrays, cli, comparing, data, findings, measuring, storage, translating
from jobs.findings import Findings, Measured
from jobs.inference import Guides, SamplingOverrides, check_least, open_checkpoint
from jobs.measuring import Found, Judges
from jobs.progress import Progress

FORMAT, FORMAT_VERSION = "ddpm-translate-evaluation", 2
NUM_SHOWN = 10
"""Pictures in the grid, spread over the set."""
NUM_SAMPLES = 3
"""Results of different seeds of those whose diversity is measured, and shown."""
JUDGE_FLAGS = {"features": "--feature-net", "classifier": "--classifier", "identity": "--identity-net"}
Key = tuple[str, str, int, str]
"""(domain, id, seed, purpose) of one picture."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """What to measure on what."""

    checkpoint: str
    """A run (its best checkpoint) or a checkpoint folder, local or s3://."""
    data: str
    """Data set: a folder or s3:// prefix that holds dataset.json."""
    output: str
    """Folder or s3:// prefix for metrics.json, grid.png and report.html."""
    num_images: int = 512
    """Pictures to translate for each domain, spread evenly over the split; 0 takes all."""
    num_diverse: int = 32
    """Of them, those drawn with three seeds to see how different the results are; a GAN has but one result.
    0: none."""
    split: str = "test"
    """Rows to measure on."""
    domain: str | None = None
    """The side to produce; by default each that the checkpoint was trained for."""
    num_train: int = 2048
    """Training pictures of each domain, spread evenly, that say how far real pictures are from real ones, and whether
    results are what was learned over again; 0 leaves that out."""
    sampling: Annotated[SamplingOverrides, tyro.conf.arg(name="")] = SamplingOverrides()
    guides: Annotated[Guides, tyro.conf.arg(name="")] = Guides()
    feature_net: str = "auto"
    """What realism is measured with: auto (EfficientNet-lite0 where its package is installed, else a fixed random net),
    inception, or a net file."""
    classifier: str | None = None
    """Which domain a picture is taken for: a net file (.pt, .pt2) that gives a logit of each domain, or a run of an
    attribute classifier of ours. Not one that leads the sampling."""
    identity_net: str | None = None
    """Whom a picture shows: a net file that gives an embedding, or a run of our own identity encoder. Not one that the
    model was trained with or that leads the sampling."""
    ema: float | None = None
    """Weights averaged over this share of the training; those that validated best by default."""
    seed: int = 0
    """Of the sampling noise, the bootstrap and the KID halves."""
    batch_size: int = 16
    """Pictures the network sees at once; memory and speed, not results."""
    num_workers: int | None = None
    """Copies of the network; by default one for each GPU, or for each CPU where there is none. 0: this process alone,
    without Ray."""


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything one command has made up its mind about before the work starts."""

    args: Args
    checkpoint_path: str
    config: configs.ModelConfig
    sampling: SamplingConfig
    guides: Guides
    judges: Judges
    nets: dict[str, dict[str, str] | None]
    """Name and fingerprint of each judge, None of those not given."""
    card: data.DatasetCard
    domains: tuple[str, ...]
    options: dict[str, Any]
    """What the results depend on."""
    plans: dict[str, dict[str, list[tuple[str, int, str]]]]
    """split → row id → (domain, seed, purpose) of each picture to look at."""
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


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compare"]:
        return comparing.compare(argv[1:])
    args = cli.parse(Args, argv, prog="jobs.evaluate", description=__doc__)
    job = prepare(args)
    report_uri = storage.join(job.args.output, "report.html")
    if finished(job):
        print(f"evaluated already: {report_uri}")
        return cli.DONE
    storage.check_writable(job.args.output)
    with contextlib.ExitStack() as stack:
        if args.num_workers != 0:
            stack.enter_context(cli.ray_session())
        for split in job.plans:
            stack.enter_context(data.damage_told(job.args.data, split))
        evaluation, files = evaluate(job)
    for domain in evaluation["domains"].values():
        for verdict in domain["verdicts"]:
            print(f"  {verdict['text']} ({verdict['figures']})")
    write(job, evaluation, files)
    print(f"report: {report_uri}")
    return cli.DONE


def prepare(args: Args) -> Job:
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
    check_least(
        {
            "--num-images": (args.num_images, 0),
            "--num-diverse": (args.num_diverse, 0),
            "--num-train": (args.num_train, 0),
            "--batch-size": (args.batch_size, 1),
            "--num-workers": (args.num_workers, 0),
        }
    )
    opened = open_checkpoint(args.checkpoint, args.domain, args.sampling, ema=args.ema, guides=args.guides)
    config, domains = opened.loaded.config, opened.domains
    card = data.read_card(args.data)
    translating.check_dataset(args.data, card, config)
    rows = translating.split_rows(args.data, card, args.split)
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
    return Job(
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
    return uri if uri in measuring.NAMED else storage.absolute(uri, flag=flag)


def open_judges(judges: Judges, domains: tuple[str, ...]) -> dict[str, Net | None]:
    """Each judge, None of those not given.

    Raises:
        InputError: it is no such net, by its flag.
    """
    found: dict[str, Net | None] = {}
    for name, flag in JUDGE_FLAGS.items():
        uri = getattr(judges, name)
        try:
            found[name] = None if uri is None else measuring.load_judge(name, uri, domains)
        except InputError as error:
            raise InputError(f"{flag}: {error}") from None
    return found


def labels(args: Args, card: data.DatasetCard) -> dict[str, tuple[int, int]]:
    """See `Job.rows`."""
    found = arrays.read_labels(args.data, card, args.split)
    return dict(zip(found.ids, zip(found.domain.tolist(), found.identity.tolist(), strict=True), strict=True))


def check_independent(
    judges: Judges, judging: Mapping[str, Net | None], guides: Guides, config: configs.ModelConfig
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
            if uri is None or judge is None or there in measuring.NAMED:
                continue
            if same_net(kind, uri, there, judge, config.domains):
                raise InputError(
                    f"{JUDGE_FLAGS[name]} {there} is {what} and would judge its own work; give another net, such as "
                    "one trained with another --seed or on other pictures"
                )


def same_net(kind: str, uri: str, there: str, judge: Net, domains: tuple[str, ...]) -> bool:
    """Whether the encoder at `uri` is the judge: the same place, or as far as it can still be read the same weights."""
    places = set()
    for each in (uri, there):
        try:
            places.add(checkpoint.resolve(each, read=storage.read_bytes)[0])
        except InputError:
            places.add(each.rstrip("/"))
    if len(places) == 1:
        return True
    try:
        return measuring.load_judge(kind, uri, domains).fingerprint == judge.fingerprint
    except InputError:  # the training's encoder may be gone
        return False


def finished(job: Job) -> bool:
    """Whether the output holds this very evaluation.

    Raises:
        InputError: it holds another one.
    """
    uri = storage.join(job.args.output, "metrics.json")
    try:
        there = storage.read_json(uri)
        earlier, version = there["options"], there["format_version"]
    except FileNotFoundError:
        return False
    except (*storage.NOT_JSON, KeyError, TypeError):
        raise InputError(f"{uri} is not this program's; give a new --output folder") from None
    if version != FORMAT_VERSION:
        raise InputError(
            f"{job.args.output} holds an evaluation of format version {version}, this program writes version "
            f"{FORMAT_VERSION}, which measures more; give a new --output folder"
        )
    for name in dict.fromkeys([*earlier, *job.options]):
        if earlier.get(name) != job.options.get(name):
            raise InputError(
                f"{job.args.output} holds an evaluation with {name} = {earlier.get(name)}, this command says "
                f"{job.options.get(name)}; give the old value back, or a new --output folder"
            )
    return True


# -- what to look at ----------------------------------------------------------------------------------------------


def spread(total: int, wanted: int) -> list[int]:
    """At most `wanted` indices, evenly over `total`; 0 wanted means all."""
    if not wanted or wanted >= total:
        return list(range(total))
    return [int((i + 0.5) * total / wanted) for i in range(wanted)]


def num_samples(config: configs.ModelConfig, args: Args) -> int:
    """How many results of a picture are drawn at most: a GAN has but one."""
    return NUM_SAMPLES if config.method == "diffusion" and args.num_diverse else 1


def make_plans(
    args: Args, card: data.DatasetCard, domains: tuple[str, ...], rows: list[tuple[str, int]], most_samples: int
) -> dict[str, dict[str, list[tuple[str, int, str]]]]:
    """Which rows of which split to look at, translated to what with which seeds.

    Raises:
        InputError: no row can be turned into the wanted domain.
    """
    plans: dict[str, dict[str, list[tuple[str, int, str]]]] = {args.split: {}}
    looked_at = args.num_train and card.splits.get("train")
    train = translating.split_rows(args.data, card, "train") if looked_at else []
    for domain in domains:
        # A pair can be read from either side; other sets give the pictures of the other sides.
        paired = card.pairing == "paired"
        usable = [name for name, side in rows if paired or card.domains[side] != domain]
        chosen = [usable[i] for i in spread(len(usable), args.num_images)]
        if not chosen:
            raise InputError(f"{args.data}: no row of split {args.split!r} can be turned into {domain!r}")
        drawn = [chosen[i] for i in spread(len(chosen), args.num_diverse)]
        shown = {drawn[i] for i in spread(len(drawn), NUM_SHOWN)}
        wishes = plans[args.split]
        for name in chosen:
            purpose = measuring.SHOW if name in shown else measuring.MEASURE
            wishes.setdefault(name, []).append((domain, args.seed, purpose))
        for name in drawn:
            purpose = measuring.SHOW_SAMPLE if name in shown else measuring.SAMPLE
            wishes[name] += [(domain, args.seed + more, purpose) for more in range(1, most_samples)]
        if not paired:
            there = [name for name, side in rows if card.domains[side] == domain]
            for i in spread(len(there), args.num_images):
                wishes.setdefault(there[i], []).append((domain, args.seed, measuring.REAL))
        known = [name for name, side in train if paired or card.domains[side] == domain]
        for i in spread(len(known), args.num_train):
            plans.setdefault("train", {}).setdefault(known[i], []).append((domain, args.seed, measuring.TRAIN))
    return plans


# -- looking ------------------------------------------------------------------------------------------------------


def fit_color_maps(job: Job) -> dict[str, np.ndarray]:
    """domain → the colour map fitted on every training pair; {} where pairs are not true ones."""
    if job.card.pairing != "paired" or not job.has_train:
        return {}
    options = {"domains": job.card.domains, "wanted": job.domains}
    if job.args.num_workers == 0:
        batches = measuring.batches_here(job.args.data, job.card, "train")
        parts = [measuring.color_moments(batch, **options)["moments"] for batch in batches]
    else:
        rows = data.read_split(job.args.data, "train")
        rows = rows.map_batches(measuring.color_moments, batch_size=256, fn_kwargs=options)
        parts = [batch["moments"] for batch in rows.iter_batches(batch_size=None, batch_format="numpy")]
    moments = np.concatenate(parts).sum(axis=0)
    return {domain: metrics.solve_color_map(moments[i]) for i, domain in enumerate(job.domains)}


def look(job: Job) -> tuple[dict[Key, Found], int]:
    """What came of every picture that the plans name, and how many copies of the network there were."""
    make: dict[str, Any] = {
        "translate": {
            "checkpoint_uri": job.checkpoint_path,
            "ema": job.ema,
            "sampling": configs.to_dict(job.sampling),
            "guides": configs.to_dict(job.guides),
        },
        "judges": configs.to_dict(job.judges),
        "domains": job.card.domains,
        "pairing": job.card.pairing,
        "color_maps": fit_color_maps(job),
    }
    batches: Iterator[translating.Batch]
    num_rows = sum(len(wishes) for plan in job.plans.values() for wishes in plan.values())
    if job.args.num_workers == 0:
        # A thread for every other core: on two busy cores a second thread made the feature net four times slower.
        threads = min(torch.get_num_threads(), max((os.cpu_count() or 1) // 2, 1))
        actor, num_workers = measuring.Measure(**make, num_threads=threads), 1
        batches = map(actor, rows_here(job))
    else:
        batches, num_workers = over_ray(job, make, num_rows)
    found: dict[Key, Found] = {}
    with Progress(total=num_rows, unit="picture", description="evaluate") as progress:
        for batch in batches:
            found.update(measuring.opened(batch))
            progress.update(len(batch["id"]))
    if len(found) != num_rows:
        raise RuntimeError(f"{num_rows} pictures were to be looked at, {len(found)} came back")
    return found, num_workers


def rows_here(job: Job) -> Iterator[translating.Batch]:
    for split, plan in job.plans.items():
        yield from measuring.rows_here(
            job.args.data, job.card, split, plan, batch_size=job.args.batch_size, keep_truth=job.card.has_targets
        )


def over_ray(job: Job, make: dict[str, Any], num_rows: int) -> tuple[Iterator[translating.Batch], int]:
    """The batches as the cluster gives them back, and the number of its actors."""
    size = job.args.batch_size
    rows = [
        translating.dataset_rows(job.args.data, job.card, split, plan, batch_size=size, keep_truth=job.card.has_targets)
        for split, plan in job.plans.items()
    ]
    pool = translating.actor_pool(num_rows, size, job.args.num_workers)
    pool["fn_constructor_kwargs"] |= make
    measured = rows[0].union(*rows[1:]).map_batches(measuring.Measure, **pool)
    batches = measured.iter_batches(batch_size=None, prefetch_batches=0, batch_format="numpy")
    return iter(batches), pool["compute"].max_size


# -- what it comes to ---------------------------------------------------------------------------------------------


def gather(job: Job, domain: str, found: Mapping[Key, Found]) -> Measured:
    """One domain's measurements in the order of their ids."""
    mine = {key[1:]: each for key, each in found.items() if key[0] == domain}

    def of(*purposes: str) -> dict[str, Found]:
        return {name: mine[name, seed, purpose] for name, seed, purpose in sorted(mine) if purpose in purposes}

    main, real, train = of(measuring.MEASURE, measuring.SHOW), of(measuring.REAL), of(measuring.TRAIN)
    columns = {
        name: np.stack([each[name] for each in main.values()]) for name in next(iter(main.values())) if "/" in name
    }
    methods: dict[str, dict[str, np.ndarray]] = {}
    for name, values in columns.items():
        method, _, what = name.partition("/")
        methods.setdefault(method, {})[what] = values
    samples: dict[str, list[np.ndarray]] = {}
    for (name, _, purpose), each in sorted(mine.items()):
        if purpose in (measuring.SAMPLE, measuring.SHOW_SAMPLE):
            samples.setdefault(name, [main[name]["model/features"]]).append(each["model/features"])
    wanted = job.card.domains.index(domain)
    sides, people = (np.array(each) for each in zip(*(job.rows[name] for name in main), strict=True))
    if job.card.pairing == "paired":
        truths = methods["truth"]
        real_features, real_chances = truths["features"], truths.get("chances")
        sides = np.full(len(main), 1 - wanted)  # whichever side the row is stored as
    else:
        real_features = stacked(real, "real/features")
        real_chances = stacked(real, "real/chances") if job.judges.classifier else None
    return Measured(
        ids=list(main),
        methods=methods,
        samples={name: np.stack(each) for name, each in samples.items()},
        real=real_features,
        real_chances=real_chances,
        people=np.where(people == arrays.NOBODY, -1 - np.arange(len(people)), people),
        train=stacked(train, "real/features"),
        wanted=wanted,
        source_domains=sides,
    )


def stacked(found: Mapping[str, Found], name: str) -> np.ndarray:
    """The values `name` of every row; (0, 0) of none."""
    return np.stack([each[name] for each in found.values()]) if found else np.zeros((0, 0), np.float32)


def grid(job: Job, domain: str, found: Mapping[Key, Found]) -> tuple[list[str], bytes]:
    """The ids shown, and their pictures: source, samples and counterpart."""
    from jobs.report import labelled_grid

    keys = sorted(key for key in found if key[0] == domain and key[3] in (measuring.SHOW, measuring.SHOW_SAMPLE))
    ids = list(dict.fromkeys(key[1] for key in keys))
    rows = []
    for name in ids:
        samples = [found[key] for key in keys if key[1] == name]
        rows.append([samples[0]["source"], *(each["result"] for each in samples)])
        if "truth" in samples[0]:
            rows[-1].append(samples[0]["truth"])
    columns = [f"sample {n + 1}" for n in range(job.num_samples)] if job.num_samples > 1 else ["result"]
    last = {"paired": ["truth"], "matched": ["proxy"]}.get(job.card.pairing, [])
    return ids, labelled_grid(["source", *columns, *last], rows)


def evaluate(job: Job) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The content of metrics.json, and the files beside it."""
    found, num_workers = look(job)
    outcome: dict[str, tuple[list[str], Findings]] = {}
    domains, files, names = {}, {}, {}
    for domain in job.domains:
        measured = gather(job, domain, found)
        outcome[domain] = measured.ids, findings.find(measured, seed=job.args.seed)
        shown, png = grid(job, domain, found)
        names[domain] = "grid.png" if len(job.domains) == 1 else f"grid-{domain}.png"
        files[names[domain]] = png
        domains[domain] = {**told(job, domain, measured, outcome[domain][1]), "shown": shown}
    files["pictures.parquet"] = findings.pictures_table(outcome)
    files["halves.parquet"] = findings.halves_table(outcome)
    evaluation = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "options": job.options,
        "checkpoint": job.checkpoint_path,
        "data": {
            "uri": job.args.data,
            "name": job.card.name,
            "licence": job.card.licence,
            "source": job.card.source,
            "pairing": job.card.pairing,
            "content_hash": job.card.content_hash,
        },
        "split": job.args.split,
        "seed": job.args.seed,
        "sampling": configs.to_dict(job.sampling),
        "guides": {name: value for name, value in configs.to_dict(job.guides).items() if guided(job.guides, name)},
        "feature_net": (job.nets["features"] or {})["name"],
        "nets": job.nets,
        "compute": cost(found, num_workers),
        "domains": domains,
        "grids": names,
        "model": configs.to_dict(job.config),
        "environment": provenance.environment(),
    }
    return evaluation, files


def guided(guides: Guides, name: str) -> bool:
    """Whether that field of the guides has an effect."""
    return getattr(guides, name.rpartition("_")[0] + "_guidance") is not None


def told(job: Job, domain: str, measured: Measured, found: Findings) -> dict[str, Any]:
    """What metrics.json says of one domain."""
    pairing = job.card.pairing
    verdicts = findings.verdicts(found, seed=job.args.seed)
    methods = [name for name in findings.METHODS if name in found.summaries]
    return {
        "headline": findings.headline(verdicts),
        "num_images": len(measured.ids),
        "num_real_images": len(measured.real),
        "num_train_images": len(measured.train),
        "num_diverse": len(measured.samples),
        "reference": {"paired": "true counterpart", "matched": "source and proxy"}.get(pairing, "source"),
        "metric_labels": findings.labels(pairing, domain),
        "methods": {
            name: {
                "name": findings.METHODS[name],
                "metrics": {metric: dataclasses.asdict(each) for metric, each in found.summaries[name].items()},
            }
            for name in methods
        },
        "instruments": {name: dataclasses.asdict(each) for name, each in found.instruments.items()},
        "verdicts": [dataclasses.asdict(verdict) for verdict in verdicts],
        "notes": findings.notes(
            found,
            pairing=pairing,
            domain=domain,
            num_train=(len(measured.train), job.card.splits.get("train", 0)),
            elsewhere=job.config.data.content_hash not in ("", job.card.content_hash),
        ),
    }


def cost(found: Mapping[Key, Found], num_workers: int) -> dict[str, Any]:
    """What a picture cost: passes through the network, and pictures a second of one copy of it (the median of the
    batches: the first one warms up)."""
    made = [each for each in found.values() if "nfe" in each]
    return {
        "nfe": sum(each["nfe"] for each in made) / len(made),
        "images_per_s": 1 / float(np.median([each["seconds"] for each in made])),
        "device": made[0]["device"],
        "num_workers": num_workers,
    }


def write(job: Job, evaluation: dict[str, Any], files: dict[str, bytes]) -> None:
    """Tables, grids and report first, metrics.json last: where it is, everything is."""
    from jobs import report

    for name, content in files.items():
        storage.write_bytes(storage.join(job.args.output, name), content)
    made = "the result" if job.num_samples == 1 else f"{job.num_samples} samples that differ in their noise only"
    images = [
        (
            f"Held-out pictures to {domain}: the source, {made}"
            + {"paired": ", the truth.", "matched": ", the proxy (another person)."}.get(job.card.pairing, "."),
            files[name],
        )
        for domain, name in evaluation["grids"].items()
    ]
    run = job.checkpoint_path.partition("/checkpoints/")[0]
    run_uri = run if storage.exists(storage.join(run, "metrics.jsonl")) else None
    report.write_report(job.args.output, run_uri=run_uri, evaluation=evaluation, images=images)
    text = json.dumps(evaluation, indent=2, allow_nan=False)
    storage.write_bytes(storage.join(job.args.output, "metrics.json"), text.encode())


if __name__ == "__main__":
    cli.run(main)
