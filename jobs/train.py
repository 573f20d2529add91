"""Train a translation model on a data set.

    python -m jobs.train --data URI --output URI --preset demo
    ray job submit --address … --working-dir . -- python -m jobs.train --data s3://… --output s3://… --preset celeba-64

The same command again resumes. Ctrl-C or a kill loses at most the steps since the last checkpoint.
"""

import contextlib
import dataclasses
import math
import sys
import threading
import time
from collections.abc import Iterator
from typing import Annotated, Any

import tyro

from ddpm_core import checkpoint, encoders, gan
from ddpm_core import config as configs
from ddpm_core.config import DataCard, ModelConfig
from ddpm_core.errors import InputError
from jobs import cli, data, storage
from jobs.presets import PRESETS, TrainOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """What one command says: where, on what, and the training options."""

    data: str
    """Data set to train on: a folder or s3:// prefix that holds dataset.json."""
    output: str
    """The run: a folder or s3:// prefix. If it holds an unfinished run of the same options, it is resumed."""
    preset: str = "celeba-64"
    """Options to start from; single ones are changed by the flags below."""
    num_workers: int = 1
    """Training processes (DDP): one a GPU, or one for every one or two CPU cores."""
    use_gpu: bool = False
    """One GPU for each worker."""
    cpus_per_worker: int = 1
    """CPU cores for each worker, and its number of threads."""
    wait_for_nodes_s: int = 0
    """How long to wait for a cluster with an autoscaler to grow to what the workers need, in seconds."""
    max_failures: int = 3
    """How often lost workers are replaced, and training goes on from the last checkpoint, before giving up."""
    options: Annotated[TrainOptions, tyro.conf.arg(name="")] = TrainOptions()


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    dataset, run = storage.absolute(args.data, flag="--data"), storage.absolute(args.output, flag="--output")
    args = with_absolute_encoder(args)
    card = data.read_card(dataset)
    config = model_config(card, args.options)
    check_fit(card, config, args)
    if finished(run, config, args.options):
        print(f"already trained: {run}")
        return cli.DONE
    storage.check_writable(run)
    with cli.ray_session():
        check_cluster(args)
        fit(args, config, dataset, run)
    best = checkpoint.load(run, read=storage.read_bytes)
    print(f"best checkpoint: {best.path}\nreport: {storage.join(run, 'report.html')}")
    return cli.DONE


def parse(argv: list[str]) -> Args:
    """The preset first, then the flags that change it."""
    name = preset_name(argv)
    presets = "\n".join(f"  {key:<14} {preset.about}" for key, preset in PRESETS.items())
    default = Args(data=tyro.MISSING, output=tyro.MISSING, preset=name, options=PRESETS[name].options)
    return cli.parse(Args, argv, prog="jobs.train", description=f"{__doc__}\npresets:\n{presets}", default=default)


def with_absolute_encoder(args: Args) -> Args:
    """The workers run in other folders than the command."""
    uri = args.options.identity_encoder
    if uri is None:
        return args
    options = dataclasses.replace(args.options, identity_encoder=storage.absolute(uri, flag="--identity-encoder"))
    return dataclasses.replace(args, options=options)


def preset_name(argv: list[str]) -> str:
    name = Args.preset
    for flag, value in zip(argv, [*argv[1:], ""], strict=True):
        if flag == "--preset":
            name = value
        elif flag.startswith("--preset="):
            name = flag.removeprefix("--preset=")
    if name not in PRESETS:
        raise InputError(f"--preset {name}{configs.did_you_mean(name, PRESETS)}: {', '.join(PRESETS)}")
    return name


def model_config(card: data.DatasetCard, options: TrainOptions) -> ModelConfig:
    """All that defines the model: the data set's facts and the options, checked together."""
    pairing = options.pairing or card.pairing
    config = ModelConfig(
        image_size=card.image_size,
        domains=card.domains,
        target_domains=() if options.target_domain is None else (options.target_domain,),
        method=options.method,
        shown="structure" if pairing == "self" and options.method == "diffusion" else "source",
        unet=options.unet,
        diffusion=options.diffusion,
        gan=options.gan,
        sampling=options.sampling,
        data=DataCard(
            name=card.name,
            licence=card.licence,
            content_hash=card.content_hash,
            pairing=pairing,
            mean_color=card.mean_color,
            landmarks=card.mean_landmarks,
        ),
        training=configs.to_dict(options),
    )
    configs.check(config)
    if config.method != "diffusion":
        gan.check(config)
    return config


