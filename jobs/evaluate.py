"""Measure a checkpoint on held-out pictures, beside baselines that need no network.

    python -m jobs.evaluate --checkpoint RUN --data DATASET --output FOLDER

Writes metrics.json (every figure with its interval, the sizes, seeds and nets), grid.png and report.html.
Baselines: a copy of the source, and for true pairs the best per-pixel linear colour map fitted on train.
"""

import dataclasses
import json
import os
import sys
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from jaxtyping import UInt8
from torch import Tensor

from ddpm_core import config as configs
from ddpm_core import metrics, provenance
from ddpm_core.config import SamplingConfig
from ddpm_core.errors import InputError
from jobs import arrays, cli, data, storage
from jobs.inference import SamplingOverrides, check_least, open_checkpoint

Pictures = UInt8[np.ndarray, "b h w 3"]

NUM_SHOWN = 10
"""Pictures in the grid, spread over the set."""
NUM_SAMPLES = 3
"""Results of different seeds shown for each of them."""
MAX_TRAIN_FEATURES = 512
"""Training targets that say how far real pictures are from real pictures."""
PROMISED = {("psnr", True), ("ssim", True), ("kid", False)}
"""(metric, against the copy?) of the comparisons that say whether a model is worth anything."""
METHODS = {
    "model": "this model",
    "copy": "copy of the source",
    "linear": "best linear colour map",
    "real": "real pictures of the training split",
}


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
    split: str = "test"
    """Rows to measure on."""
    domain: str | None = None
    """The side to produce; by default each that the checkpoint was trained for."""
    sampling: Annotated[SamplingOverrides, tyro.conf.arg(name="")] = SamplingOverrides()
    ema: float | None = None
    """Weights averaged over this share of the training; those that validated best by default."""
    seed: int = 0
    """Of the sampling noise, the bootstrap and the KID halves."""
    batch_size: int = 16
    """Pictures the network sees at once; memory and speed, not results."""
    num_workers: int | None = None
    """Copies of the network; by default one for each GPU, or for each CPU where there is none."""


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything one command has made up its mind about before Ray starts."""

    args: Args
    checkpoint_path: str
    config: configs.ModelConfig
    sampling: SamplingConfig
    card: data.DatasetCard
    domains: tuple[str, ...]
    options: dict[str, Any]
    """What the results depend on."""
    plan: dict[str, list[tuple[str, int, str]]]
    """Row id → (domain, seed, "") of each result to make of it."""


@dataclasses.dataclass(frozen=True)
class Translated:
    """The pictures of one domain's measurement; rows of the arrays belong together."""

    ids: list[str]
    sources: Pictures
    results: Pictures
    truths: Pictures | None
    """The counterparts: true ones of a paired set, proxies of a matched one."""
    samples: dict[str, list[UInt8[np.ndarray, "h w 3"]]]
    """id → results of different seeds, the first being the one measured."""


def main(argv: list[str] | None = None) -> int:
    args = cli.parse(Args, sys.argv[1:] if argv is None else argv, prog="jobs.evaluate", description=__doc__)
    job = prepare(args)
    report_uri = storage.join(job.args.output, "report.html")
    if finished(job):
        print(f"evaluated already: {report_uri}")
        return cli.DONE
    storage.check_writable(job.args.output)
    with cli.ray_session(), data.damage_told(job.args.data, args.split):
        evaluation, grids = evaluate(job)
    for domain in evaluation["domains"].values():
        for verdict in domain["verdicts"]:
            print(f"  {verdict['text']} ({verdict['figures']})")
    write(job, evaluation, grids)
    print(f"report: {report_uri}")
    return cli.DONE


