"""An evaluation as its driver sees it: measurements gathered, metrics.json and the files beside it."""

import collections
import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ddpm_core import config as configs
from ddpm_core import provenance, storage
from jobs.common import workers
from jobs.common.progress import Progress
from jobs.datasets import cache, reading
from jobs.evaluation import baselines, summary, worker
from jobs.evaluation.journal import MEASURED, Journal, Key
from jobs.evaluation.plan import EvaluationJob
from jobs.evaluation.results import FORMAT, FORMAT_VERSION
from jobs.evaluation.summary import Measured, Summary
from jobs.evaluation.worker import Found
from jobs.reports.metric_table import METHODS
from jobs.translation.batch import dataset_rows
from jobs.translation.options import GuidanceNets

# -- measuring ----------------------------------------------------------------------------------------------------


def fit_color_maps(job: EvaluationJob) -> dict[str, np.ndarray]:
    """domain → the colour map fitted on every training pair; {} where pairs are not true ones."""
    if job.card.pairing != "paired" or not job.has_train:
        return {}
    there = reading.open_split(job.args.data, "train", rows_in_piece=256)
    moments_of = functools.partial(worker.color_moments, split=there, wanted=job.domains)
    parts = workers.mapped(moments_of, there.pieces, len(there.pieces), num_workers=job.args.num_workers)
    moments = np.sum(list(parts), axis=0)
    return {domain: baselines.solve_color_map(moments[i]) for i, domain in enumerate(job.domains)}


def measure(job: EvaluationJob) -> tuple[dict[Key, Found], int]:
    """What is known of every image that the plans name, and how many copies of the network there were; what an earlier
    command has measured is not measured again."""
    journal = Journal(job.args.output, job.options)
    plans = {
        split: {name: rest for name, wishes in plan.items() if (rest := unmeasured(name, wishes, journal.rows))}
        for split, plan in job.plans.items()
    }
    make: dict[str, Any] = {
        "checkpoint_uri": job.checkpoint_path,
        "ema": job.ema,
        "sampling": configs.to_dict(job.sampling),
        "guides": configs.to_dict(job.guides),
        "judges": configs.to_dict(job.judges),
        "domains": job.card.domains,
        "pairing": job.card.pairing,
        "color_maps": fit_color_maps(job),
    }
    purposes = [purpose for plan in plans.values() for wishes in plan.values() for _, _, purpose in wishes]
    pool = workers.pool(math.ceil(len(purposes) / job.args.batch_size), job.args.num_workers)
    rows = dataset_rows(
        job.args.data,
        job.card,
        {split: plan for split, plan in plans.items() if plan},
        batch_size=job.args.batch_size,
        keep_truth=job.card.has_targets,
    )
    if journal.rows:
        print(f"{len(journal.rows):,} images are measured already, {len(purposes):,} are left")
    left = TimeLeft(purposes, pool.size)
    missing = len(purposes)
    try:
        with Progress(total=len(purposes), unit="image", description="evaluate") as progress:
            for batch in rows.through(worker.Measure, pool, **make) if purposes else ():
                done = dict(worker.opened(batch))
                journal.add(done)
                missing -= len(done)
                left.add(done)
                progress.update(len(done), left_s=left.seconds())
    finally:
        journal.flush()
    if missing:
        raise RuntimeError(f"{len(purposes)} images were to be measured, {missing} did not come back")
    return journal.rows, pool.size


def unmeasured(name: str, wishes: list[tuple[str, int, str]], known: Mapping[Key, Found]) -> list[tuple[str, int, str]]:
    """What of the wishes for a row nobody has measured."""
    return [(domain, seed, why) for domain, seed, why in wishes if (domain, name, seed, why) not in known]


class TimeLeft:
    """How long an evaluation still takes. An image that is drawn costs many passes through the network, a real one a
    single pass through the feature net: each kind is counted at its own mean."""

    def __init__(self, purposes: Iterable[str], num_workers: int) -> None:
        self.waiting = collections.Counter(map(self._kind, purposes))
        self.num_workers = num_workers
        self.spent_s: dict[str, list[float]] = {"drawn": [], "judged": [], "real": []}

    @staticmethod
    def _kind(purpose: str) -> str:
        return "real" if purpose in (worker.REAL, worker.TRAIN) else "drawn"

    def add(self, rows: Mapping[Key, Found]) -> None:
        """These are done."""
        for (*_, purpose), each in rows.items():
            kind = self._kind(purpose)
            self.waiting[kind] -= 1
            self.spent_s[kind].append(each["spent_s"])
            if kind == "drawn":
                self.spent_s["judged"].append(each["judged_s"])

    def seconds(self) -> float | None:
        """None before one was drawn. A real one costs what the nets need for a drawn one."""
        means = {kind: sum(spent) / len(spent) for kind, spent in self.spent_s.items() if spent}
        real = means.get("real", means.get("judged", 0.0))
        if "drawn" not in means and self.waiting["drawn"]:
            return None
        return (self.waiting["drawn"] * means.get("drawn", 0.0) + self.waiting["real"] * real) / self.num_workers


# -- what it comes to ---------------------------------------------------------------------------------------------


