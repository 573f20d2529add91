"""What is refused before training starts, and what the options come to on a data set."""

import dataclasses
import os
import sys
from typing import Any

import torch

from ddpm_core import checkpoint, encoders, gan, storage
from ddpm_core import config as configs
from ddpm_core.config import DataCard, ModelConfig
from ddpm_core.errors import InputError
from jobs.common import numbers, resume
from jobs.datasets.format import DatasetCard, read_card
from jobs.training import origin, profiling, run_folder
from jobs.training.encoders import informed, resolved
from jobs.training.methods import has_effect
from jobs.training.options import TrainArgs, TrainOptions, stored_options
from jobs.training.presets import PRESETS

MAY_CHANGE = ("training.epochs", "training.compile")
"""Options that a run which goes on may have others of: it may be extended; and one that there was once."""
LARGE_GIB = 8
"""What a network may take without a word: weights, gradients, moments and averages."""


def with_absolute_uris(options: TrainOptions) -> TrainOptions:
    """The workers run in other folders than the command."""

    def there(uri: str | None, flag: str) -> str | None:
        return None if uri is None else storage.absolute(uri, flag=flag)

    return dataclasses.replace(
        options,
        identity_encoder=there(options.identity_encoder, "--identity-encoder"),
        init_from=there(options.init_from, "--init-from"),
    )


def configured(args: TrainArgs, dataset: str) -> ModelConfig:
    """What the options come to on this data set.

    Raises:
        InputError: they do not go together.
    """
    card = read_card(dataset)
    config = model_config(card, args.options)
    check_fit(card, config, args)
    if config.method in configs.ENCODERS:
        config = informed(config, args.options, card, dataset)
    return origin.with_origin(config, args.options, args.output)


