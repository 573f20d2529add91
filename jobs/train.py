"""Train a translation model on a data set.

    python -m jobs.train --data URI --output URI --preset demo
    ray job submit --address … --working-dir . -- python -m jobs.train --data s3://… --output s3://… --preset celeba-64

The same command again resumes. Ctrl-C or a kill loses at most the steps since the last checkpoint.
"""

import dataclasses
import functools
import math
import re
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, TypeVar

import tyro

from ddpm_core import checkpoint, encoders, gan
from ddpm_core import config as configs
from ddpm_core.config import DataCard, Method, ModelConfig
from ddpm_core.errors import InputError
from jobs import cli, data, encoding, profiling, runs, storage, tracking, watching
from jobs.presets import PRESETS, Parallel, TrainOptions

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """What one command says: where, on what, and the training options."""

    data: str
    """Data set to train on: a folder or s3:// prefix that holds dataset.json."""
    output: str
    """The run: a folder or s3:// prefix. If it holds an unfinished run of the same options, it is resumed."""
    preset: str = "celeba-64"
    """Options to start from; single ones are changed by the flags below."""
    num_workers: str = "1"
    """Training processes: one a GPU, or one for every one or two CPU cores. 2:8 takes as many as there is room for,
    goes on with fewer when nodes are lost and grows when they come. 0 trains in this process, for debuggers."""
    use_gpu: bool = False
    """One GPU for each worker."""
    cpus_per_worker: int = 1
    """CPU cores for each worker, and its number of threads."""
    wait_for_nodes_s: int = 0
    """How long to wait for a cluster with an autoscaler to grow to what the workers need, in seconds."""
    checkpoint_every_minutes: float = 10.0
    """Between validations too; it is stored while training goes on, and again whenever a node is about to be taken."""
    keep_every_epochs: int = 0
    """Keep the checkpoints of every so many epochs beside the best and the last one; 0 keeps none."""
    parallel: Parallel = "ddp"
    """How workers share the network: each a copy, or, for networks that do not fit, each a part of it (FSDP2)."""
    validate: Literal["auto", "inline", "aside"] = "auto"
    """Who validates: the workers between two steps (inline) or a further GPU or CPU while they go on (aside); auto
    takes one that is spare."""
    max_failures: int = 3
    """How often in a row workers may be lost without a further checkpoint before giving up; each time training goes on
    from the last one."""
    profile: bool = False
    """Trace a few steps of the first worker, to RUN/profile/."""
    mlflow: str | None = None
    """Curves and pictures go there too: an MLflow server (http://…), a database (sqlite:///…) or a local folder."""
    options: Annotated[TrainOptions, tyro.conf.arg(name="")] = TrainOptions()

    @property
    def workers(self) -> tuple[int, int]:
        """Least and most training processes.

        Raises:
            InputError: --num-workers is neither a number nor two.
        """
        found = re.fullmatch(r"(\d+)(?::(\d+))?", self.num_workers)
        if not found:
            raise InputError(f"--num-workers is {self.num_workers}; give a number such as 4, or least:most such as 2:8")
        least, most = int(found[1]), int(found[2] or found[1])
        if most < least or (found[2] and not least):
            raise InputError(f"--num-workers is {self.num_workers}; the least comes first and is 1 or more")
        return least, most


def main(argv: list[str] | None = None) -> int:
    times = profiling.since_command()
    args = parse(sys.argv[1:] if argv is None else argv)
    dataset, run = storage.absolute(args.data, flag="--data"), storage.absolute(args.output, flag="--output")
    args = dataclasses.replace(args, options=with_absolute_encoder(args.options))
    if args.mlflow is not None:
        args = dataclasses.replace(args, mlflow=tracking.mlflow_uri(args.mlflow))
    config = configured(args, dataset)
    if finished(run, config, args.options):
        print(f"already trained: {run}")
        return cli.DONE
    storage.check_writable(run)
    profiling.note(times, "imports")
    try:
        with cli.ray_session(start=args.workers[1] > 0):
            profiling.note(times, "Ray")
            fit(args, config, dataset, run, times)
    except DivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        return cli.FAILED
    best, _ = checkpoint.resolve(run, read=storage.read_bytes)
    print(f"best checkpoint: {best}\nreport: {storage.join(run, 'report.html')}")
    return cli.DONE