def prepare(args: Args) -> Job:
    """All checks that cost little.

    Raises:
        InputError: whatever is wrong with the command, in one line.
    """
    from jobs.translating import check_dataset

    args = dataclasses.replace(
        args,
        checkpoint=storage.absolute(args.checkpoint, flag="--checkpoint"),
        data=storage.absolute(args.data, flag="--data"),
        output=storage.absolute(args.output, flag="--output"),
    )
    check_least(
        {
            "--num-images": (args.num_images, 0),
            "--batch-size": (args.batch_size, 1),
            "--num-workers": (args.num_workers, 1),
        }
    )
    opened = open_checkpoint(args.checkpoint, args.domain, args.sampling, ema=args.ema)
    config, domains, sampling = opened.loaded.config, opened.domains, opened.sampling
    card = data.read_card(args.data)
    check_dataset(args.data, card, config)
    options = {
        "checkpoint": opened.fingerprint,
        "data": card.content_hash,
        "split": args.split,
        "domains": list(domains),
        "num_images": args.num_images,
        **configs.to_dict(sampling),
        "seed": args.seed,
    }
    plan = make_plan(args, card, domains, num_samples(config))
    return Job(args, opened.loaded.path, config, sampling, card, domains, options, plan)


def finished(job: Job) -> bool:
    """Whether the output holds this very evaluation.

    Raises:
        InputError: it holds another one.
    """
    uri = storage.join(job.args.output, "metrics.json")
    try:
        earlier = json.loads(storage.read_bytes(uri))["options"]
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{uri} is not this program's; give a new --output folder") from None
    for name in dict.fromkeys([*earlier, *job.options]):
        if earlier.get(name) != job.options.get(name):
            raise InputError(
                f"{job.args.output} holds an evaluation with {name} = {earlier.get(name)}, this command says "
                f"{job.options.get(name)}; give the old value back, or a new --output folder"
            )
    return True