def model_config(card: DatasetCard, options: TrainOptions) -> ModelConfig:
    """All that defines the model: the data set's facts and the options, checked together."""
    pairing, wanted = options.pairing or card.pairing, options.target_domain
    shown: dict[str, Any] = {"self": "structure", "none": "nothing"} if options.method == "diffusion" else {}
    if wanted is not None and wanted not in card.domains:
        known = f"{configs.did_you_mean(wanted, card.domains)}: {', '.join(card.domains)}"
        raise InputError(f"--target-domain: unknown domain {wanted!r}{known}")
    config = ModelConfig(
        image_size=card.image_size,
        domains=card.domains,
        target_domains=() if wanted is None else (wanted,),
        method=options.method,
        shown=shown.get(pairing, "source"),
        unet=options.unet,
        diffusion=options.diffusion,
        gan=options.gan,
        encoder=resolved(card, options),
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


def check_fit(card: DatasetCard, config: ModelConfig, args: TrainArgs) -> None:
    """Refuse what cannot work before anything is started.

    Raises:
        InputError: naming the flag and what would be right.
    """
    options, (_, workers) = args.options, args.workers
    numbers.check(args)
    lengths = options.optim.ema_sigma_rels
    if not lengths or len({checkpoint.ema_file(each) for each in lengths}) < len(lengths):
        raise InputError(f"--optim.ema-sigma-rels is {list(lengths)}; give one or more different lengths, such as 0.1")
    check_batch(card, args)
    if len(config.domains) < 2 and config.method not in configs.ENCODERS:
        raise InputError(f"{args.data} has one domain, {config.domains[0]!r}; translation needs two")
    if workers < 2 and args.parallel == "fsdp" and options.method == "diffusion":
        raise InputError(f"--parallel fsdp shares a network among workers; --num-workers {args.num_workers} has no two")
    check_method(card, args)
    check_rows(card, config, args)
    check_added_losses(options)
    if config.method == "diffusion":
        check_attention(config, args)
    if config.method not in configs.ENCODERS:
        check_memory(config, args)


def check_attention(config: ModelConfig, args: TrainArgs) -> None:
    """Refuse sides that no feature map has, where the command names them: a preset's need not fit every image size.

    Raises:
        InputError: naming them and those that there are.
    """
    there = configs.sides(config)
    nowhere = [side for side in config.unet.attn_resolutions if side not in there]
    if nowhere and "--unet.attn-resolutions" in args.given:
        raise InputError(
            f"--unet.attn-resolutions {' '.join(map(str, nowhere))}: no feature map has such a side; with images of "
            f"{config.image_size} px there are {' '.join(map(str, there))}"
        )


def check_memory(config: ModelConfig, args: TrainArgs) -> None:
    """Refuse a network that cannot be trained in this process' memory; say of other large ones what they take.

    Raises:
        InputError: with the arithmetic.
    """
    with torch.device("meta"):  # shapes without memory
        network = checkpoint.build(config)
    weights = sum(each.numel() for each in network.parameters())
    copies = 4 + len(args.options.optim.ema_sigma_rels)  # weights, gradients, two moments, averages
    gib = 4 * copies * weights / 2**30
    if gib < LARGE_GIB:
        return
    takes = f"a network of {weights / 1e9:.1f} billion weights; trained it takes {gib:,.0f} GiB"
    there_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    if not args.workers[1] and not args.use_gpu and gib > there_gib:
        raise InputError(
            f"{takes}, this machine has {there_gib:,.0f}: lower --unet.model-channels, --unet.channel-mult or "
            "--unet.num-res-blocks"
        )
    shared = ", shared by the workers" if args.parallel == "fsdp" else " in each worker"
    print(f"train: {takes}{shared}, and what a step needs besides", file=sys.stderr, flush=True)


def num_rows(card: DatasetCard, options: TrainOptions) -> int:
    """Training rows that serve the wanted direction, as far as the card tells."""
    wanted, rows = options.target_domain, card.splits.get("train", 0)
    if wanted is not None and card.pairing not in ("paired", "matched"):
        rows = card.domain_counts.get("train", {}).get(wanted, 0)
    return min(rows, rows if options.max_train_images is None else options.max_train_images)


def check_batch(card: DatasetCard, args: TrainArgs) -> None:
    """Refuse a batch that has not an image for every part of every worker's share.

    Raises:
        InputError: naming the flag, and what the data allow.
    """
    options, workers = args.options, max(args.workers[1], 1)
    batch, least, rows = options.global_batch_size, workers * options.accumulate, num_rows(card, options)
    if batch >= least:
        return
    parts = f" in {options.accumulate} parts each (--accumulate)" if options.accumulate > 1 else ""
    needs = f"is not an image for each of {workers} workers{parts}"
    if 0 < rows < least:
        fewer = "lower --accumulate or --num-workers" if options.accumulate > 1 else f"--num-workers {rows} or fewer"
        raise InputError(f"--global-batch-size {batch} {needs}; with {rows} training rows give {fewer}")
    raise InputError(f"--global-batch-size {batch} {needs}; give {least} or more")


def check_rows(card: DatasetCard, config: ModelConfig, args: TrainArgs) -> None:
    """Refuse splits that have nothing to make or nothing to show, and batches larger than what there is.

    Raises:
        InputError: naming the split or the flag and what would be right.
    """
    options, wanted = args.options, args.options.target_domain
    for split in ("train", "val"):
        if not card.splits.get(split):
            raise InputError(f"{args.data} has no rows in its {split} split; prepare it again with more images")
        there = [name for name in card.domains if card.domain_counts.get(split, {}).get(name)]
        if not card.has_targets and config.method not in configs.ENCODERS:
            lacking = [name for name in card.domains if name not in there]
            needed = lacking if split == "train" else [name for name in lacking if name == wanted]
            if not needed and config.shown == "source" and len(there) < 2:
                needed = lacking
            if needed:
                raise InputError(
                    f"{card.name} has no image of {', '.join(needed)} in its {split} split; translation needs both: "
                    "prepare it again with more images"
                )
    rows = num_rows(card, options)
    if rows < options.global_batch_size:
        of = "" if wanted is None or card.pairing in ("paired", "matched") else f" of {wanted}"
        raise InputError(
            f"--global-batch-size {options.global_batch_size} is more than the {rows} training rows{of}; "
            f"give at most {rows}"
        )
    steps = rows // options.global_batch_size * options.epochs
    if args.profile and steps < profiling.NEEDED:
        raise InputError(
            f"--profile needs a run of {profiling.NEEDED} steps or more, this one has {steps}; leave it out"
        )


def check_method(card: DatasetCard, args: TrainArgs) -> None:
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
    if card.pairing == "synthetic" and (options.pairing not in (None, "synthetic") or method == "cyclegan"):
        raise InputError(
            f"{card.name} has targets made by a model, to be shown beside real images and for nothing else; train on "
            "the data that they were made from"
        )
    if options.pairing not in (None, card.pairing, "unpaired", "self", "none"):
        raise InputError(
            f"--pairing {options.pairing}: {card.name} was prepared {card.pairing}; prepare it anew for that"
        )
    if method != "diffusion" and options.pairing == "self":
        raise InputError(
            f"--pairing self: {method} would learn to copy; leave it out, or train with --method diffusion"
        )
    if options.pairing == "none":
        check_prior(options)
    if not 0 <= options.max_shift < card.image_size:
        raise InputError(f"--max-shift is {options.max_shift}; it must lie between 0 and {card.image_size - 1}")
    if method == "pix2pix" and options.pairing == "unpaired":
        raise InputError("--pairing unpaired: pix2pix learns from pairs; leave it out, or give --method cyclegan")
    if method == "pix2pix" and not card.has_targets:
        raise InputError(f"--method pix2pix learns from pairs, {card.name} has none; give --method cyclegan")
    preset = PRESETS[args.preset].options  # what it says of other methods is not the user's doing
    changed = resume.differences(configs.to_dict(preset), configs.to_dict(options))
    given = {name for name, _, now in changed if now is not None}  # no flag says None
    for name in sorted(given):
        if not has_effect(name, options):
            raise InputError(f"--{name.replace('_', '-')} has no effect with --method {method}; leave it out")


def check_prior(options: TrainOptions) -> None:
    """Refuse what a network that is shown no source cannot learn, or not be sampled by.

    Raises:
        InputError: naming the flag and what would be right.
    """
    if options.method != "diffusion":
        raise InputError(f"--pairing none: {options.method} has to be shown something; leave it out")
    if options.target_domain is not None:
        raise InputError("--pairing none needs both sides to tell what differs between them; leave --target-domain out")
    if options.identity_weight:
        raise InputError("--identity-weight has no effect with --pairing none, which shows nobody to be like")
    if options.sampling.start == "noise":
        raise InputError(
            "--pairing none: the network is shown nothing of the source, so --sampling.start noise would give images "
            "that have nothing of it; give --preset prior, or --sampling.start flowedit, residual, sdedit or ddib"
        )


def check_added_losses(options: TrainOptions) -> None:
    """Refuse weights without an encoder, an encoder without weights, and what is no encoder.

    Raises:
        InputError: naming the flag and what would be right.
    """
    weights = {"--identity-weight": options.identity_weight, "--perceptual-weight": options.perceptual_weight}
    for flag, weight in weights.items():
        if weight and options.identity_encoder is None:
            raise InputError(f"{flag} needs an encoder to compare images by; give --identity-encoder URI")
    if options.identity_encoder is not None:
        if not any(weights.values()):
            raise InputError("--identity-encoder has no effect without --identity-weight or --perceptual-weight")
        encoders.load_identity_encoder(options.identity_encoder)


def finished(run: str, config: ModelConfig, options: TrainOptions) -> bool:
    """Whether `run` holds this very run, complete.

    Raises:
        InputError: it holds another run, or something else.
    """
    try:
        there = checkpoint.read_config(run)
    except InputError:
        if storage.exists(storage.join(run, "config.json")):
            raise
        return False
    old, new = configs.to_dict(there), configs.to_dict(config)
    old["training"] = stored_options(old["training"])
    data = [{"data": {**values["data"], "pairing": None}} for values in (old, new)]
    remedy = "another --data, or it was replaced or appended to since: give the old data back, or a new --output folder"
    resume.check_same(run, "a run on other data", *data, remedy=remedy)
    asked = [{"training": values["training"]} for values in (old, new)]  # what follows from it comes after it
    for before, now in (asked, (old, new)):
        flags = resume.flags_of(TrainOptions, "training.")
        resume.check_same(run, "a run", before, now, may_change=MAY_CHANGE, flags=flags)
    best = run_folder.read_best(run)
    if (epochs := best.get("epochs", 0)) > options.epochs:
        raise InputError(
            f"{run} was trained for {epochs} epochs, this command says {options.epochs}; give {epochs} or more, or "
            "another --output"
        )
    return epochs == options.epochs and run_folder.is_complete(run, best["checkpoint"])