def check_fit(card: data.DatasetCard, config: ModelConfig, args: Args) -> None:
    """Refuse what cannot work before anything is started.

    Raises:
        InputError: naming the flag and what would be right.
    """
    options, workers = args.options, args.num_workers
    positive = {
        "--epochs": options.epochs,
        "--global-batch-size": options.global_batch_size,
        "--num-workers": workers,
        "--cpus-per-worker": args.cpus_per_worker,
        "--validate-every-epochs": options.validate_every_epochs,
        "--max-val-images": options.max_val_images,
        "--max-train-images": 1 if options.max_train_images is None else options.max_train_images,
        "--optim.learning-rate": options.optim.learning_rate,
        "--optim.grad-clip": options.optim.grad_clip,
    }
    for flag, value in positive.items():
        if not value > 0:
            raise InputError(f"{flag} is {value}; it must be positive")
    lengths = options.optim.ema_sigma_rels
    if not lengths or len({checkpoint.ema_file(each) for each in lengths}) < len(lengths):
        raise InputError(f"--optim.ema-sigma-rels is {list(lengths)}; give one or more different lengths, such as 0.1")
    if not all(0 < each < 0.28 for each in lengths):
        raise InputError(f"--optim.ema-sigma-rels is {list(lengths)}; each must lie between 0 and 0.28")
    if options.global_batch_size % workers:
        raise InputError(
            f"--global-batch-size {options.global_batch_size} cannot be shared by {workers} workers; "
            f"{options.global_batch_size // workers * workers or workers} can"
        )
    if len(config.domains) < 2:
        raise InputError(f"{args.data} has one domain, {config.domains[0]!r}; translation needs two")
    check_method(card, args)
    check_rows(card, config, args)
    check_added_losses(options)


def check_rows(card: data.DatasetCard, config: ModelConfig, args: Args) -> None:
    """Refuse splits that have nothing to make or nothing to show, and batches larger than what there is.

    Raises:
        InputError: naming the split or the flag and what would be right.
    """
    options, wanted = args.options, args.options.target_domain
    for split in ("train", "val"):
        if not card.splits.get(split):
            raise InputError(f"{args.data} has no rows in its {split} split; prepare it again with more pictures")
        there = [name for name in card.domains if card.domain_counts.get(split, {}).get(name)]
        if not card.has_targets:
            lacking = [name for name in card.domains if name not in there]
            needed = lacking if split == "train" else [name for name in lacking if name == wanted]
            if not needed and config.shown == "source" and len(there) < 2:
                needed = lacking
            if needed:
                raise InputError(
                    f"{card.name} has no picture of {', '.join(needed)} in its {split} split; translation needs both: "
                    "prepare it again with more pictures"
                )
    rows = card.splits["train"] if card.has_targets or wanted is None else card.domain_counts["train"][wanted]
    rows = min(rows, options.max_train_images or rows)
    if rows < options.global_batch_size:
        of = "" if card.has_targets or wanted is None else f" of {wanted}"
        raise InputError(
            f"--global-batch-size {options.global_batch_size} is more than the {rows} training rows{of}; "
            f"give at most {rows}"
        )


def check_method(card: data.DatasetCard, args: Args) -> None:
    """Refuse a method that these data or these options do not suit.

    Raises:
        InputError: naming the flag and what would be right.
    """
    options, method = args.options, args.options.method
    if options.pairing not in (None, card.pairing, "unpaired", "self"):
        raise InputError(
            f"--pairing {options.pairing}: {card.name} was prepared {card.pairing}; prepare it anew for that"
        )
    if method != "diffusion" and options.pairing == "self":
        raise InputError(
            f"--pairing self: {method} would learn to copy; leave it out, or train with --method diffusion"
        )
    if not 0 <= options.max_shift < card.image_size:
        raise InputError(f"--max-shift is {options.max_shift}; it must lie between 0 and {card.image_size - 1}")
    if method == "pix2pix" and options.pairing == "unpaired":
        raise InputError("--pairing unpaired: pix2pix learns from pairs; leave it out, or give --method cyclegan")
    if method == "pix2pix" and not card.has_targets:
        raise InputError(f"--method pix2pix learns from pairs, {card.name} has none; give --method cyclegan")
    preset = PRESETS[args.preset].options  # what it says of the other method is not the user's doing
    given = {name for name, _, _ in differences(configs.to_dict(preset), configs.to_dict(options))}
    for name in sorted(given):
        if name.startswith(ONLY_GAN if method == "diffusion" else ONLY_DIFFUSION):
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag} has no effect with --method {method}; leave it out")


ONLY_GAN = ("gan.",)
ONLY_DIFFUSION = (
    *("unet.", "diffusion.", "sampling.", "optim.weight_decay", "optim.grad_clip"),
    *("gradient_checkpointing", "compile", "identity_encoder", "identity_weight", "perceptual_weight"),
)
"""Options, by how their dotted names start, that only one kind of method looks at."""


def check_added_losses(options: TrainOptions) -> None:
    """Refuse weights without an encoder, an encoder without weights, and what is no encoder.

    Raises:
        InputError: naming the flag and what would be right.
    """
    weights = {"--identity-weight": options.identity_weight, "--perceptual-weight": options.perceptual_weight}
    for flag, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise InputError(f"{flag} is {weight}; it must be 0 or more")
        if weight and options.identity_encoder is None:
            raise InputError(f"{flag} needs an encoder to compare pictures by; give --identity-encoder URI")
    if options.identity_encoder is not None:
        if not any(weights.values()):
            raise InputError("--identity-encoder has no effect without --identity-weight or --perceptual-weight")
        encoders.load_identity_encoder(options.identity_encoder, read=storage.read_bytes)