def parse(argv: list[str]) -> Args:
    return parse_from_preset(Args, argv, prog="jobs.train", description=__doc__ or "")


def parse_from_preset(cls: type[T], argv: list[str], *, prog: str, description: str) -> T:
    """The preset first, then the flags that change it; `cls` has data, output, preset and options, as `Args`."""
    name = preset_name(argv)
    presets = "\n".join(f"  {key:<20} {preset}" for key, preset in PRESETS.items())
    fields: Any = {"data": tyro.MISSING, "output": tyro.MISSING, "preset": name, "options": PRESETS[name].options}
    return cli.parse(cls, argv, prog=prog, description=f"{description}\npresets:\n{presets}", default=cls(**fields))


def with_absolute_encoder(options: TrainOptions) -> TrainOptions:
    """The workers run in other folders than the command."""
    if (uri := options.identity_encoder) is None:
        return options
    return dataclasses.replace(options, identity_encoder=storage.absolute(uri, flag="--identity-encoder"))


def configured(args: Args, dataset: str) -> ModelConfig:
    """What the options come to on this data set.

    Raises:
        InputError: they do not go together.
    """
    card = data.read_card(dataset)
    config = model_config(card, args.options)
    check_fit(card, config, args)
    if config.method in configs.ENCODERS:
        config = encoding.informed(config, args.options, card, dataset)
    return config


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
        encoder=encoding.resolved(card, options),
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
    if config.method in configs.GANS:
        gan.check(config)
    if config.method in configs.ENCODERS:
        encoders.check(encoders.encoder_config(config))
    return config


def check_fit(card: data.DatasetCard, config: ModelConfig, args: Args) -> None:
    """Refuse what cannot work before anything is started.

    Raises:
        InputError: naming the flag and what would be right.
    """
    options, (_, workers) = args.options, args.workers
    positive = {
        "--epochs": options.epochs,
        "--global-batch-size": options.global_batch_size,
        "--accumulate": options.accumulate,
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
    if options.global_batch_size < max(workers, 1) * options.accumulate:
        parts = f" in {options.accumulate} parts each (--accumulate)" if options.accumulate > 1 else ""
        raise InputError(
            f"--global-batch-size {options.global_batch_size} is not a picture for each of {workers} workers{parts}; "
            f"give {max(workers, 1) * options.accumulate} or more"
        )
    if args.keep_every_epochs < 0:
        raise InputError(f"--keep-every-epochs is {args.keep_every_epochs}; it must be 0 or more")
    if not args.checkpoint_every_minutes > 0:
        raise InputError(f"--checkpoint-every-minutes is {args.checkpoint_every_minutes}; it must be positive")
    if len(config.domains) < 2 and config.method not in configs.ENCODERS:
        raise InputError(f"{args.data} has one domain, {config.domains[0]!r}; translation needs two")
    if not 0 <= options.optim.weight_decay < math.inf:
        raise InputError(f"--optim.weight-decay is {options.optim.weight_decay}; it must be 0 or more")
    if not workers and args.validate == "aside":
        raise InputError("--validate aside: with --num-workers 0 there is this process alone; leave it out")
    if workers < 2 and args.parallel == "fsdp" and options.method == "diffusion":
        raise InputError(f"--parallel fsdp shares a network among workers; --num-workers {args.num_workers} has no two")
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
        if not card.has_targets and config.method not in configs.ENCODERS:
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
    steps = rows // options.global_batch_size * options.epochs
    if args.profile and steps < profiling.NEEDED:
        raise InputError(
            f"--profile needs a run of {profiling.NEEDED} steps or more, this one has {steps}; leave it out"
        )


def check_method(card: data.DatasetCard, args: Args) -> None:
    """Refuse a method that these data or these options do not suit.

    Raises:
        InputError: naming the flag and what would be right.
    """
    options, method = args.options, args.options.method
    if method != "diffusion":
        if args.parallel != "ddp":
            raise InputError(f"--parallel {args.parallel}: {method} trains with ddp only; leave it out")
        for workers in range(max(args.workers[0], 1), args.workers[1] + 1):
            if options.global_batch_size % workers and method in configs.GANS:
                raise InputError(
                    f"--global-batch-size {options.global_batch_size} cannot be shared equally by {workers} workers, "
                    f"as {method} needs; {options.global_batch_size // workers * workers or workers} can"
                )
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
    preset = PRESETS[args.preset].options  # what it says of other methods is not the user's doing
    given = {name for name, _, _ in differences(configs.to_dict(preset), configs.to_dict(options))}
    for name in sorted(given):
        if options.encoder.noise_aware and name in CHAIN:
            continue
        if any(name.startswith(prefix) and method not in methods for prefix, methods in LOOKED_AT_BY.items()):
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag} has no effect with --method {method}; leave it out")