def evaluate(job: Job) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The content of metrics.json, and a grid of pictures for each domain."""
    from jobs.report import labelled_grid

    translated = translate(job)
    # A thread for every other core: on two busy cores a second thread made the feature net four times slower.
    torch.set_num_threads(max((os.cpu_count() or 1) // 2, 1))
    paired = job.card.pairing == "paired"
    with data.damage_told(job.args.data, "train"):
        color_maps, train_targets = fit_color_maps(job) if paired else ({}, {})
    net_name, net = metrics.feature_net()
    domains, grids = {}, {}
    for domain in job.domains:
        there = translated[domain]
        real = there.truths if paired else real_pictures(job, domain)
        domains[domain] = measure(job, domain, there, real, color_maps.get(domain), train_targets.get(domain), net)
        rows = []
        for i in spread(len(there.ids), NUM_SHOWN):
            last = [] if there.truths is None else [there.truths[i]]
            rows.append([there.sources[i], *there.samples[there.ids[i]], *last])
        columns = [f"sample {n + 1}" for n in range(num_samples(job.config))]
        truth = {"paired": ["truth"], "matched": ["proxy"]}.get(job.card.pairing, [])
        grids[domain] = labelled_grid(["source", *columns, *truth], rows)
    evaluation = {
        "format": "ddpm-translate-evaluation",
        "format_version": 1,
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
        "feature_net": net_name,
        "domains": domains,
        "model": configs.to_dict(job.config),
        "environment": provenance.environment(),
    }
    return evaluation, grids


def spread(total: int, wanted: int) -> list[int]:
    """At most `wanted` indices, evenly over `total`; 0 wanted means all."""
    if not wanted or wanted >= total:
        return list(range(total))
    return [int((i + 0.5) * total / wanted) for i in range(wanted)]


def translate(job: Job) -> dict[str, Translated]:
    """Run the held-out rows through the cluster, keyed by id."""
    from jobs import translating
    from jobs.progress import Progress

    num_rows = sum(len(wanted) for wanted in job.plan.values())
    rows = translating.translate_rows(
        translating.dataset_rows(
            job.args.data,
            job.card,
            job.args.split,
            job.plan,
            batch_size=job.args.batch_size,
            keep_truth=job.card.has_targets,
        ),
        num_rows=num_rows,
        checkpoint_uri=job.checkpoint_path,
        ema=job.args.ema,
        sampling=job.sampling,
        output=None,
        batch_size=job.args.batch_size,
        num_workers=job.args.num_workers,
    )
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    with Progress(total=num_rows, unit="picture", description="evaluate") as progress:
        for batch in rows.iter_batches(batch_size=None, prefetch_batches=0, batch_format="numpy"):
            for i in range(len(batch["id"])):
                key = (str(batch["to"][i]), str(batch["id"][i]), int(batch["seed"][i]))
                found[key] = {name: np.array(batch[name][i]) for name in ("image", "result", "truth") if name in batch}
            progress.update(len(batch["id"]))
    if len(found) != num_rows:
        raise RuntimeError(f"{num_rows} results were asked for, {len(found)} came back")
    return {domain: gather(job, domain, found) for domain in job.domains}


def num_samples(config: configs.ModelConfig) -> int:
    """How many results of a picture are shown: a GAN has but one."""
    return NUM_SAMPLES if config.method == "diffusion" else 1


def make_plan(
    args: Args, card: data.DatasetCard, domains: tuple[str, ...], num_shown_samples: int
) -> dict[str, list[tuple[str, int, str]]]:
    """Which rows to translate to what with which seeds.

    Raises:
        InputError: no row can be turned into the wanted domain.
    """
    from jobs.translating import split_rows

    rows = split_rows(args.data, card, args.split)
    plan: dict[str, list[tuple[str, int, str]]] = {}
    for domain in domains:
        # A pair can be read from either side; other sets give the pictures of the other sides.
        paired = card.pairing == "paired"
        usable = [name for name, side in rows if paired or card.domains[side] != domain]
        chosen = [usable[i] for i in spread(len(usable), args.num_images)]
        if not chosen:
            raise InputError(f"{args.data}: no row of split {args.split!r} can be turned into {domain!r}")
        shown = {chosen[i] for i in spread(len(chosen), NUM_SHOWN)}
        for name in chosen:
            seeds = range(args.seed, args.seed + (num_shown_samples if name in shown else 1))
            plan.setdefault(name, []).extend((domain, seed, "") for seed in seeds)
    return plan


def gather(job: Job, domain: str, found: dict[tuple[str, str, int], dict[str, Any]]) -> Translated:
    """One domain's results in the order of their ids."""
    seed = job.args.seed
    ids = sorted(name for to, name, number in found if to == domain and number == seed)
    main = [found[domain, name, seed] for name in ids]
    has_truth = "truth" in main[0]
    last = num_samples(job.config) - 1
    samples = {
        name: [found[domain, name, seed + n]["result"] for n in range(last + 1)]
        for name in ids
        if (domain, name, seed + last) in found
    }
    return Translated(
        ids,
        np.stack([row["image"] for row in main]),
        np.stack([row["result"] for row in main]),
        np.stack([row["truth"] for row in main]) if has_truth else None,
        samples,
    )