def gather(job: EvaluationJob, domain: str, found: Mapping[Key, Found]) -> Measured:
    """One domain's measurements in the order of their ids."""
    mine = {key[1:]: each for key, each in found.items() if key[0] == domain}

    def of(*purposes: str) -> dict[str, Found]:
        return {name: mine[name, seed, purpose] for name, seed, purpose in sorted(mine) if purpose in purposes}

    main, real, train = of(worker.MEASURE, worker.SHOW), of(worker.REAL), of(worker.TRAIN)
    columns = {
        name: np.stack([each[name] for each in main.values()]) for name in next(iter(main.values())) if "/" in name
    }
    methods: dict[str, dict[str, np.ndarray]] = {}
    for name, values in columns.items():
        method, _, what = name.partition("/")
        methods.setdefault(method, {})[what] = values
    samples: dict[str, list[np.ndarray]] = {}
    for (name, _, purpose), each in sorted(mine.items()):
        if purpose in (worker.SAMPLE, worker.SHOW_SAMPLE):
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
        people=np.where(people == cache.NOBODY, -1 - np.arange(len(people)), people),
        train=stacked(train, "real/features"),
        wanted=wanted,
        source_domains=sides,
    )


def stacked(found: Mapping[str, Found], name: str) -> np.ndarray:
    """The values `name` of every row; (0, 0) of none."""
    return np.stack([each[name] for each in found.values()]) if found else np.zeros((0, 0), np.float32)


def grid(job: EvaluationJob, domain: str, found: Mapping[Key, Found]) -> tuple[list[str], bytes]:
    """The ids shown, and their images: source, samples and counterpart."""
    from jobs.reports.grids import labelled_grid

    keys = sorted(key for key in found if key[0] == domain and key[3] in (worker.SHOW, worker.SHOW_SAMPLE))
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


def evaluate(job: EvaluationJob) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The content of metrics.json, and the files beside it."""
    found, num_workers = measure(job)
    outcome: dict[str, tuple[list[str], Summary]] = {}
    domains, files, names = {}, {}, {}
    for domain in job.domains:
        measured = gather(job, domain, found)
        outcome[domain] = measured.ids, summary.summarise(measured, seed=job.args.seed)
        shown, png = grid(job, domain, found)
        names[domain] = "grid.png" if len(job.domains) == 1 else f"grid-{domain}.png"
        files[names[domain]] = png
        domains[domain] = {**told(job, domain, measured, outcome[domain][1]), "shown": shown}
    files["pictures.parquet"] = summary.images_table(outcome)
    files["halves.parquet"] = summary.subsets_table(outcome)
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


def guided(guides: GuidanceNets, name: str) -> bool:
    """Whether that field of the guides has an effect."""
    return getattr(guides, name.rpartition("_")[0] + "_guidance") is not None


def told(job: EvaluationJob, domain: str, measured: Measured, found: Summary) -> dict[str, Any]:
    """What metrics.json says of one domain."""
    pairing = job.card.pairing
    verdicts = summary.verdicts(found, seed=job.args.seed)
    methods = [name for name in METHODS if name in found.summaries]
    return {
        "headline": summary.headline(verdicts, num_images=len(measured.ids)),
        "num_images": len(measured.ids),
        "num_real_images": len(measured.real),
        "num_train_images": len(measured.train),
        "num_diverse": len(measured.samples),
        "reference": {"paired": "true counterpart", "matched": "source and proxy"}.get(pairing, "source"),
        "methods": {
            name: {
                "name": METHODS[name],
                "metrics": {metric: dataclasses.asdict(each) for metric, each in found.summaries[name].items()},
            }
            for name in methods
        },
        "instruments": {name: dataclasses.asdict(each) for name, each in found.instruments.items()},
        "verdicts": [dataclasses.asdict(verdict) for verdict in verdicts],
        "notes": summary.notes(
            found,
            pairing=pairing,
            domain=domain,
            num_train=(len(measured.train), job.card.num_images("train", domain)),
            elsewhere=job.config.data.content_hash not in ("", job.card.content_hash),
        ),
    }


def cost(found: Mapping[Key, Found], num_workers: int) -> dict[str, Any]:
    """What an image cost: passes through the network, and images a second of one copy of it (the median of the
    batches: the first one warms up)."""
    made = [each for each in found.values() if "nfe" in each]
    return {
        "nfe": sum(each["nfe"] for each in made) / len(made),
        "images_per_s": 1 / float(np.median([each["seconds"] for each in made])),
        "device": made[0]["device"],
        "num_workers": num_workers,
    }


def write(job: EvaluationJob, evaluation: dict[str, Any], files: dict[str, bytes]) -> None:
    """Tables, grids, report and model card first, metrics.json last: where it is, everything is."""
    from jobs.reports import model_card, report

    for name, content in files.items():
        storage.write_bytes(storage.join(job.args.output, name), content)
    made = "the result" if job.num_samples == 1 else f"{job.num_samples} samples that differ in their noise only"
    images = [
        (
            f"Held-out images to {domain}: the source, {made}"
            + {"paired": ", the truth.", "matched": ", the proxy (another person)."}.get(job.card.pairing, "."),
            files[name],
        )
        for domain, name in evaluation["grids"].items()
    ]
    run = job.checkpoint_path.partition("/checkpoints/")[0]
    run_uri = run if storage.exists(storage.join(run, "metrics.jsonl")) else None
    report.write_report(job.args.output, run_uri=run_uri, evaluation=evaluation, images=images)
    environment = {}
    with contextlib.suppress(FileNotFoundError, *storage.NOT_JSON):  # of a checkpoint without its run
        environment = storage.read_json(storage.join(run, "environment.json"))
    card = model_card.build(
        evaluation["model"], environment, evaluation=evaluation, samples=[*evaluation["grids"].values()]
    )
    storage.write_bytes(storage.join(job.args.output, "README.md"), card.encode())
    text = json.dumps(evaluation, indent=2, allow_nan=False)
    storage.write_bytes(storage.join(job.args.output, "metrics.json"), text.encode())
    storage.delete_folder(storage.join(job.args.output, MEASURED))