LOOKED_AT_BY: dict[str, tuple[Method, ...]] = {
    "gan.": configs.GANS,
    "encoder.": configs.ENCODERS,
    **dict.fromkeys(("encoder.embedding_channels", "encoder.scale", "encoder.margin"), ("identity",)),
    **dict.fromkeys(("encoder.attributes", "encoder.noise_aware"), ("attributes",)),
    **dict.fromkeys(("optim.weight_decay", "optim.grad_clip"), ("diffusion", *configs.ENCODERS)),
    **dict.fromkeys(("target_domain", "pairing"), ("diffusion", *configs.GANS)),
    **dict.fromkeys(("unet.", "diffusion.", "sampling.", "accumulate"), ("diffusion",)),
    **dict.fromkeys(("gradient_checkpointing", "compile"), ("diffusion",)),
    **dict.fromkeys(("identity_encoder", "identity_weight", "perceptual_weight"), ("diffusion",)),
}
"""The methods that look at options, by how the options' dotted names start."""
CHAIN = ("diffusion.num_timesteps", "diffusion.schedule", "diffusion.zero_terminal_snr")
"""What a noise-aware classifier has in common with the model it guides."""


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
    best = runs.read_best(run)
    if (epochs := best.get("epochs", 0)) > options.epochs:
        raise InputError(
            f"{run} was trained for {epochs} epochs, this command says {options.epochs}; give {epochs} or more, or "
            "another --output"
        )
    return epochs == options.epochs and runs.is_complete(run, best["checkpoint"])


def differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, old value, new value) of each leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, old, new


HANGS_S = 3600
"""How long workers wait for each other; rank 0 may be validating alone. One that is stopped or cut off is found dead by
Ray within minutes."""


def check_cluster(args: Args) -> None:
    """The workers must fit, or Ray would wait for ever; a cluster that grows is asked to, and given time.

    Raises:
        NoRoomError: with the arithmetic.
    """
    import ray
    import ray.autoscaler.sdk

    worker = resources_per_worker(args)
    deadline = time.monotonic() + args.wait_for_nodes_s
    asked = False
    least, _ = args.workers
    while short := {name: each for name, each in worker.items() if ray.cluster_resources().get(name, 0) < each * least}:
        if time.monotonic() >= deadline:
            name, each = next(iter(short.items()))
            raise NoRoomError(
                f"--num-workers {args.num_workers} with {each} {name} each needs {each * least} {name}s, "
                f"the cluster has {ray.cluster_resources().get(name, 0):g}: give fewer workers, "
                "or --wait-for-nodes-s 600 to a cluster that grows"
            )
        if not asked:
            ray.autoscaler.sdk.request_resources(bundles=[worker] * least)
            print(f"waiting up to {args.wait_for_nodes_s} s for the cluster to grow", flush=True)
            asked = True
        time.sleep(2)
    if asked:  # or the nodes would be held when the run is over
        ray.autoscaler.sdk.request_resources(bundles=[])