def finished(run: str, config: ModelConfig, options: TrainOptions) -> bool:
    """Whether `run` holds this very run, complete.

    Raises:
        InputError: it holds another run, or something else.
    """
    try:
        there = checkpoint.read_config(run, read=storage.read_bytes)
    except InputError:
        if storage.exists(storage.join(run, "config.json")):
            raise
        return False
    old, new = configs.to_dict(there), configs.to_dict(config)
    for values in (old, new):
        values["training"].pop("epochs", None)  # a run may be extended
    for name, was, now in differences(old, new):
        if name.startswith("data.") and name != "data.pairing":
            raise InputError(
                f"{run} holds a run on other data ({name} = {was}, now {now}): another --data, or it was replaced or "
                "appended to since; give the old data back, or another --output"
            )
        raise InputError(
            f"{run} holds a run with {name} = {was}, this command says {now}; give it back, or another --output"
        )
    complete = all(storage.exists(storage.join(run, name)) for name in ("best.json", "report.html"))
    return complete and there.training.get("epochs") == options.epochs


def differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, old value, new value) of each leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, old, new


def check_cluster(args: Args) -> None:
    """The workers must fit, or Ray would wait for ever; a cluster that grows is asked to, and given time.

    Raises:
        InputError: with the arithmetic.
    """
    import ray
    import ray.autoscaler.sdk

    worker = {"CPU": args.cpus_per_worker, **({"GPU": 1} if args.use_gpu else {})}
    deadline = time.monotonic() + args.wait_for_nodes_s
    asked = False
    while short := {
        name: each for name, each in worker.items() if ray.cluster_resources().get(name, 0) < each * args.num_workers
    }:
        if time.monotonic() >= deadline:
            name, each = next(iter(short.items()))
            raise InputError(
                f"--num-workers {args.num_workers} with {each} {name} each needs {each * args.num_workers} {name}s, "
                f"the cluster has {ray.cluster_resources().get(name, 0):g}: give fewer workers, "
                "or --wait-for-nodes-s 600 to a cluster that grows"
            )
        if not asked:
            ray.autoscaler.sdk.request_resources(bundles=[worker] * args.num_workers)
            print(f"waiting up to {args.wait_for_nodes_s} s for the cluster to grow", flush=True)
            asked = True
        time.sleep(2)
    if asked:  # or the nodes would be held when the run is over
        ray.autoscaler.sdk.request_resources(bundles=[])


def fit(args: Args, config: ModelConfig, dataset: str, run: str) -> None:
    """Run the loop on Ray Train, the data read and decoded once by Ray Data onto the nodes' disks."""
    import ray
    import ray.train
    import ray.train.torch

    from jobs import arrays, report
    from jobs.train_loop import Board, describe, train_loop

    for name, content in describe(config, args.options).items():
        storage.write_bytes(storage.join(run, name), content)
    arrays.spread(dataset, ("train", "val"), resource="GPU" if args.use_gpu else "CPU")
    board = ray.remote(num_cpus=0)(Board).remote()
    attempts = storage.join(run, ".ray")  # Ray's own notes; ours are what a resumed run reads
    trainer = ray.train.torch.TorchTrainer(
        train_loop,
        train_loop_config={
            "data": dataset,
            "run": run,
            "config": configs.to_dict(config),
            "options": configs.to_dict(args.options),
            "board": board,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=args.num_workers,
            use_gpu=args.use_gpu,
            resources_per_worker={"CPU": args.cpus_per_worker, **({"GPU": 1} if args.use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name=f"attempt-{time.time_ns()}",
            storage_path=attempts,
            failure_config=ray.train.FailureConfig(max_failures=args.max_failures, controller_failure_limit=1),
        ),
    )
    with watching(board):
        try:
            trainer.fit()
        except SystemExit:  # Ray's answer to Ctrl-C, with exit code 0: what comes next must not take the run for done
            raise KeyboardInterrupt from None
    storage.delete_folder(attempts)
    report.write_report(run, run_uri=run)


@contextlib.contextmanager
def watching(board: Any) -> Iterator[None]:
    """A progress bar on the driver, fed by what rank 0 posts."""
    import ray

    from jobs.progress import Progress

    stop = threading.Event()

    def watch() -> None:
        bar, shown = None, 0
        while not stop.wait(0.5) or bar is not None:
            try:
                state = ray.get(board.look.remote(), timeout=5)
            except Exception:
                break
            if state and bar is None:
                shown = state["start"]
                bar = Progress(total=state["total"], unit="step", description="train", initial=shown)
            if bar is not None and state["step"] > shown:
                bar.update(state["step"] - shown)
                shown = state["step"]
            if stop.is_set():
                break
        if bar is not None:
            bar.close()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10)


if __name__ == "__main__":
    cli.run(main)