def fit_color_maps(job: Job) -> tuple[dict[str, np.ndarray], dict[str, Pictures]]:
    """domain → the colour map fitted on every training pair, and some training pictures of that domain."""
    moments = {domain: np.zeros((4, 7)) for domain in job.domains}
    kept: dict[str, list[np.ndarray]] = {domain: [] for domain in job.domains}
    total = job.card.splits["train"]
    every = max(total // MAX_TRAIN_FEATURES, 1)
    for batch in data.read_split(job.args.data, "train").iter_batches(batch_size=256, batch_format="numpy"):
        for domain in job.domains:
            swap = (np.asarray(job.card.domains)[batch["domain"]] == domain)[:, None, None, None]
            sources = np.where(swap, batch["target"], batch["image"])
            targets = np.where(swap, batch["image"], batch["target"])
            moments[domain] += metrics.color_moments(sources, targets)
            kept[domain].append(targets[::every])
    maps = {domain: metrics.solve_color_map(sums) for domain, sums in moments.items()}
    return maps, {domain: np.concatenate(parts) for domain, parts in kept.items()}


def real_pictures(job: Job, domain: str) -> Pictures:
    """Real pictures of `domain` from the split, evenly spread."""
    from jobs.translating import split_rows

    side = job.card.domains.index(domain)
    names = [name for name, where in split_rows(job.args.data, job.card, job.args.split) if where == side]
    chosen = {names[i] for i in spread(len(names), job.args.num_images)}
    split = arrays.load(job.args.data, job.args.split)
    return split.images([i for i, name in enumerate(split.ids) if name in chosen])


def measure(
    job: Job,
    domain: str,
    there: Translated,
    real: Pictures | None,
    color_map: np.ndarray | None,
    train_targets: Pictures | None,
    net: Any,
) -> dict[str, Any]:
    """Every method in every metric, and the verdicts, for one domain."""
    from jobs import scores

    pairing = job.card.pairing
    references: dict[str, Pictures | None] = (
        {"": there.truths} if pairing == "paired" else {"_to_source": there.sources}
    )
    if pairing == "matched":
        references["_to_proxy"] = there.truths
    methods = {"model": there.results, "copy": there.sources}
    if color_map is not None:
        methods["linear"] = metrics.apply_color_map(color_map, there.sources)
    per_picture: dict[str, dict[str, np.ndarray]] = {name: {} for name in methods}
    for suffix, reference in references.items():
        for name, pictures in methods.items():
            if reference is None or reference is pictures:
                continue  # a copy of the source is the source
            per_picture[name]["psnr" + suffix] = scores.psnr(pictures, reference)
            if min(pictures.shape[1:3]) >= scores.MIN_SSIM_SIDE:
                per_picture[name]["ssim" + suffix] = scores.ssim(pictures, reference)
    halves = {}
    if real is not None and min(len(real), len(there.ids)) >= scores.MIN_KID_IMAGES:
        made = {name: metrics.features(net, pictures) for name, pictures in methods.items()}
        if train_targets is not None and len(train_targets) >= scores.MIN_KID_IMAGES:
            made["real"] = metrics.features(net, train_targets)
        halves = kid_halves(metrics.features(net, real), made, job.args.seed)
    table = {}
    for name in [*methods, *(["real"] if "real" in halves else [])]:
        values = {
            metric: dataclasses.asdict(metrics.bootstrap(each, seed=job.args.seed))
            for metric, each in per_picture.get(name, {}).items()
        }
        if name in halves:
            values["kid"] = dataclasses.asdict(scores.halves_interval(halves[name]))
        table[name] = {"name": METHODS[name], "metrics": values}
    found = verdicts(job, per_picture, halves)
    return {
        "headline": headline(found),
        "num_images": len(there.ids),
        "num_real_images": 0 if real is None else len(real),
        "reference": {"paired": "true counterpart", "matched": "source and proxy"}.get(pairing, "source"),
        "metric_labels": labels(pairing, domain),
        "methods": table,
        "verdicts": [dataclasses.asdict(verdict) for verdict in found],
        "notes": notes(job, domain, bool(halves)),
    }


def kid_halves(real: Tensor, made: dict[str, Tensor], seed: int) -> dict[str, np.ndarray]:
    """KID of each method on the same halves."""
    from jobs import scores

    return {name: scores.kid(real, features, seed=seed) for name, features in made.items()}


def verdicts(job: Job, per_picture: dict[str, dict[str, np.ndarray]], halves: dict[str, np.ndarray]) -> list[Any]:
    """Ours against the baselines, the promised comparisons first."""
    from jobs import scores

    wanted = [
        ("psnr", "copy"),
        ("ssim", "copy"),
        ("kid", "linear"),
        ("kid", "copy"),
        ("psnr", "linear"),
        ("ssim", "linear"),
    ]
    found = []
    for metric, other in wanted:
        values = halves if metric == "kid" else {name: of.get(metric) for name, of in per_picture.items()}
        ours, theirs = values.get("model"), values.get(other)
        if ours is not None and theirs is not None:
            found.append(
                scores.verdict(
                    metric,
                    f"a {METHODS[other]}" if other == "copy" else f"the {METHODS[other]}",
                    ours,
                    theirs,
                    seed=job.args.seed,
                )
            )
    return found


def headline(found: list[Any]) -> str:
    """The promised comparisons in one sentence: what it beats, and what it does not."""
    promised = [v for v in found if (v.metric, "copy" in v.against) in PROMISED] or found
    groups: dict[tuple[bool, str], list[str]] = {}
    for v in promised:
        groups.setdefault((v.better is True, v.against), []).append(v.metric.upper())
    parts = []
    for good in (True, False):
        those = [f"{against} in {' and '.join(names)}" for (fine, against), names in groups.items() if fine == good]
        if those:
            parts.append(
                ("It beats " + ", and ".join(those) if good else "It does not beat " + ", nor ".join(those)) + "."
            )
    return " ".join(parts)


def labels(pairing: str, domain: str) -> dict[str, str]:
    """Headings of the metrics, with what each is measured to."""
    found = {"kid": f"KID to real {domain} ↓"}
    if pairing == "paired":
        return {"psnr": "PSNR to the truth, dB ↑", "ssim": "SSIM to the truth ↑", **found}
    found |= {"psnr_to_source": "PSNR to the source, dB", "ssim_to_source": "SSIM to the source"}
    if pairing == "matched":
        found |= {"psnr_to_proxy": "PSNR to the proxy, dB", "ssim_to_proxy": "SSIM to the proxy"}
    return found


def notes(job: Job, domain: str, has_kid: bool) -> list[str]:
    """What a reader must know not to misread the figures."""
    from jobs import scores

    found = []
    if job.card.pairing == "matched":
        found.append(
            "These data have no true pairs: the counterparts are the nearest neighbours among other people, proxies. "
            "Closeness to a proxy is not correctness; the figures to the source say how much of the picture was kept."
        )
    if not job.card.has_targets:
        found.append(
            "These data have no pairs: PSNR and SSIM are to the source and say how much of the picture was kept, "
            "not whether the translation is right."
        )
    if not has_kid:
        found.append(f"No KID: it needs {scores.MIN_KID_IMAGES} results and as many real pictures of {domain}.")
    return found


def write(job: Job, evaluation: dict[str, Any], grids: dict[str, bytes]) -> None:
    """Grids and report first, metrics.json last: where it is, everything is."""
    from jobs import report

    names = {domain: "grid.png" if len(grids) == 1 else f"grid-{domain}.png" for domain in grids}
    evaluation["grids"] = names
    for domain, png in grids.items():
        storage.write_bytes(storage.join(job.args.output, names[domain]), png)
    count = num_samples(job.config)
    made = "the result" if count == 1 else f"{count} samples that differ in their noise only"
    images = [
        (
            f"Held-out pictures to {domain}: the source, {made}"
            + {"paired": ", the truth.", "matched": ", the proxy (another person)."}.get(job.card.pairing, "."),
            png,
        )
        for domain, png in grids.items()
    ]
    run = job.checkpoint_path.partition("/checkpoints/")[0]
    run_uri = run if storage.exists(storage.join(run, "metrics.jsonl")) else None
    report.write_report(job.args.output, run_uri=run_uri, evaluation=evaluation, images=images)
    text = json.dumps(evaluation, indent=2, allow_nan=False)
    storage.write_bytes(storage.join(job.args.output, "metrics.json"), text.encode())


if __name__ == "__main__":
    cli.run(main)