def fit(
    args: Args,
    config: ModelConfig,
    dataset: str,
    run: str,
    times: profiling.Times,
    *,
    spread: bool = True,
    callbacks: Sequence[Any] = (),
) -> None:
    """Run the loop on Ray Train, the data read and decoded once onto the nodes' disks.

    `spread` False: they are there already, and a node that lacks them reads for itself. `callbacks`: Ray Train's.

    Raises:
        DivergedError: the losses are lost.
    """
    import ray
    import ray.train
    import ray.train.torch

    from jobs import arrays, parallel
    from jobs.train_loop import train_loop

    local, aside = not args.workers[1], None
    if not local:
        check_cluster(args)
        aside = resources_aside(args)
        if spread:
            arrays.spread(dataset, ("train", "val"), resource="GPU" if args.use_gpu else "CPU")
    profiling.note(times, "data")
    # Only now that we can begin: a command that trains there ends when it sees it.
    owner = uuid.uuid4().hex
    for name, content in runs.describe(run, config, owner).items():
        storage.write_bytes(storage.join(run, name), content)
    board = watching.Board() if local else ray.remote(num_cpus=0)(watching.Board).remote()
    attempts = storage.join(run, ".ray")  # Ray's own notes; ours are what a resumed run reads
    trainer = functools.partial(
        ray.train.torch.TorchTrainer,
        train_loop,
        train_loop_config={
            "data": dataset,
            "run": run,
            "owner": owner,
            "config": configs.to_dict(config),
            "options": configs.to_dict(args.options),
            "board": board,
            "checkpoint_every_s": args.checkpoint_every_minutes * 60,
            "keep_every_epochs": args.keep_every_epochs,
            "parallel": args.parallel,
            "mlflow": args.mlflow,
            "aside": aside,
            "times": times,
            "profile": args.profile,
        },
        torch_config=parallel.Torch(timeout_s=HANGS_S),
        scaling_config=ray.train.ScalingConfig(
            num_workers=args.workers[0] if len({*args.workers}) == 1 else args.workers,
            use_gpu=args.use_gpu,
            resources_per_worker=resources_per_worker(args),
        ),
    )
    failures = 0
    with watching.watching(board, run):
        while True:
            before, _ = runs.latest_checkpoint(run)
            storing = ray.train.RunConfig(
                name=f"attempt-{time.time_ns()}",
                storage_path=attempts,
                failure_config=ray.train.FailureConfig(max_failures=0, controller_failure_limit=0),
                callbacks=[*callbacks],
            )
            try:
                end = trainer(run_config=storing).fit().return_value or {}
                break
            except SystemExit:  # Ray's answer to Ctrl-C, with exit code 0: what comes next must not take it for done
                raise KeyboardInterrupt from None
            except ray.train.TrainingFailedError as error:
                step, _ = runs.latest_checkpoint(run)
                failures = 1 if step > before else failures + 1
                if failures > args.max_failures or local or cli.input_error(error) is not None:
                    raise
                cause = (str(error).strip().splitlines() or [type(error).__name__])[-1]
                print(f"workers were lost ({cause}); going on from step {step:,}", file=sys.stderr, flush=True)
                times.clear()  # as in the job: it starts anew
                profiling.note(times, "loss")
                check_cluster(args)
        storage.delete_folder(attempts)
        if end:
            raise DivergedError(
                f"the losses were lost at step {end['diverged_at']:,} (not finite, or far above the first ones); the "
                f"last good checkpoint is {end['last_good'] or 'none'}; train anew with a lower --optim.learning-rate"
            )


def resources_per_worker(args: Args) -> dict[str, float]:
    return {"CPU": args.cpus_per_worker, **({"GPU": 1} if args.use_gpu else {})}


def resources_aside(args: Args) -> dict[str, float] | None:
    """What a task that validates while training goes on takes, as ray.remote's options; None to validate inline.

    Raises:
        InputError: --validate aside, and the cluster has nothing to spare.
    """
    import ray

    worker, there = resources_per_worker(args), ray.cluster_resources()
    spare = all(there.get(name, 0) >= each * (args.workers[1] + 1) for name, each in worker.items())
    if args.validate == "aside" and not spare:
        raise InputError(
            f"--validate aside needs room for one process more than the {args.workers[1]} workers; the cluster has "
            f"{there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs: give fewer workers, or --validate inline"
        )
    if args.validate == "inline" or not spare:
        return None
    return {"num_cpus": worker["CPU"], "num_gpus": worker.get("GPU", 0)}


class NoRoomError(InputError):
    """The cluster is smaller than what was asked for."""


class DivergedError(Exception):
    """A run that cannot go on."""

    outcome = "diverged"
    """What the report says of it."""


if __name__ == "__main__":
    cli.run(main)
